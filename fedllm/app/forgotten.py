"""What is left of what a run had to forget, and the certificate that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedllm
from fedllm.app.build import Parts, build
from fedllm.app.certificate import file_sha256, read_certificate, write_certificate
from fedllm.app.config import read_recipe, read_toml
from fedllm.app.data import open_named
from fedllm.app.progress import Ui
from fedllm.app.report.page import write_report
from fedllm.app.run import total_seconds
from fedllm.app.unlearn import Replay, Wish, last_before, number_of
from fedllm.audit.forgotten import Known, known, losses
from fedllm.core.errors import FedllmError
from fedllm.core.types import Tensors
from fedllm.runtime.store import load_checkpoint, read_events
from fedllm.silo.examples import Example, spread
from fedllm.silo.forget import row_key
from fedllm.silo.models import weights_sha256
from fedllm.silo.trainables import trained, write

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

MOST = 512
"""Texts of each kind that the attack looks at."""

SAYS = {
    "exact": "The replayed rounds were run again without what was removed; no number of theirs depends on it.",
    "calibrated": "The result approximates a model that never learned from what was removed; the attack below says how "
    "well, and nothing proves it.",
}


def certify(old: Path, replay: Replay, wish: Wish, key: Ed25519PrivateKey | None, against: Path | None, ui: Ui) -> Path:
    """Attack the models before and after, write the certificate into the new run, and its report anew."""
    new, method = replay.folder, "calibrated" if wish.calibrated else "exact"
    recipe = read_recipe(read_toml(new / "recipe.toml"))
    rounds = [event for event in read_events(new) if event["event"] == "round"]
    certificate = {
        "certificate": "unlearning",
        "fedllm": fedllm.__version__,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "removed": {"silo": wish.silo, **({"rows": len(replay.keys), "sha256": replay.keys} if replay.keys else {})},
        "method": method,
        "says": SAYS[method],
        **({"ratio": wish.ratio, "interval": wish.interval} if wish.calibrated else {}),
        "old": {
            "run": old.name,
            **last_of(old),
            "note": "holds what was removed until it is deleted",
        },
        "replayed_from": {
            "round": replay.first - 1,
            "checkpoint_sha256": file_sha256(replay.checkpoint) if replay.checkpoint else None,
            "model_sha256": weights_sha256(recipe.model),
        },
        "result": {"run": new.name, **last_of(new), "files": result_files(new)},
        "rounds_replayed": len(rounds) - replay.first + 1,
        "seconds": round(sum(total_seconds(event) for event in rounds[replay.first - 1 :]), 1),
        "verification": attack(old, replay, wish, against, ui),
    }
    path = write_certificate(new, certificate, key)
    write_report(new)
    return path


def last_of(run: Path) -> dict[str, Any]:
    """Return the hash of a run's last checkpoint."""
    last = last_before(run, 1 << 31)
    return {"round": number_of(last), "checkpoint_sha256": file_sha256(last)} if last else {}


def result_files(run: Path) -> dict[str, str]:
    """Return the hashes of the weights that a run has exported."""
    found = sorted(path for name in ("adapter", "model") for path in (run / name).glob("*.safetensors"))
    return {str(path.relative_to(run)): file_sha256(path) for path in found}


def attack(old: Path, replay: Replay, wish: Wish, against: Path | None, ui: Ui) -> dict[str, Any]:
    """Return how well what was removed is told from the silo's held-out text: before, after, and retrained if given."""
    if replay.recipe.scratch:
        return {"why_not": "the model was made anew from nothing, with a tokenizer of its own"}
    parts = build(replay.recipe)
    if parts.ranks:
        parts.ranks.close()
    if parts.method:
        return {"why_not": f"algorithm '{parts.method.name}' leaves no weights whose loss could be looked at"}
    try:
        shard = open_named(read_recipe(read_toml(old / "recipe.toml")))[wish.silo]
    except FedllmError as error:
        return {"why_not": f"the text of '{wish.silo}' is not here any more ({error})"}
    gone = set(replay.keys)
    prepare = parts.task.prepare
    members = prepare([row for row in shard.train if not gone or row_key(row) in gone], wish.silo).examples
    others = prepare([row for row in shard.test if row_key(row) not in gone], wish.silo).examples
    if not members or not others:
        return {"why_not": "nothing of what was removed, or of the silo's held-out text, can be scored"}
    members, others = spread(members, MOST), spread(others, MOST)
    models = {"base": parts.params, "before": params_of(old), "after": params_of(replay.folder)}
    models |= {"retrained": params_of(against)} if against else {}
    found, base = dict[str, Any](), None
    for name, params in models.items():
        with ui.part(f"attack: {name}", None):
            now = scored(parts, params, members, others)
        base = base or now
        found[name] = told(known(*now, *base))
    return {"attack": "membership by loss", "removed": len(members), "held_out": len(others), **found}


def scored(
    parts: Parts, params: Tensors, members: Sequence[Example], others: Sequence[Example]
) -> tuple[list[float], list[float]]:
    """Return the losses of texts and of others under a model."""
    write(trained(parts.model), {**parts.own, **params})
    pad, size = parts.tokenizer.pad_token_id, parts.recipe.evaluate.batch_size
    one, other = (losses(parts.model, each, parts.objective, pad, size) for each in (members, others))
    return one, other


def params_of(run: Path) -> Tensors:
    """Return what a run has learned."""
    kept = load_checkpoint(run)
    if kept is None:
        raise FedllmError(f"The run '{run}' has no checkpoint; give a run that is finished.")
    return kept.state.params


def told(found: Known) -> Mapping[str, float]:
    """Return what the attack found, rounded to what it can tell."""
    return {key: round(value, 4) for key, value in found._asdict().items()}


def lines(path: Path) -> list[str]:
    """Say what a certificate says, a line each."""
    said = read_certificate(path)
    found = [f"Replayed: {said['rounds_replayed']} rounds, {said['method']}, without {removed(said)}"]
    for name, row in said["verification"].items():
        if isinstance(row, dict):
            found.append(
                f"{name}: loss {row['loss']:.3f} of what was removed, {row['loss_others']:.3f} held out; told apart "
                f"with AUC {row['auc']:.3f} +- {row['error']:.3f}, against the base {row['auc_against_base']:.3f}"
            )
    if why := said["verification"].get("why_not"):
        found.append(f"No attack: {why}.")
    return [*found, f"Certificate: {path}"]


def removed(said: Mapping[str, Any]) -> str:
    """Say what a certificate's run left out."""
    rows = said["removed"].get("rows")
    return f"{rows} rows of '{said['removed']['silo']}'" if rows else f"silo '{said['removed']['silo']}'"
