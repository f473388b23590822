"""Text prompts found by scores alone: candidates from the server, scored where the data is, kept by a bandit.

The loop is that of APE (Zhou et al. 2022, arXiv:2211.01910) and OPRO: propose, score, keep, propose from what was kept.
What is federated is the scoring: each silo scores the same candidates on a few of its own examples and replies one mean
a candidate, and the server keeps a running mean over silos and rounds. Which candidates stay is decided as UCB does
(Auer et al. 2002): by the mean less a bonus for what was seen little of; what is the result, by the mean plus it. With
`select = "fixed_size"` and `size = 1` one silo scores a round, as in FedOne (arXiv:2506.14929), for a fraction of the
calls.
Proposals come from edits (`edits.py`) and, if asked for, from paraphrases by the server's model: neither sees a silo's
text. With `critique` a silo's own model mends what it got wrong there (`critique.py`), and the edited prompt alone
leaves, after it was looked through. The model may be here or behind an API (`trying.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fedllm.algorithms.asking import asked_of, require_answered, sitting_out
from fedllm.algorithms.budget import Budget, kept_budget, new_budget
from fedllm.algorithms.critique import mended
from fedllm.algorithms.edits import Propose, Proposed, edits, paraphrases
from fedllm.algorithms.method import Ground, Method, require_no_transforms
from fedllm.algorithms.trying import WRITTEN, trying, writer
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.round import accept
from fedllm.core.seeds import derive
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import (
    Algorithm,
    Dataset,
    Exchange,
    Reply,
    Report,
    Request,
    Select,
    Silo,
    State,
    Step,
    Tensors,
)
from fedllm.silo.candidates import Measure, drawn
from fedllm.silo.endpoint import Unanswered
from fedllm.silo.reading import plain

Proposer: TypeAlias = Literal["edits", "model", "both", "critique"]
"""Where new prompts come from: edits, paraphrases by the server's model, half of each, or the silos' own critiques with
edits for the rest."""

PHRASES = (
    "Read the text carefully.",
    "Consider the overall tone.",
    "Pay attention to the last sentence.",
    "Decide what the writer thinks.",
    "Answer with one word.",
    "Be precise.",
    "Examples of what is meant follow.",
)
"""What edits add where a recipe names no phrases."""


PARAPHRASE = WRITTEN + 128
"""Tokens that a paraphrase can take beside the prompt: what is written, the question and a chat's template."""


class Pool(NamedTuple):
    """Prompts, the mean score of each so far, and on how many examples; lower scores are better."""

    texts: list[str]
    score_P: Tensor
    seen_P: Tensor

    def bound(self, bonus: float) -> list[int]:
        """Return the places by score plus so many standard errors, the best first; what was never seen is last."""
        spread = bonus / self.seen_P.clamp(min=1e-9).sqrt()
        value_P = torch.where(self.seen_P > 0, self.score_P + spread, torch.full_like(self.score_P, math.inf))
        return sorted(range(len(self.texts)), key=lambda place: (float(value_P[place]), place))

    def take(self, places: Sequence[int]) -> Pool:
        """Return those prompts."""
        return Pool([self.texts[place] for place in places], self.score_P[list(places)], self.seen_P[list(places)])


def text_prompt(
    ground: Ground,
    *,
    prompt: str,
    calls: int,
    tokens: int | None = None,
    candidates: int = 12,
    keep: int = 4,
    examples: int = 16,
    score: Measure = "choice",
    bonus: float = 1.0,
    longest: int = 64,
    proposer: Proposer = "edits",
    phrases: Sequence[str] = PHRASES,
) -> Method:
    """Search a text that stands before every row, by scores alone, within a budget.

    `prompt` is where it starts. A round scores `candidates` prompts of at most `longest` tokens, `keep` of them the
    best so far and the rest new, on `examples` examples of each silo; `bonus` is how much is forgiven for having been
    seen little. `calls` and `tokens` are the budget of all silos and rounds together; a silo that sends no reply, or
    whose model does not answer, is counted as having spent its share of the round. When the budget is spent, the
    remaining rounds ask nobody. Requests to an API have a budget of their own beside it: `endpoint.tokens` and others.
    """
    require_no_transforms("text_prompt", ground)
    whole = new_budget(calls, tokens)
    tried, mending = trying(ground, score), proposer == "critique"
    if mending and not asked_of(ground, "text_prompt").words:
        raise FedllmError("algorithm.proposer 'critique' reads wrong answers, which a task without words has none of.")
    if tokens is not None and not ground.tokenizer:
        raise FedllmError(
            "algorithm.tokens is counted by the model's tokenizer, which an API does not give; set endpoint.tokens."
        )
    if not 1 <= keep < candidates:
        raise FedllmError(
            f"algorithm.keep is {keep} and candidates {candidates}; keep at least 1 and fewer than those."
        )
    if examples < 1:
        raise FedllmError(f"algorithm.examples is {examples}; it must be above 0.")
    require_fits(ground, tried.length(prompt), longest)
    propose = proposing(ground, proposer, phrases)
    # A critique looks at the examples once more, and takes two calls to write.
    most_calls = candidates * examples + (examples + 2) * mending

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        texts = texts_in("candidates", request.tensors, most=candidates)
        allowed = Budget(int(request.scalars["calls"]), int(request.scalars["tokens"]))
        chosen = drawn(silo.data["train"], examples, derive(silo.seed, "round", request.round))
        found = tried.score(silo, texts, chosen, allowed)
        told, spent, answered = {"scores": found.scores_P.float()}, found.spent, True
        if mending:
            best, seed = texts[int(found.scores_P.argmin())], derive(silo.seed, "critique", request.round)
            own = drawn(silo.data["questions"], examples, derive(silo.seed, "round", request.round))
            made = mended(ground.speaker(silo), asked_of(ground, ""), best, own, seed, allowed.minus(*spent))
            told |= as_tensors("new", [text for text in made.texts if fits(text)])
            spent, answered = Budget(spent.calls + made.spent.calls, spent.tokens + made.spent.tokens), made.answered
        scalars = {
            "train_loss": float(found.scores_P.mean()),
            "calls": float(spent.calls),
            "tokens": float(spent.tokens),
        }
        if not answered:
            scalars["critique_unanswered"] = 1.0
        return Reply(request.client, request.round, told, float(found.examples), scalars), {}

    def fits(text: str) -> bool:
        return bool(text.strip()) and tried.length(text) <= longest

    def algorithm(select: Select) -> Algorithm:
        asked = {name for number in range(ground.rounds) for name in select(number)}
        # A silo on its own has its share of what all have together.
        mine = (
            whole
            if len(asked) == len(ground.names)
            else Budget(*(value * len(asked) // len(ground.names) for value in whole))
        )

        if mine.calls // max(1, len(select(0))) < candidates:
            raise FedllmError(
                f"algorithm.calls is {calls}, which pays for no round of {candidates} candidates at "
                f"{len(select(0))} silos; raise it, or ask fewer silos a round with select.name = 'fixed_size'."
            )

        def init(params: Tensors) -> State:
            return State(0, params, {"left": mine.tensor()}, {})

        def server(state: State, exchange: Exchange) -> tuple[State, Report]:
            left = kept_budget(state.optimiser["left"])
            pool, names = pool_in(state.params), list(select(state.round))
            offered = texts_in("offered", state.params) if mending else []
            pool, left, problem = filled(pool, offered, left, state.round)
            pool, left, report, offered = scored(pool, names, state.round, left, exchange)
            if problem:
                report["proposer_unanswered"] = problem
            kept = pool.take(pool.bound(-bonus)[:keep])
            best = kept.take(kept.bound(bonus)[:1])
            told: dict[str, float | str] = {
                "prompt": best.texts[0],
                "best_score": float(best.score_P[0]),
                "calls_spent": mine.calls - left.calls,
                "calls_left": left.calls,
                "tokens_spent": mine.tokens - left.tokens,
            }
            if tokens is not None:
                told["tokens_left"] = left.tokens
            report |= told
            params = {**pool_tensors(kept), **as_tensors("prompt", best.texts)}
            if mending:
                params |= as_tensors("offered", offered)
            return State(state.round + 1, params, {"left": left.tensor()}, {}), report

        def filled(pool: Pool, offered: list[str], left: Budget, number: int) -> tuple[Pool, Budget, str]:
            """Return the pool with new prompts, the silos' first, and why the server's model wrote none."""
            wanted, problem = candidates - len(pool.texts), ""
            ranked = [pool.texts[place] for place in pool.bound(bonus)]
            asks = proposer in ("model", "both")
            room = min(wanted, left.calls, left.tokens // (longest + PARAPHRASE)) if asks else wanted
            made = Proposed([])
            try:
                made = propose(ranked, room, derive(ground.seed, "propose", number)) if room else made
            except Unanswered as error:
                # What it took is not known, so that the most that it can be is counted.
                made, problem = Proposed([], room, room * (longest + PARAPHRASE)), str(error)
            texts = [text for text in [*offered, *made.texts] if fits(text)]
            new = [text for text in dict.fromkeys(texts) if text not in pool.texts][:wanted]
            blank = torch.zeros(len(new), dtype=torch.float64)
            pool = Pool([*pool.texts, *new], torch.cat([pool.score_P, blank]), torch.cat([pool.seen_P, blank]))
            return pool, left.minus(made.calls, made.tokens), problem

        def scored(
            pool: Pool, names: Sequence[str], number: int, left: Budget, exchange: Exchange
        ) -> tuple[Pool, Budget, dict[str, float | str], list[str]]:
            share, report = left.share(len(names)), dict[str, float | str]()
            # No more than a round can take, so that a silo that is silent does not cost all that is left.
            share = share._replace(calls=min(share.calls, most_calls))
            if share.calls < len(pool.texts) or not names:
                return pool, left, {"clients": 0, "asked": 0}, []
            scalars = {"calls": float(share.calls), "tokens": float(min(share.tokens, 1 << 52))}
            tensors = as_tensors("candidates", pool.texts)
            like = {"scores": torch.empty(len(pool.texts), device="meta")}
            waiting, total_P = set(names), pool.score_P * pool.seen_P
            seen_P, answers, offers = pool.seen_P.clone(), dict[str, Reply](), dict[str, list[str]]()
            for reply in exchange([Request(name, number, "train", tensors, scalars) for name in names]):
                try:
                    require_answered(reply)
                    new, reply = without_texts(reply) if mending else ([], reply)
                    accept(reply, number, waiting, (), [like])
                    if reply.weight > examples:
                        raise Refused(f"it says that it scored {reply.weight:g} examples")
                except Refused as problem:
                    report[f"dropped.{reply.client}"] = str(problem)
                    continue
                waiting.discard(reply.client)
                answers[reply.client], offers[reply.client] = reply, new
            for name in names:
                # In one order whatever the order of arrival, so that the sums have the same bits.
                if answer := answers.get(name):
                    total_P = total_P + answer.weight * answer.tensors["scores"].double().cpu()
                    seen_P = seen_P + answer.weight
                    report |= {f"{key}.{name}": value for key, value in answer.scalars.items()}
                left = left.minus(*charged(answer, share))
            for name in sorted(waiting):
                report.setdefault(f"dropped.{name}", "no reply")
            report |= {"clients": len(answers), "asked": len(names)}
            if not answers:
                return pool, left, report, []
            score_P = total_P / seen_P
            report["score"] = float(score_P.mean())
            offered = [text for name in names for text in offers.get(name, [])]
            return Pool(pool.texts, score_P, seen_P), left, report, offered

        steps = [
            Step("server", f"propose {candidates} prompts by {proposer}"),
            Step("silo", "score the candidates" + ", mend the best by what it gets wrong" * mending),
            Step("server", f"keep {keep} by their scores"),
        ]
        wire = {"scores": torch.empty(candidates, device="meta")}
        if mending:
            wire["new.utf8"] = torch.empty(6 * longest, dtype=torch.uint8, device="meta")
        down = {"candidates.utf8": torch.empty(6 * longest * candidates, dtype=torch.uint8, device="meta")}
        return Algorithm(
            init, ground.guard(sitting_out(client)), server, None, steps, lambda params: wire, lambda params: down
        )

    def ticks(data: Dataset) -> int:
        if not ground.tokenizer:
            return 1
        return 1 + -(-candidates * min(examples, len(data["train"])) // ground.batch_size)

    whole_tokens = "any number of tokens" if tokens is None else f"{tokens:,} tokens"
    return Method(
        "text_prompt",
        {
            **pool_tensors(Pool([prompt], torch.zeros(1).double(), torch.zeros(1).double())),
            **as_tensors("prompt", [prompt]),
            **(as_tensors("offered", []) if mending else {}),
        },
        algorithm,
        tried.evaluator,
        lambda model, shown, folder: write_prompt(ground, shown, folder),
        shown=lambda state: {name: value for name, value in state.params.items() if name.startswith("prompt.")},
        steps=ticks,
        weights=False,
        notes=[
            ("search", f"{candidates} prompts a round by {proposer}, on {examples} examples of a silo"),
            ("budget", f"{calls:,} calls (a prompt with an example) and {whole_tokens}; evaluation is not in it"),
            ("leaves", f"{candidates} scores a silo and round; " + ("one edited prompt" if mending else "no text")),
        ],
    )


def charged(reply: Reply | None, share: Budget) -> Budget:
    """Return what a silo is charged: what it says, its whole share where it says nothing that can be believed."""
    said = [reply.scalars.get(key, -1.0) for key in ("calls", "tokens")] if reply else [-1.0, -1.0]
    return Budget(*(int(value) if 0 <= value <= most else most for value, most in zip(said, share, strict=True)))


def pool_in(tensors: Tensors) -> Pool:
    """Return the pool of a state."""
    return Pool(texts_in("pool", tensors), tensors["pool.score"], tensors["pool.seen"])


def pool_tensors(pool: Pool) -> dict[str, Tensor]:
    """Return a pool as it is kept."""
    return {**as_tensors("pool", pool.texts), "pool.score": pool.score_P, "pool.seen": pool.seen_P}


def without_texts(reply: Reply) -> tuple[list[str], Reply]:
    """Return the one prompt that a silo may add, if it did, and its reply without it."""
    new = texts_in("new", reply.tensors, most=1, longest=1 << 14)
    rest = {name: value for name, value in reply.tensors.items() if not name.startswith("new.")}
    return new, reply._replace(tensors=rest)


def proposing(ground: Ground, proposer: Proposer, phrases: Sequence[str]) -> Propose:
    """Return where the server's new prompts come from."""
    change = edits(phrases)
    if proposer in ("edits", "critique"):
        return change
    say = paraphrases(writer(ground))
    if proposer == "model":
        return say

    def mixed(best: Sequence[str], wanted: int, seed: int) -> Proposed:
        said = say(best, wanted // 2, seed)
        return said._replace(texts=said.texts + change(best, wanted - len(said.texts), seed).texts)

    return mixed


def require_fits(ground: Ground, length: int, longest: int) -> None:
    """Refuse a prompt to start from that is nothing or too long, for itself or for the model."""
    if not 1 <= length <= longest:
        raise FedllmError(f"algorithm.prompt has {length} tokens; write 1 to {longest}, or raise algorithm.longest.")
    config = getattr(plain(ground.model), "config", None) if ground.tokenizer else None
    most = getattr(config, "max_position_embeddings", None)
    if most and longest >= most:
        raise FedllmError(f"algorithm.longest is {longest}, but the model sees {most} tokens at once; lower it.")


def write_prompt(ground: Ground, shown: Tensors, folder: Path) -> None:
    """Write the prompt with what is needed to use it elsewhere."""
    (text,) = texts_in("prompt", shown, most=1)
    folder.mkdir(parents=True, exist_ok=True)
    whole = f"{text}\n{ground.task.template}" if ground.task.template else text
    told = {
        "prompt": text,
        "template": whole,
        "words": list(ground.task.words),
        "call": {"prompt": whole.replace("{text}", "YOUR TEXT"), "max_tokens": 8, "temperature": 0},
    }
    (folder / "prompt.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
