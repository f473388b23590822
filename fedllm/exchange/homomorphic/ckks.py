"""Whole numbers as CKKS ciphertexts, their sums, and exactly those sums again.

Cheon, Kim, Kim and Song 2017 (ASIACRYPT, 2016/421 of the IACR). What CKKS decrypts is off by its noise, and who sees
both ciphertext and what it decrypts to can reckon the key from that noise (Li and Micciancio 2021, 2020/1533). Here all
that is encrypted is whole numbers, far enough apart to be rounded back: what is told has no noise left, as in the exact
CKKS of 2024/853. A ciphertext here is two polynomials modulo one prime, a sum of ciphertexts is the sum of their
numbers, and the server adds them as such: no library reads bytes of a stranger, and the server needs none.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.noise import key_of

DEGREE = 4096
"""Of the polynomials: with a modulus of 60 bits far more than 128 bits of security (they would bear 109)."""

SLOTS = DEGREE // 2
"""Numbers in one ciphertext."""

MODULUS = 2**60 - 2**14 + 1
"""The prime, which is SEAL's for this degree."""

SCALE = 2.0**27
"""What one is worth; the noise of a fresh ciphertext is about 2^-13 of it at most, in a slot."""

ROOM = 2**31
"""A sum's numbers are below it."""

WHOLE = 2.0**-6
"""How far from a whole number what is decrypted may be."""

Numbers = NDArray[np.int64]


class Keys(NamedTuple):
    """SEAL with the silos' key."""

    seal: Any
    context: Any
    encoder: Any
    encryptor: Any
    decryptor: Any
    head: bytes
    """With which SEAL's files begin: a magic number, the length of the head, the version."""


def opened(key: bytes) -> Keys:
    """Return SEAL with the key that 32 bytes stand for: the same at every silo that has them."""
    # A server adds ciphertexts up without it.
    from tenseal import sealapi as seal

    seeds = key_of(key, "seal", 0) + key_of(key, "seal", 1)
    drawn = seal.Blake2xbPRNGFactory(list(struct.unpack("<8Q", seeds)))
    secret = seal.KeyGenerator(context_of(seal, drawn)).secret_key()
    # Only the key comes from these bytes: the noise of ciphertexts is the operating system's.
    context = context_of(seal, None)
    made = (seal.CKKSEncoder(context), seal.Encryptor(context, secret), seal.Decryptor(context, secret))
    with tempfile.TemporaryDirectory(prefix="fedllm-") as folder:
        path = Path(folder) / "plain"
        seal.Plaintext().save(str(path))
        return Keys(seal, context, *made, path.read_bytes()[:5])


def context_of(seal: Any, drawn: Any) -> Any:
    """Return the parameters as SEAL takes them, or raise where its own prime is another one."""
    parameters = seal.EncryptionParameters(seal.SCHEME_TYPE.CKKS)
    parameters.set_poly_modulus_degree(DEGREE)
    modulus = seal.CoeffModulus.Create(DEGREE, [60])
    if [prime.value() for prime in modulus] != [MODULUS]:
        raise FedllmError("This version of tenseal uses another modulus; install the one that constraints.txt names.")
    parameters.set_coeff_modulus(modulus)
    if drawn is not None:
        parameters.set_random_generator(drawn)
    return seal.SEALContext(parameters, True, seal.SEC_LEVEL_TYPE.TC128)


def encrypted(keys: Keys, slots: Numbers) -> Numbers:
    """Encrypt rows of `SLOTS` whole numbers each; every ciphertext is 2 times `DEGREE` numbers below `MODULUS`."""
    made = np.empty((len(slots), 2, DEGREE), np.int64)
    plain, cipher = keys.seal.Plaintext(), keys.seal.Ciphertext()
    for row, target in zip(slots, made, strict=True):
        keys.encoder.encode(row.astype(np.float64).tolist(), SCALE, plain)
        keys.encryptor.encrypt_symmetric(plain, cipher)
        target[:] = np.fromiter((cipher[place] for place in range(2 * DEGREE)), np.uint64).reshape(2, DEGREE)
    return made


def add(total: Numbers, more: Numbers) -> None:
    """Add ciphertexts to a sum of ciphertexts, in place."""
    np.add(total, more, out=total)
    np.subtract(total, MODULUS, out=total, where=total >= MODULUS)


def require_ciphertexts(numbers: Numbers, rows: int) -> None:
    """Raise `Refused` for what is not so many ciphertexts."""
    if numbers.shape != (rows, 2, DEGREE):
        raise Refused(f"its ciphertexts have the shape {numbers.shape}, not {(rows, 2, DEGREE)}")
    if numbers.size and not 0 <= int(numbers.min()) <= int(numbers.max()) < MODULUS:
        raise Refused("a number of its ciphertexts is outside the modulus")


def decrypted(keys: Keys, numbers: Numbers) -> Numbers:
    """Return the whole numbers in ciphertexts, or raise `Refused` where there are none: another key, or rubbish."""
    require_ciphertexts(numbers, len(numbers))
    found = np.empty((len(numbers), SLOTS), np.float64)
    plain, cipher = keys.seal.Plaintext(), keys.seal.Ciphertext()
    with tempfile.TemporaryDirectory(prefix="fedllm-") as folder:
        path = Path(folder) / "cipher"
        for row, target in zip(numbers, found, strict=True):
            path.write_bytes(as_file(keys, row))
            # SEAL itself reads ciphertexts from files only.
            cipher.load(keys.context, str(path))
            keys.decryptor.decrypt(cipher, plain)
            target[:] = keys.encoder.decode_double(plain)
    whole = np.rint(found)
    if found.size and not (np.abs(found - whole).max() < WHOLE and np.abs(whole).max() < ROOM):
        raise Refused("it holds no whole numbers: a silo has another key, or sent rubbish")
    return whole.astype(np.int64)


def as_file(keys: Keys, numbers: Numbers) -> bytes:
    """Return one ciphertext as SEAL 4 writes it where it does not compress: parameters, sizes, scale, the numbers."""

    def part(body: bytes) -> bytes:
        return keys.head + struct.pack("<BHQ", 0, 0, 16 + len(body)) + body

    data = struct.pack("<Q", numbers.size) + numbers.astype("<u8").tobytes()
    return part(struct.pack("<4Q?3QdQ", *keys.context.first_parms_id(), True, 2, DEGREE, 1, SCALE, 1) + part(data))
