"""A recipe: what a run is, as TOML. Its tables name functions; their keys are the functions' arguments."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fedllm.core.errors import FedllmError, first_problem

SHORT_NAMES = {"smollm2-135m": "smollm2-135m-instruct"}
"""What a model may be called for short -> the name under which it is told of; there is only this one of its size."""


class Closed(BaseModel):
    """A table whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SiloFiles(Closed):
    """One silo's text: `train`, and `test` if it is apart; else a part of `train` is held out."""

    train: str
    test: str | None = None
    query: str | None = None
    """What to read, where `train` is a database's URL."""
    test_query: str | None = None
    columns: dict[str, str] = {}
    """The task's name of a column -> this silo's own."""
    templates: str | None = None
    """Prompt templates that this silo adds to a library: a text file, templates apart by a line of three dashes."""


class Data(Closed):
    """How the silos' rows become examples."""

    root: str = "."
    """Folder that relative paths start from."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of a silo's rows that is only for evaluation, where it gives no test file."""
    limit_train: int = Field(0, ge=0)
    limit_test: int = Field(64, ge=0)
    """Rows of a silo that are used at most (0: all); test rows cost time in every round."""
    not_utf8: Literal["skip", "refuse"] = "skip"
    """What is done about lines that are not UTF-8; those that are skipped are counted in the report."""
    limit_by: Literal["first", "random"] = "first"
    """Which rows those are; in a file that is sorted by label the first ones would all be of one kind."""


class Evaluate(Closed):
    """What is measured beside the federated model's held-out loss."""

    every: int = Field(1, gt=0)
    """Rounds between two looks at the held-out text; the last round is always looked at."""
    silos: int = Field(32, gt=0)
    """Silos that are looked at, and trained alone, at most; of more a seeded sample."""
    batch_size: int = Field(16, gt=0)
    alone: bool = True
    """Train each silo alone with the same budget."""
    pooled: bool | Literal["data_parallel", "same_batches"] = False
    """Train on everything in one place, only where the texts may be shared: one batch after the other, or as many
    steps as a silo takes on batches as large as those of all together: drawn from all text (`data_parallel`), or the
    silos' very own side by side (`same_batches`), where a large silo counts for no more than in federated training."""
    choice: dict[str, str] = {}
    """Multiple-choice files by name, scored before and after."""
    exact: dict[str, str] = {}
    """Files of prompts and answers by name, answered and matched before and after."""
    general: dict[str, str] = {}
    """Plain text by name that no silo holds; its loss before and after says what was forgotten. A file alone is named
    after itself."""
    limit: int = Field(100, gt=0)
    """Rows of those files, or blocks of general text, that are used at most."""
    examples: int = Field(0, ge=0)
    """Held-out examples of a silo that are scored at most, spread evenly over all of them (0: all)."""

    @field_validator("general", mode="before")
    @classmethod
    def _named_after_itself(cls, general: Any) -> Any:
        return {Path(general).name.partition(".")[0]: general} if isinstance(general, str) else general


class Scratch(Closed):
    """A model from nothing, in place of `model`."""

    depth: int = Field(4, gt=0)
    """Layers; the width is 64 times as many."""
    context: int = Field(512, gt=0)
    """Tokens that the model can see at once."""
    config: str | None = None
    """A transformers configuration (folder, file or hub id), in place of the dial."""
    tokenizer: str = "federated"
    """Learned by the silos together, or the one of a model."""
    vocab: int = Field(4096, gt=259)
    min_silos: int = Field(2, gt=0)
    """Silos that must have a pair of tokens before it becomes one."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of the noise on the silos' counts, as a multiple of `contribution`."""
    contribution: float | None = Field(None, gt=0)
    """The most that one record adds to a round's counts, as an L2 norm."""


class Privacy(Closed):
    """What is counted where noise is added: epsilon at this `delta`."""

    delta: float = Field(1e-5, gt=0, lt=1)
    """Well below 1 over the number of what is hidden: silos, or records of a silo."""
    target_epsilon: float | None = Field(None, gt=0)
    """What the whole run may spend; noise that the recipe does not say is solved for it."""
    stop_at_epsilon: float | None = Field(None, gt=0)
    """The run ends with its last round that stays at or below it."""


class Secure(Closed):
    """The server sees only the sum of the silos' updates: `exchange.secure.settings.Settings`, and more."""

    neighbours: int = Field(0, ge=0)
    drop_outs: int | None = Field(None, ge=0)
    colluding: int = Field(0, ge=0)
    least: int = Field(3, ge=3)
    bits: Literal[16, 32] = 32
    largest_weight: float = Field(10_000, ge=1, le=2**20)
    groups: int = Field(1, ge=1)
    largest_value: float | None = Field(None, gt=0)
    losses: bool = False
    """Let each silo tell its held-out loss and how many examples it has; else neither leaves it."""
    mean_loss: bool = True
    """Add up the silos' held-out losses with the updates, where none tells its own and there is no noise."""


class Homomorphic(Closed):
    """The server adds up ciphertexts that silos open: `exchange.homomorphic.settings.Settings`."""

    tensors: list[str] = ["*"]
    """Patterns of the names of those that are encrypted."""
    key: str = "FEDLLM_KEY"
    """The environment variable with the key that the sites of a federation share and the server does not know."""
    least: int = Field(3, ge=3)
    bits: Literal[16, 32] = 32
    largest_weight: float = Field(10_000, ge=1, le=2**20)
    largest_value: float | None = Field(None, gt=0)


class Links(Closed):
    """The network that a run on one machine is reckoned over: keyword arguments of `runtime.link.link`."""

    default: dict[str, Any] = {}
    silos: dict[str, dict[str, Any]] = {}
    overlap: bool = False
    """Messages travel while the silos compute."""


class Duplicates(Closed):
    """Texts that several silos have are found by salted hashes before training; each stays at one of them."""

    text: str | list[str] = "text"
    """The column, or the columns, that are compared."""
    salt: str = "FEDLLM_SALT"
    """The environment variable with the secret that the sites of a federation share and the server does not know."""


class Availability(Closed):
    """Which silos are there when, in a run on one machine: arguments of `exchange.availability.presences`."""

    drop: float = Field(0.0, ge=0, lt=1)
    """Share of the replies that are lost, of every silo that says no other."""
    silos: dict[str, dict[str, Any]] = {}


class Keep(Closed):
    """What a run keeps of its rounds, so that a silo or rows can be forgotten later without all of them anew."""

    checkpoints: int = Field(2, ge=0)
    """The last so many (0: all); forgetting then begins before the first round that has to be forgotten."""
    norms: bool = False
    """How long each silo's update was in each round, which calibrated forgetting needs; the server then keeps that."""


class Without(Closed):
    """What a run leaves out as if it had never been there; `fedllm unlearn` writes it."""

    silos: list[str] = []
    rows: dict[str, list[str]] = {}
    """Rows of a silo by their hashes (`silo.forget.row_key`)."""
    norms: dict[str, list[float]] = {}
    """Norms to which the silos' updates are scaled, one a round: see `exchange.calibrate`."""


class Federation(Closed):
    """How a run between machines waits; a run on one machine does not look at it."""

    least: int = Field(1, gt=0)
    """Sites that must take part."""
    patience: float = Field(60, gt=0)
    """Seconds without any progress after which a site's work of a round is given up."""
    deadline: float | None = Field(None, gt=0)
    """Seconds after which a site that is still at work on what a round asks is late, and not waited for."""
    parallel: int = Field(8, gt=0)
    """Sites that send or fetch at the same time; all work at the same time."""


class EndpointTable(Closed):
    """A model behind an API, where `model` is "endpoint"."""

    url: str = Field(pattern="^https?://[^/]+")
    """Up to and with /v1."""
    model: str = Field(min_length=1)
    """The model's name there."""
    key_env: str | None = Field(None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    """The environment variable that has the key; the key itself stands in no recipe and no run."""
    timeout: float = Field(60, gt=0)
    tries: int = Field(5, gt=0)
    parallel: int = Field(4, gt=0)
    batch: int = Field(16, gt=0)
    calls: int | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    cost: float | None = Field(None, gt=0)
    """Requests, tokens and money that the run may take at most, on each machine that asks."""
    price_read: float = Field(0, ge=0)
    price_written: float = Field(0, ge=0)
    """Of a million tokens."""


class Leaks(Closed):
    """What a text that leaves a silo is looked through for."""

    n: int = Field(8, ge=0)
    """Words in a row that are a copy of the silo's text; 0 looks for none."""
    action: Literal["redact", "block"] = "redact"
    kinds: list[str] | None = None
    """Personal data by Presidio's names; if not said the usual ones, where presidio-analyzer is installed."""


class Canaries(Closed):
    """Random secrets that each silo plants among the rows it learns from, for `fedllm audit` to look for."""

    count: int = Field(16, gt=0)
    """Secrets that each silo makes; each is planted by the toss of a coin."""
    repeat: int = Field(1, gt=0)
    """Rows that tell each of them."""
    folder: str = "canaries"
    """Where a silo keeps its secrets, seen from data.root; they are sent to nobody."""


class Recipe(Closed):
    """A whole run."""

    name: str = "run"
    seed: int = 0
    rounds: int = Field(3, ge=0)
    model: str = "smollm2-135m-instruct"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    runtime: Literal["auto", "local", "cohort"] = "auto"
    threads: int | None = Field(None, gt=0)
    gradient_checkpointing: bool = False
    processes: int = Field(1, gt=0)
    """Processes over which a silo shards the model that it trains (FSDP2), each with its rows of a batch; on GPUs one
    each."""
    silos: dict[str, SiloFiles] = {}
    partition: dict[str, Any] | None = None
    data: Data = Data()
    evaluate: Evaluate = Evaluate()
    federation: Federation = Federation()
    scratch: Scratch | None = None
    links: Links | None = None
    availability: Availability | None = None
    duplicates: Duplicates | None = None
    endpoint: EndpointTable | None = None
    leaks: Leaks = Leaks()
    keep: Keep = Keep()
    without: Without = Without()
    privacy: Privacy = Privacy()
    secure: Secure | None = None
    homomorphic: Homomorphic | None = None
    canaries: Canaries | None = None
    algorithm: dict[str, Any] = {"name": "averaging"}
    """Local training and an average, made of the tables below, or a method of its own."""
    task: dict[str, Any] = {"name": "instruct"}
    trainable: dict[str, Any] = {"name": "lora"}
    client: dict[str, Any] = {"name": "local_training"}
    select: dict[str, Any] = {"name": "everyone"}
    share: dict[str, Any] = {"name": "everything"}
    aggregate: dict[str, Any] = {"name": "mean"}
    optimiser: dict[str, Any] = {"name": "fedavg"}
    transforms: list[dict[str, Any]] = []
    cleaning: list[dict[str, Any]] = []
    """What each silo does to its rows before it learns from them, step by step."""

    @field_validator("silos", mode="before")
    @classmethod
    def _short_form(cls, silos: Any) -> Any:
        if not isinstance(silos, Mapping):
            return silos
        return {name: {"train": files} if isinstance(files, str) else files for name, files in silos.items()}

    @field_validator("model", mode="after")
    @classmethod
    def _long_name(cls, model: str) -> str:
        return SHORT_NAMES.get(model, model)

    @field_validator("client", mode="before")
    @classmethod
    def _only_client(cls, client: Any) -> Any:
        return {"name": "local_training", **client} if isinstance(client, Mapping) else client


TABLES: dict[str, type[BaseModel]] = {
    "": Recipe,
    "data": Data,
    "evaluate": Evaluate,
    "silos": SiloFiles,
    "federation": Federation,
    "scratch": Scratch,
    "links": Links,
    "availability": Availability,
    "duplicates": Duplicates,
    "endpoint": EndpointTable,
    "leaks": Leaks,
    "keep": Keep,
    "without": Without,
    "privacy": Privacy,
    "secure": Secure,
    "homomorphic": Homomorphic,
    "canaries": Canaries,
}
"""The closed tables of a recipe, and the whole."""

KNOWN = {name: list(table.__pydantic_fields__) for name, table in TABLES.items()}


def read_recipe(source: str | Path | Mapping[str, Any] | Recipe, settings: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file or a mapping, with `key.path=value` settings over it."""
    if isinstance(source, Recipe):
        return source
    where = "the recipe" if isinstance(source, Mapping) else str(source)
    table = dict(source) if isinstance(source, Mapping) else read_toml(Path(source))
    for setting in settings:
        table = with_setting(table, setting)
    for kind in ("algorithm", "task", "trainable", "select", "share", "aggregate", "optimiser", "partition"):
        if isinstance(table.get(kind), str):
            table[kind] = {"name": table[kind]}
        if isinstance(table.get(kind), Mapping) and "name" not in table[kind]:
            usual = Recipe.__pydantic_fields__[kind].default
            if not usual:
                raise FedllmError(f"{where}: [{kind}] has no 'name'; say which {kind} it is.")
            table[kind] = {**usual, **table[kind]}
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        raise FedllmError(f"{where}: {first_problem(error.errors(), KNOWN)}") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedllmError(f"There is no recipe '{path}'; give the path of a TOML file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise FedllmError(f"The recipe '{path}' is not TOML: {error}.") from error


def with_setting(table: Mapping[str, Any], setting: str) -> dict[str, Any]:
    """Return the table with one `key.path=value` put in; the value is TOML, or else a string.

    >>> with_setting({"client": {"steps": 3}}, "client.steps=5")
    {'client': {'steps': 5}}
    """
    path, equals, text = setting.partition("=")
    if not equals:
        raise FedllmError(f"--set '{setting}' has no '='; write it as key.path=value.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return put(table, path.strip().split("."), value, setting)


def put(table: Mapping[str, Any], path: list[str], value: Any, setting: str) -> dict[str, Any]:
    """Return the table with a value at a path of keys."""
    if len(path) == 1:
        return {**table, path[0]: value}
    inner = table.get(path[0], {})
    inner = {"name": inner} if isinstance(inner, str) and path[0] != "silos" else inner
    if not isinstance(inner, Mapping):
        raise FedllmError(f"--set '{setting}': '{path[0]}' is not a table; set it as a whole.")
    return {**table, path[0]: put(inner, path[1:], value, setting)}


def write_recipe(recipe: Recipe) -> str:
    """Return a recipe as TOML, with every default said."""
    return tomli_w.dumps(recipe.model_dump(exclude_none=True))
