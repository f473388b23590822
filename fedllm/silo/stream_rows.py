"""Rows of a source one after the other, for files larger than memory."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from fedllm.core.errors import FedllmError
from fedllm.silo.readers import Note, ending_of, first_line, read_file
from fedllm.silo.sources import files_in, is_saved_dataset, read_rows

PIECE = 1 << 20
"""Bytes of a text file that make one row, up to the end of a line."""

BOM = b"\xef\xbb\xbf"


NOT_UTF8 = "lines that are not UTF-8"

Bad: TypeAlias = Literal["skip", "refuse"]
"""What to do about text that is not UTF-8."""


def stream_source(source: str | Path, bad: Bad, note: Note, split: str = "train") -> Iterator[dict[str, Any]]:
    """Yield the rows of whatever `read_rows` takes, files and folders of files one row after the other."""
    path = Path(source).expanduser()
    if path.is_dir() and not is_saved_dataset(path):
        for file in files_in(path, split):
            yield from stream_rows(file, bad, note)
    elif path.is_file():
        yield from stream_rows(path, bad, note)
    else:
        yield from read_rows(source, split)


def stream_rows(path: Path, bad: Bad, note: Note) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file; of `.jsonl` and `.txt`, also with `.gz`, only one is in memory at a time.

    A text file of more than a mebibyte is several rows. Lines that are not UTF-8 are counted as such and skipped, or
    refused with their number. Files of other kinds are read as a whole.
    """
    reader = {".jsonl": json_rows, ".txt": text_rows}.get(ending_of(path) or "")
    if reader is None:
        yield from read_file(path)
        return
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            yield from reader(file, path, bad, note)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise FedllmError(f"{path} is not a whole gzip file ({error}); make or copy it again.") from error
    except OSError as error:
        raise FedllmError(f"{path} cannot be read ({first_line(error)}); check the file and its rights.") from error


def json_rows(file: BinaryIO | gzip.GzipFile, path: Path, bad: Bad, note: Note) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file with one on each line."""
    for number, line in enumerate(file, start=1):
        said = decoded(line.removeprefix(BOM) if number == 1 else line, path, number, bad, note)
        if said is None or not said.strip():
            continue
        try:
            row = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise FedllmError(
                f"{path}, line {number}: broken JSON ({first_line(error)}); mend or delete it."
            ) from error
        if not isinstance(row, dict):
            raise FedllmError(f"{path}, line {number}: not a JSON object; write one {{...}} on each line.")
        # Escapes can spell what UTF-8 cannot write: half of a pair of surrogates.
        if (
            "\\ud" in said.lower()
            and decoded(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass"), path, number, bad, note)
            is None
        ):
            continue
        yield row


def text_rows(file: BinaryIO | gzip.GzipFile, path: Path, bad: Bad, note: Note) -> Iterator[dict[str, Any]]:
    """Yield a text file in pieces of whole lines; a line longer than a piece is cut between two characters."""
    lines, size, number, left = list[str](), 0, 1, b""
    for line in iter(lambda: file.readline(PIECE), b""):
        whole, left = halves(left + line)
        said = decoded(whole.removeprefix(BOM) if number == 1 else whole, path, number, bad, note)
        number += line.endswith(b"\n")
        lines.append(said or "")
        size += len(whole)
        if size >= PIECE:
            yield {"text": "".join(lines)}
            lines, size = [], 0
    if left:
        decoded(left, path, number, bad, note)
    if "".join(lines).strip():
        yield {"text": "".join(lines)}


def halves(data: bytes) -> tuple[bytes, bytes]:
    """Cut off the start of a character at the end.

    >>> halves("aß".encode()[:-1])
    (b'a', b'\\xc3')
    """
    for back in range(1, min(4, len(data)) + 1):
        if data[-back] < 0x80:
            break
        if data[-back] >= 0xC0:
            wanted = 2 if data[-back] < 0xE0 else 3 if data[-back] < 0xF0 else 4
            return (data[:-back], data[-back:]) if wanted > back else (data, b"")
    return data, b""


def decoded(line: bytes, path: Path, number: int, bad: Bad, note: Note) -> str | None:
    """Return a line as text; None where it is not UTF-8, which is counted."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        if bad == "refuse":
            raise FedllmError(
                f"{path}, line {number}: not UTF-8; save the file as UTF-8, or set data.not_utf8 = 'skip'."
            ) from error
        note(NOT_UTF8)
        return None
