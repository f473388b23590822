"""What attacks get out of updates and models, without protection and with it: token recall and canary exposure.

    python -m benchmarks.privacy [--data FOLDER] [--only PART] [--again]

FOLDER has `models/stories260k` and `medquad`. Each part is a file in `benchmarks/results/privacy`, so that what is
there is not measured again (but with --again), and a run that was begun goes on.

*Inversion*: each of MedQuAD's nine institutions takes one step on one record of 24 tokens, with all weights of
stories260k. The attacker has the update, the model and the length of the text, and names as many tokens as the text
has different ones. `recall_plain` is the better attack's share of right ones, `recall_chance` that of naming the most
common tokens of held-out text; `recall_sum` is what the sum of the nine gives for the text of one of them;
`recall_dp` is with noise at the silo for epsilon = 8 at delta = 1e-5, all of it spent on this one step, which is the
least noise that any run with that epsilon has. `recall_secagg` is what the server has of the text of one of them when
the nine add up securely, `recall_secagg_all` what it has of all nine texts together. `descent_*` is what the descent on
gradients gets of four of the records: from a plain step, an AdamW step, four of those in a row, a plain one with noise.

*Exposure*: three institutions with few rows learn them and random secrets, each planted eight times by the toss of a
coin, without noise and with record-level noise for epsilon = 8 over the run. Exposure is in bits, 8 at most; a secret
that was never seen has 1.42 on average. `epsilon_from_below_*` is what the coins prove.

*Utility*: what is kept of the gain without noise at epsilon 8, 3 and 1 (`benchmarks/privacy_utility.py`).

*Users*: the same where each of 1,000 users is hidden with all its records (`benchmarks/privacy_users.py`).

The goals: without protection most tokens are recovered and the secrets found; with the sum or epsilon = 8 both are at
chance; at epsilon = 8, 70 % of the gain is kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, done, keep, machine
from benchmarks.privacy_users import users
from benchmarks.privacy_utility import utility
from fedllm.app.audits.case import open_case
from fedllm.app.audits.findings import Finding
from fedllm.app.audits.learned import secrets_kept
from fedllm.app.audits.targets import ATTACKS
from fedllm.app.audits.updates import SEVERAL, attack_updates
from fedllm.app.progress import Ui
from fedllm.exchange.accounting import Mechanism, noise_for

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SILOS = ("cancergov", "cdc", "gard", "ghr", "mplus", "nhlbi", "niddk", "ninds", "seniorhealth")
FEW = ("cdc", "gard", "niddk")
EPSILON, DELTA = 8.0, 1e-5
TRIALS, TOKENS = 45, 24
LARGEST = 10.0
"""Norm to which an update may come in a secure sum: nothing here is longer, so that only the sum protects."""
CANARIES = {"count": 12, "repeat": 8}


def recipe(source: Path, folder: Path, silos: Sequence[str], **tables: Any) -> dict[str, Any]:
    """Return a recipe that trains all weights of stories260k on some of MedQuAD's institutions."""
    files = {
        name: {part: str(source / "medquad" / f"{name}.{part}.jsonl.gz") for part in ("train", "test")}
        for name in silos
    }
    return {
        "model": str(source / "models" / "stories260k"),
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "silos": files,
        "trainable": {"name": "full"},
        "task": {"name": "instruct", "max_tokens": 64},
        "evaluate": {"alone": False, "every": 100, "examples": 8},
        **tables,
        "data": {"root": str(folder.absolute()), "limit_test": 40, **tables.get("data", {})},
    }


def dp_sgd(noise: float | None, **settings: Any) -> dict[str, Any]:
    """Return a client with record-level noise: so much, or what the target asks for."""
    return {"name": "dp_sgd", "clip": 1.0, **({"noise": noise} if noise else {}), **settings}


def inversion(data: Path, folder: Path) -> dict[str, Any]:
    """Attack one record's update without protection, in the sum, and with noise for epsilon = 8."""
    size = {"steps": 5, "batch_size": 8}
    plain = recipe(data, folder, SILOS, rounds=1, client=size, data={"limit_train": 200})
    multiplier = noise_for(EPSILON, DELTA, lambda noise: [Mechanism(noise)])
    noised = {**plain, "client": dp_sgd(multiplier, **size)}
    summed = {**plain, "transforms": [{"name": "clip", "max_norm": LARGEST}], "secure": {"drop_outs": 1}}
    found = {}
    for name, made in (("plain", plain), ("dp", noised), ("secagg", summed)):
        case = open_case(done(made, folder / f"inversion_{name}"), 0, TRIALS, TOKENS, 0, Ui(None))
        found[name] = attack_updates(case)[0]
    best = {
        "plain": strongest(found["plain"], "one record, plain step"),
        "sum": strongest(found["plain"], f"sum of {len(SILOS)} silos, one's text"),
        "sum_all": strongest(found["plain"], f"sum of {len(SILOS)} silos, all texts"),
        "adamw": strongest(found["plain"], "one record, AdamW step"),
        "dp": strongest(found["dp"], "one record, plain step"),
        "secagg": strongest(found["secagg"], f"sum of {len(SILOS)} silos, one's text"),
        "secagg_all": strongest(found["secagg"], f"sum of {len(SILOS)} silos, all texts"),
    }
    result: dict[str, Any] = {"trials": TRIALS, "tokens": TOKENS, "noise_multiplier": multiplier}
    for name, each in best.items():
        result[f"recall_{name}"] = round(each.found.value, 4)
        result[f"recall_{name}_interval"] = [round(each.found.low, 4), round(each.found.high, 4)]
        result[f"attack_{name}"] = each.attack
    rouge = strongest(found["plain"], "one record, plain step", "text recovered in order (ROUGE-L)")
    noised_rouge = strongest(found["dp"], "one record, plain step", "text recovered in order (ROUGE-L)")
    return {
        **result,
        "recall_chance": round(best["plain"].chance, 4),
        "recall_chance_sum_all": round(best["sum_all"].chance, 4),
        "rouge_l_plain": round(rouge.found.value, 4),
        "rouge_l_dp": round(noised_rouge.found.value, 4),
        "rouge_l_chance": round(rouge.chance, 4),
        **descents(found),
    }


def strongest(findings: Sequence[Finding], case: str, measure: str = "tokens recovered") -> Finding:
    """Return the attack that found most in a case, among those that were tried on all of its records."""
    own = [each for each in findings if each.case == case and each.measure == measure]
    tried = max(each.found.n for each in own)
    return max((each for each in own if each.found.n == tried), key=lambda each: each.found.value)


def descents(found: Mapping[str, Sequence[Finding]]) -> dict[str, Any]:
    """Return what the descent on gradients, which is tried on few records, found in each of the cases it had."""
    cases = {
        "plain": ("plain", "one record, plain step"),
        "adamw": ("plain", "one record, AdamW step"),
        "several": ("plain", f"one record, {SEVERAL} of the run's own steps"),
        "dp": ("dp", "one record, plain step"),
    }
    measures = {"recall": "tokens recovered", "rouge_l": "text recovered in order (ROUGE-L)"}
    result = dict[str, Any]()
    for key, (run, case) in cases.items():
        for name, measure in measures.items():
            for each in found[run]:
                if (each.attack, each.case, each.measure) == (ATTACKS["descent"], case, measure):
                    result[f"descent_{name}_{key}"] = round(each.found.value, 4)
                    result[f"descent_{name}_{key}_interval"] = [round(each.found.low, 4), round(each.found.high, 4)]
                    result["descent_trials"] = each.found.n
    return result


def exposure(data: Path, folder: Path, private: bool) -> dict[str, Any]:
    """Train on rows with secrets among them, with record-level noise or without, and look for the secrets."""
    size = {"steps": 50, "batch_size": 16, "learning_rate": 3e-3}
    made = recipe(
        data,
        folder,
        FEW,
        rounds=4,
        canaries=CANARIES,
        client=dp_sgd(None, **size) if private else size,
        data={"limit_train": 24},
        **({"privacy": {"target_epsilon": EPSILON, "delta": DELTA}} if private else {}),
    )
    kind = "dp" if private else "plain"
    case = open_case(done(made, folder / f"exposure_{kind}"), 0, 2, TOKENS, 0, Ui(None))
    findings, bound = secrets_kept(case)
    by = {(each.attack, each.case): each.found for each in findings}
    planted, control = by[("exposure", "canaries that were planted")], by[("exposure", "canaries that were not")]
    assert bound is not None
    return {
        f"exposure_{kind}": round(planted.value, 3),
        f"exposure_{kind}_interval": [round(planted.low, 3), round(planted.high, 3)],
        f"exposure_{kind}_not_planted": round(control.value, 3),
        f"extracted_{kind}": round(by[("prompting", "canaries that were planted")].value, 4),
        f"canaries_{kind}": [planted.n, control.n],
        "exposure_chance": round(findings[0].chance, 3),
        f"epsilon_from_below_{kind}": round(bound.told.epsilon, 3),
        f"epsilon_from_below_most_{kind}": round(bound.told.most, 3),
        f"epsilon_from_above_{kind}": bound.ledger,
    }


PARTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "inversion": inversion,
    "exposure_plain": lambda data, folder: exposure(data, folder, False),
    "exposure_dp": lambda data, folder: exposure(data, folder, True),
    "utility": utility,
    "users": users,
}

KEYS = (
    *("recall_plain", "recall_secagg", "recall_sum", "recall_dp", "recall_chance"),
    *("exposure_plain", "exposure_dp", "exposure_chance", "gain_kept_eps8"),
)
"""What the last line has; null where no part that was measured says it."""


def main() -> None:
    """Measure what is not measured yet and keep the whole."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, default=DATA)
    asked.add_argument("--only", choices=PARTS, help="measure this part and read the others from their files")
    asked.add_argument("--again", action="store_true", help="measure anew what is there already")
    given = asked.parse_args()
    found = dict[str, Any]()
    for part, function in PARTS.items():
        file = RESULTS / "privacy" / f"{part}.json"
        wanted = given.only in (None, part)
        if wanted and (given.again or not file.exists()):
            measured = function(given.data, Path("runs") / "benchmark-privacy")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"machine": machine(), **measured}, indent=1) + "\n")
            print(f"{part}: {json.dumps(measured)}", flush=True)
        if file.exists():
            found |= {key: value for key, value in json.loads(file.read_text()).items() if key != "machine"}
    keep("privacy", {**dict.fromkeys(KEYS), **found})


if __name__ == "__main__":
    main()
