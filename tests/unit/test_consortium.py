"""A consortium's file: closed, with names that can be file names and certificates."""

from __future__ import annotations

import pytest

from fedllm.core.errors import FedllmError
from fedllm.federation.consortium import read_consortium, write_consortium

GOOD = """
name = "demo"
admin = "admin@example.org"
sites = ["hospital_a", "hospital-b"]
[server]
address = "fed.example.org"
port = 8002
"""


def read(tmp_path, text):
    path = tmp_path / "consortium.toml"
    path.write_text(text)
    return read_consortium(path)


def test_what_is_written_is_read_again(tmp_path):
    consortium = read(tmp_path, GOOD)
    assert consortium.sites == ["hospital_a", "hospital-b"] and consortium.server.port == 8002
    assert read(tmp_path, write_consortium(consortium)) == consortium


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('name = "demo"', 'name = "demo"\nsite = 3', "did you mean 'sites'"),
        ("port = 8002", "prot = 8002", "did you mean 'port'"),
        ("port = 8002", "port = 99999", "server.port"),
        ('"hospital_a"', '"hospital.a"', "no name for a site"),
        ('"hospital_a"', '"../a"', "no name for a site"),
        ('"hospital_a"', '"Server"', "word of the engine"),
        ('"hospital_a"', '"HOSPITAL-B"', "same name"),
        ('"fed.example.org"', '"::1"', "IPv4"),
        ('"fed.example.org"', '"a b"', "host name"),
        ('"admin@example.org"', '"admin"', "admin"),
        ('admin = "admin@example.org"\n', "", "'admin' is missing"),
        ("[server]", "[server", "not TOML"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(tmp_path, old, new, says):
    assert old in GOOD
    with pytest.raises(FedllmError, match=says):
        read(tmp_path, GOOD.replace(old, new))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FedllmError, match="There is no consortium"):
        read_consortium(tmp_path / "none.toml")
