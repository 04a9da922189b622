"""A small sweep of the embedded model, as a process that tests start, kill and start again."""

import json
import os
from pathlib import Path

import torch

from sirius import Engine
from sirius.demo.embedded import FOLDER
from sirius.evaluation import completions, sweep
from sirius.evaluation.grid import Grid
from sirius.evaluation.suite import OWN, task_manager

SPARSE = {"sparsity": "coarse", "keep": 0.4}
GRID = Grid(
    ("demo_reasoning", "demo_understanding"),
    (
        {"sparsity": "none"},
        {**SPARSE, "preset": "paper", "tree_width": 2},
        {"sparsity": "coarse", "keep": {"choose": [0.1, 0.9]}, "correct": False},  # nonsense, and nearly the full model
    ),
    limit=3,
    validation=2,
    chat=True,
)
SAMPLES = 2 * (3 + 3 + 2 + 2 + 3)  # of two tasks: two settings, two to choose from, and the chosen one


def run(folder: Path) -> list[Path]:
    """Decode and grade the grid in a folder."""
    torch.set_num_threads(1)
    parts = sweep.load_parts(GRID, task_manager(OWN, GRID.tasks), allowed=False)
    engine = Engine.load(str(FOLDER), dtype="float32", device="cpu")
    return sweep.Sweep(GRID, engine, parts, folder, "embedded", batch_size=2).run()


def results(folder: Path) -> dict[str, dict]:
    """Return the results of a folder by their files' names, without what differs from run to run."""
    found = {path.name: json.loads(path.read_text()) for path in sorted((folder / "cells").iterdir())}
    for each in found.values():
        for name in ("seconds", "tokens_per_second"):
            del each["stats"][name]
        del each["time"]
        each.pop("commit", None)  # may be another one when the tests run in a working tree
    return found


def process(folder: Path, rank: int, size: int) -> None:
    """Run the sweep as process `rank` of `size`, with less patience for dead processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    completions.PATIENCE, completions.BEAT, sweep.POLL = 1.5, 0.1, 0.1
    run(folder)
