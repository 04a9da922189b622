"""Sweeps: a grid of settings over tasks. Every sample is saved as it finishes; what is done is not done again.

Samples are decoded first, by one process or several that share a folder, and graded by lm-eval when all of a cell are
there. So a process that dies costs its unfinished samples alone, and the results are those of one process.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from sirius.benchmark.facts import facts
from sirius.benchmark.record import save
from sirius.engine import Engine
from sirius.errors import ConfigError, FileError
from sirius.evaluation.catalogue import task_of
from sirius.evaluation.completions import Completions
from sirius.evaluation.grid import Grid
from sirius.evaluation.lm import Asked, SiriusLM, figures
from sirius.evaluation.ranks import Ranks
from sirius.evaluation.suite import load_tasks
from sirius.settings import Setting

SEED = 1234  # of the choice of worked examples, lm-eval's own
PATIENCE = 60.0  # seconds without a new sample, after which another process counts as dead
TEST, VALIDATION = "test", "validation"


@dataclass(frozen=True)
class Cell:
    """One task under one setting.

    items   the numbers of the items that are decoded, of each of the task's parts
    choice  the group of settings that this one was chosen from, or stands to be chosen from
    """

    task: str
    setting: Setting
    split: str
    items: range | None
    choice: str | None = None

    def asked(self, grid: Grid, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that the result depends on, as JSON holds it."""
        items = None if self.items is None else [self.items.start, self.items.stop]
        shown = {"task": self.task, "setting": self.setting.flat(), "split": self.split, "items": items}
        return {**shown, "choice": self.choice, "shots": grid.shots, "chat": grid.chat, "model": dict(model)}


@dataclass
class Sweep:
    """A grid at work on one model.

    parts    lm-eval's tasks of each name, see `load_parts`
    folder   where samples and results are kept
    name     of the model, in results
    allowed  whether code that the model writes may be run
    """

    grid: Grid
    engine: Engine
    parts: Mapping[str, Mapping[str, Task]]
    folder: Path
    name: str
    batch_size: int = 8
    allowed: bool = False
    command: str = ""
    ranks: Ranks = field(default_factory=Ranks.here)
    on_sample: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.completions = Completions(self.folder / "completions", self.ranks.rank)
        try:
            (self.folder / "cells").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot write {self.folder}: {error.strerror or error}") from error
        one = Ranks()  # lm-eval grades in each process what all of them decoded
        options: dict[str, Any] = {"batch_size": self.batch_size, "ranks": one, "quiet": True, "name": self.name}
        self.lm = SiriusLM(self.engine, completions=self.completions, **options)
        self.model = {**self.lm.identity, "parameters": self.engine.model.num_parameters()}
        self.requests: dict[tuple[str, range | None], list[Instance]] = {}

    def run(self) -> list[Path]:
        """Decode and grade everything, and return the files of the tested cells."""
        firsts, groups = self.cells()
        self._finish([*firsts, *(cell for group in groups for cell in group)])
        best = [self._best(group) for group in groups]
        self._finish(best)
        return [self._path(cell) for cell in dict.fromkeys([*firsts, *best])]

    def cells(self) -> tuple[list[Cell], list[list[Cell]]]:
        """Return the cells that are tested whatever comes, and groups of which the best one is tested later."""
        firsts, groups = [], []
        for task in self.grid.tasks:
            tested, held_out = self._items(task)
            firsts += [Cell(task, setting, TEST, tested) for setting in self.grid.fixed(task)]
            for name, options in self.grid.choices(task):
                groups.append([Cell(task, setting, VALIDATION, held_out, name) for setting in options])
        return firsts, groups

    def missing(self) -> int:
        """Return how many samples are not decoded yet, at most: a setting that will be chosen may be known already."""
        firsts, groups = self.cells()
        cells = [*firsts, *(cell for group in groups for cell in group)]
        chosen = sum(len(self._requests(replace(group[0], items=self._items(group[0].task)[0]))) for group in groups)
        return chosen + sum(len(self._unfinished(cell)) for cell in cells if not self._path(cell).exists())

    # --- decoding

    def _finish(self, cells: Sequence[Cell]) -> None:
        """Decode and grade cells: this process's share first, then what others leave undone."""
        todo = [cell for cell in cells if not self._path(cell).exists()]
        for cell in todo:
            self._decode(cell, (self.ranks.rank, self.ranks.size))
            if self.ranks.size == 1:
                self._grade(cell)
        for cell in todo if self.ranks.size > 1 else ():
            self._wait_for_others(cell)
            self._decode(cell, (0, 1))
            self._grade(cell)

    def _decode(self, cell: Cell, share: tuple[int, int]) -> None:
        asked = [cast("Asked", each.args) for each in self._requests(cell)]
        self.lm.samples(asked, cell.setting, share=share, on_sample=self.on_sample)

    def _unfinished(self, cell: Cell) -> list[Instance]:
        requests = self._requests(cell)
        asked = [cast("Asked", each.args) for each in requests]
        known = self.lm.known(asked, cell.setting)
        return [request for request, sample in zip(requests, known, strict=True) if sample is None]

    def _wait_for_others(self, cell: Cell) -> None:
        """Wait until a cell is whole, or no process has finished a sample for a while."""
        began, count = time.monotonic(), -1
        while self._unfinished(cell):
            if len(self.completions.found) != count:
                began, count = time.monotonic(), len(self.completions.found)
            if time.monotonic() - began > PATIENCE:
                return
            time.sleep(min(1.0, PATIENCE / 10))
            self.completions.read()

    def _requests(self, cell: Cell) -> list[Instance]:
        """Return lm-eval's requests of a cell, all of its parts together."""
        if (known := self.requests.get((cell.task, cell.items))) is not None:
            return known
        found: list[Instance] = []
        for task in self.parts[cell.task].values():
            task.set_fewshot_seed(SEED)  # its draws go on from call to call
            task.build_all_requests(
                samples=None if cell.items is None else list(cell.items),
                rank=0,
                world_size=1,
                apply_chat_template=self.grid.chat,
                fewshot_as_multiturn=self.grid.chat,
                chat_template=self.lm.apply_chat_template if self.grid.chat else None,
                tokenizer_name=self.lm.tokenizer_name if self.grid.chat else "",
            )
            found += task.instances
        self.requests[cell.task, cell.items] = found
        return found

    # --- grading

    def _grade(self, cell: Cell) -> None:
        """Let lm-eval grade a cell that is whole, and save the result."""
        if self._path(cell).exists():
            return
        self.lm.values, self.lm.stats = cell.setting.flat(), {}
        parts = self.parts[cell.task]
        for task in parts.values():
            task.set_fewshot_seed(SEED)
        items = None if cell.items is None else {name: list(cell.items) for name in parts}
        results = evaluate(
            self.lm,
            {"tasks": dict(parts)},
            samples=items,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=self.grid.chat,
            fewshot_as_multiturn=self.grid.chat,
            confirm_run_unsafe_code=self.allowed,
        )
        assert results is not None
        save(self._path(cell), self._result(cell, cast("Mapping[str, Any]", results)["samples"]))

    def _result(self, cell: Cell, graded: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
        known, whole = task_of(cell.task), {}
        for part, rows in graded.items():
            for row in rows:
                name = row["doc_id"] if len(graded) == 1 else f"{part}:{row['doc_id']}"
                scores = {f"{metric},{row['filter']}": float(row[metric]) for metric in row["metrics"]}
                whole.setdefault(name, {"id": name, "scores": {}})["scores"] |= scores
        samples = list(whole.values())
        names = list(samples[0]["scores"])
        decoded = [stats for each in self.lm.stats.values() for stats in each]
        return {
            "task": cell.task,
            "kind": None if known is None else known.kind,
            "setting": cell.setting.flat(),
            "label": cell.setting.label(),
            "choice": cell.choice,
            "split": cell.split,
            "metric": known.metric if known is not None and known.metric in names else names[0],
            "metrics": {name: _summary([each["scores"][name] for each in samples]) for name in names},
            "samples": samples,
            "stats": figures(decoded),
            "chance": known.chance if known is not None else None,
            "lossless": cell.setting.lossless,
            "model": self.model,
            "shots": next(iter(self.parts[cell.task].values())).config.num_fewshot,
            "chat": self.grid.chat,
            **facts(self.command, torch.get_num_threads()),
            "lm_eval": version("lm_eval"),
        }

    def _best(self, group: Sequence[Cell]) -> Cell:
        """Return the cell to be tested: of the settings of a group that which did best on items that are not tested.

        Of equal ones the one that reads fewest bytes per token is taken.
        """

        def merit(cell: Cell) -> tuple[float, float]:
            result = json.loads(self._path(cell).read_text())
            return result["metrics"][result["metric"]]["value"], -result["stats"]["bytes_per_token"]

        best = max(group, key=merit)
        return replace(best, split=TEST, items=self._items(best.task)[0])

    def _items(self, name: str) -> tuple[range | None, range]:
        """Return the items of a task that are tested, and those held out for choices."""
        limit, held_out = self.grid.limit, self.grid.validation
        count = min(len(task.eval_docs) for task in self.parts[name].values())
        tested = None if limit is None else range(min(limit, count))
        return tested, range(limit or 0, (limit or 0) + held_out)

    def _path(self, cell: Cell) -> Path:
        asked = json.dumps(cell.asked(self.grid, self.model), sort_keys=True)
        return self.folder / "cells" / f"{cell.task}-{sha256(asked.encode()).hexdigest()[:12]}.json"


def load_parts(grid: Grid, manager: TaskManager, allowed: bool) -> dict[str, dict[str, Task]]:
    """Return lm-eval's tasks that each name of a grid stands for, set up as lm-eval's own command does it.

    allowed  whether code that the model writes may be run

    Raises ConfigError of data that cannot be had, and of tasks that a sweep cannot run.
    """
    return {name: _parts(name, grid, manager, allowed) for name in grid.tasks}


def _parts(name: str, grid: Grid, manager: TaskManager, allowed: bool) -> dict[str, Task]:
    parts = load_tasks([name], manager)
    for part, task in parts.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise ConfigError(
                f"{part} scores given answers ({task.OUTPUT_TYPE}), which the full model does alone, so that no "
                "setting changes it; `sirius eval` runs it"
            )
        if getattr(task, "UNSAFE_CODE", False) and not allowed:
            raise ConfigError(f"{part} runs code that the model writes; give --confirm-run-unsafe-code to allow it")
        if grid.shots is not None and task.config.num_fewshot != 0:
            task.set_config("num_fewshot", grid.shots)
        elif task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        count, asked = len(task.eval_docs), (grid.limit or 0) + grid.validation
        if grid.validation and asked > count:
            raise ConfigError(
                f"{part} has {count} items, and limit {grid.limit} and validation {grid.validation} need {asked}"
            )
    return parts


def _summary(scores: Sequence[float]) -> dict[str, float]:
    """Return the mean of scores, and its standard error."""
    return {"value": mean(scores), "stderr": stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0}
