"""A certificate of what was forgotten: JSON that names files by their hashes, signed where a key is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedllm.core.errors import FedllmError
from fedllm.runtime.store import write_text

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

NAME = "certificate.json"
LARGEST = 1 << 24
"""Bytes that a certificate has at most."""


def file_sha256(path: Path) -> str:
    """Return the hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def signed_bytes(certificate: Mapping[str, Any]) -> bytes:
    """Return what a signature is over: all of a certificate but the signature, as JSON of one form."""
    bare = {key: value for key, value in certificate.items() if key != "signature"}
    return json.dumps(bare, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def write_certificate(folder: Path, certificate: Mapping[str, Any], key: Ed25519PrivateKey | None) -> Path:
    """Write a certificate into a run's folder, signed with Ed25519 if there is a key."""
    whole = dict(certificate)
    if key is not None:
        public = key.public_key().public_bytes_raw().hex()
        whole["signature"] = {"ed25519": key.sign(signed_bytes(certificate)).hex(), "public_key": public}
    write_text(folder / NAME, json.dumps(whole, indent=1, allow_nan=False) + "\n")
    return folder / NAME


def read_certificate(path: Path) -> dict[str, Any]:
    """Read a certificate, which may come from anybody."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FedllmError(
            f"The certificate '{path}' cannot be read ({error}); give one that was not changed."
        ) from error
    if not isinstance(found, dict) or found.get("certificate") != "unlearning":
        raise FedllmError(f"'{path}' is no certificate of unlearning; give the {NAME} of such a run.")
    return found


def checked(path: Path, public: Path) -> list[str]:
    """Return what a certificate's signature and the files beside it say, as sentences.

    Raises:
        FedllmError: if it is not signed by the public key's owner, or a file that it names is another.
    """
    from cryptography.exceptions import InvalidSignature

    certificate, key = read_certificate(path), read_public(public)
    try:
        key.verify(bytes.fromhex(certificate["signature"]["ed25519"]), signed_bytes(certificate))
    except (InvalidSignature, KeyError, TypeError, ValueError):
        raise FedllmError(
            f"'{path}' has no signature of the owner of '{public}'; it was changed, or another key signed it."
        ) from None
    result = certificate.get("result")
    named = result.get("files") if isinstance(result, dict) else None
    found = []
    for name, sha256 in (named if isinstance(named, dict) else {}).items():
        file = path.parent / name
        if not file.resolve().is_relative_to(path.parent.resolve()) or not file.is_file():
            found.append(f"{name} is not beside the certificate")
        elif file_sha256(file) != sha256:
            raise FedllmError(f"'{file}' is not the file that the certificate is about; its hash is another.")
        else:
            found.append(f"{name} is the file that the certificate names")
    return [f"signed by the owner of {public.name}", *found]


def private_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 private key in PEM."""
    require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise FedllmError(f"The key '{path}' cannot be read ({error}); {MAKE}.") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise FedllmError(f"'{path}' is no Ed25519 key; {MAKE}.")
    return key


def read_public(path: Path) -> Ed25519PublicKey:
    """Read an Ed25519 public key in PEM."""
    require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ed25519

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, TypeError) as error:
        raise FedllmError(f"The public key '{path}' cannot be read ({error}); give the signer's in PEM.") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise FedllmError(f"'{path}' is no Ed25519 public key; give the signer's in PEM.")
    return key


MAKE = "make one with `openssl genpkey -algorithm ed25519 -out key.pem`"


def require_cryptography() -> None:
    """Raise unless the library for signatures is there."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise FedllmError("Signatures need `pip install 'fedllm[federation]'`.") from error
