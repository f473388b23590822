"""A plan as a person reads it: the round as a diagram, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from fedllm.algorithms.duplicates import STEPS
from fedllm.app.build import Parts, counts, longest, row_tokens
from fedllm.app.catalog import make
from fedllm.app.config import Recipe
from fedllm.app.homomorphic import homomorphic_lines
from fedllm.app.lean import can_be_lean
from fedllm.app.privacy import (
    UNITS,
    hides_records,
    is_private,
    open_ends,
    planned_epsilons,
    said,
    tokenizer_entries,
    transforms,
    uses,
)
from fedllm.app.secure import secure_lines
from fedllm.app.terminal import amount, many
from fedllm.core.plan import size
from fedllm.core.round import apart, largest, parts_of
from fedllm.core.types import Facts, Share, Tensors, on_meta
from fedllm.exchange.availability import told
from fedllm.exchange.ledger import spent
from fedllm.runtime.remote import LARGE
from fedllm.silo.muon import inner_matrices
from fedllm.silo.trainables import trained

ADAMW_BYTES = 12
"""Gradient and two moments in float32, a trained value."""

PROCESS_BYTES = 600_000_000
"""Python with torch, transformers and peft loaded."""

MEAN_BYTES = 16
"""Two float64 words a value, in which the server adds updates up."""


SEES = {
    "each": "each silo's update",
    "part": "each silo's tensors that are in clear, times its weight, and of the rest only the sum",
    "sum": "only the sum",
    "groups": "only the sums of groups",
}
"""What `Facts.sees` says, in words."""


def facts_text(facts: Facts) -> str:
    """Say what is known of an update."""
    sees = f"server sees {SEES[facts.sees]}"
    bound = (
        "norm not bounded"
        if facts.norm_bound is None
        else f"norm at most {facts.norm_bound:g}"
        if math.isfinite(facts.norm_bound)
        else "norm at most the round's clip"
    )
    noise = "" if facts.noise is None else f", noise {facts.noise:.3g} times that"
    return f"{sees}, {bound}{noise}"


def plan_lines(parts: Parts) -> Iterator[str]:
    """Yield the plan of a run, line by line."""
    recipe, plan, names = parts.recipe, parts.plan, parts.silos.names
    total = sum(value.numel() for value in parts.model.parameters())
    runs = f"{many(len(names), 'silo')}, {many(recipe.rounds, 'round')}"
    yield f"{recipe.name}: {runs}, {recipe.model} ({total / 1e6:.1f} M parameters)"
    yield ""
    first = STEPS if recipe.duplicates else ()
    width = max(len(step.name) for step in (*first, *plan.steps))
    for once in first:
        yield f"  · {once.where:<6}  {once.name:<{width}}  once, before the rounds"
    before = None
    for place, step in enumerate(plan.steps):
        facts = facts_text(step.facts)
        known = facts if facts != before else "″"
        before = facts
        joint = "┌" if place == 0 else "└" if place == len(plan.steps) - 1 else "│"
        yield f"  {joint} {step.where:<6}  {step.name:<{width}}  {known}"
    yield "    └─▶ next round"
    yield ""
    runtime = f"cohort, {parts.width} clients as one batch" if parts.width > 1 else "local, one client after another"
    if not parts.method:
        share = plan.parameters / max(1, total)
        yield f"trained      {plan.parameters:,} parameters ({share:.2%}), {parts.trainable.name}"
    elif not parts.method.weights:
        yield "trained      nothing inside the model"
    yield f"on the wire  {amount(plan.bytes_down)} down, {amount(plan.bytes_up)} up, a client and round"
    if parts.ranks:
        runtime += f", each by {recipe.processes} processes"
    if away(parts):
        runtime = "federation, each site on its own machine; the server's part"
    yield f"runs as      {runtime}, on {parts.device.type} in {str(parts.dtype).removeprefix('torch.')}"
    if away(parts) and parts.algorithm.ahead:
        yield "overlap      a site begins the next round while its reply to this one is under way"
    for word, sentence in parts.method.notes if parts.method else ():
        yield f"{word:<12} {sentence}"
    if not total:
        return
    for place, silo in enumerate(told(parts.there)):
        yield f"{'' if place else 'available':<13}{silo}"
    yield f"memory       about {amount(memory(parts))} ({memory_note(parts)})"
    yield from secure_lines(recipe, len(names))
    yield from homomorphic_lines(recipe, whole_update(parts), plan.bytes_up, away(parts))
    yield from privacy_lines(parts)


def privacy_lines(parts: Parts) -> Iterator[str]:
    """Yield what a run's noise is worth by plan, and what it leaves open; without noise that nothing is claimed."""
    recipe, names = parts.recipe, parts.silos.names
    examples = counts(recipe, parts.silos)
    sums = parts.plan.steps[-1].facts.sees in ("sum", "groups")
    if not is_private(recipe):
        seen = "only sums are seen" if sums else f"the server sees {SEES[parts.plan.steps[-1].facts.sees]}"
        yield f"privacy      none is claimed: no noise is added, and {seen}"
        return
    for unit, found in planned_epsilons(recipe, len(names), examples).items():
        yield (
            f"privacy      epsilon {found.best:.3g} at delta {recipe.privacy.delta:g} after {recipe.rounds} rounds, of "
            f"{UNITS[unit]}"
        )
    for use in said(uses(recipe, len(names), examples)):
        yield f"             {use}"
    if hides_records(recipe) and not examples and recipe.client.get("rate") is None:
        yield "privacy      of one record of a site: by how many records it has, at the ledger once they are known"
    yield f"not covered  {'; '.join(open_ends(recipe))}"


def tokenizer_lines(recipe: Recipe, looks: Mapping[str, int]) -> Iterator[str]:
    """Yield what the noise on the counts is worth from which a tokenizer is learned."""
    entries = tokenizer_entries(recipe, looks)
    if entries:
        delta = recipe.privacy.delta
        most = max(each.best for each in spent(entries, "record", delta).values())
        yield f"tokenizer    epsilon {most:.3g} at delta {delta:g}, of {UNITS['record']}, by its counts alone"


def memory(parts: Parts) -> int:
    """Return the bytes expected: weights, the server's half, and on one machine the silos' training and memory too."""
    processes, weights = parts.recipe.processes, size(parts.model.parameters())
    if away(parts):
        # A lean server has the model's weights when it no longer has what rounds need.
        told = server(parts)
        return PROCESS_BYTES + (max(told, 2 * weights) if can_be_lean(parts) else weights + told)
    together = parts.ranks is not None
    # A silo's own start, gradient, optimiser state and update; a cohort has those of all its members.
    training = parts.plan.parameters * (ADAMW_BYTES + 4 + 4) * parts.width
    running = PROCESS_BYTES * (1 + processes * together) + weights * (1 + together)
    return running + server(parts) + training + activations(parts) + remembered(parts) * len(parts.silos.names)


def server(parts: Parts) -> int:
    """Return what the server holds: the first and the present parameters, optimiser state, the sum and an update.

    Of replies that stay in their files there are the mean of one tensor and sums of a part of it; the first parameters
    of a lean server lie in a file.
    """
    like, recipe = on_meta(parts.params), parts.recipe
    come = parts.algorithm.down(like) if parts.method else largest(updates(parts))
    state = parts.algorithm.init(like)
    sums = recipe.secure.groups if recipe.secure else 1
    held = MEAN_BYTES
    if recipe.aggregate["name"] != "mean":
        held = 4 * (sums if recipe.secure else min(len(parts.silos.names), len(parts.select(0))))
    added = sum(value.numel() for value in come.values()) * (held + 4 * sums)
    if away(parts) and size(come.values()) > LARGE and in_files(parts):
        added = 4 * max(value.numel() for value in come.values())
    # What comes back in another form than the parameters have is also stepped from in that form.
    other = size(value for name, value in come.items() if name not in like)
    kept = 1 if away(parts) and can_be_lean(parts) else 2
    return kept * size(like.values()) + other + size(state.optimiser.values()) + added


def in_files(parts: Parts) -> bool:
    """Say whether large replies can stay in their files: nothing that happens to them needs more than a tensor."""
    recipe = parts.recipe
    used = transforms(recipe, len(parts.silos.names), parts.secret)
    return not (parts.method or recipe.secure or recipe.homomorphic) and apart(used)


def updates(parts: Parts) -> list[Tensors]:
    """Return what a silo's update is in each round until the parts of it come round again, without the numbers."""
    share: Share = make("share", parts.recipe.share, rounds=parts.recipe.rounds)
    return list(parts_of(share, on_meta(parts.params)))


def whole_update(parts: Parts) -> Tensors:
    """Return all of an update that travels in one round or another."""
    return {name: value for part in updates(parts) for name, value in part.items()}


def remembered(parts: Parts) -> int:
    """Return what a silo remembers between rounds: its optimiser's moments, weights of its own, codecs' errors."""
    recipe, stage = parts.recipe, whole_update(parts)
    whole = size(on_meta(parts.params).values())
    kept = moments(parts) if recipe.client.get("keep_optimiser") else 0
    kept += 2 * whole * (recipe.share["name"] == "fragments")
    for transform in transforms(recipe, len(parts.silos.names), parts.secret):
        sent, errors = transform.encode(stage, {}, 0)
        kept, stage = kept + size(errors.values()), dict(sent)
    return kept


def moments(parts: Parts) -> int:
    """Return what the optimiser of local training remembers: two moments of a value, or one where Muon steps it."""
    optimiser, params = parts.recipe.client.get("optimiser", "adamw"), on_meta(parts.params)
    alone = [params[name] for name in inner_matrices(parts.model, trained(parts.model))] if optimiser == "muon" else []
    return 0 if optimiser == "sgd" else 2 * size(params.values()) - size(alone)


def away(parts: Parts) -> bool:
    """Say whether the silos' text lies on other machines."""
    return not any(shard.train for shard in parts.silos.shards.values())


def activations(parts: Parts) -> int:
    """Estimate what one batch keeps for the backward pass: 30 hidden vectors a layer and token, and the logits."""
    config = parts.model.config
    hidden = getattr(config, "hidden_size", 0)
    layers = getattr(config, "num_hidden_layers", 0)
    client = parts.recipe.client
    rows = int(client.get("micro_batch") or client.get("batch_size", 8)) * parts.width
    word = 2 if "16" in str(parts.dtype) else 4
    kept = 2 if parts.recipe.gradient_checkpointing else 30
    here = parts.silos.shards[parts.silos.names[0]].train
    tokens = longest(parts.silos) if here else row_tokens(parts.recipe)
    return rows * tokens * (layers * hidden * kept * word + getattr(config, "vocab_size", 0) * (word + 14))


def memory_note(parts: Parts) -> str:
    """Say what most of the memory is."""
    told = f"weights {amount(size(parts.model.parameters()))}, the server's half {amount(server(parts))}"
    if away(parts):
        return f"{told}, whatever the number of sites"
    kept = remembered(parts)
    told += f", what {len(parts.silos.names)} silos remember {amount(kept * len(parts.silos.names))}" if kept else ""
    return f"{told}, activations about {amount(activations(parts))}"
