"""The command line. Heavy libraries are imported where they are used, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from fedllm.app.federation_cli import federation
from fedllm.app.site_cli import site
from fedllm.app.terminal import Settings, err, fail, out, say
from fedllm.core.errors import FedllmError, Interrupted

if TYPE_CHECKING:
    from fedllm.app.config import Recipe

app = typer.Typer(
    help="Several organisations make one language model together from text that none of them may share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(federation, name="federation")
app.add_typer(site, name="site")

RecipeFile = Annotated[Path, typer.Argument(help="A recipe: a TOML file.", show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder; by default runs/NAME.")]


@app.command()
def quickstart(
    settings: Settings = [],  # noqa: B006
    out_folder: Out = None,
    pooled: Annotated[bool, typer.Option("--pooled", help="Also train on everything in one place.")] = False,
) -> None:
    """Four silos fine-tune SmolLM2-135M with LoRA by FedAvg, on text that every machine has."""
    extra = ["evaluate.pooled=true"] if pooled else []
    recipe = recipe_of(Path(__file__).with_name("quickstart.toml"), [*extra, *settings])
    start(recipe, out_folder or next_free(Path("runs") / recipe.name))


@app.command()
def run(
    recipe: RecipeFile,
    settings: Settings = [],  # noqa: B006
    out_folder: Out = None,
    stop: Annotated[
        float | None,
        typer.Option("--stop-at-epsilon", help="End with the last round that does not spend more.", show_default=False),
    ] = None,
) -> None:
    """Run a recipe."""
    limit = [] if stop is None else [f"privacy.stop_at_epsilon={stop}"]
    start(recipe_of(recipe, [*settings, *limit]), out_folder)


@app.command()
def plan(recipe: RecipeFile, settings: Settings = []) -> None:  # noqa: B006
    """Print the round that a recipe makes, its sizes and its memory; nothing runs."""
    from tempfile import TemporaryDirectory

    from fedllm.app.build import build
    from fedllm.app.plan_view import plan_lines, tokenizer_lines
    from fedllm.app.progress import Ui
    from fedllm.app.scratch import start as start_from_nothing

    read = recipe_of(recipe, settings)
    with TemporaryDirectory() as apart:
        looks: dict[str, int] = {}
        if read.scratch:
            looks = start_from_nothing(read, Path(apart), Ui(None), keep=False).get("looks", {})
            read = read.model_copy(update={"model": apart})
        for line in plan_lines(build(read, weights=False)):
            say(line)
        for line in tokenizer_lines(read, looks):
            say(line)


@app.command()
def resume(folder: RunFolder) -> None:
    """Go on with a run that was stopped or killed, with the same result as if it had not been."""
    from fedllm.app.progress import Ui
    from fedllm.app.run import resume as go_on

    close(go_on(folder, Ui(out)))


@app.command()
def evaluate(
    target: Annotated[Path, typer.Argument(help="A run, an adapter folder or a model folder.", show_default=False)],
    data: Annotated[list[str], typer.Option("--data", help="Text to evaluate on; by default the run's silos.")] = [],  # noqa: B006
    limit: Annotated[int, typer.Option(help="Rows of each --data file that are used at most.")] = 100,
) -> None:
    """Measure a result: loss and perplexity, multiple choice or exact match, by what the file holds."""
    from fedllm.app.evaluate import evaluate as measure

    out.print(measure(target, data, limit))


@app.command()
def chat(
    target: Annotated[Path, typer.Argument(help="A run, an adapter folder or a model folder.", show_default=False)],
    max_tokens: Annotated[int, typer.Option(help="Tokens an answer has at most.")] = 256,
    base: Annotated[bool, typer.Option("--base", help="Talk to the model as it was before.")] = False,
) -> None:
    """Talk to a run's model; an empty line or Ctrl-D ends."""
    from fedllm.app.chat import talk

    talk(target, max_tokens, base, out)


@app.command()
def serve(
    target: Annotated[Path, typer.Argument(help="A run, an adapter folder or a model folder.", show_default=False)],
    host: Annotated[
        str, typer.Option(help="Where to listen; by default only this machine can reach it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    key: Annotated[
        str | None,
        typer.Option(help="A token that every request must bring.", envvar="FEDLLM_SERVE_KEY", show_default=False),
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are told to come back.", min=0)] = 16,
    base: Annotated[bool, typer.Option("--base", help="Serve the model as it was before.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto; by default the run's.")] = None,
) -> None:
    """Serve a result to programs that speak OpenAI's protocol: chats, completions, log-probabilities."""
    from fedllm.app.serve import serve as listen

    listen(target, out, host=host, port=port, key=key, queue=queue, base=base, dtype=dtype)


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[Path | None, typer.Option(help="Where to write; by default inside the run's folder.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="One plain model with the adapter inside.")] = False,
) -> None:
    """Write a run's result for use elsewhere."""
    from fedllm.app.export import export_run

    say(f"Written to {export_run(folder, to, merged)}")


@app.command()
def audit(
    folder: RunFolder,
    attacks: Annotated[
        list[str],
        typer.Option("--attack", help="updates, membership, canaries, origin or tensors; by default all of them."),
    ] = [],  # noqa: B006
    trials: Annotated[int, typer.Option(help="Records that are to be read out of updates.", min=2)] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens that such a record is cut to.", min=4)] = 24,
    rows: Annotated[int, typer.Option(help="Training and held-out texts each, for membership.", min=16)] = 256,
    seed: Annotated[int, typer.Option(help="The same seed finds the same.")] = 0,
    show_text: Annotated[
        bool, typer.Option("--show-text", help="Show records beside what was recovered of them.")
    ] = False,
) -> None:
    """Attack a finished run: what of the silos' text can be had back from updates and model."""
    from fedllm.app.audits.command import Wanted
    from fedllm.app.audits.command import audit as attack
    from fedllm.app.progress import Ui

    page, sentences = attack(folder, Wanted(tuple(attacks), trials, tokens, rows, seed, show_text), Ui(out))
    for sentence in sentences:
        say(sentence)
    say(f"Audit:   {page}")


@app.command()
def unlearn(
    folder: RunFolder,
    silo: Annotated[str, typer.Option("--silo", help="The silo that is to be forgotten.", show_default=False)],
    rows: Annotated[
        Path | None, typer.Option("--rows", help="Only these rows of it: a file in the silo's own form.")
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Approximately (FedEraser): faster, and not proven.")
    ] = False,
    ratio: Annotated[float, typer.Option(help="Calibrated: share of the local steps.")] = 0.5,
    interval: Annotated[int, typer.Option(help="Calibrated: rounds for which one is replayed.")] = 2,
    key: Annotated[Path | None, typer.Option(help="An Ed25519 key (PEM) that signs the certificate.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="A run without the silo or rows from the start, to compare with.")
    ] = None,
    out_folder: Out = None,
) -> None:
    """Replay a finished run without a silo, or without rows of it, and certify what is left of them."""
    from fedllm.app.certificate import private_key
    from fedllm.app.forgotten import certify, lines
    from fedllm.app.progress import Ui
    from fedllm.app.unlearn import Wish
    from fedllm.app.unlearn import unlearn as forget

    wish, signer = Wish(silo, rows, calibrated, ratio, interval), private_key(key) if key else None
    replay = forget(folder, wish, out_folder, Ui(out))
    with Ui(out) as ui:
        path = certify(folder, replay, wish, signer, against, ui)
    close(replay.folder)
    for line in lines(path):
        say(line)


@app.command()
def certificate(
    path: Annotated[Path, typer.Argument(help="A certificate of unlearning.", show_default=False)],
    key: Annotated[Path, typer.Option("--key", help="The signer's public key (PEM).", show_default=False)],
) -> None:
    """Check who signed a certificate, and that the files beside it are those that it is about."""
    from fedllm.app.certificate import checked

    for line in checked(path, key):
        say(line)


@app.command()
def report(folder: RunFolder) -> None:
    """Write a run's report anew, also while it is running."""
    from fedllm.app.report.page import write_report

    if not (folder / "events.jsonl").exists():
        raise FedllmError(f"There is no run in '{folder}'; give the folder that `fedllm run` made.")
    say(f"Report: {write_report(folder)}")


def next_free(folder: Path) -> Path:
    """Return the folder, or with the first number after its name under which there is none yet.

    A quickstart is tried more than once; a run of one's own is only replaced by hand.
    """
    taken, number = folder, 1
    while taken.exists():
        number += 1
        taken = folder.with_name(f"{folder.name}-{number}")
    return taken


def recipe_of(source: Path, settings: list[str]) -> Recipe:
    """Read a recipe with settings over it."""
    from fedllm.app.config import read_recipe

    return read_recipe(source, settings)


def start(recipe: Recipe, folder: Path | None) -> None:
    """Run a recipe with progress on the terminal, and say what came of it."""
    from fedllm.app.progress import Ui
    from fedllm.app.run import run as go

    rounds = f"{recipe.rounds} round{'s' * (recipe.rounds != 1)}"
    model = "a model from nothing" if recipe.scratch else recipe.model
    out.print(Text.assemble((recipe.name, "bold"), f": {rounds} of {model}"), highlight=False, soft_wrap=True)
    close(go(recipe, folder, ui=Ui(out)))


def close(folder: Path) -> None:
    """Print the comparison and where things are."""
    from fedllm.app.results import comparisons, read_metrics, verdict

    metrics = read_metrics(folder)
    out.print()
    out.print(comparisons(metrics))
    out.print(verdict(metrics), highlight=False, markup=False)
    out.print()
    for what, name in (
        ("Report", "report.html"),
        ("Adapter", "adapter"),
        ("Model", "model"),
        ("Prompt", "prompt/prompt.json"),
    ):
        if (folder / name).exists():
            say(f"{what + ':':<9}{folder / name}")
    if not (folder / "prompt").is_dir():
        say(f"Talk:    fedllm chat {folder}")


def main() -> None:
    """Run the command line: an error that the user can mend is one sentence and exit code 2."""
    try:
        app()
    except FedllmError as error:
        fail(str(error))
    except Interrupted as stop:
        err.print(str(stop) or "Stopped.", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        where = f" ('{error.filename}')" if error.filename else ""
        fail(f"{error.strerror or error}{where}; what the run has written so far is kept.")
