"""From a recipe to the parts of a run, cheap checks first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fedllm.algorithms.method import Ground, Method
from fedllm.app import privacy
from fedllm.app.averaged import averaged, selection
from fedllm.app.catalog import CATALOG, SEND_PROMPTS, make
from fedllm.app.config import Recipe
from fedllm.app.data import Silos, open_named
from fedllm.app.quiet import quiet_libraries
from fedllm.app.ranks import Ranks, check_processes
from fedllm.app.refused import check_together
from fedllm.app.rows import NOWHERE
from fedllm.app.voices import (
    REMEDY,
    NoWeights,
    endpoint_of,
    guard_note,
    guard_of,
    rows_of,
    speaker_for,
    words_task,
)
from fedllm.app.work import check_kept, make_work
from fedllm.core.errors import FedllmError
from fedllm.core.noise import fresh_secret
from fedllm.core.plan import Plan, plan
from fedllm.core.seeds import derive
from fedllm.core.types import Algorithm, Client, Dataset, Select, Share, Silo, State, Tensors, Transform, Work
from fedllm.exchange.availability import Presence, presences
from fedllm.exchange.select import fixed_size
from fedllm.runtime.link import SiloLink, links_of
from fedllm.silo import trainables
from fedllm.silo.cohort import stackable
from fedllm.silo.endpoint import Endpoint
from fedllm.silo.evaluate import held_out
from fedllm.silo.fit import slowed
from fedllm.silo.models import ENDPOINT, empty_model, load_model, load_tokenizer, pick_device, pick_dtype
from fedllm.silo.objective import Objective, causal_loss
from fedllm.silo.prompts import require_room, virtual_tokens
from fedllm.silo.questions import Asking, asking
from fedllm.silo.speaker import Speaker
from fedllm.silo.streams import Blocks
from fedllm.silo.tasks import Task
from fedllm.silo.trainables import Trainable, parameters
from fedllm.silo.width import cohort_width


class Parts(NamedTuple):
    """All that a run is made of."""

    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    tokenizer: Any
    task: Task
    silos: Silos
    trainable: Trainable
    model: nn.Module
    params: Tensors
    objective: Objective
    select: Select
    algorithm: Algorithm
    evaluator: Client
    plan: Plan
    looked: Sequence[str]
    """The silos whose held-out text is looked at."""
    own: Tensors
    """What no silo ever sends, as it is at first."""
    first: Tensors
    """All that is trained, as it is at first, where silos keep some of it to themselves."""
    links: Mapping[str, SiloLink]
    """The network that rounds are reckoned over, if the recipe has one."""
    there: Mapping[str, Presence]
    """When the silos are there, where the recipe says it."""
    width: int
    """Clients trained as one batch; 1 is one by one."""
    ranks: Ranks | None
    """The processes that train a silo's model together, if there are several; to be closed."""
    secret: bytes
    """What noise is drawn from, where there is any."""
    method: Method | None = None
    """What the recipe's algorithm is where it is more than local training and an average."""
    endpoint: Endpoint | None = None
    """Where the model is behind an API."""

    def work(self, **changes: Any) -> Work:
        """Return the recipe's local training, with other settings where given."""
        return make_work(
            self.recipe, self.objective, self.tokenizer, self.secret, self.ranks, self.trainable, self.first, **changes
        )

    def pace(self, name: str) -> int:
        """Return how many steps a silo of this machine takes in a round."""
        return slowed(self.steps(self.silos.examples(name)), self.there.get(name, Presence()).slow)

    def present(self, number: int) -> list[str]:
        """Return who is asked in a round, counted from 0, and is there."""
        return [name for name in self.select(number) if self.there.get(name, Presence()).there(number + 1)]

    def steps(self, data: Dataset) -> int:
        """Return how often a client with this data ticks in a round."""
        return self.method.steps(data) if self.method else self.work().steps(data)

    def shown(self, state: State) -> Tensors:
        """Return what of a server's state is evaluated and exported."""
        return self.method.shown(state) if self.method else state.params

    def open_silo(self, tick: Callable[[int], None]) -> Callable[[str], Silo]:
        """Return the function that opens a silo by name; `tick` hears of every step."""
        seed = self.recipe.seed
        return lambda name: Silo(name, self.model, self.silos.examples(name), {}, derive(seed, "silo", name), tick)


def build(
    recipe: Recipe,
    weights: bool = True,
    elsewhere: Sequence[str] = (),
    secret: bytes | None = None,
    key: bytes | None = None,
) -> Parts:
    """Build a run's parts; without `weights` the model has shapes only, enough for a plan, and nothing is written.

    `elsewhere` names the silos of a federation, whose text other machines hold. Noise is drawn from the `secret`; a
    plan needs none. `key` is what the sites of a federation share for [homomorphic]; on one machine there is no need.

    Raises `FedllmError` for whatever does not fit, before anything is trained.
    """
    quiet_libraries()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    check_together(recipe, bool(elsewhere))
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device)
    endpoint = endpoint_of(recipe)
    asked = asking(recipe.task) if CATALOG["algorithm"].get(recipe.algorithm["name"]) in SEND_PROMPTS else None
    tokenizer = None if endpoint else load_tokenizer(recipe.model)
    task = words_task(recipe, asked) if endpoint else make("task", recipe.task, tokenizer)
    trainable = trainables.none() if endpoint or asked else make("trainable", recipe.trainable, tokenizer=tokenizer)
    named = {name: NOWHERE for name in elsewhere} if elsewhere else open_named(recipe, keep=weights)
    shards = {name: shard for name, shard in named.items() if name not in recipe.without.silos}
    silos = Silos(shards, task, tested=recipe.evaluate.examples, asking=asked)
    if not elsewhere:
        silos.check()
    recipe, secret = privacy.resolved(recipe, len(silos.names), counts(recipe, silos)), secret or fresh_secret()
    privacy.require_target(recipe, len(silos.names), counts(recipe, silos))
    select = selection(recipe, list(named), secret)

    if not elsewhere:
        check_processes(recipe, device)
    ranks = Ranks(recipe, device, dtype) if recipe.processes > 1 and not elsewhere else None
    model: nn.Module
    if endpoint:
        model = trainable.attach(NoWeights(), recipe.seed)
    elif weights:
        model = attached(recipe, trainable, device, dtype)
    else:
        model = trainable.attach(empty_model(recipe.model, kept_dtype(trainable, dtype)), recipe.seed)
    if not endpoint:
        check_fit(recipe, tokenizer, model)
    autocast = None if trainable.adapter or dtype == torch.float32 else dtype
    objective = causal_loss(autocast)
    every: Tensors = parameters(model)
    if device.type == "mps":
        every = {name: value.cpu() for name, value in every.items()}
    params: Tensors = {name: value for name, value in every.items() if not trainable.stays(name)}
    own = {name: value for name, value in every.items() if trainable.stays(name)}
    if own and not params:
        raise FedllmError("All that is trained stays at the silos; let trainable.tokens be 1 or more beside personal.")
    share: Share = make("share", recipe.share, rounds=recipe.rounds)
    check_kept(recipe, share, own)
    if not (elsewhere or endpoint) and virtual_tokens(model):
        require_room(model, virtual_tokens(model), longest_of_all(silos))

    transforms = [] if privacy.is_private(recipe) else privacy.transforms(recipe, len(silos.names), secret)
    speaker = speaker_for(endpoint, tokenizer, objective, recipe.evaluate.batch_size)
    method = make_method(recipe, model, tokenizer, task, trainable, objective, silos.names, transforms, asked, speaker)
    if method:
        params = method.start
    elif not params:
        raise FedllmError(f"trainable '{trainable.name}' leaves nothing to average; use 'lora' or another.")
    links = links_of(silos.names, recipe.links.default, recipe.links.silos) if recipe.links else {}
    there = presence_of(silos.names, recipe)
    first = {**params, **own} if own or share.partial else {}
    work = make_work(recipe, objective, tokenizer, secret, ranks, trainable, first)
    rows = recipe.evaluate.batch_size
    evaluator = (
        method.evaluator
        if method
        else held_out(objective, task, tokenizer, trainable, batch_size=rows, autocast=autocast, first=own)
    )
    algorithm = (
        method.algorithm(select)
        if method
        else averaged(recipe, work, evaluator, select, share, params, own, len(silos.names), secret, key, there)
    )
    fitting = plan(algorithm, params)
    width = 1 if elsewhere else choose_width(recipe, model, silos, algorithm, device)
    return Parts(
        recipe, device, dtype, tokenizer, task, silos, trainable, model, params, objective, select, algorithm,
        evaluator, fitting, sample(silos.names, recipe), own, first, links, there, width, ranks, secret, method,
        endpoint,
    )  # fmt: skip


def make_method(
    recipe: Recipe,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    trainable: Trainable,
    objective: Objective,
    names: Sequence[str],
    transforms: Sequence[Transform],
    asked: Asking | None,
    speaker: Callable[[Silo], Speaker],
) -> Method | None:
    """Return the method that a recipe's algorithm names, or None for local training and an average."""
    if recipe.algorithm["name"] == "averaging":
        if odd := sorted(recipe.algorithm.keys() - {"name"}):
            raise FedllmError(
                f"algorithm.{odd[0]} is not a setting of 'averaging', whose parts are tables of their own, such as "
                "[client] and [optimiser]."
            )
        return None
    if recipe.evaluate.general:
        raise FedllmError(
            f"evaluate.general is the loss of a model that was trained, and '{recipe.algorithm['name']}' trains none; "
            "take it out, or learn with algorithm 'averaging'."
        )
    fixed = Recipe.__pydantic_fields__
    for kind in ("client", "share", "optimiser"):
        if (name := getattr(recipe, kind)["name"]) != fixed[kind].default["name"]:
            raise FedllmError(f"algorithm '{recipe.algorithm['name']}' has no {kind} '{name}'; take [{kind}] out.")
    aggregate = make("aggregate", recipe.aggregate)
    size = recipe.evaluate.batch_size
    ground = Ground(
        names, recipe.rounds, recipe.seed, model, tokenizer, task, trainable, objective, aggregate, transforms, size,
        asked, speaker, guard_of(recipe), rows_of(recipe),
    )  # fmt: skip
    method: Method = make("algorithm", recipe.algorithm, ground)
    if recipe.model == ENDPOINT and method.weights:
        raise FedllmError(f"algorithm '{method.name}' needs the model's weights, which an API does not give; {REMEDY}.")
    return method._replace(notes=[*method.notes, ("leaks", guard_note(recipe))]) if asked else method


def check_fit(recipe: Recipe, tokenizer: Any, model: Any) -> None:
    """Raise unless the model has an embedding for every token that the tokenizer makes, and sees a whole block."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise FedllmError(
            f"The tokenizer of '{recipe.model}' makes {len(tokenizer):,} tokens and its model knows {rows:,}; put the "
            "tokenizer beside the model with which it was trained."
        )
    block, context = int(recipe.task.get("block", 0)), getattr(model.config, "max_position_embeddings", None)
    if context is not None and block > context:
        raise FedllmError(f"task.block is {block}, but the model sees {context} tokens at once; lower it.")


def presence_of(names: Sequence[str], recipe: Recipe) -> dict[str, Presence]:
    """Return when the silos are there, if the recipe says it."""
    if recipe.availability is None:
        return {}
    return presences(names, recipe.availability.drop, recipe.availability.silos, recipe.rounds)


def attached(recipe: Recipe, trainable: Trainable, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Load a recipe's model with what is trained attached to it."""
    kept = kept_dtype(trainable, dtype)
    base = load_model(recipe.model, device, kept, row_tokens(recipe), recipe.gradient_checkpointing)
    return trainable.attach(base, recipe.seed)


def kept_dtype(trainable: Trainable, dtype: torch.dtype) -> torch.dtype:
    """Return the type of the model's weights: those that are trained stay in float32, whatever they are computed in."""
    return dtype if trainable.adapter else torch.float32


def choose_width(recipe: Recipe, model: nn.Module, silos: Silos, algorithm: Algorithm, device: torch.device) -> int:
    """Return how many clients train as one batch."""
    fits = algorithm.cohort is not None and stackable(model)
    if recipe.runtime == "cohort" and not fits:
        raise FedllmError(
            "runtime is 'cohort', which trains plain LoRA without dropout on linear layers, or a soft prompt without "
            "an encoder at the silo; use runtime = 'auto', or trainable.name = 'lora' with dropout = 0, or 'prompt'."
        )
    if recipe.runtime == "local" or recipe.processes > 1 or not fits:
        return 1
    rows = int(recipe.client.get("micro_batch") or recipe.client.get("batch_size", 8))
    width = cohort_width(model, rows, longest(silos) + virtual_tokens(model), device)
    return max(2, width) if recipe.runtime == "cohort" else width


def sample(names: Sequence[str], recipe: Recipe) -> list[str]:
    """Return as many silos as a recipe looks at, the same ones in every round."""
    drawn = fixed_size(names, min(len(names), recipe.evaluate.silos), derive(recipe.seed, "looked"))
    return list(drawn(0))


def row_tokens(recipe: Recipe) -> int:
    """Return the tokens that a row may have: from the recipe alone, so that every machine computes alike."""
    return int(recipe.task.get("max_tokens", 512))


def longest(silos: Silos) -> int:
    """Return the tokens of the longest example that the first silo trains on: what one may expect of all."""
    examples = silos.examples(silos.names[0])["train"]
    # All blocks but the last are as long as the first, and there may be very many.
    return max(len(example.input_ids) for example in (examples[:1] if isinstance(examples, Blocks) else examples))


def counts(recipe: Recipe, silos: Silos) -> dict[str, int]:
    """Return the examples of each silo that is on this machine, where what noise is worth depends on them."""
    if not privacy.hides_records(recipe):
        return {}
    return {name: len(silos.examples(name)["train"]) for name in silos.names if silos.shards[name].train}


def longest_of_all(silos: Silos) -> int:
    """Return the tokens of the longest example of all silos, held-out ones too."""
    each = [part for name in silos.names for part in silos.examples(name).values()]
    return max(len(example.input_ids) for part in each for example in part)
