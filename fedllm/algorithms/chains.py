"""Chains of thought that silos pool: Fed-DP-CoT (Liu, Pang and Fan 2023, arXiv:2304.13911).

"DP" is for questions with Different Parameters; it is not differential privacy, and none is claimed. Silos think about
the same public questions; chains whose answer they agree on are shown as examples before a new question, with the
warning that they may be wrong.

Other than in the paper, where a server has all questions, the silos' own ones stay with them. A silo may think with
examples of its own (`own`), which is how what it knows comes into the pool; its chains are looked through for copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fedllm.algorithms.asking import asked_of, evaluating, gathered, prompting, require_counts
from fedllm.algorithms.method import Ground, Method, require_no_transforms
from fedllm.algorithms.prompt_files import write_prompt
from fedllm.algorithms.self_consistency import STEPS, Thought, agreed, think
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.seeds import derive, generator
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.silo.answers import final
from fedllm.silo.asking import Measured, drawn, measure

WARNING = "The examples may have mistakes; think for yourself."

LONGEST = 2000
"""Characters of a chain of thought that travels."""


def fed_dp_cot(
    ground: Ground,
    *,
    public: str,
    demonstrations: int = 4,
    batch: int = 8,
    samples: int = 3,
    own: int = 0,
    agreement: float = 0.5,
    temperature: float = 0.7,
    tokens: int = 200,
) -> Method:
    """Pool chains of thought on `batch` questions of the `public` file a round, and show the best agreed upon.

    `own` is how many examples of its own a silo thinks with; the answers of the public file are not looked at.
    """
    require_no_transforms("fed_dp_cot", ground)
    require_counts(demonstrations=demonstrations, batch=batch, samples=samples, tokens=tokens)
    asking = asked_of(ground, "fed_dp_cot")
    texts = list(dict.fromkeys(asking.texts(ground.rows(public), public))) if public else []
    if public and len(texts) < batch:
        raise FedllmError(f"algorithm.public '{public}' has {len(texts)} questions; give it {batch} or lower batch.")

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        asked = texts_in("asked", request.tensors)
        shown = drawn(silo.data["questions"], own, silo.seed, "shown")
        before = "".join(f"{q.text}\n\n{q.answer}\n\n\n" for q in shown)
        seed = derive(silo.seed, "think", request.round)
        thoughts = think(ground.speaker(silo), asked, before, samples, temperature, tokens, seed)
        silo.tick(0)
        told = {
            **as_tensors("chains", [thought.chain[:LONGEST] for thought in thoughts]),
            **as_tensors("answers", [thought.answer[:64] for thought in thoughts]),
        }
        return Reply(request.client, request.round, told, float(len(asked))), silo.memory

    def server(select: Select, state: State, exchange: Exchange) -> tuple[State, Report]:
        order = torch.randperm(
            len(texts), generator=generator(ground.seed, "public", state.round * batch // len(texts))
        )
        places = [int(order[(state.round * batch + k) % len(texts)]) for k in range(batch)]
        asked = [texts[place] for place in places]
        requests = [Request(name, state.round, "train", as_tensors("asked", asked)) for name in select(state.round)]
        found, report = gathered(exchange, requests, lambda reply: read_thoughts(reply, batch))
        votes = {name: {k: thought.answer for k, thought in enumerate(each)} for name, each in found.items()}
        decided = agreed(votes)
        new = []
        for k, answer, share in zip(*decided, strict=True):
            chains = [each[k].chain for each in found.values() if each[k].answer == answer and each[k].chain]
            if share >= agreement and answer and chains:
                # The shortest of the chains that agree: the least room in the prompt, and the least that can be wrong.
                new.append((share, asked[k], min(chains, key=lambda chain: (len(chain), chain))))
        had = pool_in(state.params)
        fresh = [each for each in new if each[1] not in {text for _, text, _ in had}]
        best = sorted([*had, *fresh], key=lambda each: -each[0])[:demonstrations]
        report |= {"agreement": sum(decided.shares) / max(1, len(decided.shares)), "pool": float(len(best))}
        return state._replace(round=state.round + 1, params=pool_tensors(best)), report

    def prompt(pool: Sequence[tuple[float, str, str]]) -> str:
        shown = "".join(f"{text}\n\n{chain}\n\n\n" for _, text, chain in pool)
        return f"{shown}{WARNING}\n\n" if shown else ""

    def evaluated(request: Request, silo: Silo) -> Measured:
        pool = [] if request.scalars.get("base") else pool_in(request.tensors)
        speaker, tests = ground.speaker(silo), silo.data["tests"]
        thoughts = think(speaker, [q.text for q in tests], prompt(pool), 1, 0.0, tokens, silo.seed)
        right = [t.answer == final(q.answer) for t, q in zip(thoughts, tests, strict=True)]
        loss, scored = None, len(tests)
        if speaker.score is not None:
            plain = asking._replace(words=())
            told = measure(speaker, plain, [lambda text: f"{prompt(pool)}{text}\n\n{STEPS}\n"], tests)[0]
            loss, scored = told.loss, told.tokens
        return Measured(0.0, loss, sum(right) / max(1, len(right)), scored)

    def export(model: Any, learned: Tensors, folder: Path) -> None:
        pool = pool_in(learned)
        table = [{"question": text, "chain": chain, "agreement": round(share, 4)} for share, text, chain in pool]
        write_prompt(folder, f"{prompt(pool)}{{text}}\n\n{STEPS}", (), demonstrations=table)

    steps = [
        Step("server", "ask public questions"),
        Step("silo", "think"),
        Step("server", "pool chains that agree"),
    ]
    like = {**as_tensors("chains", ["x" * 4 * LONGEST] * batch), **as_tensors("answers", ["x" * 64] * batch)}
    return Method(
        "fed_dp_cot",
        pool_tensors([]),
        prompting(ground, client, server, steps, like),
        evaluating(evaluated),
        export,
        weights=False,
        notes=[
            ("sends up", f"{batch} chains of thought and answers a round ('DP': different parameters, not privacy)")
        ],
    )


def read_thoughts(reply: Reply, count: int) -> list[Thought]:
    """Return a silo's chains of thought, or raise `Refused`."""
    chains, answers = texts_in("chains", reply.tensors, count), texts_in("answers", reply.tensors, count)
    if len(chains) != count or len(answers) != count or any(len(chain) > 2 * LONGEST for chain in chains):
        raise Refused(f"its reply is not {count} chains of thought")
    return [Thought(*each) for each in zip(chains, answers, strict=True)]


def pool_tensors(pool: Sequence[tuple[float, str, str]]) -> Tensors:
    """Return pooled chains as tensors."""
    return {
        "shares": torch.tensor([share for share, _, _ in pool], dtype=torch.float32),
        **as_tensors("asked", [text for _, text, _ in pool]),
        **as_tensors("chains", [chain for _, _, chain in pool]),
    }


def pool_in(tensors: Tensors) -> list[tuple[float, str, str]]:
    """Return pooled chains, from tensors of our own."""
    shares = tensors["shares"].tolist()
    return list(zip(shares, texts_in("asked", tensors), texts_in("chains", tensors), strict=True))
