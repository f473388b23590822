"""What a site keeps: uploads by the hash of their bytes, and each piece of work once, whole or not at all."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Request
from fedllm.federation.site import record
from fedllm.federation.site.record import TRAIN, done_once, find, keep, memory_before, with_reply
from fedllm.federation.site.spool import WAITING, Spool
from tests.desks import key_of

FULL = """
import resource, sys
from pathlib import Path
from fedllm.core.errors import FedllmError
def small(most):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
folder = Path(sys.argv[1])
"""


def name_of(number, op="train"):
    return key_of(f"{op} {number}".encode())


def done(folder, number, op="train", reply=b"reply", memory=b"memory"):
    folder.mkdir(exist_ok=True)
    path = folder / ".working"
    path.write_bytes(reply + str(number).encode())
    if memory:
        (folder / ".working.memory").write_bytes(memory + str(number).encode())
    return keep(folder, Request("a", number, op, {}), name_of(number, op), path)


def test_work_is_found_by_its_request_by_its_reply_and_by_its_round(tmp_path):
    kept = done(tmp_path, 4)
    assert kept.path.read_bytes() == b"reply4" and kept.reply == key_of(b"reply4") and kept.size == 6
    assert find(tmp_path, name_of(4)) == with_reply(tmp_path, kept.reply) == done_once(tmp_path, TRAIN, 4) == kept
    assert find(tmp_path, name_of(5)) is None and done_once(tmp_path, TRAIN, 5) is None
    assert with_reply(tmp_path, name_of(4)) is None and find(tmp_path / "no run", name_of(4)) is None


def test_memory_is_that_of_the_last_training_before(tmp_path):
    done(tmp_path, 1)
    done(tmp_path, 3)
    done(tmp_path, 4, "evaluate", memory=b"")
    assert memory_before(tmp_path, 0) is None and memory_before(tmp_path, 1) is None
    assert memory_before(tmp_path, 2).read_bytes() == memory_before(tmp_path, 3).read_bytes() == b"memory1"
    assert memory_before(tmp_path, 9).read_bytes() == b"memory3"
    done(tmp_path, 5, memory=b"")
    assert memory_before(tmp_path, 6) is None


def test_the_last_rounds_are_kept_and_that_there_were_others_is_known(tmp_path):
    for number in range(6):
        done(tmp_path, number)
    assert [done_once(tmp_path, TRAIN, number).kept for number in range(6)] == [False] * 3 + [True] * 3
    assert len(list(tmp_path.glob("*.memory"))) == 3
    assert with_reply(tmp_path, key_of(b"reply1")) is None
    with pytest.raises(FedllmError, match="after round 1 is no longer kept, so round 2 cannot be made again"):
        memory_before(tmp_path, 2)


def test_many_looks_in_one_round_are_kept_apart_and_the_oldest_go(tmp_path):
    for number in range(5):
        path = tmp_path / ".working"
        path.write_bytes(f"reply{number}".encode())
        look = keep(tmp_path, Request("a", 0, "evaluate", {}), name_of(number), path)
        os.utime(record.beside(look.stem, ".request"), ns=(number, number))
    assert [find(tmp_path, name_of(number)) is not None for number in range(5)] == [False, False, True, True, True]
    assert len(list(tmp_path.iterdir())) == 6


def test_without_its_marker_work_was_not_done(tmp_path):
    done(tmp_path, 1)
    (tmp_path / "train-000002.reply").write_bytes(b"half")
    (tmp_path / "train-000002.memory").write_bytes(b"half")
    assert done_once(tmp_path, TRAIN, 2) is None and with_reply(tmp_path, key_of(b"half")) is None
    assert memory_before(tmp_path, 3).read_bytes() == b"memory1"
    assert done(tmp_path, 2).path.read_bytes() == b"reply2"


def test_a_marker_that_is_not_one_is_named(tmp_path):
    (tmp_path / "train-000001.request").write_bytes(b"{")
    with pytest.raises(FedllmError, match=r"'train-000001\.request' cannot be read"):
        find(tmp_path, name_of(1))


def test_a_full_disk_is_one_sentence_and_nothing_is_recorded(tmp_path):
    code = FULL + (
        "from fedllm.core.types import Request\nfrom fedllm.federation.site.record import TRAIN, done_once, keep\n"
        "(folder / '.working').write_bytes(b'reply')\nsmall(100)\n"
        "try:\n    keep(folder, Request('a', 1, 'train', {}), '0' * 64, folder / '.working')\n"
        "except FedllmError as error:\n    print(error)\n"
        "print(done_once(folder, TRAIN, 1), [path.name for path in folder.iterdir()])"
    )
    made = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    sentence, left = made.stdout.splitlines()
    assert "The site cannot write 'train-000001.request' (File too large); make room at the site" in sentence
    assert left == "None []" and list(tmp_path.iterdir()) == []


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool")


def sent(spool, data, size=None, key=None, pieces=3):
    key, step = key or key_of(data), max(1, len(data) // pieces)
    for start in range(0, len(data), step):
        have = spool.put(key, start, size or len(data), data[start : start + step])
    return have


def test_a_file_in_pieces_is_whole_when_its_hash_is_right(spool):
    data = random.Random(0).randbytes(1000)
    assert spool.hold(key_of(data)) is None
    assert sent(spool, data) == 1000
    assert spool.hold(key_of(data)).read_bytes() == data
    assert spool.put(key_of(data), 0, 1000, data[:10]) == 1000


def test_a_piece_that_does_not_go_on_where_the_file_ends_changes_nothing(spool):
    data = b"0123456789"
    key = key_of(data)
    assert spool.put(key, 5, 10, data[5:]) == 0
    assert spool.put(key, 0, 10, data[:4]) == 4
    assert spool.put(key, 0, 10, data[:4]) == 4
    assert spool.put(key, 5, 10, data[5:]) == 4
    assert spool.put(key, 0, 10, b"") == 4
    assert spool.hold(key) is None
    assert spool.put(key, 4, 10, data[4:]) == 10


def test_wrong_bytes_are_thrown_away(spool):
    with pytest.raises(Refused, match="not those of its key; send it again"):
        sent(spool, b"wrong", key=key_of(b"right"))
    assert sent(spool, b"right") == 5


def test_more_bytes_than_said_are_refused(spool):
    with pytest.raises(Refused, match="ends at 5 of a message of 4 bytes"):
        spool.put(key_of(b"right"), 0, 4, b"right")


def test_what_a_kill_left_is_gone_on_with_and_checked_anew(spool, tmp_path):
    data = b"0123456789"
    spool.put(key_of(data), 0, 10, data[:4])
    sent(spool, b"whole")
    again = Spool(tmp_path / "spool")
    assert again.put(key_of(data), 4, 10, data[4:]) == 10
    assert again.hold(key_of(b"whole")) is not None
    (tmp_path / "spool" / key_of(b"power cut")).write_bytes(b"power \0\0\0")
    assert Spool(tmp_path / "spool").hold(key_of(b"power cut")) is None


def test_old_whole_files_make_room_as_fast_as_a_new_one_comes(spool, tmp_path):
    old, kept, new = (bytes([number]) * 100 for number in range(3))
    for data in (old, kept):
        sent(spool, data)
        time.sleep(0.01)

    def sizes():
        return {path.name: path.stat().st_size for path in (tmp_path / "spool").iterdir()}

    assert sizes() == {key_of(old): 100, key_of(kept): 100}
    for start, left in ((0, 60), (40, 20)):
        spool.put(key_of(new), start, 100, new[start : start + 40])
        assert sizes() == {f"-{key_of(old)}": left, key_of(kept): 100, key_of(new): start + 40}
    # Taken up where a crash stopped it; what was to go does not come back.
    spool = Spool(tmp_path / "spool")
    assert sizes() == {key_of(kept): 100, key_of(new): 80}
    spool.put(key_of(new), 80, 100, new[80:])
    assert spool.hold(key_of(new)) and spool.hold(key_of(kept)) and not spool.hold(key_of(old))


def test_nothing_that_made_room_is_left_once_a_smaller_file_is_whole(spool, tmp_path):
    for data in (b"a" * 1000, b"b" * 10):
        sent(spool, data)
        time.sleep(0.01)
    sent(spool, b"c" * 10)
    assert sorted(path.stat().st_size for path in (tmp_path / "spool").iterdir()) == [10, 10]


def test_only_a_few_files_wait_and_what_is_worked_on_stays(spool, tmp_path):
    sent(spool, b"held")
    spool.hold(key_of(b"held"))
    spool.hold(key_of(b"held"))
    spool.let_go(key_of(b"held"))
    for number in range(9):
        spool.put(key_of(b"%d" % number), 0, 100, b"half")
    assert len(list((tmp_path / "spool").iterdir())) == WAITING + 1
    assert spool.put(key_of(b"8"), 0, 100, b"") == 4 and spool.put(key_of(b"0"), 0, 100, b"") == 0
    spool.let_go(key_of(b"held"))
    sent(spool, b"another")
    assert spool.hold(key_of(b"held"))
    spool.let_go(key_of(b"held"))
    sent(spool, b"one more")
    assert spool.hold(key_of(b"held")) is None


def test_a_file_that_cannot_fit_is_refused_before_its_first_byte(spool, tmp_path):
    with pytest.raises(FedllmError, match=r"no room for a message of .* MB; make room at the site"):
        spool.put(key_of(b""), 0, 1 << 60, b"x")
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_disk_that_fills_up_keeps_the_bytes_before(tmp_path):
    code = FULL + (
        "from fedllm.federation.site.spool import Spool\nspool = Spool(folder)\n"
        "spool.put('0' * 64, 0, 9000, b'x' * 1000)\nsmall(1500)\n"
        "try:\n    spool.put('0' * 64, 1000, 9000, b'x' * 1000)\nexcept FedllmError as error:\n    print(error)\n"
        "print(spool.put('0' * 64, 0, 9000, b''))\n"
    )
    made = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "(File too large); make room at the site, then ask again." in made.stdout
    assert made.stdout.endswith("\n1000\n")
