"""Answers as text: the number or the words that are meant, and whether two of them are the same."""

from __future__ import annotations

import re
import string
from decimal import Decimal

NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)-?\.\d+")
MARK = "####"
"""What stands before the final answer in GSM8K and those who followed it."""


def matches(written: str, answer: str) -> bool:
    """Say whether what was written gives the answer: the same number, or the same words where it is none.

    >>> matches("She pays $1,051.00 in all.", "1051"), matches("5 - 3 = 2\\n#### 2 apples for 4", "2")
    (True, True)
    >>> matches("The Eiffel tower!", "Eiffel Tower"), matches("about 3", "three")
    (True, False)
    """
    gold = answer.partition(MARK)[2] or answer
    wanted = NUMBER.fullmatch(plain_signs(gold).strip())
    if wanted:
        return last_number(written) == value(wanted.group())
    return same_words(written.partition(MARK)[2] or written) == same_words(gold)


def last_number(text: str) -> Decimal | None:
    """Return the first number after `####` if there is one, else the last number of the text.

    >>> last_number("He had 3, then 1,000.50."), last_number("#### -4.0 of 9"), last_number("none")
    (Decimal('1000.50'), Decimal('-4.0'), None)
    """
    marked = NUMBER.search(plain_signs(text.partition(MARK)[2]))
    if marked:
        return value(marked.group())
    found = NUMBER.findall(plain_signs(text))
    return value(found[-1]) if found else None


def plain_signs(text: str) -> str:
    """Write every minus as a hyphen, and before the dollar sign."""
    return text.replace("\N{MINUS SIGN}", "-").replace("$-", "-$")


def value(number: str) -> Decimal:
    """Return a number without its commas and dollar sign; 2 and 2.0 are equal."""
    return Decimal(number.replace(",", "").replace("$", ""))


def same_words(text: str) -> str:
    """Lower the case and drop punctuation, articles and extra spaces, as SQuAD's evaluation does."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def final(text: str) -> str:
    """Return an answer in one spelling: its number if it has one, else its words.

    >>> final("She has 3 + 4 = 7.0 apples."), final("#### 1,200 m"), final("The Eiffel Tower!")
    ('7', '1200', 'eiffel tower')
    """
    number = last_number(text)
    if number is not None:
        return format(number.normalize(), "f")
    return same_words(text.partition(MARK)[2] or text)
