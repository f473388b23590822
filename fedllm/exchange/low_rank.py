"""The two factors of a matrix's nearest neighbour of low rank, as LoRA has them."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.core.seeds import generator

SPARE = 8
"""Columns beyond twice the rank in which the leading directions are looked for."""

POWERS = 4
"""How often the product and its transpose are applied to those columns."""

FAINT = 1e-6
"""How strong, beside the product, the directions are that A already has: above what float32 rounds, below all else."""


def factors(product_OI: Tensor, start_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B whose product is the nearest of rank R: of all such A that which is nearest to where it was.

    The rows of A are orthogonal and all of one length, as at LoRA's own start, so that a step at a silo goes as far as
    before; B has all the rest. A thus follows from the leading directions together, whatever their order or sign, and
    stays alive where the product has fewer directions than rows, as balanced factors do not.
    """
    m_OI, a_RI = product_OI.double(), start_RI.double()
    length = float(a_RI.norm()) / len(a_RI) ** 0.5 or 1.0
    rows_IR = leading(m_OI, a_RI)
    # The nearest matrix with orthonormal rows (Schönemann 1966, the orthogonal Procrustes problem).
    left, _, right = torch.linalg.svd(a_RI @ rows_IR, full_matrices=False)
    new_RI = (length * left @ right @ rows_IR.mT).to(start_RI.dtype)
    return new_RI, (m_OI @ new_RI.double().mT / length**2).to(product_OI.dtype)


def leading(m_OI: Tensor, a_RI: Tensor) -> Tensor:
    """Return orthonormal columns that span the leading R right singular directions.

    By subspace iteration from chance columns (Halko, Martinsson and Tropp 2011, arXiv:0909.4061, algorithm 4.4): exact
    where the product has rank 2 R + 8 or less, or as few rows or columns, and elsewhere for a small part of the time of
    a whole decomposition. Where the product has fewer directions than R, A keeps those that it had.
    """
    faint = FAINT * float(m_OI.norm()) / (float(a_RI.norm()) or 1.0)
    seen_NI = torch.cat([m_OI, (faint or 1.0) * a_RI])
    rank, inputs = a_RI.shape
    width = min(2 * rank + SPARE, *seen_NI.shape)
    basis_IW = torch.randn(inputs, width, dtype=torch.float64, generator=generator(0, "product", inputs)).to(m_OI)
    for _ in range(POWERS):
        basis_IW = torch.linalg.qr(seen_NI.mT @ torch.linalg.qr(seen_NI @ basis_IW).Q).Q
    turns = torch.linalg.svd(seen_NI @ basis_IW, full_matrices=False).Vh
    return basis_IW @ turns[:rank].mT
