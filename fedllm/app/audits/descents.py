"""The descent on gradients, on as many trials as there is time for: short texts, small models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

from fedllm.app.audits.case import Case
from fedllm.app.audits.findings import Finding, against
from fedllm.app.audits.targets import ATTACKS, Target
from fedllm.audit.descent import descend
from fedllm.audit.recovery import rouge_l, token_recall

TRIES = 4
"""Trials of a case: one takes some fifteen seconds of a thread on a model of 260,000 weights."""

LONGEST = 32
"""Tokens of a text."""

LARGEST = 5_000_000
"""Weights of a model: each of some hundred steps goes through all of them, there and back, and back again."""

NAMED = 40
"""Tokens that the other attacks name and the descent chooses from."""


def descents(
    case: Case,
    said: str,
    targets: Sequence[Target],
    named: Mapping[str, Sequence[Sequence[int]]],
    common: Sequence[int],
) -> list[Finding]:
    """Attack the first targets that are one short text, from what the other attacks `named` there, the likeliest first.

    Where those name nothing, every token of the vocabulary may be in the text.
    """
    if not small_enough(case) or not all(target.scored and len(target.text) <= LONGEST for target in targets[:TRIES]):
        return []
    texts, true = list[list[int]](), list[Sequence[int]]()
    with case.ui.part(f"descent, {said}"[:24], len(targets[:TRIES])):
        for place, target in enumerate(targets[:TRIES]):
            orders = [order[place] for attack, order in named.items() if len(order) == len(targets)]
            found = descend(case.parts.model, target.update, candidates(case, orders), target.scored, case.seed + place)
            if found:
                texts.append(found)
                true.append(target.text)
            case.ui.tick(len(target.text))
    if not texts:
        return []
    pairs = list(zip(texts, true, strict=True))
    guessed = [token_recall(common, text) for text in true]
    in_order = [rouge_l(common[: len(text)], text) for text in true]
    recalls = [token_recall(list(dict.fromkeys(found)), text) for found, text in pairs]
    whole = [rouge_l(found, text) for found, text in pairs]
    name = ATTACKS["descent"]
    return [
        against(name, said, "tokens recovered", recalls, guessed, case.seed),
        against(name, said, "text recovered in order (ROUGE-L)", whole, in_order, case.seed),
    ]


def small_enough(case: Case) -> bool:
    """Say whether a descent through the model ends in reasonable time."""
    return sum(value.numel() for value in case.parts.model.parameters()) <= LARGEST


def how_far(case: Case) -> str:
    """Say on what descents were tried."""
    if not small_enough(case):
        return f"not tried, since the model has more than {LARGEST:,} weights"
    return f"{min(TRIES, case.trials)} records a case at most, of {LONGEST} tokens at most, one by one"


def candidates(case: Case, orders: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens to choose from, taking turns between what each attack names first."""
    if not orders:
        return list(range(case.parts.model.get_input_embeddings().weight.shape[0]))  # type: ignore[operator]
    turns = chain.from_iterable(zip_longest(*orders))
    return list(dict.fromkeys(token for token in turns if token is not None))[:NAMED]
