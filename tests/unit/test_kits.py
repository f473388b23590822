"""Joining and leaving on disk: what is written, what is refused, and that no key travels."""

from __future__ import annotations

import json
import stat

import pytest

from fedllm.core.errors import FedllmError
from fedllm.federation import keys, members

CONSORTIUM = """
name = "demo"
admin = "admin@example.org"
sites = ["a", "b"]
[server]
address = "127.0.0.1"
port = 8002
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "consortium.toml").write_text(CONSORTIUM)
    members.init(tmp_path / "consortium.toml", tmp_path / "federation")
    return tmp_path / "federation"


def join(folder, place, name="a", **options):
    return members.join(members.approve(folder, members.request(name, place), **options), place)


def test_a_site_joins_and_its_key_never_leaves_it(folder, tmp_path):
    joined = join(folder, tmp_path / "a")
    assert joined[:4] == ("a", "demo", "127.0.0.1", 8002)
    assert joined.fingerprint == keys.fingerprint(members.read_root(folder))
    key = (tmp_path / "a" / "kit" / "startup" / "client.key").read_bytes()
    body = key.splitlines()[3]
    for path in (tmp_path / "a" / "a.request", tmp_path / "a" / "a.approved", *folder.rglob("*")):
        assert not path.is_file() or body not in path.read_bytes()


def test_private_keys_are_their_owners_and_the_folder_too(folder, tmp_path):
    join(folder, tmp_path / "a")
    found = [*folder.rglob("*.key"), *(tmp_path / "a").rglob("*.key")]
    assert len(found) == 4
    assert {stat.S_IMODE(path.stat().st_mode) for path in found} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "a" / "kit").stat().st_mode) == 0o700


def test_jobs_bring_no_code_and_nothing_is_kept_under_tmp(folder, tmp_path):
    join(folder, tmp_path / "a")
    for local in (folder / "server" / "local", tmp_path / "a" / "kit" / "local"):
        resources = json.loads((local / "resources.json").read_text())
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert all(name.startswith(("fedllm.", "nvflare.collab.runtime.")) for name in resources["class_allow_list"])
        rights = json.loads((local / "authorization.json").read_text())["permissions"]
        assert {right["byoc"] for right in rights.values()} == {"none"}
        assert "/tmp/nvflare" not in json.dumps(resources)


def test_an_init_never_writes_over_keys_that_may_be_in_use(folder, tmp_path):
    with pytest.raises(FedllmError, match="exists already"):
        members.init(tmp_path / "consortium.toml", folder)


def test_only_names_of_the_consortium_are_approved(folder, tmp_path):
    with pytest.raises(FedllmError, match="is not a site of demo"):
        members.approve(folder, members.request("stranger", tmp_path / "x"))


def test_a_second_key_for_a_name_needs_a_second_thought(folder, tmp_path):
    join(folder, tmp_path / "a")
    join(folder, tmp_path / "a")
    first = members.issued(folder, "a")
    request = members.request("a", tmp_path / "thief")
    with pytest.raises(FedllmError, match="--again"):
        members.approve(folder, request)
    assert members.issued(folder, "a") == first
    members.approve(folder, request, again=True)
    assert members.revoked(folder) == {"names": [], "serials": [f"{first.serial_number:x}"]}


def test_a_revoked_name_stays_out_until_it_is_approved_again(folder, tmp_path):
    join(folder, tmp_path / "a")
    members.revoke(folder, "a")
    assert members.revoked(folder)["names"] == ["a"]
    with pytest.raises(FedllmError, match="--again"):
        join(folder, tmp_path / "a")
    approval = tmp_path / "a" / "a.approved"
    assert not members.is_newer(approval, tmp_path / "a")
    members.approve(folder, members.request("a", tmp_path / "a"), again=True)
    assert members.is_newer(approval, tmp_path / "a")
    members.join(approval, tmp_path / "a")
    assert not members.is_newer(approval, tmp_path / "a")
    assert members.revoked(folder)["names"] == [] and len(members.revoked(folder)["serials"]) == 1
    with pytest.raises(FedllmError, match="There is no 'c'"):
        members.revoke(folder, "c")


def test_an_approval_is_for_this_sites_key_and_federation(folder, tmp_path):
    approved = members.approve(folder, members.request("a", tmp_path / "a"))
    members.request("a", tmp_path / "other")
    with pytest.raises(FedllmError, match="another key"):
        members.join(approved, tmp_path / "other")
    table = json.loads(approved.read_text())
    for change in ({"name": "b"}, {"extra": 1}, {"certificate": "x"}, {"root": table["certificate"]}):
        approved.write_text(json.dumps(table | change))
        with pytest.raises(FedllmError):
            members.join(approved, tmp_path / "a")
    approved.write_text(json.dumps(table))
    members.join(approved, tmp_path / "a")
    (tmp_path / "second.toml").write_text(CONSORTIUM)
    members.init(tmp_path / "second.toml", tmp_path / "second")
    with pytest.raises(FedllmError, match="another federation"):
        join(tmp_path / "second", tmp_path / "a")
