"""Answers that silos agree on: Fed-SP-SC (Liu, Pang and Fan 2023, arXiv:2304.13911).

Silos hold the same question, each in its own words ("SP": the Same Parameters). Each answers its own wording step by
step, several times, and votes for the answer that it finds most often; the majority over silos is the answer.

Other than in the paper the model is not asked by one server that sees all questions: each silo asks it, and a number
for the question and the answer are all that leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedllm.algorithms.asking import asked_of, evaluating, gathered, prompting, require_counts
from fedllm.algorithms.method import Ground, Method, require_no_transforms
from fedllm.algorithms.prompt_files import write_prompt
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.seeds import derive, generator
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.exchange.votes import epsilon_of_votes, require_epsilon, winner
from fedllm.silo.answers import final
from fedllm.silo.asking import Measured
from fedllm.silo.questions import Question
from fedllm.silo.speaker import Speaker, Writing
from fedllm.silo.templates import Turn

STEPS = "Let's think step by step, and write the final answer after ####."


class Thought(NamedTuple):
    """A chain of thought and the answer that it comes to."""

    chain: str
    answer: str


class Agreed(NamedTuple):
    """Questions that were voted on: their numbers, the winning answers, and the share of silos behind each."""

    numbers: list[int]
    answers: list[str]
    shares: list[float]


def think(
    speaker: Speaker, questions: Sequence[str], before: str, samples: int, temperature: float, tokens: int, seed: int
) -> list[Thought]:
    """Return for each question the answer found most often in `samples` chains of thought, with its first chain."""
    turns = [[Turn("user", f"{before}{text}\n\n{STEPS}")] for text in questions for _ in range(samples)]
    how = Writing(max_tokens=tokens, temperature=temperature if samples > 1 else 0.0, seed=seed)
    chains = speaker.write(turns, how)
    found = []
    for first in range(0, len(chains), samples):
        here = [Thought(chain, final(chain)) for chain in chains[first : first + samples]]
        most, _ = Counter(thought.answer for thought in here).most_common(1)[0]
        found.append(next(thought for thought in here if thought.answer == most))
    return found


def fed_sp_sc(
    ground: Ground,
    *,
    samples: int = 3,
    batch: int = 16,
    temperature: float = 0.7,
    tokens: int = 200,
    epsilon: float | None = None,
) -> Method:
    """Vote on the answers to the questions that silos hold out, `batch` a silo and round.

    What a round asks goes by the questions' numbers, so that silos come to the same ones. With `epsilon` each question
    is decided by report noisy max among the task's words; that a silo has a question is not hidden by it.
    """
    require_no_transforms("fed_sp_sc", ground)
    require_counts(samples=samples, batch=batch, tokens=tokens)
    require_epsilon(epsilon)
    words = [final(word) for word in asked_of(ground, "fed_sp_sc").words]
    if epsilon is not None and not words:
        raise FedllmError(
            "algorithm.epsilon needs answers that are known beforehand: one that is there because a silo gave it tells "
            "of this silo; use the task 'classify' with words, or take epsilon out."
        )
    rounds = max(1, ground.rounds)

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        due = [each for each in silo.data["tests"] if each.number % rounds == request.round % rounds]
        mine = sorted(due, key=by_number)[:batch]
        seed = derive(silo.seed, "think", request.round)
        thoughts = think(ground.speaker(silo), [q.text for q in mine], "", samples, temperature, tokens, seed)
        silo.tick(0)
        told = {
            "numbers": torch.tensor([each.number for each in mine], dtype=torch.int64),
            **as_tensors("answers", [thought.answer[:64] for thought in thoughts]),
        }
        return Reply(request.client, request.round, told, float(max(1, len(mine)))), silo.memory

    def server(select: Select, state: State, exchange: Exchange) -> tuple[State, Report]:
        requests = [Request(name, state.round, "train", {}) for name in select(state.round)]
        found, report = gathered(exchange, requests, lambda reply: read_votes(reply, batch))
        new = agreed(found, words, epsilon, derive(ground.seed, "votes", state.round))
        had = agreed_in(state.params)
        report["questions"] = float(len(new.numbers))
        if epsilon is None:
            report["agreement"] = sum(new.shares) / max(1, len(new.shares))
        else:
            report["epsilon"] = epsilon_of_votes(batch * (state.round + 1), epsilon)
        whole = Agreed(had.numbers + new.numbers, had.answers + new.answers, had.shares + new.shares)
        return state._replace(round=state.round + 1, params=agreed_tensors(whole)), report

    def evaluated(request: Request, silo: Silo) -> Measured:
        known = agreed_in(request.tensors)
        table = dict(zip(known.numbers, known.answers, strict=True))
        tests = silo.data["tests"]
        missing = [each for each in tests if request.scalars.get("base") or each.number not in table]
        alone = think(ground.speaker(silo), [q.text for q in missing], "", 1, 0.0, tokens, silo.seed) if missing else []
        own = {each.number: thought.answer for each, thought in zip(missing, alone, strict=True)}
        right = [{**table, **own}[each.number] == final(each.answer) for each in tests]
        return Measured(0.0, None, sum(right) / max(1, len(right)), len(right))

    def export(model: Any, learned: Tensors, folder: Path) -> None:
        known = agreed_in(learned)
        rows = [{"question": n, "answer": a, "agreement": round(s, 4)} for n, a, s in zip(*known, strict=True)]
        write_prompt(folder, f"{{text}}\n\n{STEPS}", (), agreed=rows)

    per_round = [
        ("sends up", f"{batch} answers a round, and numbers (hashes) for their questions; {samples} chains each")
    ]
    if epsilon is not None:
        spent = epsilon_of_votes(batch * ground.rounds, epsilon)
        per_round.append(("votes", f"epsilon {spent:g} for all of a silo's votes in {ground.rounds} rounds"))
    like = {
        "numbers": torch.empty(batch, dtype=torch.int64, device="meta"),
        **as_tensors("answers", ["x" * 64] * batch),
    }
    steps = [Step("silo", "think, and vote for an answer"), Step("server", "take the majority")]
    return Method(
        "fed_sp_sc",
        agreed_tensors(Agreed([], [], [])),
        prompting(ground, client, server, steps, like),
        evaluating(evaluated),
        export,
        weights=False,
        notes=per_round,
    )


def by_number(question: Question) -> int:
    """Return a question's number."""
    return question.number


def agreed(
    votes: Mapping[str, Mapping[int, str]], words: Sequence[str] = (), epsilon: float | None = None, seed: int = 0
) -> Agreed:
    """Decide each question by the silos' votes for an answer, of `words` if there are any; of equals the first.

    With `epsilon` no shares are told, which are counts without noise.

    >>> agreed({"a": {7: "4"}, "b": {7: "5"}, "c": {7: "5", 9: "1"}})
    Agreed(numbers=[7, 9], answers=['5', '1'], shares=[0.6666666666666666, 1.0])
    """
    found = Agreed([], [], [])
    for number in sorted({number for each in votes.values() for number in each}):
        tally = Counter(each[number] for each in votes.values() if number in each)
        answers = list(words) or sorted(tally)
        best = answers[winner([tally[a] for a in answers], epsilon, generator(seed, "vote", number))]
        found.numbers.append(number)
        found.answers.append(best)
        found.shares.append(tally[best] / tally.total() if epsilon is None else 0.0)
    return found


def read_votes(reply: Reply, most: int) -> dict[int, str]:
    """Return a silo's answers by question, or raise `Refused`."""
    numbers, answers = reply.tensors.get("numbers"), texts_in("answers", reply.tensors, most, 512 * most)
    if numbers is None or numbers.dtype != torch.int64 or numbers.shape != (len(answers),):
        raise Refused("its answers have no questions")
    return dict(zip(numbers.tolist(), answers, strict=True))


def agreed_tensors(known: Agreed) -> Tensors:
    """Return what was agreed as tensors."""
    return {
        "numbers": torch.tensor(known.numbers, dtype=torch.int64),
        **as_tensors("answers", known.answers),
        "shares": torch.tensor(known.shares, dtype=torch.float32),
    }


def agreed_in(tensors: Tensors) -> Agreed:
    """Return what was agreed, from tensors of our own."""
    return Agreed(tensors["numbers"].tolist(), texts_in("answers", tensors), tensors["shares"].tolist())
