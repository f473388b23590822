"""How much of a text was had back: the share of its tokens, ROUGE-L, and what guessing gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


def token_recall(named: Sequence[int], text: Sequence[int]) -> float:
    """Return the share of a text's different tokens that are among those named.

    Both the attack and the guess may name as many as the text has, so recall is precision too.

    >>> token_recall([5, 6, 7], [5, 9, 5, 7])
    0.6666666666666666
    """
    there = set(text)
    return len(there & set(named[: len(there)])) / len(there)


def by_frequency(texts: Iterable[Sequence[int]]) -> list[int]:
    """Return tokens from the most to the least common: what one names who has seen nothing but other text.

    >>> by_frequency([[1, 2, 2], [2, 3, 1]])
    [2, 1, 3]
    """
    counts = Counter(token for text in texts for token in text)
    return [token for token, _ in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))]


def rouge_l(found: Sequence[int], text: Sequence[int]) -> float:
    """Return ROUGE-L's F1 (Lin 2004): twice the longest common subsequence over both lengths.

    >>> rouge_l([1, 2, 3], [1, 9, 3, 4, 5])
    0.5
    """
    if not found or not text:
        return 0.0
    before = [0] * (len(text) + 1)
    for token in found:
        now = [0]
        for place, other in enumerate(text):
            now.append(before[place] + 1 if token == other else max(before[place + 1], now[-1]))
        before = now
    return 2 * before[-1] / (len(found) + len(text))
