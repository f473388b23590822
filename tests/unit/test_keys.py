"""Keys stay where they are made; a certificate is for one name, one key, one purpose and a time."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.federation import keys


@pytest.fixture(scope="module")
def pair():
    return keys.new_key(), keys.new_key()


@pytest.fixture(scope="module")
def root(pair):
    return keys.new_root("demo", pair[0])


def test_a_key_is_its_owners_and_never_written_over(tmp_path, pair):
    path = tmp_path / "kit" / "client.key"
    keys.write_key(path, pair[0])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.read_key(path).private_numbers() == pair[0].private_numbers()
    with pytest.raises(FileExistsError):
        keys.write_key(path, pair[1])


def test_a_request_says_name_and_key_and_nothing_private(pair):
    data = keys.new_request("hospital_a", pair[1])
    assert keys.read_request(data) == ("hospital_a", pair[1].public_key())
    assert b"PRIVATE" not in data


def signing_request(name, key):
    builder = x509.CertificateSigningRequestBuilder().subject_name(keys.subject(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("name", ["../etc", "a.b", "a b", "a" * 64])
def test_a_request_for_an_improper_name_is_refused(pair, name):
    with pytest.raises(FedllmError, match="no proper name"):
        keys.read_request(signing_request(name, pair[1]))


def test_a_weak_or_strange_key_is_refused():
    for key in (rsa.generate_private_key(65537, 1024), ec.generate_private_key(ec.SECP256R1())):
        with pytest.raises(FedllmError, match="not RSA with at least 2048 bits"):
            keys.read_request(signing_request("a", key))


def test_a_request_changed_on_its_way_is_refused(pair):
    request = x509.load_pem_x509_csr(keys.new_request("hospital_a", pair[1]))
    changed = request.public_bytes(serialization.Encoding.DER).replace(b"hospital_a", b"hospital_b")
    with pytest.raises(FedllmError, match="not signed by its own key"):
        keys.read_request(x509.load_der_x509_csr(changed).public_bytes(serialization.Encoding.PEM))


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_one_sentence(data):
    with pytest.raises(FedllmError):
        keys.read_request(data)


def purposes(certificate):
    return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_a_certificate_is_for_one_purpose_and_no_authority(root, pair):
    site = keys.issue(root, pair[0], "a", pair[1].public_key())
    server = keys.issue(root, pair[0], "127.0.0.1", pair[1].public_key(), hosts=["127.0.0.1", "localhost"])
    assert purposes(site) == [ExtendedKeyUsageOID.CLIENT_AUTH] and purposes(server) == [ExtendedKeyUsageOID.SERVER_AUTH]
    for each in (site, server):
        assert not each.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_clock_that_is_a_day_wrong_refuses_nobody(root, pair):
    site = keys.issue(root, pair[0], "a", pair[1].public_key())
    day, now = timedelta(days=1), datetime.now(UTC)
    for certificate in (site, root):
        assert certificate.not_valid_before_utc < now - day and now + day < certificate.not_valid_after_utc


def test_a_certificate_belongs_to_its_root_key_name_and_time(root, pair):
    authority, own = pair
    good = keys.issue(root, authority, "a", own.public_key())
    keys.belongs(good, root, own.public_key(), "a")
    other = keys.new_root("demo", own)
    for problem, arguments in {
        "not signed by the root": (good, other, own.public_key(), "a"),
        "another key": (good, root, authority.public_key(), "a"),
        "another name": (good, root, own.public_key(), "b"),
        "clock": (keys.issue(root, authority, "a", own.public_key(), days=-1), root, own.public_key(), "a"),
    }.items():
        with pytest.raises(FedllmError, match=problem):
            keys.belongs(*arguments)
