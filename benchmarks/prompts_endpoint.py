"""How far scores that come through the served endpoint are from those in process: the largest difference in nats."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fedllm.core.seeds import generator
from fedllm.evaluation.speaker import in_process
from fedllm.silo.endpoint import Address, Endpoint
from fedllm.silo.models import SMOLLM2, load_model, load_tokenizer
from fedllm.silo.objective import causal_loss

TEXTS = (
    "a gorgeous , witty , seductive movie .",
    "the plot is paper-thin and the jokes fall flat .",
    "naïve café-goers will love it ; everyone else : beware — 2½ stars .",
    "it's so laddish and juvenile , only teenage boys could possibly find it funny .",
    "an unexpectedly moving film about two brothers , one house , and the sea .",
)
PROMPTS = ("", "Is this review good or bad?\n", "You are a film critic. Answer with one word.\n\n")
WORDS = (" positive", " negative", " terrible", " wonderful", " so-so, all in all")


def endpoint_error(model: str = SMOLLM2) -> dict[str, float | int]:
    """Score prompts with label words at the endpoint and in process; return the largest and the mean difference."""
    pairs = [(f"{prompt}Review: {text}\nSentiment:", word) for prompt in PROMPTS for text in TEXTS for word in WORDS]
    with served(model) as url:
        endpoint = Endpoint(Address(url, name_of(model), timeout=600))
        endpoint.check()
        there = endpoint.score(shuffled(pairs))
        endpoint.close()
    tokenizer = load_tokenizer(model)
    here = in_process(load_model(model), tokenizer, causal_loss()).score(shuffled(pairs))
    differences = [abs(a.total - b.total) for a, b in zip(there, here, strict=True)]
    same = sum(a.tokens == b.tokens for a, b in zip(there, here, strict=True))
    return {
        "endpoint_max_error": max(differences),
        "endpoint_mean_error": sum(differences) / len(differences),
        "endpoint_scored": len(pairs),
        "endpoint_same_tokens": same,
    }


def shuffled(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the pairs in another order, so that both sides batch them differently from how they were made."""
    import torch

    return [pairs[place] for place in torch.randperm(len(pairs), generator=generator(0, "pairs")).tolist()]


def name_of(model: str) -> str:
    """Return the name by which the endpoint knows a model."""
    return model.rstrip("/").rpartition("/")[2]


@contextmanager
def served(model: str) -> Iterator[str]:
    """Serve a model in a process of its own, as a user would; yield its URL."""
    command = [sys.executable, "-m", "fedllm", "serve", model, "--port", "0", "--dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = next((found for line in process.stdout if (found := re.search(r"http://\S+", line))), None)
        if found is None:
            raise RuntimeError("the endpoint did not start")
        yield found.group()
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    import json

    print(json.dumps(endpoint_error()))
