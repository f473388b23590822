"""Several organisations make one language model together from text that none of them may share."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

WHERE = {
    "fedllm.app.run": ["run", "resume"],
    "fedllm.core.types": ["Silo", "Request", "Reply", "State"],
    "fedllm.core.errors": ["FedllmError"],
    "fedllm.core.round": ["averaging"],
    "fedllm.core.plan": ["plan"],
    "fedllm.core.aggregate": ["mean"],
    "fedllm.core.optimisers": ["fedavg", "fedavgm", "nesterov", "fedadagrad", "fedadam", "fedyogi"],
    "fedllm.exchange.select": ["everyone", "fixed_size", "poisson"],
    "fedllm.exchange.clip": ["clip"],
    "fedllm.exchange.cast": ["cast"],
    "fedllm.exchange.top_k": ["top_k"],
    "fedllm.exchange.lora_error": ["lora_error"],
    "fedllm.silo.sources": ["read_rows"],
    "fedllm.silo.models": ["load_model", "load_tokenizer"],
    "fedllm.silo.tasks": ["instruct", "causal", "classify"],
    "fedllm.silo.trainables": ["full", "lora", "dora", "ia3", "prefix", "prompt", "p_tuning", "parameters"],
    "fedllm.silo.objective": ["causal_loss"],
    "fedllm.silo.training": ["local_training"],
    "fedllm.silo.evaluate": ["held_out"],
    "fedllm.runtime.local": ["local", "cohort"],
}
"""What `import fedllm` offers and where it lives; a module is imported when it is first asked for."""

__all__ = [name for names in WHERE.values() for name in names]


def __getattr__(name: str) -> Any:
    for module, names in WHERE.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'fedllm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
