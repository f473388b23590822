"""Rules that tell running text from what is left over of web pages: Gopher's.

Rae et al. 2021 (arXiv:2112.11446), section A1.1: quality filtering and repetition removal with the thresholds of
table A1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedllm.silo.cleaning import Columns, Row, Step, dropping, text_of

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))

BULLETS = ("•", "‣", "-", "*", "●")

TOP_RUNS = {2: 0.20, 3: 0.18, 4: 0.16}
"""Words of a run -> share of the characters that the most frequent such run may have."""

REPEATED_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Words of a run -> share of the characters that may lie in runs that were there before."""


def quality(
    text: Columns = "text",
    min_words: int = 50,
    max_words: int = 100_000,
    min_word_length: float = 3.0,
    max_word_length: float = 10.0,
    max_symbols: float = 0.1,
    max_bullets: float = 0.9,
    max_ellipses: float = 0.3,
    min_letters: float = 0.8,
    stop_words: int = 2,
) -> Step:
    """Drop texts that are too short or long, or whose words are not like words.

    Lengths are means in characters; `max_symbols` is `#` and ellipses a word; `max_bullets` and `max_ellipses` are
    shares of the lines that start or end so; `min_letters` is the share of words with a letter; `stop_words` are
    the English ones of {the, be, to, of, and, that, have, with} that must be there (0 for other languages).
    """
    settings = dict(locals())

    def reason(row: Row) -> str | None:
        said = text_of(row, text)
        words, lines = said.split(), said.splitlines() or [""]
        if not words or len(words) < min_words:
            return "too short"
        if len(words) > max_words:
            return "too long"
        if not min_word_length <= sum(map(len, words)) / len(words) <= max_word_length:
            return "word length"
        if (said.count("#") + said.count("...") + said.count("…")) / len(words) > max_symbols:
            return "symbols"
        if sum(line.lstrip().startswith(BULLETS) for line in lines) / len(lines) > max_bullets:
            return "bullets"
        if sum(line.rstrip().endswith(("...", "…")) for line in lines) / len(lines) > max_ellipses:
            return "ellipses"
        if sum(any(map(str.isalpha, word)) for word in words) / len(words) < min_letters:
            return "few letters"
        if stop_words and len(STOP_WORDS.intersection(map(str.lower, words))) < stop_words:
            return "no stop words"
        return None

    return dropping("quality", reason, settings)


def repetition(text: Columns = "text") -> Step:
    """Drop texts that repeat themselves: lines, paragraphs, or runs of 2 to 10 words."""

    def reason(row: Row) -> str | None:
        said = text_of(row, text)
        for what, pieces in (("lines", said.splitlines()), ("paragraphs", said.split("\n\n"))):
            count, characters = repeated([piece.strip() for piece in pieces if piece.strip()])
            if count > 0.3 or characters > 0.2:
                return f"repeated {what}"
        words = said.split()
        whole = sum(map(len, words))
        if any(top_run(words, size) > most * whole for size, most in TOP_RUNS.items()):
            return "one run of words"
        if any(repeated_runs(words, size) > most * whole for size, most in REPEATED_RUNS.items()):
            return "repeated words"
        return None

    return dropping("repetition", reason, {"text": text})


def repeated(pieces: Sequence[str]) -> tuple[float, float]:
    """Return the shares of pieces, and of their characters, that were there before.

    >>> repeated(["ab", "c", "ab", "d"])
    (0.25, 0.3333333333333333)
    """
    if not pieces:
        return 0.0, 0.0
    again = [(count - 1, len(piece)) for piece, count in Counter(pieces).items()]
    characters = sum(count * length for count, length in again) / sum(map(len, pieces))
    return sum(count for count, _ in again) / len(pieces), characters


def top_run(words: Sequence[str], size: int) -> int:
    """Return the characters in the most frequent run of `size` words, 0 where none is there twice."""
    runs = Counter(zip(*(words[start:] for start in range(size)), strict=False))
    most = max(runs.values(), default=0)
    return most * max(sum(map(len, run)) for run, count in runs.items() if count == most) if most > 1 else 0


def repeated_runs(words: Sequence[str], size: int) -> int:
    """Return the characters of the words in runs of `size` words that were there before, each word once.

    >>> repeated_runs("a b c a b c".split(), 2)
    3
    """
    seen: set[tuple[str, ...]] = set()
    total, counted = 0, 0
    for start in range(len(words) - size + 1):
        run = tuple(words[start : start + size])
        if run in seen:
            total += sum(map(len, words[max(start, counted) : start + size]))
            counted = start + size
        seen.add(run)
    return total
