"""Who is asked by the methods that send prompts: the model of this process, or one behind an API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from fedllm.app.config import Recipe
from fedllm.app.rows import open_rows
from fedllm.core.errors import FedllmError
from fedllm.core.types import Client, Silo
from fedllm.silo.endpoint import Address, Endpoint
from fedllm.silo.leaks import Guard, guarded, hider
from fedllm.silo.models import ENDPOINT
from fedllm.silo.objective import Objective
from fedllm.silo.purse import Budget
from fedllm.silo.questions import Asking
from fedllm.silo.speaker import Speaker
from fedllm.silo.tasks import Prepared, Task

REMEDY = (
    "name a local model, or an algorithm that only sends prompts: exemplars, fed_sp_sc, fed_dp_cot, templates, "
    "text_prompt"
)


class NoWeights(nn.Module):
    """The model of a run whose model is behind an API: it has no weights, and says so to whoever looks for them."""

    def __getattr__(self, name: str) -> NoReturn:
        raise FedllmError(f"The model is behind an API, which lets nobody at its weights; {REMEDY}.")


def is_away(recipe: Recipe) -> bool:
    """Say whether a recipe's model is behind an API, and refuse what cannot be then."""
    if recipe.model != ENDPOINT:
        if recipe.endpoint:
            raise FedllmError(
                'There is an [endpoint], but the model is another; set model = "endpoint" or take it out.'
            )
        return False
    if recipe.endpoint is None:
        raise FedllmError('model is "endpoint", but no [endpoint] says where it is; add url and model.')
    if recipe.algorithm["name"] == "averaging":
        raise FedllmError(f"Local training needs the model's weights, which an API does not give; {REMEDY}.")
    if recipe.evaluate.choice or recipe.evaluate.exact or recipe.evaluate.pooled or recipe.scratch:
        raise FedllmError(
            "evaluate.choice, evaluate.exact, evaluate.pooled and [scratch] need a model that is here; take them out."
        )
    return True


def endpoint_of(recipe: Recipe) -> Endpoint | None:
    """Return the recipe's endpoint, not asked yet, or None where the model is here."""
    if not is_away(recipe) or recipe.endpoint is None:
        return None
    said = recipe.endpoint
    address = Address(said.url, said.model, said.key_env, said.timeout, said.tries, said.parallel, said.batch)
    budget = Budget(said.calls, said.tokens, said.cost, said.price_read, said.price_written)
    return Endpoint(address, budget)


def speaker_for(
    endpoint: Endpoint | None, tokenizer: Any, objective: Objective, batch_size: int
) -> Callable[[Silo], Speaker]:
    """Return what gives a silo its model as text in and text out."""

    def here(silo: Silo) -> Speaker:
        from fedllm.evaluation.speaker import in_process

        return in_process(silo.model, tokenizer, objective, batch_size=batch_size, tick=silo.tick)

    def away(silo: Silo) -> Speaker:
        assert endpoint is not None
        return endpoint.speaker()

    return away if endpoint else here


def guard_of(recipe: Recipe) -> Callable[[Client], Client]:
    """Return what looks a client's texts through before they leave."""
    guard = Guard(recipe.leaks.n, recipe.leaks.action, hider(recipe.leaks.kinds))
    return lambda client: guarded(client, guard)


def guard_note(recipe: Recipe) -> str:
    """Say what texts are looked through for."""
    copies = f"copies of {recipe.leaks.n} words in a row" if recipe.leaks.n else "no copies"
    personal = "personal data" if hider(recipe.leaks.kinds) else "no personal data (presidio-analyzer is not installed)"
    return (
        f"texts that leave a silo are looked through for {copies} and {personal}; what is found: {recipe.leaks.action}"
    )


def rows_of(recipe: Recipe) -> Callable[[str], Sequence[Mapping[str, Any]]]:
    """Return what reads a file beside the recipe's data."""
    return lambda source: open_rows(source, Path(recipe.data.root))


def words_task(recipe: Recipe, asking: Asking | None) -> Task:
    """Return a task that makes no tokens of its rows: where the model is away, so is its tokenizer."""
    if asking is None:
        raise FedllmError(f"The task '{recipe.task['name']}' asks nothing; set task.name to 'classify' or 'instruct'.")
    read = asking.read

    def prepare(rows: Sequence[Mapping[str, Any]], where: str) -> Prepared:
        found = read(rows, where)
        return Prepared(found, len(rows) - len(found))  # type: ignore[arg-type]

    return Task(recipe.task["name"], prepare, recipe.task.get("label"), asking.words, template=asking.template)
