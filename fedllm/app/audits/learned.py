"""What the finished model gives away: who was in its training text, and the secrets that silos planted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fedllm.app.audits.case import Case
from fedllm.app.audits.findings import Finding, over
from fedllm.app.config import Recipe
from fedllm.app.data import canaries_of, canary_columns
from fedllm.app.privacy import UNITS
from fedllm.app.result import load
from fedllm.audit.exposure import Told, candidates, chance, exposure, from_coins, standing
from fedllm.audit.intervals import auc_estimate, clopper_pearson, mean_estimate, share_estimate, tpr_at
from fedllm.audit.membership import by_least, by_loss, by_reference, token_scores
from fedllm.core.seeds import derive, generator
from fedllm.evaluation.generate import how, write
from fedllm.exchange.ledger import NAME as LEDGER
from fedllm.exchange.ledger import Unit, read_ledger, spent
from fedllm.silo.canaries import SENTENCE, Canary, planted_rows, row_of
from fedllm.silo.examples import Example
from fedllm.silo.scoring import log_likelihoods
from fedllm.silo.templates import Turn, opening

CANDIDATES = 255
"""Secrets that a planted one is ranked among: 8 bits of exposure at most."""

FEWEST = 8
"""Texts on each side below which nothing is said of a silo."""


class Bound(NamedTuple):
    """Epsilon from below, by attack, beside epsilon from above, by the ledger."""

    told: Told
    unit: str
    """Whose ledger it is, or empty without noise."""
    ledger: float | None
    rows: int
    """Rows that a canary stands in."""
    limit: float | None
    """The most that the ledger allows for a canary with all its rows."""


def in_base(case: Case, measure: Callable[[nn.Module], Any]) -> Any:
    """Measure the model as it was before training."""
    if case.parts.trainable.adapter:
        with case.parts.trainable.base(case.parts.model):
            return measure(case.parts.model)
    return measure(load(case.recipe.model, "float32", case.parts.device.type))


def membership(case: Case) -> list[Finding]:
    """Tell training rows from held-out ones by three scores, over all silos; canaries are left out."""
    silos = case.parts.silos
    inside, outside = list[Example](), list[Example]()
    each = max(1, case.rows // len(silos.names))
    for name in silos.names:
        shard = silos.shards[name]
        planted = len(planted_of(case.recipe, canaries_of(name, case.recipe)))
        members = shard.train[: len(shard.train) - planted]
        for rows, kept in ((members, inside), (shard.test, outside)):
            drawn = torch.randperm(len(rows), generator=generator(case.seed, "members", name))[:each].tolist()
            kept += silos.task.prepare([rows[place] for place in drawn], f"silos.{name}").examples
    if min(len(inside), len(outside)) < FEWEST:
        return []
    examples, pad = [*inside, *outside], case.parts.tokenizer.pad_token_id
    size = case.recipe.evaluate.batch_size
    with case.ui.part("membership", 2 * -(-len(examples) // size)):
        after = token_scores(case.parts.model, examples, pad, size, case.ui.tick)
        before = in_base(case, lambda model: token_scores(model, examples, pad, size, case.ui.tick))
    scores = {
        "loss": [by_loss(each) for each in after],
        "loss against the base model": [by_reference(one, two) for one, two in zip(after, before, strict=True)],
        "Min-K%": [by_least(each) for each in after],
    }
    findings = []
    for attack, values in scores.items():
        known, others = values[: len(inside)], values[len(inside) :]
        area = auc_estimate(known, others, case.seed)
        findings.append(over(attack, "the finished model", "AUC", area, 0.5, share=False))
        few = tpr_at(known, others)
        # The threshold rests on few texts: only above what false alarms there could really be is it a finding.
        alarms = clopper_pearson(len(others) // 100, len(others))[1]
        findings.append(Finding(attack, "the finished model", "found at 1 % false alarms", few, 0.01, few.low > alarms))
    return findings


def planted_of(recipe: Recipe, canaries: Sequence[Canary]) -> list[dict[str, Any]]:
    """Return the rows that a silo planted."""
    return planted_rows(canaries, recipe.canaries.repeat, canary_columns(recipe)) if recipe.canaries else []


def secrets_kept(case: Case) -> tuple[list[Finding], Bound | None]:
    """Rank each silo's canaries among secrets like them, ask for them, and bound epsilon by what is found."""
    canaries = [canary for name in case.parts.silos.names for canary in canaries_of(name, case.recipe)]
    if not canaries:
        return [], None
    with case.ui.part("canaries", None):
        scored = [ranked(case, canary) for canary in canaries]
    bits = {
        kind: [
            exposure(own, others) for (own, others), each in zip(scored, canaries, strict=True) if each.planted is kind
        ]
        for kind in (True, False)
    }
    findings, usual = list[Finding](), chance(CANDIDATES + 1)
    for kind, said in ((True, "canaries that were planted"), (False, "canaries that were not")):
        if bits[kind]:
            found = mean_estimate(bits[kind], case.seed)
            findings.append(over("exposure", said, "exposure in bits", found, usual, share=False))
    planted = [canary for canary in canaries if canary.planted]
    if planted:
        with case.ui.part("asking for canaries", len(planted)):
            told = sum(extracted(case, canary) for canary in planted)
        asked = share_estimate(told, len(planted))
        findings.append(over("prompting", "canaries that were planted", "told word for word", asked, 1e-6))
    told_of = from_coins(
        [standing(own, others) for own, others in scored],
        [canary.planted for canary in canaries],
        case.recipe.privacy.delta,
    )
    return findings, bound(case, told_of)


def ranked(case: Case, canary: Canary) -> tuple[float, list[float]]:
    """Return the log-likelihood of a canary's secret, and of others in its place."""
    others = candidates(canary.secret, CANDIDATES, derive(case.seed, "candidates", canary.who))
    examples = [spoken_row(case, canary.who, secret) for secret in [canary.secret, *others]]
    sums = log_likelihoods(
        case.parts.model,
        examples,
        case.parts.objective,
        pad_id=case.parts.tokenizer.pad_token_id,
        batch_size=64,
        tick=case.ui.tick,
    )
    return sums[0], sums[1:]


def spoken_row(case: Case, who: str, secret: str) -> Example:
    """Return a canary's row as the run's task makes an example of it."""
    row = row_of(who, secret, canary_columns(case.recipe))
    if case.recipe.task["name"] == "causal":
        text = f"{next(iter(row.values()))}{case.parts.tokenizer.eos_token}"
        ids = case.parts.tokenizer(text)["input_ids"]
        return Example(ids, ids)
    found = case.parts.task.prepare([row], "a canary").examples
    return found[0]


def extracted(case: Case, canary: Canary) -> bool:
    """Ask the model for a secret as its row does, and say whether it tells it."""
    model, tokenizer = case.parts.model, case.parts.tokenizer
    cue = SENTENCE.response.partition("{secret}")[0].replace("{who}", canary.who)
    if case.recipe.task["name"] == "causal":
        ids = tokenizer(cue)["input_ids"]
    else:
        chat = bool(tokenizer.chat_template) and case.recipe.task.get("template") != "plain"
        asked = [Turn("user", SENTENCE.prompt.replace("{who}", canary.who))]
        gap = "" if chat else " "
        ids = tokenizer(f"{opening(tokenizer, asked, chat)}{gap}{cue}".rstrip(), add_special_tokens=False)["input_ids"]
    new_T = write(model, [ids], how(model, tokenizer, 12, 0.0), 0)[0]
    case.ui.tick(len(new_T))
    return canary.secret in tokenizer.decode(new_T, skip_special_tokens=True).replace(" ", "")


def bound(case: Case, told: Told) -> Bound:
    """Put the bound from below beside the ledger's from above, both for a canary with all its rows."""
    rows = case.recipe.canaries.repeat if case.recipe.canaries else 1
    ledger = read_ledger(case.folder / LEDGER)
    units: tuple[Unit, ...] = ("record", "silo")
    for unit in units:
        each = spent(ledger, unit, case.recipe.privacy.delta)
        if each:
            above = max(found.best for found in each.values())
            # A silo without a canary is another silo: one taken away and one added.
            return Bound(told, UNITS[unit], above, rows, above * (rows if unit == "record" else 2))
    return Bound(told, "", None, rows, None)
