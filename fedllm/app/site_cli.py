"""`fedllm site ...`: what a site's administrator types."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedllm.app.terminal import Settings, fail, say
from fedllm.core.errors import FedllmError

site = typer.Typer(help="A site of a federation: what it holds, what it allows, and its daemon.", no_args_is_help=True)

SiteFile = Annotated[Path, typer.Argument(help="The site's file.")]
DataOption = Annotated[str, typer.Option("--data", help="This site's text, in place of [data] train.")]
HERE = Path("site.toml")
WIDTHS = (29, 7, 16, 5, 8, 9, 16)
"""Characters of the log's columns."""

WORKER = [sys.executable, "-m", "fedllm.app.worker"]


@site.command()
def request(
    name: Annotated[str, typer.Argument(help="The name under which the consortium lists this site.")],
    folder: Annotated[Path, typer.Option("--in", help="The site's folder.")] = Path(),
) -> None:
    """Make this site's key, which never leaves it, its site.toml, and a request to send to the server."""
    from fedllm.app.site_template import TEMPLATE
    from fedllm.federation.members import request as make_request

    folder.mkdir(parents=True, exist_ok=True)
    sent = make_request(name, folder)
    if not (folder / "site.toml").exists():
        (folder / "site.toml").write_text(TEMPLATE.format(name=name), encoding="utf-8")
    say(f"Send {sent} to whoever runs the server, and put the {name}.approved that comes back beside it.")
    say(f"What may happen here is yours to say in {folder / 'site.toml'}.")


@site.command()
def join(
    approval: Annotated[Path, typer.Argument(help="The NAME.approved that came back.", show_default=False)],
    folder: Annotated[
        Path | None, typer.Option("--in", help="The site's folder; by default where the file is.")
    ] = None,
) -> None:
    """Check an approval and join the federation; `site start` does it by itself for one beside site.toml."""
    from fedllm.federation.members import join as take

    joined = take(approval, folder or approval.parent)
    say(f"{joined.name} has joined {joined.consortium} at {joined.address}:{joined.port}.")
    say(f"Ask for the root's fingerprint by another way and compare: {joined.fingerprint}")


@site.command()
def start(
    file: SiteFile = HERE,
    data: DataOption = "",
) -> None:
    """Serve this site until it is stopped: text and model stay here, nothing listens to the outside."""
    from fedllm.app.site import known, text_of
    from fedllm.app.site_privacy import spending
    from fedllm.federation.members import is_newer
    from fedllm.federation.site.daemon import reach
    from fedllm.federation.site.daemon import start as serve
    from fedllm.federation.site.desk import Desk
    from fedllm.federation.site.policy import read_site
    from fedllm.silo.models import weights_sha256

    here = read_site(file, known())
    approval = file.parent / f"{here.name}.approved"
    if not approval.exists() and not (Path(here.kit) / "startup" / "client.crt").exists():
        raise FedllmError(f"{here.name} has joined no federation; put {approval.name} beside {file} first.")
    if approval.exists() and is_newer(approval, file.parent):
        join(approval, file.parent)
    use(data)
    text_of(here, file)
    # Hashing takes long for a large model, and every run asks for it.
    hashed = functools.cache(weights_sha256)
    with Desk(here, WORKER, known(), hashed, {"FEDLLM_SITE": str(file.absolute())}, spending(here, file)) as desk:
        try:
            reach(Path(here.kit))
        except FedllmError as error:
            say(f"{error} {here.name} goes on trying.")
        say(f"{here.name} is at work; Ctrl-C ends it.")
        serve(here.name, Path(here.kit), Path(here.state), desk.answer)


@site.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a TOML file.", show_default=False)],
    file: SiteFile = HERE,
    settings: Settings = [],  # noqa: B006
    user: Annotated[str, typer.Option(help="Who would start it.")] = "",
    data: DataOption = "",
    run: Annotated[str, typer.Option(help="The run's name, if it has begun here: what it spent is part of it.")] = "",
) -> None:
    """Show what a recipe would do here and whether this site's rules let it; nothing runs."""
    from fedllm.app.build import build
    from fedllm.app.config import read_recipe
    from fedllm.app.lead import asked_of, question
    from fedllm.app.plan_view import plan_lines
    from fedllm.app.privacy import is_private
    from fedllm.app.site import known, own_recipe
    from fedllm.app.site_privacy import spending
    from fedllm.federation.site.policy import read_site
    from fedllm.federation.site.rules import by_epsilon, facts, refusals
    from fedllm.silo.models import weights_sha256

    use(data)
    here, read = read_site(file, known()), read_recipe(recipe, settings)
    told = asked_of(here.name, read)
    asked = facts(question(here.name, read, weights_sha256(read.model), "check", user))
    found = list(refusals(here, asked, known(), weights_sha256))
    account = spending(here, file)
    if not found:
        found = list(by_epsilon(here, told, run, account))
    say(f"recipe       sha256 {asked.recipe}")
    for rule, sentence in found:
        say(f"refused      {rule}: {sentence}")
    if found:
        raise FedllmError(f"{here.name} would refuse this recipe by {', '.join(rule for rule, _ in found)}.")
    parts = build(own_recipe(told, file), weights=False)
    for line in plan_lines(parts):
        say(line)
    counts = parts.silos.shards[here.name]
    say(f"text here    {len(counts.train):,} rows to learn from, {len(counts.test):,} held out")
    say(f"leaves here  updates of {parts.plan.parameters:,} values; numbers: {', '.join(here.policy.metrics)}")
    if is_private(read):
        before, after = account.after(told, run)
        limit = f" of {here.policy.epsilon:g}" if here.policy.epsilon else ""
        say(f"epsilon      {before:.3g} spent here, {after:.3g}{limit} with this run, at delta {here.policy.delta:g}")
    say(f"allowed      {here.name} would take part")


@site.command()
def audit(file: SiteFile = HERE) -> None:
    """Verify the audit log and print it: what was asked, what left, when, how many bytes, under which rule."""
    from fedllm.federation.site.audit import COLUMNS, rows, verify
    from fedllm.federation.site.policy import read_site

    log = verify(Path(read_site(file).state) / "audit.jsonl")
    say("  ".join(f"{name:<{width}}" for name, width in zip(COLUMNS, WIDTHS, strict=True)))
    for *cells, rest in rows(log.entries):
        say("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)) + f"  {rest}")
    say(f"{len(log.entries)} lines, each follows from the one before it: nothing was changed or taken from between.")
    if log.cut:
        say(f"The last line was cut short by a crash ({log.cut} bytes); the next start mends it.")


@site.command()
def deploy(
    file: SiteFile = HERE,
    kind: Annotated[str, typer.Option(help="systemd, compose or helm.")] = "systemd",
    to: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("deploy"),
) -> None:
    """Write what keeps this site's daemon running: a systemd unit, a Compose file or a Helm chart."""
    from fedllm.app.site import known, text_of
    from fedllm.federation.deploy import Daemon
    from fedllm.federation.deploy import deploy as write
    from fedllm.federation.site.policy import read_site

    here = read_site(file, known())
    Path(here.state).mkdir(parents=True, exist_ok=True)
    files = [file.parent / each for each in read_paths(text_of(here, file).train, here.data.test)]
    models = [file.parent / model.path for model in here.models.values() if model.path]
    daemon = Daemon("site", here.name, file, Path(here.state), writes=[Path(here.kit)], reads=[*files, *models])
    for path in write(daemon, kind, to):
        say(f"Written: {path}")


@site.command()
def health(file: SiteFile = HERE) -> None:
    """Say whether this site's daemon is alive: exit code 0, or 1 and the reason."""
    from fedllm.federation.health import healthy
    from fedllm.federation.site.policy import read_site

    if reason := healthy(Path(read_site(file).state)):
        fail(reason, code=1)
    say("alive")


def use(data: str) -> None:
    """Let text that was named on the command line take the place of the site's file's, also in the worker."""
    from fedllm.app.site import DATA

    if data:
        os.environ[DATA] = data if ":" in data else str(Path(data).expanduser().absolute())


def read_paths(*sources: str | None) -> Sequence[str]:
    """Return those sources that are files or folders."""
    return [source for source in sources if source and ":" not in source]
