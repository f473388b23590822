"""The command line. Heavy libraries are imported where they are used, so that `--help` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console

from fedllm.core.errors import FedllmError, Interrupted

app = typer.Typer(
    help="Several organisations make one language model together from text that none of them may share.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

Set = Annotated[Optional[list[str]], typer.Option("--set", help="A setting over the recipe: key.path=value.")]  # noqa: UP045
Out = Annotated[Optional[Path], typer.Option(help="The run's folder; by default runs/NAME.")]  # noqa: UP045
Run = Annotated[Path, typer.Argument(help="The folder of a run.")]


@app.command()
def quickstart(settings: Set = None, out_folder: Annotated[Optional[Path], typer.Option("--out")] = None, pooled: Annotated[bool, typer.Option(help="Also train on everything in one place.")] = False) -> None:  # noqa: UP045
    """Four silos fine-tune SmolLM2-135M with LoRA by FedAvg, on text that every machine has."""
    extra = ["evaluate.pooled=true"] if pooled else []
    start(Path(__file__).with_name("quickstart.toml"), [*extra, *(settings or [])], out_folder)


@app.command()
def run(recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")], settings: Set = None, out_folder: Annotated[Optional[Path], typer.Option("--out")] = None) -> None:  # noqa: UP045
    """Run a recipe."""
    start(recipe, settings or [], out_folder)
