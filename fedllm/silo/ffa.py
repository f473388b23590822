"""LoRA with A frozen, so that the mean of what silos send is the mean of what they learned, also inside a sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedllm.silo.trainables import Trainable, lora


def ffa_lora(
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    rslora: bool = False,
) -> Trainable:
    """FFA-LoRA (Sun et al. 2024, arXiv:2403.12313, section 4): A stays as it was drawn, and only B is learned and sent.

    The mean of the silos' B times the one A is the mean of their products B A, which no mean of both factors is: so
    averages, secure sums and noise act on the weights' own change. It sends half of what LoRA sends; noise is not
    squared by a product of two noised factors. Everybody draws the same A from the recipe's seed.
    """
    whole = lora(r, alpha, dropout, target_modules, rslora)

    def attach(model: nn.Module, seed: int) -> nn.Module:
        attached = whole.attach(model, seed)
        for name, value in attached.named_parameters():
            if ".lora_A." in name:
                value.requires_grad_(False)
        return attached

    return whole._replace(name="lora, A frozen", attach=attach)
