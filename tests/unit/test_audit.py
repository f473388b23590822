"""The audit log: it grows, holds together, says which line was changed, and survives a kill."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.federation.site import audit
from fedllm.federation.site.audit import COLUMNS, Audit, digest, rows, verify
from fedllm.federation.site.rules import canonical


def written(path, *runs):
    log = Audit(path)
    for run in runs:
        log.append("begin", run=run, round=1, op="train", bytes=7, rule="")
    log.close()
    return path.read_bytes()


def test_lines_come_back_in_order_and_go_on_after_a_restart(tmp_path):
    path = tmp_path / "audit.jsonl"
    written(path, "one", "é\ud800")
    written(path, "three")
    entries, cut = verify(path)
    assert [entry["run"] for entry in entries] == ["one", "é\ud800", "three"] and cut == 0
    assert entries[0]["before"] == "0" * 64
    assert [entry["before"] for entry in entries[1:]] == [entry["hash"] for entry in entries[:-1]]
    assert datetime.fromisoformat(entries[0]["time"]) <= datetime.now(UTC)


def test_no_log_is_an_empty_one(tmp_path):
    assert verify(tmp_path / "none") == ([], 0)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_byte_is_changed_its_line_is_named(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    whole = written(path, "one", "two", "three")
    place = data.draw(st.integers(0, len(whole) - 2))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    path.write_bytes(whole[:place] + bytes([other]) + whole[place + 1 :])
    number = whole[:place].count(b"\n") + 1
    with pytest.raises(FedllmError, match=rf"changed at line {number}:"):
        verify(path)
    with pytest.raises(FedllmError, match="move it away"):
        Audit(path)


def test_a_line_that_is_taken_out_put_in_twice_or_made_anew_is_named(tmp_path):
    path = tmp_path / "audit.jsonl"
    one, two, three, _ = written(path, "one", "two", "three").split(b"\n")
    forged = {**json.loads(two), "bytes": 0}
    forged = canonical(forged | {"hash": digest(forged)})
    spaced = json.dumps(json.loads(two)).encode()
    changes = [[two], [one, three], [one, one, two, three], [one, forged, three], [one, spaced, three], [one, b"", two]]
    for lines, number in zip(changes, (1, 2, 2, 3, 2, 2), strict=True):
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        with pytest.raises(FedllmError, match=rf"line {number}:"):
            verify(path)


def test_a_last_line_cut_anywhere_is_mended_and_said(tmp_path):
    whole = written(tmp_path / "whole", "one", "two")
    start = whole.index(b"\n") + 1
    for end in (start + 1, start + 40, len(whole) - 1):
        path = tmp_path / f"cut-{end}"
        path.write_bytes(whole[:end])
        assert (len(verify(path).entries), verify(path).cut) == (1, end - start)
        written(path, "three")
        entries, cut = verify(path)
        assert [entry["what"] for entry in entries] == ["begin", "healed", "begin"] and cut == 0
        assert entries[1]["bytes"] == end - start


def test_threads_share_a_log(tmp_path):
    log = Audit(tmp_path / "audit.jsonl")
    threads = [threading.Thread(target=lambda: [log.append("ask", run="r") for _ in range(10)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert len(verify(tmp_path / "audit.jsonl").entries) == 80


def test_a_full_disk_is_one_sentence_and_leaves_no_half_line(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from fedllm.core.errors import FedllmError
from fedllm.federation.site.audit import Audit, verify
path = Path(sys.argv[1])
log = Audit(path)
log.append("ask", run="one")
resource.setrlimit(resource.RLIMIT_FSIZE, (600, resource.RLIM_INFINITY))
try:
    log.append("ask", run="x" * 500)
except FedllmError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("ask", run="three")
print([entry["run"] for entry in verify(path).entries], verify(path).cut)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "log"], capture_output=True, text=True, check=True)
    sentence, runs = done.stdout.splitlines()
    assert sentence == "The site cannot write 'log' (File too large); make room at the site, then ask again."
    assert runs == "['one', 'three'] 0"


def test_a_closed_log_writes_into_no_other_file(tmp_path):
    log = Audit(tmp_path / "audit.jsonl")
    log.close()
    with (tmp_path / "other").open("w"), pytest.raises(FedllmError):
        log.append("ask")
    assert (tmp_path / "other").read_text() == ""


def test_what_is_recent_survives_a_restart_and_ends_with_the_day(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    written(path, "one")
    log = Audit(path)
    log.append("begin", run="two")
    assert [entry["run"] for entry in log.recent()] == ["one", "two"]
    monkeypatch.setattr(audit, "DAY", timedelta(0))
    assert log.recent() == []
    log.close()


def test_rows_show_every_entry(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = Audit(path)
    log.append("get", run="r1", round=2, op="train", bytes=5, rule="clip", request="ab")
    log.close()
    (row,) = rows(verify(path).entries)
    assert dict(zip(COLUMNS, row[:-1], strict=True)) | {"time": ""} == {
        "time": "", "what": "get", "run": "r1", "round": "2", "op": "train", "bytes": "5", "rule": "clip",
    }  # fmt: skip
    assert row[-1] == "request ab"
