"""What each silo makes for a round, and what two of them agree on: X25519, HKDF-SHA256 and AES-GCM.

All secrets come from the silo's own secret, by round: whoever has lost its memory makes the same again.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedllm.core.errors import Refused
from fedllm.core.noise import key_of

KEY_BYTES = 32
NONCE_BYTES = 12
BOX_BYTES = NONCE_BYTES + 2 * KEY_BYTES + 16
"""A sealed pair of shares: nonce, two shares, tag."""


class Pair(NamedTuple):
    """A private key and its public half, 32 bytes each."""

    private: bytes
    public: bytes


class Own(NamedTuple):
    """The two key pairs of a silo in a round."""

    channel: Pair
    """For the boxes that travel between silos by way of the server."""
    mask: Pair
    """For the masks that two silos share; its private half is shared out."""


def own_keys(secret: bytes, *address: str | int) -> Own:
    """Return a silo's keys at an address: its name and the round."""
    return Own(*(pair_of(key_of(secret, "secure", kind, *address)) for kind in ("channel", "mask")))


def pair_of(private: bytes) -> Pair:
    """Return a private key with its public half."""
    public = X25519PrivateKey.from_private_bytes(private).public_key()
    return Pair(private, public.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw))


def agreed(private: bytes, public: bytes, context: bytes, purpose: str) -> bytes:
    """Return the 32 bytes that two key pairs have in common, for one purpose in one round.

    Raises:
        Refused: for a public key on a point of low order, with which everybody would agree on the same.
    """
    try:
        common = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise Refused("its public key is no key: it lies on a bad point") from error
    return derived(common, context, purpose)


def derived(secret: bytes, context: bytes, purpose: str) -> bytes:
    """Return 32 bytes for a purpose from a secret."""
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=context, info=f"fedllm secure {purpose}".encode()).derive(secret)


def require_point(public: bytes) -> None:
    """Raise `Refused` for a public key that is none."""
    agreed(secrets.token_bytes(KEY_BYTES), public, b"", "check")


def commitment(secret: bytes, context: bytes) -> bytes:
    """Return what a silo's own mask is checked by when it is put together again; it tells nothing of it before."""
    return hashlib.sha256(b"fedllm secure commitment" + context + secret).digest()


def sealed(key: bytes, plain: bytes, about: bytes) -> bytes:
    """Encrypt two shares, bound to what they are about."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, plain, about)


def unsealed(key: bytes, box: bytes, about: bytes) -> bytes:
    """Return what is in a box, or raise `Refused` for one that was not sealed with this key about this."""
    try:
        return AESGCM(key).decrypt(box[:NONCE_BYTES], box[NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise Refused("a box of shares was not sealed by the silo that it is said to come from") from error
