"""Who takes part in a federation: a closed TOML file at the server."""

from __future__ import annotations

import ipaddress
import re
import tomllib
from pathlib import Path

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedllm.core.errors import FedllmError, first_problem

SITE = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,62}$"
"""A site's name; it becomes a file name, a certificate's subject and an address inside the engine."""

USER = r"^[A-Za-z0-9._%+-]{1,40}@[A-Za-z0-9.-]{1,20}\.[A-Za-z]{2,}$"
"""A user's name has the form of an e-mail address; with it, it fits a certificate's subject (64)."""

RESERVED = {"server", "admin", "all", "@all", "relay"}
"""Words that the engine uses for parties of its own."""


class Server(BaseModel):
    """Where the sites and the administrator find the server."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str
    port: int = Field(8002, ge=1, le=65535)

    @field_validator("address")
    @classmethod
    def _host(cls, address: str) -> str:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            if not re.fullmatch(r"(?=.{1,64}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*", address):
                raise ValueError("write a host name or an IPv4 address") from None
            return address
        if ip.version != 4:
            raise ValueError("the engine listens on IPv4 only; write a host name or an IPv4 address")
        return address


class Consortium(BaseModel):
    """A federation: its name, its server, who may start runs, and the sites that may join."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=SITE)
    server: Server
    admin: str = Field(pattern=USER)
    sites: list[str] = Field(min_length=1)

    @field_validator("sites")
    @classmethod
    def _names(cls, sites: list[str]) -> list[str]:
        for name in sites:
            if not re.fullmatch(SITE, name):
                raise ValueError(f"'{name}' is no name for a site; use letters, digits, - and _, 63 at most")
            if name.lower() in RESERVED:
                raise ValueError(f"'{name}' is a word of the engine; give the site another name")
        if len({name.lower() for name in sites}) < len(sites):
            raise ValueError("two sites have the same name")
        return sites


def read_consortium(path: Path) -> Consortium:
    """Read a consortium's file, or say in one sentence what is wrong with it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        return Consortium.model_validate(table)
    except FileNotFoundError:
        raise FedllmError(f"There is no consortium '{path}'; write one, or give the folder that `init` made.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FedllmError(f"The consortium '{path}' is not TOML: {error}.") from error
    except ValidationError as error:
        known = {"": list(Consortium.__pydantic_fields__), "server": list(Server.__pydantic_fields__)}
        raise FedllmError(f"{path}: {first_problem(error.errors(), known)}") from error


def write_consortium(consortium: Consortium) -> str:
    """Return a consortium as TOML."""
    return tomli_w.dumps(consortium.model_dump())
