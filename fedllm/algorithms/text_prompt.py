"""Text prompts found by scores alone: candidates from the server, scored where the data is, kept by a bandit.

The loop is that of APE (Zhou et al. 2022, arXiv:2211.01910) and OPRO: propose, score, keep, propose from what was kept.
What is federated is the scoring: each silo scores the same candidates on a few of its own examples and replies one mean
a candidate, and the server keeps a running mean over silos and rounds. Which candidates stay is decided as UCB does
(Auer et al. 2002): by the mean less a bonus for what was seen little of; what is the result, by the mean plus it. With
`select = "fixed_size"` and `size = 1` one silo scores a round, as in FedOne (arXiv:2506.14929), for a fraction of the
calls.
Proposals come from edits (`edits.py`) and, if asked for, from the model's own paraphrases: neither sees a silo's text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedllm.algorithms.budget import Budget, kept_budget, new_budget
from fedllm.algorithms.edits import Propose, edits, paraphrases
from fedllm.algorithms.method import Ground, Method, require_no_transforms
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
from fedllm.silo.candidates import Measure, Reader, drawn, require_measure
from fedllm.silo.prompted import cost_of, prompt_tokens, prompted_held_out, text_scores
from fedllm.silo.reading import plain
from fedllm.silo.tasks import word_tokens
from fedllm.silo.writing import writing

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
    proposer: Literal["edits", "model", "both"] = "edits",
    phrases: Sequence[str] = PHRASES,
) -> Method:
    """Search a text that stands before every row, by scores alone, within a budget.

    `prompt` is where it starts. A round scores `candidates` prompts of at most `longest` tokens, `keep` of them the
    best so far and the rest new, on `examples` examples of each silo; `bonus` is how much is forgiven for having been
    seen little. `calls` and `tokens` are the budget of all silos and rounds together; a silo that sends no reply is
    counted as having spent its share. When it is spent, the remaining rounds ask nobody.
    """
    require_no_transforms("text_prompt", ground)
    whole = new_budget(calls, tokens)
    words = word_tokens(ground.tokenizer, ground.task)
    require_measure(score, words, plain(ground.model))
    if not 1 <= keep < candidates:
        raise FedllmError(
            f"algorithm.keep is {keep} and candidates {candidates}; keep at least 1 and fewer than those."
        )
    if examples < 1:
        raise FedllmError(f"algorithm.examples is {examples}; it must be above 0.")
    require_fits(ground, prompt, longest)
    propose = proposing(ground, proposer, phrases)

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        texts = texts_in("candidates", request.tensors, most=candidates)
        allowed = Budget(int(request.scalars["calls"]), int(request.scalars["tokens"]))
        chosen, spent = affordable(
            drawn(silo.data["train"], examples, derive(silo.seed, "round", request.round)),
            texts,
            ground.tokenizer,
            allowed,
        )
        if not chosen:
            raise FedllmError("The budget of this round does not pay for one example; raise algorithm.tokens.")
        reader = Reader(silo.model, words, ground.tokenizer.pad_token_id, ground.batch_size, silo.tick)
        scores_P = text_scores(reader, ground.tokenizer, texts, chosen, score)
        scalars = {"train_loss": float(scores_P.mean()), "calls": float(spent.calls), "tokens": float(spent.tokens)}
        return Reply(request.client, request.round, {"scores": scores_P.float()}, float(len(chosen)), scalars), {}

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
            pool, left = filled(pool, left, state.round)
            pool, left, report = scored(pool, names, state.round, left, exchange)
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
            return State(state.round + 1, params, {"left": left.tensor()}, {}), report

        def filled(pool: Pool, left: Budget, number: int) -> tuple[Pool, Budget]:
            wanted = candidates - len(pool.texts)
            ranked = [pool.texts[place] for place in pool.bound(bonus)]
            # A paraphrase is a call too, and reads and writes as much as two of the longest prompts and the question.
            room = min(left.calls, left.tokens // (4 * longest + 64)) if proposer != "edits" else wanted
            made = propose(ranked, min(wanted, room), derive(ground.seed, "propose", number)) if room else None
            texts = [text for text in (made.texts if made else []) if fits(ground, text, longest)]
            new = [text for text in dict.fromkeys(texts) if text not in pool.texts][:wanted]
            blank = torch.zeros(len(new), dtype=torch.float64)
            pool = Pool([*pool.texts, *new], torch.cat([pool.score_P, blank]), torch.cat([pool.seen_P, blank]))
            return pool, left.minus(made.calls, made.tokens) if made else left

        def scored(
            pool: Pool, names: Sequence[str], number: int, left: Budget, exchange: Exchange
        ) -> tuple[Pool, Budget, dict[str, float | str]]:
            share, report = left.share(len(names)), dict[str, float | str]()
            if share.calls < len(pool.texts) or not names:
                return pool, left, {"clients": 0, "asked": 0}
            scalars = {"calls": float(share.calls), "tokens": float(min(share.tokens, 1 << 52))}
            tensors = as_tensors("candidates", pool.texts)
            like = {"scores": torch.empty(len(pool.texts), device="meta")}
            waiting, total_P = set(names), pool.score_P * pool.seen_P
            seen_P, answers = pool.seen_P.clone(), dict[str, Reply]()
            for reply in exchange([Request(name, number, "train", tensors, scalars) for name in names]):
                try:
                    accept(reply, number, waiting, (), [like])
                    if reply.weight > examples:
                        raise Refused(f"it says that it scored {reply.weight:g} examples")
                except Refused as problem:
                    report[f"dropped.{reply.client}"] = str(problem)
                    continue
                waiting.discard(reply.client)
                answers[reply.client] = reply
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
                return pool, left, report
            score_P = total_P / seen_P
            report["score"] = float(score_P.mean())
            return Pool(pool.texts, score_P, seen_P), left, report

        steps = [
            Step("server", f"propose {candidates} prompts by {proposer}"),
            Step("silo", "score the candidates"),
            Step("server", f"keep {keep} by their scores"),
        ]
        wire = {"scores": torch.empty(candidates, device="meta")}
        down = {"candidates.utf8": torch.empty(6 * longest * candidates, dtype=torch.uint8, device="meta")}
        return Algorithm(init, client, server, None, steps, lambda params: wire, lambda params: down)

    def ticks(data: Dataset) -> int:
        return 1 + -(-candidates * min(examples, len(data["train"])) // ground.batch_size)

    whole_tokens = "any number of tokens" if tokens is None else f"{tokens:,} tokens"
    return Method(
        "text_prompt",
        {
            **pool_tensors(Pool([prompt], torch.zeros(1).double(), torch.zeros(1).double())),
            **as_tensors("prompt", [prompt]),
        },
        algorithm,
        prompted_held_out(ground.tokenizer, words, batch_size=ground.batch_size),
        lambda model, shown, folder: write_prompt(ground, shown, folder),
        shown=lambda state: {name: value for name, value in state.params.items() if name.startswith("prompt.")},
        steps=ticks,
        notes=[
            ("search", f"{candidates} prompts a round by {proposer}, on {examples} examples of a silo"),
            ("budget", f"{calls:,} calls (a prompt with an example) and {whole_tokens}; evaluation is not in it"),
            ("leaves", f"{candidates} scores a silo and round; no text"),
        ],
    )


def affordable(
    examples: Sequence[Any], texts: Sequence[str], tokenizer: Any, allowed: Budget
) -> tuple[list[Any], Budget]:
    """Return as many of the examples as the budget pays for with every prompt, and what that takes."""
    chosen, spent = list[Any](), Budget(0, 0)
    for example in examples:
        more = Budget(spent.calls + len(texts), spent.tokens + cost_of(tokenizer, texts, example))
        if more.calls > allowed.calls or more.tokens > allowed.tokens:
            break
        chosen, spent = [*chosen, example], more
    return chosen, spent


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


def proposing(ground: Ground, proposer: str, phrases: Sequence[str]) -> Propose:
    """Return where new prompts come from."""
    if proposer == "edits":
        return edits(phrases)
    say = paraphrases(writing(ground.model, ground.tokenizer))
    if proposer == "model":
        return say
    change = edits(phrases)

    def mixed(best: Sequence[str], wanted: int, seed: int) -> Any:
        said = say(best, wanted // 2, seed)
        return said._replace(texts=said.texts + change(best, wanted - len(said.texts), seed).texts)

    return mixed


def fits(ground: Ground, text: str, longest: int) -> bool:
    """Say whether a prompt is one: something, and not too long."""
    return bool(text.strip()) and len(prompt_tokens(ground.tokenizer, text)) <= longest


def require_fits(ground: Ground, prompt: str, longest: int) -> None:
    """Refuse a prompt to start from that is too long for itself, or with the longest row for the model."""
    if not fits(ground, prompt, longest):
        length = len(prompt_tokens(ground.tokenizer, prompt))
        raise FedllmError(f"algorithm.prompt has {length} tokens; write 1 to {longest}, or raise algorithm.longest.")
    most = getattr(plain(ground.model).config, "max_position_embeddings", None)
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
