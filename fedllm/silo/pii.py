"""Personal data in rows: addresses, numbers and accounts that have a form, found by Presidio's pattern recognisers.

They need no language model, and so do not find names, places or street addresses; a form that they do not know stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

from fedllm.core.errors import FedllmError, nearest
from fedllm.silo.cleaning import Columns, Note, Row, Step
from fedllm.silo.sources import require_columns

RECOGNIZERS = {
    "EMAIL_ADDRESS": "EmailRecognizer",
    "PHONE_NUMBER": "PhoneRecognizer",
    "CREDIT_CARD": "CreditCardRecognizer",
    "IBAN_CODE": "IbanRecognizer",
    "IP_ADDRESS": "IpRecognizer",
    "US_SSN": "UsSsnRecognizer",
    "URL": "UrlRecognizer",
    "CRYPTO": "CryptoRecognizer",
    "DATE_TIME": "DateRecognizer",
    "UK_NHS": "NhsRecognizer",
    "MEDICAL_LICENSE": "MedicalLicenseRecognizer",
}
"""Kind of data -> Presidio's class for it."""

USUAL = ("EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "US_SSN")


class Find(NamedTuple):
    """A place in a text and what is there."""

    start: int
    end: int
    kind: str
    score: float


def pii(
    text: Columns = "text",
    kinds: Sequence[str] = USUAL,
    score: float = 0.4,
    phones: Literal["valid", "possible"] = "valid",
) -> Step:
    """Put `<EMAIL_ADDRESS>` and the like in the place of personal data; each place is counted under its kind.

    `score` is Presidio's, from 0 to 1: of a form alone, without the words around it. `phones` that are `possible`
    are all digits that could be dialled, which hides more numbers than telephones have.
    """
    for kind in kinds:
        if kind not in RECOGNIZERS:
            raise FedllmError(f"cleaning.pii: kinds has {kind!r}; {nearest(kind, RECOGNIZERS)}")
    columns = [text] if isinstance(text, str) else list(text)

    def run(rows: Iterable[Row], note: Note) -> Iterator[Row]:
        recognizers = [recognizer(kind, phones) for kind in kinds]
        for row in rows:
            require_columns([row], columns, "A row to clean")
            changed = {name: scrubbed(str(row[name]), recognizers, score, note) for name in columns}
            yield {**row, **changed}

    return Step("pii", run, {"text": text, "kinds": list(kinds), "score": score, "phones": phones})


def scrubbed(text: str, recognizers: Sequence[Any], score: float, note: Note) -> str:
    """Return the text with its finds replaced."""
    pieces, place = [], 0
    for find in apart(found(text, recognizers, score)):
        pieces += [text[place : find.start], f"<{find.kind}>"]
        place = find.end
        note(find.kind)
    return "".join([*pieces, text[place:]])


def found(text: str, recognizers: Sequence[Any], score: float) -> list[Find]:
    """Return what the recognisers find, places that overlap among them."""
    results = (each for one in recognizers for each in one.analyze(text, one.supported_entities, None))
    return [Find(each.start, each.end, each.entity_type, each.score) for each in results if each.score >= score]


def apart(finds: Sequence[Find]) -> list[Find]:
    """Join finds that overlap, so that no part of one is left; the kind is that of the surest, then the longest.

    >>> [find[:3] for find in apart([Find(0, 5, "URL", 0.5), Find(3, 9, "EMAIL_ADDRESS", 1.0), Find(12, 14, "URL", 1)])]
    [(0, 9, 'EMAIL_ADDRESS'), (12, 14, 'URL')]
    """
    joined: list[list[Find]] = []
    end = -1
    for find in sorted(finds):
        if find.start < end:
            joined[-1].append(find)
        else:
            joined.append([find])
        end = max(end, find.end)
    best = [min(group, key=lambda find: (-find.score, find.start - find.end, find.kind)) for group in joined]
    return [
        Find(min(find.start for find in group), max(find.end for find in group), kind.kind, kind.score)
        for group, kind in zip(joined, best, strict=True)
    ]


def recognizer(kind: str, phones: str) -> Any:
    """Return Presidio's recogniser of one kind of data."""
    try:
        from presidio_analyzer import predefined_recognizers
    except ModuleNotFoundError as error:
        raise FedllmError("cleaning.pii needs the package presidio-analyzer; run: pip install 'fedllm[pii]'") from error
    if kind == "PHONE_NUMBER":
        return predefined_recognizers.PhoneRecognizer(leniency=1 if phones == "valid" else 0)
    if kind == "EMAIL_ADDRESS":
        return email_recognizer(predefined_recognizers.EmailRecognizer)
    return getattr(predefined_recognizers, RECOGNIZERS[kind])()


def email_recognizer(base: type[Any]) -> Any:
    """Return the recogniser of mail addresses with the list of domains that is installed; its own asks the network."""
    from tldextract import TLDExtract

    domains = TLDExtract(suffix_list_urls=(), cache_dir=None)

    class Offline(base):
        def validate_result(self, pattern_text: str) -> bool:
            return bool(domains(pattern_text).domain and domains(pattern_text).suffix)

    return Offline()
