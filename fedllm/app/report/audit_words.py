"""What each number of an audit means, in words, and what would lower it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedllm.app.report.words import plain


class Section(NamedTuple):
    """One kind of attack: what it is, what its numbers mean, and what would lower them."""

    title: str
    asks: str
    lowers: str
    plotted: str
    plot_title: str
    by_case: bool = True
    findings: Sequence[Mapping[str, Any]] = ()


SECTIONS = {
    "updates": Section(
        "Text out of updates",
        "Can someone who sees what a silo sends read its text? The attacker has the model and the recipe, knows how "
        "long the text is, and names as many tokens (pieces of words) as the text has different ones; guessing names "
        "the most common ones.",
        "Let the server see sums of many silos only (secure aggregation; a sum of few short texts still shows which "
        "tokens are in it, though not whose); add noise at the silo (client dp_sgd, or "
        "transform local_dp); train on more records and more steps a round. Noise that the server adds does not hide a "
        "silo from the server.",
        "tokens recovered",
        "Tokens recovered",
    ),
    "membership": Section(
        "Who was in the training text",
        "Can someone who has the finished model tell whether a given record was among the training text? AUC is the "
        "chance that the attack ranks a training record above one that was held out: 0.5 is a coin's toss, 1 is "
        "certainty. Beside it stands how many training records are found while 1 in 100 of the others is taken for "
        "one by mistake.",
        "Fewer passes over the text, more text, smaller adapters; noise at the silo (dp_sgd) bounds it.",
        "AUC",
        "AUC of the attacks on the finished model",
        by_case=False,
    ),
    "canaries": Section(
        "Secrets learned by heart",
        "Each silo planted random secrets among its rows, each by the toss of a coin. Exposure says how far up a "
        "secret is among random ones like it: each bit halves the places before it, and 8 bits mean the first of 256. "
        "A secret that the model never saw has 1.4 bits on average.",
        "Drop repeated rows (near_duplicates) and personal data (pii) at the silos; fewer passes; noise (dp_sgd, "
        "central_dp).",
        "exposure in bits",
        "Exposure of the planted secrets, and of the control",
    ),
    "origin": Section(
        "Which silo is it",
        "Would it hide a silo to take its name off what it sends? Updates of one round are given to the silos by those "
        "of the round before, and held-out texts to the silo whose update fits them best.",
        "Secure aggregation, which leaves no single update to look at; noise at the silo. If the server knows the "
        "senders anyway, this is no loss.",
        "given to the right silo",
        "Given to the right silo",
    ),
}

OF = {
    "updates": ("embedding rows", "span check", "descent"),
    "membership": ("loss", "loss against the base model", "Min-K%"),
    "canaries": ("exposure", "prompting"),
    "origin": ("nearest update", "lowest loss"),
}
"""Which attacks belong to a section."""

HOW = {
    "embedding rows": "looks for the rows of the embedding that moved",
    "span check": "looks for tokens that lie in the span of the first layer's update",
    "descent": "seeks a text whose gradient is the update",
    "loss": "takes texts of low loss for training records",
    "loss against the base model": "takes texts whose loss fell most for training records",
    "Min-K%": "looks at the least likely tokens of a text",
    "exposure": "ranks secrets by their likelihood",
    "prompting": "asks the model for the secret",
    "nearest update": "compares directions",
    "lowest loss": "tries each silo's update on the text",
}


def sections(result: Mapping[str, Any]) -> list[Section]:
    """Return the sections that have findings: those with a sentence are the strongest of each case and measure."""
    made = []
    for key, section in SECTIONS.items():
        own = [found for found in result["findings"] if found["attack"] in OF[key]]
        if own:
            best: dict[tuple[str, str], Mapping[str, Any]] = {}
            for found in own:
                place = (found["case"], found["measure"])
                if place not in best or above(found) > above(best[place]):
                    best[place] = found
            told = [
                {**found, "text": found_text(found), "says": sentence(found) if found in best.values() else ""}
                for found in own
            ]
            made.append(section._replace(findings=told))
    return made


def above(found: Mapping[str, Any]) -> float:
    """Return how far a finding is above chance."""
    return float(found["found"]["value"] - found["chance"])


def value_text(value: float, share: bool) -> str:
    """Write a share in per cent, another number with two decimals.

    >>> value_text(0.9567, True), value_text(0.9567, False), value_text(0.000001, True)
    ('96 %', '0.96', '0 %')
    """
    return f"{100 * value:.0f} %" if share else f"{value:.2f}"


def found_text(found: Mapping[str, Any]) -> dict[str, str]:
    """Return a finding's numbers as text."""
    one, share = found["found"], found["share"]
    ends = [value_text(one[end], share).removesuffix(" %") for end in ("low", "high")]
    return {
        "value": value_text(one["value"], share),
        "interval": f"{ends[0]}\N{EN DASH}{ends[1]}",
        "chance": value_text(found["chance"], share),
        "n": f"{one['n']:,}",
    }


def sentence(found: Mapping[str, Any]) -> str:
    """Say in one plain sentence what a finding is and whether it is more than chance."""
    verdict = "That is more than chance." if found["leaks"] else "That is not beyond chance."
    return f"{told(found, found_text(found))} {verdict}"


def told(found: Mapping[str, Any], text: Mapping[str, str]) -> str:
    """Say what a finding is."""
    how, case, value, chance = HOW[found["attack"]], plain(found["case"], 120), text["value"], text["chance"]
    opening = f"{case[0].upper()}{case[1:]}"
    if found["measure"] == "tokens recovered":
        return f"{opening}: an attack that {how} names {value} of the tokens; guessing names {chance}."
    if found["measure"].startswith("text recovered"):
        return f"{opening}: the text is put together to {value}, 100 % being word for word; guessing gets {chance}."
    if found["measure"] == "AUC":
        cases = f"{100 * found['found']['value']:.0f} of 100"
        return f"An attack that {how} ranks a training record above a held-out one in {cases} cases; a coin does in 50."
    if found["measure"].startswith("found at"):
        return (
            f"At one false alarm in 100, an attack that {how} finds {value} of the training records; chance finds 1 %."
        )
    if found["attack"] == "exposure":
        return f"The {case} have an exposure of {value} bits on average; secrets that were never seen have {chance}."
    if found["attack"] == "prompting":
        return f"Asked for them, the model tells {value} of the {case} word for word."
    return f"{opening}: an attack that {how} is right in {value} of the cases; chance is {chance}."


def strongest(result: Mapping[str, Any], key: str, measure: str, case: str = "") -> Mapping[str, Any] | None:
    """Return the finding of a section that is furthest above chance."""
    own = [
        found
        for found in result["findings"]
        if found["attack"] in OF[key] and found["measure"] == measure and case in found["case"]
    ]
    return max(own, key=above, default=None)


HEADLINES = (
    ("updates", "tokens recovered", "one record", "a record's tokens from a silo's own update"),
    ("updates", "tokens recovered", "a round as sent", "the tokens of a whole round from one silo's update"),
    ("updates", "tokens recovered", "one's text", "one silo's tokens from the sum of all"),
    ("membership", "AUC", "", "membership in the training text (AUC)"),
    ("canaries", "exposure in bits", "that were planted", "planted secrets (exposure in bits)"),
    ("origin", "given to the right silo", "", "the silo behind an update or a text"),
)
"""What is said first: section, measure, case, and what it is called."""


def cards(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the headlines as cards."""
    made = []
    for key, measure, case, title in HEADLINES:
        found = strongest(result, key, measure, case)
        if found:
            text = found_text(found)
            made.append(
                {
                    "title": title[0].upper() + title[1:],
                    "value": text["value"],
                    "small": f"chance {text['chance']}",
                    "name": "alone" if found["leaks"] else "pooled",
                }
            )
    return made


def lead(result: Mapping[str, Any]) -> list[str]:
    """Return the answer: what leaks beyond chance, what does not, and what stood in between."""
    if not result["findings"]:
        tried = [key for key in result["attacks"] if key in SECTIONS]
        said = ["Nothing could be attacked: the run has too little text for these attacks."] if tried else []
        return [*said, protection(result), *sensitive(result)]
    leaks, holds = list[str](), list[str]()
    for key, measure, case, title in HEADLINES:
        found = strongest(result, key, measure, case)
        if found:
            text = found_text(found)
            (leaks if found["leaks"] else holds).append(f"{title}, {text['value']} (chance {text['chance']})")
    if not leaks:
        return ["No attack got more than chance.", protection(result), *sensitive(result)]
    said = [f"Attacks got more than chance in {len(leaks)} of {len(leaks) + len(holds)} respects: {'; '.join(leaks)}."]
    said += [f"Not beyond chance: {'; '.join(holds)}."] if holds else []
    return [*said, protection(result), *sensitive(result)]


def sensitive(result: Mapping[str, Any]) -> list[str]:
    """Say which tensors tell the most of the text, and how a recipe names them."""
    if not (told := result.get("tensors")):
        return []
    named = [each for each in told["each"] if each["named"]]
    values, share = (value_text(sum(each[key] for each in named), True) for key in ("values", "sensitivity"))
    return [
        f"Of {len(told['each'])} tensors of an update the {len(named)} most sensitive have {values} of its values and "
        f"{share} of the sensitivity. To encrypt these alone, the others being seen: {told['setting']}"
    ]


def protection(result: Mapping[str, Any]) -> str:
    """Say what stood between the attacker and the text in this run."""
    if result["sum_only"]:
        noise = ", with noise in it" if result["noise"] else ""
        sums = f"In this run the server sees the updates' sum only{noise}, and that sum is what was attacked."
        key = " Whoever has the silos' key, with which all updates were encrypted, sees each of them."
        return sums + key * bool(result.get("encrypted"))
    if not result["noise"]:
        return "In this run the server sees each silo's update, and no noise is on it."
    if result["at_server"]:
        return (
            "In this run the server adds noise, which hides a silo from those who see the models, not from the server."
        )
    return "In this run every silo adds noise before anything leaves it."


def epsilon(result: Mapping[str, Any]) -> list[str]:
    """Say what the canaries prove of epsilon, beside what the ledger promises."""
    bound = result["epsilon"]
    if not bound:
        return []
    told = bound["told"]
    rows = f"{bound['rows']} row{'s' * (bound['rows'] != 1)}"
    said = [
        f"From the canaries alone, epsilon is at least {told['epsilon']:.2f} for a secret that stands in {rows}: of "
        f"{told['guesses']} guesses which secrets were planted {told['right']} were right. So many canaries cannot "
        f"show more than {told['most']:.2f}, whatever the model has learned."
    ]
    if bound["ledger"] is None:
        return [*said, "The run has no noise, so there is no upper bound: epsilon is infinite."]
    said.append(
        f"The ledger promises epsilon {bound['ledger']:.2f} at most for {bound['unit']}, which allows a secret in "
        f"{rows} {bound['limit']:.2f}."
    )
    broken = told["epsilon"] > bound["limit"]
    said.append(
        "The attack found more than the ledger allows: the noise or its accounting is wrong. Do not publish this model."
        if broken
        else "The two do not contradict each other."
    )
    return said
