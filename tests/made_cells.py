"""Result files as a sweep writes them, made without decoding: settings are real, figures are made up to fit them."""

import json
import random
from pathlib import Path
from typing import Any

from sirius.settings import Setting, make_setting

KINDS = {"coqa": "understanding", "truthfulqa_gen": "understanding", "gsm8k": "reasoning", "csqa_cot": "reasoning"}
METRICS = {"coqa": "f1,none", "gsm8k": "exact_match,strict-match"}
CHANCE = {"truthfulqa_gen": 0.5, "csqa_cot": 0.2}
ABLATED = {"rewrite": 0.12, "interleave": 0.05, "rollback": 0.25}
MODEL = {"model": "meta/tiny-llama", "revision": None, "dtype": "torch.bfloat16", "parameters": 494032768}
ITEMS = 80
FULL = {"sparsity": "none"}


def record(task: str = "gsm8k", items: int = ITEMS, split: str = "test", **options: Any) -> dict[str, Any]:
    """Return a result; the options are those of a setting, with `changes` to fields of the result."""
    changes = options.pop("changes", {})
    setting = make_setting(options or FULL)
    metric = METRICS.get(task, "exact_match,none")
    rng = random.Random(f"{task} {setting.label()}")
    hard = random.Random(task)
    likely = _score(task, setting)
    scores = [float(0.5 * hard.random() + 0.5 * rng.random() < likely) for _ in range(items)]
    mean = sum(scores) / items
    spread = (sum((score - mean) ** 2 for score in scores) / max(items - 1, 1) / items) ** 0.5
    return {
        "task": task,
        "kind": KINDS.get(task),
        "setting": setting.flat(),
        "label": setting.label(),
        "choice": None,
        "split": split,
        "metric": metric,
        "metrics": {metric: {"value": mean, "stderr": spread}},
        "samples": [{"id": i, "scores": {metric: score}} for i, score in enumerate(scores)],
        "stats": _stats(setting, rng),
        "chance": CHANCE.get(task, 0.0),
        "lossless": setting.lossless,
        "model": MODEL,
        "shots": 8,
        "chat": False,
        "date": "2026-11-28",
        "commit": "250149a0d557",
        "machine": "2 x Processor <fast & new>",
        "gpu": None,
        "threads": 2,
        "python": "3.11.7",
        "torch": "2.13.0",
        "transformers": "5.24.0",
        "sirius": "0.1.0",
        "lm_eval": "0.4.13",
        "command": "sirius sweep table2 --output 'results <1>'",
        **changes,
    }


def write(folder: Path, *records: dict[str, Any]) -> Path:
    """Write results into a folder as a sweep does, and return the folder."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    there = len(list((folder / "cells").iterdir()))
    for number, each in enumerate(records, start=there):
        (folder / "cells" / f"{each['task']}-{number:012x}.json").write_text(json.dumps(each))
    return folder


def studies() -> list[dict[str, Any]]:
    """Return results of all studies of ours, and of a width chosen on validation items."""
    found = []
    for task in KINDS:
        found.append(record(task))
        found += [record(task, sparsity=method, correct=False) for method in ("coarse", "fine")]
    paper: dict[str, Any] = {"preset": "paper", "tree_width": 1}
    for method in ("coarse", "fine"):
        own = {"sparsity": method, **paper}
        found += [record(sparsity=method, keep=keep, correct=False) for keep in (0.2, 0.3, 0.4, 0.6, 0.8)]
        found += [record(**own, keep=keep) for keep in (0.2, 0.3, 0.4, 0.6, 0.8)]
        found += [record(**own, threshold=bar) for bar in (0.01, 0.05, 0.1, 0.3, 0.5, 0.7)]
        found += [record(**own, period=period) for period in (2, 4, 8, 32, 64)]
        found += [record(**{**own, "tree_width": width}) for width in (2, 4, 8)]
        found += [record(**own, ablate=part) for part in ABLATED]
        found += [oracle(method, bar) for bar in (0.0, 1e-6, 1e-4, 0.01, 0.1, 0.5)]
        chosen = {"choice": f"sparsity {method}, preset paper; best of tree_width"}
        found += [
            record("csqa_cot", items=20, split="validation", **{**own, "tree_width": width}, changes=chosen)
            for width in (1, 4, 8)
        ]
        found.append(record("csqa_cot", **{**own, "tree_width": 4}, changes=chosen))
    return found


def oracle(method: str, threshold: float) -> dict[str, Any]:
    """Return a result of the oracle's study."""
    rule = {"accept": "threshold", "threshold": threshold, "accept_temperature": 1.0}
    return record(sparsity=method, period=2, ablate="interleave", **rule)


def _score(task: str, setting: Setting) -> float:
    full = 0.75
    if setting.full or KINDS.get(task) == "understanding":
        return full
    keep, kind = setting.sparsity.keep, setting.sparsity.method
    alone = full * keep ** (0.8 if kind == "coarse" else 0.4)
    if setting.correction is None:
        return alone
    regained = 0.9 if setting.lossless else min(0.95, 0.6 + 0.3 * setting.correction.least**0.5)
    return alone + (full - alone) * regained - sum(ABLATED[part] for part in setting.correction.ablate)


def _stats(setting: Setting, rng: random.Random) -> dict[str, Any]:
    rule, keep = setting.correction, setting.sparsity.keep
    shrinks = 0.7 if setting.sparsity.method == "coarse" else 0.47
    density = 1.0 if setting.full else 1 - (1 - keep) * shrinks
    period = rule.period if rule else 1
    assert isinstance(period, int)
    chance = 0.0 if rule is None else min(0.995, 0.9 + 0.2 * keep - 0.08 * rule.least + 0.004 * rule.tree_width)
    histogram = [0] * period
    for _ in range(400):
        kept = 0
        while kept < period - 1 and rng.random() < chance:
            kept += 1
        histogram[kept] += 1
    accepted = sum(kept * count for kept, count in enumerate(histogram))
    aal = 1 + accepted / 400 if rule else None
    effective = density if aal is None else ((period - 1) * density + 1) / aal
    return {
        "rounds": 400,
        "rounds_complete": 400,
        "drafted": 400 * (period - 1),
        "accepted": accepted,
        "corrections": 400 - histogram[-1] if rule else 0,
        "rolled_back": 0,
        "corrections_per_token": 0.0 if rule is None else (400 - histogram[-1]) / (400 + accepted),
        "tokens": 400 + accepted,
        "aal": aal,
        "aal_complete": aal and min(period, aal + 0.25),  # a text's end cuts some windows
        "period": period,
        "density": density,
        "effective_density": effective,
        "density_streamed": density,
        "effective_density_streamed": effective,
        "parameters_per_token": effective * 5e8,
        "bytes_per_token": effective * 1e9,
        "acceptance_histogram": histogram,
        "seconds": 1.0,
        "tokens_per_second": 400.0 + accepted,
        "lossless": setting.lossless,
    }
