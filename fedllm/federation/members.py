"""Joining and leaving: a federation's folder, a site's request, the answer to it, and its revocation.

A site's key is made at the site and stays there. Two files travel, `NAME.request` and
`NAME.approved`, and neither is secret; that nobody changed them on the way is seen by comparing the
fingerprints that both ends print.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from cryptography.x509 import Certificate
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.core.errors import FedllmError, nearest
from fedllm.federation import keys, kits, notes
from fedllm.federation.consortium import SITE, Consortium, Server, read_consortium, write_consortium


class Approved(BaseModel):
    """What comes back to a site: its certificate, the federation's root, and where the server is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    consortium: str = Field(pattern=SITE)
    name: str = Field(pattern=SITE)
    server: Server
    certificate: str
    root: str


class Joined(NamedTuple):
    """What a site has joined."""

    name: str
    consortium: str
    address: str
    port: int
    fingerprint: str


def init(source: Path, folder: Path) -> str:
    """Make a federation's folder from its consortium's file; return the root's fingerprint.

    `ca/` holds the root key and belongs on no other machine; `server/` is FLARE's workspace there;
    `admin/` is the administrator's kit and may be moved to the machine that runs are started from.
    """
    consortium = read_consortium(source)
    folder = folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise FedllmError(f"'{folder}' exists already and has keys that may be in use; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    key = keys.new_key()
    root = keys.new_root(consortium.name, key)
    keys.write_key(folder / "ca" / "root.key", key)
    (folder / "ca" / "root.crt").write_bytes(keys.pem(root))
    for name in ("ca/issued", "runs", "jobs", "snapshots", "transfer"):
        (folder / name).mkdir()

    hosts = list(dict.fromkeys([consortium.server.address, "localhost", "127.0.0.1"]))
    own = keys.new_key()
    server = keys.issue(root, key, consortium.server.address, own.public_key(), hosts=hosts)
    startup = folder / "server" / "startup"
    keys.write_key(startup / "server.key", own)
    (startup / "server.crt").write_bytes(keys.pem(server))
    (startup / "rootCA.pem").write_bytes(keys.pem(root))
    kits.server_kit(folder, consortium)

    own = keys.new_key()
    admin = keys.issue(root, key, consortium.admin, own.public_key(), role=kits.ADMIN_ROLE)
    startup = folder / "admin" / "startup"
    keys.write_key(startup / "client.key", own)
    (startup / "client.crt").write_bytes(keys.pem(admin))
    (startup / "rootCA.pem").write_bytes(keys.pem(root))
    kits.admin_kit(folder / "admin", consortium)
    note(folder, consortium.admin, admin)
    notes.put(folder / "revoked.json", {"names": [], "serials": []})
    notes.put_text(folder / "consortium.toml", write_consortium(consortium))
    return keys.fingerprint(root)


def request(name: str, folder: Path) -> Path:
    """Make a site's key, unless it has one, and the file `NAME.request` to send; return the file's path."""
    if not re.fullmatch(SITE, name):
        raise FedllmError(f"'{name}' is no name for a site; use letters, digits, - and _, 63 at most.")
    key_file = folder / "kit" / "startup" / "client.key"
    if not key_file.exists():
        keys.write_key(key_file, keys.new_key())
    (folder / "kit").chmod(0o700)
    out = folder / f"{name}.request"
    out.write_bytes(keys.new_request(name, keys.read_key(key_file)))
    return out


def approve(folder: Path, file: Path, *, again: bool = False, days: int = keys.PARTY_DAYS) -> Path:
    """Sign a site's request; return the path of `NAME.approved`, beside the request, to send back.

    A second key for the same name is refused, unless `again`: then the first one is revoked.
    """
    consortium = of(folder)
    asked = keys.read_request(read_bytes(file))
    if asked.name not in consortium.sites:
        raise FedllmError(
            f"'{asked.name}' is not a site of {consortium.name}; {nearest(asked.name, consortium.sites)} "
            f"Sites are listed in '{folder / 'consortium.toml'}'."
        )
    with FileLock(folder / "ca" / "lock"):
        before = issued(folder, asked.name)
        other = before is not None and before.public_key() != asked.public
        if before is not None and not again and (other or asked.name in revoked(folder)["names"]):
            raise FedllmError(
                f"'{asked.name}' has a certificate for another key, or was revoked; if the site really asks anew, "
                "approve with --again: what it had before is then refused."
            )
        key = keys.read_key(folder / "ca" / "root.key")
        root = read_root(folder)
        certificate = keys.issue(root, key, asked.name, asked.public, days=days)
        if before is not None and again:
            put_revoked(folder, drop=asked.name, serial=before.serial_number)
        note(folder, asked.name, certificate)
    answer = Approved(
        consortium=consortium.name,
        name=asked.name,
        server=consortium.server,
        certificate=keys.pem(certificate).decode(),
        root=keys.pem(root).decode(),
    )
    out = file.with_name(f"{asked.name}.approved")
    out.write_text(answer.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return out


def join(file: Path, folder: Path) -> Joined:
    """Check that an approval is for this site's key and of one root, and write the site's kit."""
    try:
        answer = Approved.model_validate_json(read_bytes(file))
    except ValidationError as error:
        raise FedllmError(f"'{file}' is not an approval ({error.errors()[0]['msg']}); ask for it anew.") from error
    startup = folder / "kit" / "startup"
    root = keys.read_certificate(answer.root.encode(), "The root in the approval")
    certificate = keys.read_certificate(answer.certificate.encode(), "What came in the approval")
    keys.belongs(certificate, root, keys.read_key(startup / "client.key").public_key(), answer.name)
    kept = startup / "rootCA.pem"
    if kept.exists() and kept.read_bytes() != keys.pem(root):
        raise FedllmError(
            f"'{folder}' has joined another federation before; make a new site folder for '{answer.consortium}'."
        )
    (startup / "client.crt").write_bytes(keys.pem(certificate))
    kept.write_bytes(keys.pem(root))
    kits.site_kit(folder / "kit", answer.name, answer.consortium, answer.server.address, answer.server.port)
    return Joined(answer.name, answer.consortium, answer.server.address, answer.server.port, keys.fingerprint(root))


def is_newer(file: Path, folder: Path) -> bool:
    """Tell whether an approval's certificate was made after the one that the site has, if it has one."""
    own = folder / "kit" / "startup" / "client.crt"
    if not own.exists():
        return True
    try:
        answer = Approved.model_validate_json(read_bytes(file))
    except ValidationError as error:
        raise FedllmError(f"'{file}' is not an approval ({error.errors()[0]['msg']}); ask for it anew.") from error
    certificate = keys.read_certificate(answer.certificate.encode(), "What came in the approval")
    before = keys.read_certificate(own.read_bytes(), f"'{own}'")
    return certificate != before and certificate.not_valid_before_utc >= before.not_valid_before_utc


def revoke(folder: Path, name: str) -> None:
    """Refuse a site, or the administrator, from now on; a server that runs acts on it within seconds."""
    consortium = of(folder)
    with FileLock(folder / "ca" / "lock"):
        certificate = issued(folder, name)
        if certificate is None and name not in consortium.sites:
            raise FedllmError(f"There is no '{name}' in {consortium.name}; {nearest(name, consortium.sites)}")
        put_revoked(folder, add=name, serial=certificate.serial_number if certificate else None)


def of(folder: Path) -> Consortium:
    """Return the consortium of a federation's folder."""
    return read_consortium(folder / "consortium.toml")


def revoked(folder: Path) -> dict[str, list[str]]:
    """Return the names and the serials (hex) that are refused; a file that cannot be read refuses to go on."""
    table: dict[str, Any] = json.loads((folder / "revoked.json").read_text(encoding="utf-8"))
    return {"names": [str(each) for each in table["names"]], "serials": [str(each) for each in table["serials"]]}


def put_revoked(folder: Path, *, add: str = "", drop: str = "", serial: int | None = None) -> None:
    """Write down who is refused."""
    table = revoked(folder)
    names = ({*table["names"]} | ({add} if add else set())) - {drop}
    serials = {*table["serials"]} | ({f"{serial:x}"} if serial is not None else set())
    notes.put(folder / "revoked.json", {"names": sorted(names), "serials": sorted(serials)})


def read_root(folder: Path) -> Certificate:
    """Return a federation's root certificate."""
    return keys.read_certificate(read_bytes(folder / "ca" / "root.crt"), "The root")


def issued(folder: Path, name: str) -> Certificate | None:
    """Return the certificate that a party has, if it has one."""
    path = folder / "ca" / "issued" / f"{name}.crt"
    return keys.read_certificate(path.read_bytes(), f"'{path}'") if path.exists() else None


def note(folder: Path, name: str, certificate: Certificate) -> None:
    """Keep what was issued, so that it can be revoked."""
    (folder / "ca" / "issued" / f"{name}.crt").write_bytes(keys.pem(certificate))


def read_bytes(path: Path, largest: int = 100_000) -> bytes:
    """Return a small file that somebody sent."""
    try:
        with path.open("rb") as file:
            data = file.read(largest + 1)
    except FileNotFoundError:
        raise FedllmError(f"There is no file '{path}'.") from None
    if len(data) > largest:
        raise FedllmError(f"'{path}' is larger than any file of its kind ({largest} bytes).")
    return data
