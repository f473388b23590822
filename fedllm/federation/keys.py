"""Keys and certificates: one root per federation, one certificate per party, made where its key stays.

Keys are RSA, since the engine signs its own challenges with them (PSS). A certificate says what it is
for (a server's cannot be used as a client's, nor the other way round), and is valid from two days ago,
so that a clock that is a day wrong refuses nobody.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedllm.core.errors import FedllmError
from fedllm.federation.consortium import SITE

BITS = 3072
BACKDATED = timedelta(days=2)
ROOT_DAYS, PARTY_DAYS = 3650, 825

Key = rsa.RSAPrivateKey
Certificate = x509.Certificate


class Request(NamedTuple):
    """What a site sends to be let in: its name, and the public half of its key."""

    name: str
    public: rsa.RSAPublicKey


def new_key() -> Key:
    """Make a private key."""
    return rsa.generate_private_key(public_exponent=65537, key_size=BITS)


def write_key(path: Path, key: Key) -> None:
    """Write a private key that only its owner can read; a key that is there is never written over."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())


def read_key(path: Path) -> Key:
    """Read a private key."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise FedllmError(f"There is no key '{path}'; make it where it is used, it is never sent.") from None
    except (ValueError, TypeError) as error:
        raise FedllmError(f"'{path}' is not a private key ({error}).") from error
    if not isinstance(key, rsa.RSAPrivateKey):
        raise FedllmError(f"'{path}' is not an RSA key, which the engine needs.")
    return key


def new_request(name: str, key: Key) -> bytes:
    """Return a signing request (PEM) for a name; the key signs it and stays where it is."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject(name))
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def read_request(data: bytes) -> Request:
    """Return the name and the key of a signing request; nothing else in it is used."""
    try:
        asked = x509.load_pem_x509_csr(data)
        names = asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        public, signed = asked.public_key(), asked.is_signature_valid
    except Exception as error:  # the parser meets any bytes, and has exceptions of many kinds
        raise FedllmError(
            f"The file is not a request ({type(error).__name__}); send what `site request` made."
        ) from error
    if not signed:
        raise FedllmError("The request is not signed by its own key; ask the site to make it anew.")
    if not isinstance(public, rsa.RSAPublicKey) or public.key_size < 2048:
        raise FedllmError("The request's key is not RSA with at least 2048 bits; ask the site to make it anew.")
    if len(names) != 1 or not re.fullmatch(SITE, str(names[0].value)):
        raise FedllmError("The request has no proper name; ask the site to make it anew.")
    return Request(str(names[0].value), public)


def new_root(name: str, key: Key, days: int = ROOT_DAYS) -> Certificate:
    """Return a federation's own root certificate."""
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    builder = (
        begin(name, name, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
    )
    return builder.sign(key, hashes.SHA256())


def issue(
    root: Certificate,
    key: Key,
    name: str,
    public: rsa.RSAPublicKey,
    *,
    role: str = "",
    hosts: Sequence[str] = (),
    days: int = PARTY_DAYS,
) -> Certificate:
    """Return a certificate for a party: a server if it has hosts, else a client, with a role or none."""
    issuer = str(root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
    usage = x509.KeyUsage(True, False, True, False, False, False, False, False, False)
    builder = (
        begin(name, issuer, public, days, role)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .add_extension(x509.SubjectAlternativeName([host_name(host) for host in hosts or [name]]), critical=False)
    )
    return builder.sign(key, hashes.SHA256())


def begin(name: str, issuer: str, public: rsa.RSAPublicKey, days: int, role: str = "") -> x509.CertificateBuilder:
    """Return what every certificate begins with."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject(name, role))
        .issuer_name(subject(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def subject(name: str, role: str = "") -> x509.Name:
    """Return a party's name as certificates say it; the engine reads a user's role from there."""
    parts = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if role:
        parts.append(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role))
    return x509.Name(parts)


def host_name(host: str) -> x509.GeneralName:
    """Return a host as certificates say it."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def pem(certificate: Certificate) -> bytes:
    """Return a certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def read_certificate(data: bytes, what: str) -> Certificate:
    """Return the certificate in a PEM."""
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise FedllmError(f"{what} is not a certificate ({error}).") from error


def belongs(certificate: Certificate, root: Certificate, public: rsa.RSAPublicKey, name: str) -> None:
    """Check that a certificate is this root's, for this key and name, and is valid today."""
    try:
        certificate.verify_directly_issued_by(root)
        root.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise FedllmError("The certificate is not signed by the root that came with it; ask for it anew.") from error
    if certificate.public_key() != public:
        raise FedllmError("The certificate is for another key than this site's; send the newest request and join anew.")
    if certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value != name:
        raise FedllmError(f"The certificate is for another name than '{name}'.")
    if not certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc:
        raise FedllmError(
            f"The certificate is valid from {certificate.not_valid_before_utc:%Y-%m-%d} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}, which today is not; look at this machine's clock."
        )


def fingerprint(certificate: Certificate) -> str:
    """Return the start of a certificate's SHA-256, in groups that two people can compare by voice."""
    text = certificate.fingerprint(hashes.SHA256()).hex()[:32]
    return " ".join(text[place : place + 4] for place in range(0, 32, 4))
