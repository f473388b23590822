"""Whose update and whose text: what is left of a silo's name when it is taken off."""

from __future__ import annotations

import torch

from fedllm.app.audits.case import Case
from fedllm.app.audits.findings import Finding, over
from fedllm.app.audits.views import round_of
from fedllm.audit.intervals import share_estimate
from fedllm.audit.origin import attributed, lowest
from fedllm.core.seeds import generator
from fedllm.silo.scoring import log_likelihoods, scored_tokens
from fedllm.silo.trainables import trained, write

MOST = 8
"""Silos that are told apart."""

TEXTS = 6
"""Held-out texts of each."""


def whose(case: Case) -> list[Finding]:
    """Give updates of one round to silos by those of the round before, and held-out texts by the silos' updates.

    Behind a secure sum there is no silo's update to go by, and nothing is found.
    """
    parts, last = case.parts, max(0, case.state.round - 1)
    names = list(parts.silos.names[:MOST])
    if len(names) < 2 or case.sum_only:
        return []
    data = {name: parts.silos.examples(name)["train"] for name in names}
    with case.ui.part("whose update", None):
        known = round_of(case, parts.work(), data, last).each
        later = round_of(case, parts.work(), data, last + 1).each
    given = attributed(known, later)
    right = sum(name == silo for name, silo in given.items())
    case_said = f"{len(names)} silos, an update without a name"
    findings = [
        over("nearest update", case_said, "given to the right silo", share_estimate(right, len(given)), 1 / len(names))
    ]
    texts, true = [], []
    for name in names:
        test = parts.silos.examples(name)["test"]
        drawn = torch.randperm(len(test), generator=generator(case.seed, "whose", name))[:TEXTS].tolist()
        texts += [test[place] for place in drawn]
        true += [name] * len(drawn)
    losses = {}
    with case.ui.part("whose text", None):
        for name, update in known.items():
            after = {key: value - update[key] for key, value in case.state.params.items()}
            write(trained(parts.model), {**parts.own, **after})
            sums = log_likelihoods(
                parts.model, texts, parts.objective, pad_id=parts.tokenizer.pad_token_id, tick=case.ui.tick
            )
            losses[name] = [-total / scored_tokens(each) for total, each in zip(sums, texts, strict=True)]
    case.reset()
    right = sum(silo == name for silo, name in zip(lowest(losses), true, strict=True))
    said = f"{len(names)} silos, a held-out text"
    found = share_estimate(right, len(true))
    return [*findings, over("lowest loss", said, "given to the right silo", found, 1 / len(names))]
