"""Numbers as people read them, and the sentences that answer the reader's first questions."""

from __future__ import annotations

import math
import re
from typing import Any

from fedllm.app.report.data import Comparison, Losses, Run, is_number, mean, summed_losses

NONE = "\N{EN DASH}"
"""What stands in a table where there is no number."""
NAMED = 4
"""The most silos that a sentence names; beyond it, it counts them."""


def number(value: Any, digits: int = 2) -> str:
    """Write a number with thousands separated, or a dash for none."""
    if not is_number(value):
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def perplexity(loss: Any) -> str:
    """Write exp(loss) with three or four significant digits."""
    if not is_number(loss):
        return NONE
    if loss > 16:
        return f"e^{loss:.1f}"
    value = math.exp(loss)
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def apart(*values: float) -> list[str]:
    """Write losses with two decimals, or as many more as tell different ones apart.

    >>> apart(3.07, 3.09), apart(3.071, 3.074)
    (['3.07', '3.09'], ['3.071', '3.074'])
    """
    for digits in (2, 3, 4):
        texts = [f"{value:.{digits}f}" for value in values]
        if len(set(texts)) == len(set(values)):
            break
    return texts


def size(count: Any) -> str:
    """Write bytes in decimal units.

    >>> size(3686400)
    '3.69 MB'
    """
    if not is_number(count):
        return NONE
    unit, name = unit_of(count)
    return f"{count / unit:.3g} {name}"


def unit_of(count: float) -> tuple[float, str]:
    """Return the decimal unit that suits a number of bytes."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return unit, name
    return 1.0, "B"


def duration(seconds: Any) -> str:
    """Write a time span.

    >>> duration(200.0), duration(7.04), duration(7300)
    ('3 min 20 s', '7.0 s', '2 h 2 min')
    """
    if not is_number(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes} min"


def plain(name: Any, longest: int = 60) -> str:
    """Return a silo's name on one line, shortened in the middle, without characters that redirect text."""
    text = "".join(c if c.isprintable() else " " for c in str(name))
    text = " ".join(text.split()) or "(no name)"
    tail = longest // 3
    return text if len(text) <= longest else f"{text[: longest - tail - 1]}…{text[-tail:]}"


def lead(run: Run, found: Comparison) -> list[str]:
    """Return the answer: what the federation bought, and who would still gain from a personal model."""
    silos = [name for name in found.federated if name in found.base]
    after = rounds_done(run)
    federated = mean(found.federated, list(found.federated))
    if run.start.get("losses") == "kept":
        told = [f"No silo told its held-out loss or how many examples it has (secure.losses is false); {after}."]
        return told + in_sums(run)
    if federated is None:
        return [f"There is no held-out loss of a federated model yet; {after}."]
    sentences = [against_base(found, silos, after) if silos else f"The federated loss is {federated:.2f}."]
    sentences += [text for text in (against_alone(found), personal(found), against_pooled(found)) if text]
    return sentences


def in_sums(run: Run) -> list[str]:
    """Say between what the mean held-out loss went, where it was told in sums alone."""
    points = summed_losses(run)
    if not points:
        return []
    (first, start), (last, end) = points[0], points[-1]
    was, now = apart(start, end)
    text = f"Their mean, told in the secure sum alone, was {was} nats a token before round {first + 1}"
    return [f"{text} and {now} before round {last + 1}." if last > first else f"{text}."]


def rounds_done(run: Run) -> str:
    """Say how far the run is."""
    done, planned = (run.rounds[-1]["round"] if run.rounds else 0), run.start.get("rounds")
    if run.done:
        return f"after {done} round{'s' * (done != 1)}"
    return f"so far, after {done} of {number(planned)} rounds" if planned else f"so far, after {done} rounds"


def against_base(found: Comparison, silos: list[str], after: str) -> str:
    """Compare the federated model with the base model."""
    start, end = (sum(values[name] for name in silos) / len(silos) for values in (found.base, found.federated))
    better = sum(found.federated[name] < found.base[name] for name in silos)
    was, now = apart(start, end)
    verdict = "better than" if end < start else "worse than" if end > start else "equal to"
    return (
        f"{after[0].upper()}{after[1:]}, the federated model is {verdict} the base model: mean held-out loss "
        f"{now} against {was} (perplexity {perplexity(end)} against {perplexity(start)}), "
        f"lower for {counted(better, len(silos))}."
    )


def against_alone(found: Comparison) -> str:
    """Compare the federated model with each silo's lone model, on everyone's text."""
    everyone = list(found.federated)
    means = everyone_means(found)
    federated = mean(found.federated, everyone)
    if not means or federated is None:
        return ""
    best = min(means, key=means.__getitem__)
    average = sum(means.values()) / len(means)
    low, high = min(means.values()), max(means.values())
    if len(means) == 1:
        verdict = "better" if federated < low else "no better"
        return f"On everyone's text it is {verdict} than the model that {plain(best)} trained alone ({low:.2f})."
    span = f"{low:.2f} to {high:.2f}, mean {average:.2f}"
    if federated < low:
        return f"On everyone's text it is better than every model that one silo trained alone ({span})."
    if federated < average:
        return (
            f"On everyone's text it is better than the average model that one silo trained alone ({span}), "
            f"but that of {plain(best)} is as good or better."
        )
    return f"On everyone's text it is no better than the average model that one silo trained alone ({span})."


def everyone_means(found: Comparison) -> Losses:
    """Return each lone model's mean loss over everyone's text, where it was measured on all of it."""
    means = {name: mean(row, list(found.federated)) for name, row in found.everywhere.items()}
    return {name: value for name, value in means.items() if value is not None}


def gainers(found: Comparison) -> list[str]:
    """Return the silos whose own model is better on their own text than the federated one, most first."""
    gains = {n: found.federated[n] - loss for n, loss in found.alone.items() if n in found.federated}
    return sorted((name for name, gain in gains.items() if gain > 0), key=lambda name: -gains[name])


def personal(found: Comparison) -> str:
    """Say which silos would still gain from a model of their own."""
    compared = [name for name in found.alone if name in found.federated]
    if not compared:
        return ""
    names = gainers(found)
    if not names:
        return "On its own text, no silo's own model is better than the federated one."
    if len(names) <= NAMED:
        pairs = (apart(found.alone[n], found.federated[n]) for n in names)
        listed = [f"{plain(n)} ({own} alone against {fed})" for n, (own, fed) in zip(names, pairs, strict=True)]
        whose = "its" if len(names) == 1 else "their"
        return f"On {whose} own text, a personal model would still be better for {spoken(listed)}."
    worst = names[0]
    own, fed = apart(found.alone[worst], found.federated[worst])
    some = counted(len(names), len(compared))
    return (
        f"{some[0].upper()}{some[1:]} would still gain from a personal model on their own text, "
        f"{plain(worst)} most ({own} alone against {fed})."
    )


def against_pooled(found: Comparison) -> str:
    """Say how far the federated model is from training on everything in one place."""
    silos = [name for name in found.federated if name in found.pooled]
    one, other = mean(found.pooled, silos), mean(found.federated, silos)
    if one is None or other is None:
        return ""
    pooled, federated = apart(one, other)
    if one < other:
        return f"Training on everything in one place reaches {pooled}, {other - one:.2g} lower than federated."
    return f"Training on everything in one place reaches {pooled}, no better than federated ({federated})."


def counted(some: int, total: int) -> str:
    """Say how many of the silos."""
    if some == total:
        return "the only silo" if total == 1 else f"all {total:,} silos"
    return f"{some:,} of {total:,} silos" if some else f"none of {total:,} silos"


def spoken(items: list[str]) -> str:
    """Join items as a sentence does."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def facts(value: Any) -> str:
    """Write what is known after a step of the plan, whatever form it was stored in."""
    if isinstance(value, dict):
        return ", ".join(f"{key.replace('_', ' ')} {item}" for key, item in value.items() if item is not None)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def protected(steps: list[dict[str, Any]]) -> bool:
    """Return whether a step's name says that it hides updates or adds noise."""
    return any(re.search(r"secure|homomorphic|noise|privacy|\bdp\b", str(step.get("name", "")), re.I) for step in steps)
