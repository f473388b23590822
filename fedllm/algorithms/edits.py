"""New text prompts out of old ones: phrases deleted, swapped, added, and paraphrases by a model.

GrIPS, Prasad et al. 2023 (arXiv:2203.07281), section 3: edits of an instruction at the level of phrases. Its phrases
are those of a parser, these are what stands between punctuation marks, or runs of words where nothing does; and what is
added comes from a list, not from what was deleted before. No edit sees anything but the prompts and that list.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

RUN = 4
"""Words of a phrase that no punctuation ends."""


class Proposed(NamedTuple):
    """New prompts and what they took: calls of a model, and its tokens."""

    texts: list[str]
    calls: int = 0
    tokens: int = 0


Propose: TypeAlias = Callable[[Sequence[str], int, int], Proposed]
"""From the best prompts (best first), how many are wanted, and a seed to new ones, perhaps fewer than wanted."""


def phrases_of(text: str) -> list[str]:
    """Split a text into phrases, of which it is the concatenation with single spaces.

    >>> phrases_of("Read it well. Is the review of the film good, or bad?")
    ['Read it well.', 'Is the review of', 'the film good,', 'or bad?']
    """
    found = []
    for sentence in re.findall(r"[^\s.,;:!?][^.,;:!?]*[.,;:!?]*", text):
        words = sentence.split()
        found += [" ".join(words[at : at + RUN]) for at in range(0, len(words), RUN)]
    return found


def edits(bank: Sequence[str]) -> Propose:
    """Propose prompts with a phrase deleted, swapped with another, or added from the bank."""

    def propose(best: Sequence[str], wanted: int, seed: int) -> Proposed:
        draw, found = random.Random(seed), list[str]()
        for _ in range(20 * wanted):
            if len(found) == wanted:
                break
            # The better a prompt, the more often it is edited.
            parent = best[min(int(draw.expovariate(1.0)), len(best) - 1)]
            child = parent
            for _ in range(draw.choice((1, 1, 2))):
                child = edited(child, bank, draw)
            if child and child not in best and child not in found:
                found.append(child)
        return Proposed(found)

    return propose


def edited(text: str, bank: Sequence[str], draw: random.Random) -> str:
    """Return the text after one edit at random."""
    phrases = phrases_of(text)
    kinds = ["delete", "swap"] if len(phrases) > 1 else []
    kind = draw.choice([*kinds, "add", "add"] if bank else kinds or ["keep"])
    if kind == "delete":
        del phrases[draw.randrange(len(phrases))]
    elif kind == "swap":
        one, other = draw.sample(range(len(phrases)), 2)
        phrases[one], phrases[other] = phrases[other], phrases[one]
    elif kind == "add":
        phrases.insert(draw.randint(0, len(phrases)), draw.choice(list(bank)))
    return " ".join(phrases)


def paraphrases(write: Callable[[str, int], tuple[str, int]]) -> Propose:
    """Propose what a model writes when it is asked to say a prompt in other words (APE, arXiv:2211.01910, section 3.1).

    `write(question, seed)` is the model, here or anywhere: it returns what it wrote and the tokens that took.
    """

    def propose(best: Sequence[str], wanted: int, seed: int) -> Proposed:
        found, tokens = list[str](), 0
        for number in range(wanted):
            text, used = write(QUESTION.format(prompt=best[number % len(best)]), seed + number)
            tokens += used
            found.append(" ".join(text.strip().strip('"').split()))
        return Proposed([text for text in dict.fromkeys(found) if text and text not in best], wanted, tokens)

    return propose


QUESTION = "Write the following instruction in other words, in one or two sentences.\n\nInstruction: {prompt}"
"""What a model is asked for a paraphrase."""
