"""Which of the trained tensors tell most of the text: what `homomorphic.tensors` had best name."""

from __future__ import annotations

from typing import Any

from fedllm.app.audits.case import Case
from fedllm.app.audits.views import sampled
from fedllm.audit.sensitivity import by_tensor, covering, sensitivity
from fedllm.silo.trainables import trained

TOKENS = 4
"""Of each record."""

SHARE = 0.1
"""Of all values, that the tensors named have at least."""


def most_sensitive(case: Case) -> dict[str, Any]:
    """Return the tensors of an update by how sensitive they are, and the first of them that have a tenth of its values.

    It is reckoned from as many of the silos' training records as an audit attacks, with the run's last weights.
    """
    silos, params = case.parts.silos, trained(case.parts.model)
    each = -(-case.trials // len(silos.names))
    rows = [row for name in silos.names for row in sampled(case, name, each)][: case.trials]
    case.reset()
    case.parts.model.eval()
    with case.ui.part("sensitive tensors", None):
        found = by_tensor(sensitivity(case.parts.model, {n: params[n] for n in case.state.params}, rows, TOKENS))
    names = {tensor.name for tensor in covering(found, SHARE)}
    return {
        "records": len(rows),
        "each": [{**tensor._asdict(), "named": tensor.name in names} for tensor in found],
        "setting": "homomorphic.tensors = [" + ", ".join(f'"{name}"' for name in sorted(names)) + "]",
    }
