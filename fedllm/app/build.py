"""From a recipe to the parts of a run, cheap checks first."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from fedllm.app.catalog import make
from fedllm.app.config import Recipe
from fedllm.app.data import NOWHERE, Silos, open_shards
from fedllm.core.errors import FedllmError
from fedllm.core.plan import Plan, plan
from fedllm.core.round import averaging
from fedllm.core.seeds import derive
from fedllm.core.types import Algorithm, Client, Select, Share, Silo, Tensors, Work
from fedllm.exchange.lora_error import lora_error
from fedllm.exchange.select import fixed_size
from fedllm.runtime.link import SiloLink, links_of
from fedllm.silo.cohort import stackable
from fedllm.silo.evaluate import held_out
from fedllm.silo.keeping import keeping
from fedllm.silo.models import empty_model, load_model, load_tokenizer, pick_device, pick_dtype
from fedllm.silo.objective import Objective, causal_loss
from fedllm.silo.prompts import require_room, virtual_tokens
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
    width: int
    """Clients trained as one batch; 1 is one by one."""

    def work(self, **changes: Any) -> Work:
        """Return the recipe's local training, with other settings where given."""
        return make_work(self.recipe, self.objective, self.tokenizer, self.trainable, self.first, **changes)

    def open_silo(self, tick: Callable[[int], None]) -> Callable[[str], Silo]:
        """Return the function that opens a silo by name; `tick` hears of every step."""
        seed = self.recipe.seed
        return lambda name: Silo(name, self.model, self.silos.examples(name), {}, derive(seed, "silo", name), tick)


def build(recipe: Recipe, weights: bool = True, elsewhere: Sequence[str] = ()) -> Parts:
    """Build a run's parts; without `weights` the model has shapes only, enough for a plan.

    `elsewhere` names the silos of a federation, whose text other machines hold.

    Raises `FedllmError` for whatever does not fit, before anything is trained.
    """
    quiet_libraries()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = pick_device(recipe.device)
    dtype = pick_dtype(recipe.dtype, device)
    tokenizer = load_tokenizer(recipe.model)
    task = make("task", recipe.task, tokenizer)
    trainable = make("trainable", recipe.trainable, tokenizer=tokenizer)
    silos = Silos({name: NOWHERE for name in elsewhere} if elsewhere else open_shards(recipe), task)
    if not elsewhere:
        silos.check()
    select = make("select", recipe.select, silos.names, seed=recipe.seed)

    # Weights that are trained stay in float32, whatever type they are computed in.
    kept = dtype if trainable.adapter else torch.float32
    if weights:
        base = load_model(recipe.model, device, kept, row_tokens(recipe), recipe.gradient_checkpointing)
    else:
        base = empty_model(recipe.model, kept)
    model = trainable.attach(base, recipe.seed)
    objective = causal_loss(None if trainable.adapter or dtype == torch.float32 else dtype)
    every: Tensors = parameters(model)
    if device.type == "mps":
        every = {name: value.cpu() for name, value in every.items()}
    params = {name: value for name, value in every.items() if not trainable.stays(name)}
    own = {name: value for name, value in every.items() if trainable.stays(name)}
    if own and not params:
        raise FedllmError("All that is trained stays at the silos; let trainable.tokens be 1 or more beside personal.")
    if not elsewhere and virtual_tokens(model):
        require_room(model, virtual_tokens(model), longest_of_all(silos))

    links = links_of(silos.names, recipe.links.default, recipe.links.silos) if recipe.links else {}
    share: Share = make("share", recipe.share, rounds=recipe.rounds)
    if own and share.name and not share.partial:
        raise FedllmError(
            f"share.name is '{recipe.share['name']}', whose silos train all that is sent, and trainable.personal is "
            "never sent; use share.name = 'everything' or trainable.personal = 0."
        )
    first = {**params, **own} if own or share.partial else {}
    work = make_work(recipe, objective, tokenizer, trainable, first)
    factors = any(".lora_A." in name and value.dim() == 2 for name, value in params.items())
    algorithm = averaging(
        work=work,
        select=select,
        aggregate=make("aggregate", recipe.aggregate),
        optimiser=make("optimiser", recipe.optimiser, rounds=recipe.rounds),
        share=share._replace(name=stays_text(share, own)),
        transforms=[make("transforms", part) for part in recipe.transforms],
        probes=[lora_error(str(recipe.aggregate.get("weights", "examples")))] if factors else [],
    )
    evaluator = held_out(objective, task, tokenizer, trainable, batch_size=recipe.evaluate.batch_size, first=own)
    fitting = plan(algorithm, params)
    width = 1 if elsewhere else choose_width(recipe, model, silos, algorithm, device)
    return Parts(
        recipe, device, dtype, tokenizer, task, silos, trainable, model, params, objective, select, algorithm,
        evaluator, fitting, sample(silos.names, recipe), own, first, links, width,
    )  # fmt: skip


def make_work(
    recipe: Recipe,
    objective: Objective,
    tokenizer: Any,
    trainable: Trainable,
    first: Tensors,
    **changes: Any,
) -> Work:
    """Return a recipe's local training, with other settings where given.

    Where not all that is trained is sent, `first` is how all of it begins.
    """
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    if "steps" in changes:
        # Whoever says how many steps trains in one go, in which the learning rate runs its whole course.
        changes = {"rounds": 1, **changes}
    part = {key: value for key, value in {**recipe.client, **changes}.items() if value is not None}
    work: Work = trainable.work(make("client", part, objective, pad, rounds=recipe.rounds))
    return keeping(work, first) if first else work


def stays_text(share: Share, own: Tensors) -> str:
    """Say beside what is shared how much never leaves a silo."""
    count = sum(value.numel() for value in own.values())
    return "; ".join(filter(None, [share.name, f"{count:,} personal values stay at each silo" if own else ""]))


def choose_width(recipe: Recipe, model: nn.Module, silos: Silos, algorithm: Algorithm, device: torch.device) -> int:
    """Return how many clients train as one batch."""
    fits = algorithm.cohort is not None and stackable(model)
    if recipe.runtime == "cohort" and not fits:
        raise FedllmError(
            "runtime is 'cohort', which trains plain LoRA without dropout on linear layers, or a soft prompt without "
            "an encoder at the silo; use runtime = 'auto', or trainable.name = 'lora' with dropout = 0, or 'prompt'."
        )
    if recipe.runtime == "local" or not fits:
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
    return max(len(example.input_ids) for example in silos.examples(silos.names[0])["train"])


def longest_of_all(silos: Silos) -> int:
    """Return the tokens of the longest example of all silos, held-out ones too."""
    each = [part for name in silos.names for part in silos.examples(name).values()]
    return max(len(example.input_ids) for part in each for example in part)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and notices out of ours."""
    import warnings

    import datasets
    import transformers

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with contextlib.suppress(ImportError):
        import huggingface_hub

        huggingface_hub.logging.set_verbosity_error()
