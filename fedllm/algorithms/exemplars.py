"""Few-shot examples chosen together: from a pool that may be seen by all, by scores from data that nobody shows.

The pool is a file beside the recipe, or written by the silos' models. Examples are chosen place by place: in a round
the silos score what is chosen with another example in one of its places, on their own questions, and only these scores
leave. The weighted mean decides; what is there stays unless another one is better. Empty places are filled first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedllm.algorithms.asking import asked_of, evaluating, gathered, mean_of, prompting, require_counts
from fedllm.algorithms.method import Ground, Method, require_no_transforms
from fedllm.algorithms.prompt_files import write_prompt
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.seeds import derive, generator
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.silo.asking import Measured, Prompt, drawn, filled, measure
from fedllm.silo.questions import Asking
from fedllm.silo.speaker import Speaker, Writing
from fedllm.silo.templates import Turn

SYNTHETIC = "synthetic"

LONGEST = 2000
"""Characters of an example that is written by a silo's model."""


class Shot(NamedTuple):
    """An example: a question and its answer."""

    text: str
    answer: str


def exemplars(
    ground: Ground,
    *,
    pool: str = SYNTHETIC,
    shots: int = 4,
    candidates: int = 8,
    questions: int = 32,
    written: int = 8,
    temperature: float = 0.8,
) -> Method:
    """Choose `shots` examples, trying `candidates` of the pool a round on as many of each silo's `questions`.

    `pool` is a file with the task's columns, or "synthetic": then each silo's model first writes `written` examples,
    after the silo's own ones, of which no copies leave.
    """
    require_no_transforms("exemplars", ground)
    require_counts(shots=shots, candidates=candidates, questions=questions, written=written)
    asking = asked_of(ground, "exemplars")
    kept = read_pool(ground, asking, pool) if pool and pool != SYNTHETIC else []

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        speaker = ground.speaker(silo)
        if request.scalars.get("write"):
            made = invented(speaker, asking, silo, written, temperature)
            return Reply(request.client, request.round, shot_tensors(made), float(max(1, len(made)))), silo.memory
        own = drawn(silo.data["questions"], questions, silo.seed)
        sets = [[each for each in places if each >= 0] for places in request.tensors["sets"].tolist()]
        offered = shots_in(request.tensors)
        prompts = [with_shots(asking, [offered[place] for place in places]) for places in sets]
        scores = [each.value for each in measure(speaker, asking, prompts, own)]
        silo.tick(0)
        told = {"scores": torch.tensor(scores, dtype=torch.float32)}
        return Reply(request.client, request.round, told, float(len(own))), silo.memory

    def server(select: Select, state: State, exchange: Exchange) -> tuple[State, Report]:
        after = state._replace(round=state.round + 1)
        names, had = select(state.round), shots_in(state.params)
        if not had:
            requests = [Request(name, state.round, "train", {}, {"write": 1.0}) for name in names]
            found, report = gathered(exchange, requests, lambda reply: read_shots(reply, asking, written))
            together = dict.fromkeys(shot for name in sorted(found) for shot in found[name])
            report["pool"] = float(len(together))
            return after._replace(params={**state.params, **shot_tensors(list(together))}), report
        chosen: list[int] = state.params["chosen"].tolist()
        sets = tried(chosen, len(had), candidates, state.round, ground.seed)
        used = sorted({place for each in sets for place in each if place >= 0})
        places = {each: place for place, each in enumerate(used)} | {-1: -1}
        tensors = {
            **shot_tensors([had[place] for place in used]),
            "sets": torch.tensor([[places[each] for each in row] for row in sets], dtype=torch.int64),
        }
        requests = [Request(name, state.round, "train", tensors) for name in names]
        scored, report = gathered(exchange, requests, lambda reply: (read_scores(reply, len(sets)), reply.weight))
        means = mean_of({n: s for n, (s, _) in scored.items()}, {n: w for n, (_, w) in scored.items()})
        best = max(range(len(sets)), key=means.__getitem__)
        report |= {"score": means[best], "gain": means[best] - means[0], "pool": float(len(had))}
        report |= {f"own_score.{name}": scores[best] for name, (scores, _) in scored.items()}
        return after._replace(params={**state.params, "chosen": torch.tensor(sets[best])}), report

    def evaluated(request: Request, silo: Silo) -> Measured:
        shown = [] if request.scalars.get("base") else shots_in(request.tensors)
        return measure(ground.speaker(silo), asking, [with_shots(asking, shown)], silo.data["tests"])[0]

    def shown(state: State) -> Tensors:
        pool_now = shots_in(state.params)
        return shot_tensors([pool_now[place] for place in state.params["chosen"].tolist() if place >= 0])

    def export(model: Any, learned: Tensors, folder: Path) -> None:
        write_prompt(
            folder, with_shots(asking, shots_in(learned))("{text}"), asking.words, examples=len(shots_in(learned))
        )

    steps = [
        Step("server", "offer examples of the pool"),
        Step("silo", "score them on own questions"),
        Step("server", "keep what scores best"),
    ]
    sent_up: Tensors = {"scores": torch.empty(candidates + 1, device="meta")}
    if pool == SYNTHETIC:
        # A character has four bytes at most.
        sent_up = shot_tensors([Shot("x" * 4 * LONGEST, "x" * 64)] * written)
    start = {"chosen": torch.full((shots,), -1), **shot_tensors(kept)}
    source = "written by the silos' models in the first round" if not kept else f"{len(kept)} examples of {pool}"
    notes = [("pool", source), ("sends up", f"{candidates + 1} scores; {questions} own questions behind each")]
    algorithm = prompting(ground, client, server, steps, sent_up)
    return Method("exemplars", start, algorithm, evaluating(evaluated), export, shown=shown, weights=False, notes=notes)


def with_shots(asking: Asking, shots: Sequence[Shot]) -> Prompt:
    """Return the prompt that shows examples before the question."""
    ask = filled(asking.template)
    before = "".join(f"{ask(shot.text)} {shot.answer}\n\n" for shot in shots)
    return lambda text: before + ask(text)


def tried(chosen: Sequence[int], pool: int, candidates: int, number: int, seed: int) -> list[list[int]]:
    """Return what is tried in a round: what is chosen, and that with another example in this round's place."""
    place = number % len(chosen)
    if -1 in chosen:
        place = list(chosen).index(-1)
    order = torch.randperm(pool, generator=generator(seed, "candidates", number)).tolist()
    fresh = [each for each in order if each not in chosen][:candidates]
    return [list(chosen), *([*chosen[:place], each, *chosen[place + 1 :]] for each in fresh)]


def invented(speaker: Speaker, asking: Asking, silo: Silo, count: int, temperature: float) -> list[Shot]:
    """Return examples that the model writes after the silo's own ones."""
    own = drawn(silo.data["questions"], count, silo.seed, "inspiration")
    ask = 'Here is a text:\n"{text}"\nWrite another text of the same kind, about something else. Write the text only.'
    turns = [[Turn("user", ask.replace("{text}", question.text[:LONGEST]))] for question in own]
    how = Writing(max_tokens=96, temperature=temperature, seed=derive(silo.seed, "invented"))
    texts = [text.strip().strip('"').strip() for text in speaker.write(turns, how)]
    made = [Shot(text[:LONGEST], question.answer) for text, question in zip(texts, own, strict=True)]
    return [shot for shot in made if shot.text]


def read_pool(ground: Ground, asking: Asking, pool: str) -> list[Shot]:
    """Read the pool."""
    found = [Shot(each.text, each.answer) for each in asking.read(ground.rows(pool), pool)]
    if not found:
        raise FedllmError(f"algorithm.pool '{pool}' has no example; give it some or set pool = 'synthetic'.")
    return list(dict.fromkeys(found))


def shot_tensors(shots: Sequence[Shot]) -> dict[str, Tensor]:
    """Return examples as tensors."""
    return {**as_tensors("asked", [s.text for s in shots]), **as_tensors("answered", [s.answer for s in shots])}


def shots_in(tensors: Tensors) -> list[Shot]:
    """Return the examples among tensors of our own."""
    if "asked.ends" not in tensors:
        return []
    return [Shot(*each) for each in zip(texts_in("asked", tensors), texts_in("answered", tensors), strict=True)]


def read_shots(reply: Reply, asking: Asking, most: int) -> list[Shot]:
    """Return the examples in a silo's reply, or raise `Refused`."""
    texts, answers = (texts_in(name, reply.tensors, most) for name in ("asked", "answered"))
    if len(texts) != len(answers) or any(len(text) > LONGEST + 200 for text in (*texts, *answers)):
        raise Refused("its examples are too long, or have no answers")
    if asking.words and not set(answers) <= {*asking.words, ""}:
        raise Refused("an answer of its examples is none of the task's words")
    return [Shot(*each) for each in zip(texts, answers, strict=True) if all(each)]


def read_scores(reply: Reply, count: int) -> list[float]:
    """Return the scores in a silo's reply, or raise `Refused`."""
    scores = reply.tensors.get("scores")
    if scores is None or scores.dtype != torch.float32 or scores.shape != (count,):
        raise Refused(f"its reply is not {count} scores")
    values: list[float] = scores.tolist()
    if not all(map(math.isfinite, values)):
        raise Refused("a score is not finite")
    return values
