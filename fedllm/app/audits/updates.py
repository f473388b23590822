"""Text out of updates: the attacks on what a silo sends, one record at a time, as the run sends it, and on the sum."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedllm.app.audits.case import Case
from fedllm.app.audits.descents import descents
from fedllm.app.audits.findings import Finding, against
from fedllm.app.audits.targets import ATTACKS, Recovered, Target
from fedllm.app.audits.views import View, Watched, round_of, sampled, steps_on_one
from fedllm.audit.recovery import by_frequency, rouge_l, token_recall
from fedllm.audit.rows import likeliest, row_scores
from fedllm.audit.span import span_distances, span_text
from fedllm.exchange.secure.graph import dealt
from fedllm.silo.examples import Example

ORDERED = 64
"""Tokens up to which a text is put in order: each step looks at all candidates again."""

STEPS = {"adamw": "AdamW", "muon": "Muon"}
"""What the findings call the step of a recipe's own optimiser; plain SGD's is attacked anyway."""

SEVERAL = 4
"""Steps on one record in a row that are attacked beside a single one."""


def attack_updates(case: Case) -> tuple[list[Finding], list[Recovered]]:
    """Attack single records in plain steps, the same in the recipe's own step, their sum, and a round as it is."""
    silos = case.parts.silos
    names = in_one_sum(case, case.parts.select(case.state.round) or silos.names)
    common = by_frequency(example.input_ids for name in names for example in silos.examples(name)["test"])
    times = max(1, -(-case.trials // len(names)))
    drawn = {name: sampled(case, name, times) for name in names}
    records = min(len(silos.examples(name)["train"]) for name in names)
    findings, shown = list[Finding](), list[Recovered]()
    kinds = [("one record, plain step", True, 1)]
    if (name := case.recipe.client.get("optimiser", "adamw")) != "sgd":
        kinds.append((f"one record, {STEPS[name]} step", False, 1))
    if not case.sum_only:
        kinds.append((f"one record, {SEVERAL} of the run's own steps", False, SEVERAL))
    for said, plain, steps in kinds:
        views = [one_each(case, drawn, place, records, plain, steps) for place in range(times)]
        told = [{name: drawn[name][place % len(drawn[name])] for name in names} for place in range(times)]
        texts = [{name: example.input_ids for name, example in each.items()} for each in told]
        singles = [
            Target(example.input_ids, view.each[name], len(example.input_ids), [label >= 0 for label in example.labels])
            for view, each in zip(views, told, strict=True)
            for name, example in each.items()
            if name in view.each
        ][: case.trials]
        found, recovered = attacked(case, said, singles, common)
        findings += found
        shown = shown or recovered
        if plain and len(names) > 1:
            findings += in_sum(case, views, texts, common)
    return findings + as_sent(case, names if case.sum_only else names[:4], common), shown


def in_one_sum(case: Case, names: Sequence[str]) -> list[str]:
    """Return those whose updates the server sees together: all, or the first of the groups."""
    groups = case.recipe.secure.groups if case.recipe.secure else 1
    return dealt(names, groups, case.recipe.seed, case.state.round)[0]


def in_sum(
    case: Case, views: Sequence[View], texts: Sequence[Mapping[str, Sequence[int]]], common: Sequence[int]
) -> list[Finding]:
    """Attack the sum of silos with one record each: for the tokens of one of them, and for those of all."""
    one, every = list[Target](), list[Target]()
    for view, told in zip(views, texts, strict=True):
        together = [token for text in told.values() for token in text]
        one += [Target(text, view.whole, len(together)) for text in told.values()]
        every.append(Target(together, view.whole, len(together)))
    said = f"sum of {len(texts[0])} silos"
    findings = attacked(case, f"{said}, one's text", one[: case.trials], common)[0]
    return findings + attacked(case, f"{said}, all texts", every, common)[0]


def one_each(
    case: Case, drawn: Mapping[str, Sequence[Example]], place: int, records: int, plain: bool, steps: int = 1
) -> View:
    """Return what is to be seen of a round in which every silo trains on one record."""
    data = {name: [examples[place % len(examples)]] for name, examples in drawn.items()}
    return round_of(case, steps_on_one(case, records, plain, steps), data)


def as_sent(case: Case, names: Sequence[str], common: Sequence[int]) -> list[Finding]:
    """Attack the updates of a round as the run makes them: the target is all text that a silo read for it."""
    data = {name: Watched(case.parts.silos.examples(name)["train"]) for name in names}
    view = round_of(case, case.parts.work(), data, max(0, case.state.round - 1))
    read = {
        name: [token for place in data[name].read for token in data[name].examples[place].input_ids] for name in names
    }
    together = sum(map(len, read.values()))
    targets = [
        Target(text, view.each.get(name, view.whole), len(text) if name in view.each else together)
        for name, text in read.items()
        if text
    ]
    return attacked(case, "a round as sent", targets, common)[0]


def attacked(
    case: Case, said: str, targets: Sequence[Target], common: Sequence[int]
) -> tuple[list[Finding], list[Recovered]]:
    """Run the attacks on every target, and hold what they name against a guess by frequency."""
    if not targets:
        return [], []
    model = case.parts.model
    guessed = [token_recall(common, target.text) for target in targets]
    named: dict[str, list[list[int]]] = {}
    built: list[list[int]] = []
    with case.ui.part(said[:24], len(targets)):
        for target in targets:
            length = len(target.text)
            if (rows_V := row_scores(model, target.update)) is not None:
                named.setdefault("rows", []).append(likeliest(rows_V))
            if (away_V := span_distances(model, target.update, target.length)) is not None:
                order = likeliest(away_V)
                named.setdefault("span", []).append(order)
                if target.length <= ORDERED:
                    built.append(span_text(model, target.update, order[: len(set(target.text))], length))
            case.ui.tick(length)
    findings = list[Finding]()
    for attack, orders in named.items():
        recalls = [token_recall(order, target.text) for order, target in zip(orders, targets, strict=True)]
        findings.append(against(ATTACKS[attack], said, "tokens recovered", recalls, guessed, case.seed))
    if len(built) == len(targets):
        whole = [rouge_l(text, target.text) for text, target in zip(built, targets, strict=True)]
        in_order = [rouge_l(common[: len(target.text)], target.text) for target in targets]
        findings.append(against("span check", said, "text recovered in order (ROUGE-L)", whole, in_order, case.seed))
    findings += descents(case, said, targets, named, common)
    orders = named.get("span") or named.get("rows") or []
    texts = built if len(built) == len(targets) else [[] for _ in targets]
    return findings, [
        Recovered(target.text, order[: len(set(target.text))], text)
        for target, order, text in zip(targets, orders, texts, strict=False)
    ]
