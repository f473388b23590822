"""`fedllm federation ...`: what a federation's server and its administrator type."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedllm.app.terminal import Settings, fail, out, say
from fedllm.core.errors import FedllmError

federation = typer.Typer(help="A federation: its server, its members, and the runs in it.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The federation's folder.", show_default=False)]
Admin = Annotated[Path, typer.Option("--admin", help="The administrator's kit; `init` makes it.")]
RunName = Annotated[str, typer.Argument(help="The run's name.", show_default=False)]
KIT = Path("federation") / "admin"


@federation.command()
def init(
    source: Annotated[Path, typer.Argument(help="A consortium: a TOML file.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", help="The federation's folder.")] = Path("federation"),
) -> None:
    """Make the server's folder: the root of all certificates, the server's kit and the administrator's."""
    from fedllm.federation.members import init as make

    fingerprint = make(source, folder)
    say(f"{folder / 'ca'} holds the root key; it leaves this machine only as a backup.")
    say(f"{folder / 'admin'} is the administrator's kit; take it to the machine that runs are started from.")
    say(f"The root's fingerprint, for the sites to compare: {fingerprint}")


@federation.command()
def approve(
    file: Annotated[Path, typer.Argument(help="The NAME.request that a site sent.", show_default=False)],
    folder: Annotated[Path, typer.Option("--in", help="The federation's folder.")] = Path("federation"),
    again: Annotated[
        bool, typer.Option("--again", help="A new key for a site that has one; the old is revoked.")
    ] = False,
) -> None:
    """Sign a site's request; send the file that comes of it back to the site."""
    from fedllm.federation.members import approve as sign

    say(f"Send {sign(folder, file, again=again)} back to the site.")


@federation.command()
def revoke(
    name: Annotated[str, typer.Argument(help="A site, or the administrator.", show_default=False)],
    folder: Annotated[Path, typer.Option("--in", help="The federation's folder.")] = Path("federation"),
) -> None:
    """Refuse a member from now on."""
    from fedllm.federation.members import revoke as refuse

    refuse(folder, name)
    say(f"{name} is refused from now on.")


@federation.command()
def start(folder: Folder = Path("federation")) -> None:
    """Serve the federation until it is stopped, on one port; runs that are wanted go on by themselves."""
    from fedllm.federation.server.serve import serve

    say(f"Serving {folder}; Ctrl-C ends it.")
    serve(folder, "fedllm.app.lead:lead")


@federation.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe: a TOML file.", show_default=False)],
    settings: Settings = [],  # noqa: B006
    admin: Admin = KIT,
    name: Annotated[str, typer.Option(help="The run's name; by default the recipe's.")] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Start it and come back at once.")] = False,
) -> None:
    """Show the plan, ask every site, and start a run; Ctrl-C leaves it running."""
    from fedllm.app.config import read_recipe, write_recipe
    from fedllm.app.office import plan_of, watch
    from fedllm.federation.control import opened

    read = read_recipe(recipe, settings)
    if read.silos or read.partition:
        say("The recipe's own [silos] and [partition] are left out: each site reads what its site.toml says.")
    read = read.model_copy(update={"silos": {}, "partition": None})
    with opened(admin) as ask:
        sites = list(ask({"do": "status"})["sites"])
        for line in plan_of(read, sites):
            say(line)
        called = ask({"do": "submit", "name": name or read.name, "recipe": write_recipe(read)})["name"]
        say(f"Run {called} is submitted; its sites: {', '.join(sites)}.")
        if not detach:
            watch(ask, called, admin)
        else:
            say(f"`fedllm federation attach {called}` watches it.")


@federation.command()
def status(name: Annotated[str, typer.Argument(help="A run; all if none is named.")] = "", admin: Admin = KIT) -> None:
    """Show the sites and the runs."""
    from fedllm.app.office import status_table
    from fedllm.federation.control import opened

    with opened(admin) as ask:
        for table in status_table(ask({"do": "status", "name": name} if name else {"do": "status"})):
            out.print(table)


@federation.command()
def attach(name: RunName, admin: Admin = KIT) -> None:
    """Watch a run that is going on; Ctrl-C leaves it running."""
    from fedllm.app.office import watch
    from fedllm.federation.control import opened

    with opened(admin) as ask:
        watch(ask, name, admin)


@federation.command()
def logs(
    name: RunName,
    admin: Admin = KIT,
    engine: Annotated[
        bool, typer.Option("--engine", help="What the engine wrote, in place of the run itself.")
    ] = False,
    lines: Annotated[int, typer.Option(help="Lines at most.")] = 200,
) -> None:
    """Print the last lines of a run's log."""
    from fedllm.app.office import log_lines
    from fedllm.federation.control import opened

    with opened(admin) as ask:
        found = log_lines(ask, name, engine, lines)
    for line in found:
        say(line)
    if not found:
        say(f"The engine had nothing to say of {name}." if engine else f"{name} has said nothing yet.")


@federation.command()
def stop(name: RunName, admin: Admin = KIT) -> None:
    """Stop a run, and the training at its sites, at once; `resume` goes on from its last round."""
    from fedllm.federation.control import opened

    with opened(admin) as ask:
        before = ask({"do": "stop", "name": name}).get("state")
    if before in ("done", "failed", "stopped"):
        say(f"{name} is {before} already; nothing of it is at work.")
    else:
        say(f"{name} is being stopped; `fedllm federation resume {name}` goes on from its last round.")


@federation.command()
def resume(
    name: RunName,
    admin: Admin = KIT,
    detach: Annotated[bool, typer.Option("--detach", help="Come back at once.")] = False,
) -> None:
    """Go on with a run that was stopped or has failed."""
    from fedllm.app.office import watch
    from fedllm.federation.control import opened

    with opened(admin) as ask:
        ask({"do": "resume", "name": name})
        if not detach:
            watch(ask, name, admin)
        else:
            say(f"{name} goes on from its last round; `fedllm federation attach {name}` watches it.")


@federation.command()
def fetch(
    name: RunName,
    admin: Admin = KIT,
    to: Annotated[Path | None, typer.Option("--out", help="Where to; by default runs/NAME.")] = None,
) -> None:
    """Bring a run's results here: adapter or model, report, numbers and events."""
    from fedllm.app.office import bring
    from fedllm.federation.control import opened

    with opened(admin) as ask:
        say(f"Brought to {bring(ask, name, to or Path('runs') / name)}")


@federation.command()
def deploy(
    folder: Folder = Path("federation"),
    kind: Annotated[str, typer.Option(help="systemd, compose or helm.")] = "systemd",
    to: Annotated[Path, typer.Option("--out", help="The folder to write to.")] = Path("deploy"),
) -> None:
    """Write what keeps the server running: a systemd unit, a Compose file or a Helm chart."""
    from fedllm.federation.deploy import Daemon
    from fedllm.federation.deploy import deploy as write
    from fedllm.federation.members import of

    consortium = of(folder)
    for path in write(Daemon("server", consortium.name, folder, folder, port=consortium.server.port), kind, to):
        say(f"Written: {path}")


@federation.command()
def health(folder: Folder = Path("federation")) -> None:
    """Say whether the server is alive: exit code 0, or 1 and the reason."""
    from fedllm.federation.health import healthy

    if not folder.is_dir():
        raise FedllmError(f"There is no federation in '{folder}'; `fedllm federation init` makes one.")
    if reason := healthy(folder):
        fail(reason, code=1)
    say("alive")
