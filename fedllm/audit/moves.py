"""The discrete half of a descent on gradients: tokens change places, and what fits better stays.

Balunovic et al. 2022 (LAMP, arXiv:2202.08827), section 4: gradient matching finds tokens sooner than their order, so a
text's tokens are swapped, moved, and moved together, and of all these texts the one is kept whose mismatch plus
weighted loss by a language model is the lowest; the model under attack is itself that language model. A fifth move,
which the paper has not, puts another candidate in a token's place: one of those offered.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

WIDE = 32
"""Moves that are looked at side by side."""


class Drafted(NamedTuple):
    """A text as places in a list of candidates."""

    tokens: Sequence[int]
    came: Sequence[int | None]
    """Where each token stood before; None where another one was put."""
    score: float


def rearranged(
    tokens: Sequence[int],
    offered: Sequence[tuple[int, int]],
    score: Callable[[Sequence[Sequence[int]]], Sequence[float]],
    rounds: int,
    draw: random.Random,
) -> Drafted:
    """Try so many rounds of moves side by side, go on from the best wherever it lowers the score; return the last.

    `offered` are places and the candidates that may be put there.
    """
    best = Drafted(list(tokens), list(range(len(tokens))), score([tokens])[0])
    for _ in range(rounds):
        pairs = list(zip(best.tokens, best.came, strict=True))
        texts = [moved(pairs, offered, draw) for _ in range(WIDE)]
        scores = score([[token for token, _ in text] for text in texts])
        lowest = min(range(WIDE), key=scores.__getitem__)
        if scores[lowest] < best.score:
            text = texts[lowest]
            best = Drafted([token for token, _ in text], [place for _, place in text], scores[lowest])
    return best


Pair = tuple[int, int | None]


def moved(text: list[Pair], offered: Sequence[tuple[int, int]], draw: random.Random) -> list[Pair]:
    """Return a text after one move drawn at random: a swap, a token or a stretch elsewhere, a turn, another token."""
    # As many replacements as there are swaps and moves of one token.
    kind, length = draw.randrange(6 if offered else 4), len(text)
    first, second = sorted(draw.sample(range(length), 2))
    if kind == 0:
        text = [*text]
        text[first], text[second] = text[second], text[first]
        return text
    if kind == 1:
        there = first if draw.random() < 0.5 else second
        rest = text[:there] + text[there + 1 :]
        here = first + second - there
        return [*rest[:here], text[there], *rest[here:]]
    if kind == 2:
        rest = text[:first] + text[second:]
        here = draw.randrange(len(rest) + 1)
        return [*rest[:here], *text[first:second], *rest[here:]]
    if kind == 3:
        return text[second:] + text[:second]
    place, token = draw.choice(offered)
    return [*text[:place], (token, None), *text[place + 1 :]]
