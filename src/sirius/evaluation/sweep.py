"""Sweeps: a grid of settings over tasks. Every sample is saved as it finishes; what is done is not done again.

Samples are decoded first, by one process or several that share a folder, and graded by lm-eval when all of a cell are
there. So a process that dies costs its unfinished samples alone, and the results are those of one process.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from sirius.benchmark.facts import facts
from sirius.benchmark.record import save
from sirius.engine import Engine
from sirius.errors import ConfigError
from sirius.evaluation.catalogue import needs_chat, task_of
from sirius.evaluation.completions import Completions, make_folder
from sirius.evaluation.grid import Grid
from sirius.evaluation.lm import GenerationRequest, SiriusLM, figures
from sirius.evaluation.ranks import Ranks
from sirius.evaluation.suite import check_shots, load_tasks
from sirius.report.estimate import average
from sirius.settings import Setting

SEED = 1234  # of the choice of worked examples, lm-eval's own
TEST, VALIDATION = "test", "validation"
POLL = 1.0  # seconds between two looks at what other processes have finished


@dataclass(frozen=True)
class Cell:
    """One task under one setting.

    items   the places in the task's order (see `in_order`) of the problems that are decoded, None: all
    choice  the group of settings that this one was chosen from, or stands to be chosen from
    """

    task: str
    setting: Setting
    split: str
    items: range | None
    choice: str | None = None


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
    revision: str | None = None
    batch_size: int = 8
    allowed: bool = False
    command: str = ""
    ranks: Ranks = field(default_factory=Ranks.here)
    on_sample: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        self.completions = Completions(self.folder / "completions", self.ranks.rank)
        make_folder(self.folder / "cells")
        one = Ranks()  # lm-eval grades in each process what all of them decoded
        options: dict[str, Any] = {"batch_size": self.batch_size, "ranks": one, "quiet": True, "name": self.name}
        options["revision"] = self.revision
        self.lm = SiriusLM(self.engine, completions=self.completions, **options)
        self.model = {**self.lm.identity, "parameters": self.engine.model.num_parameters()}
        self.orders = {name: in_order(parts) for name, parts in self.parts.items()}
        self.requests: dict[tuple[str, range | None], list[Instance]] = {}
        self.paths: dict[Cell, Path] = {}

    def run(self) -> list[Path]:
        """Decode and grade everything, and return the files of the tested cells."""
        firsts, groups = self.cells()
        with self.completions.alive():
            self._finish([*firsts, *(cell for group in groups for cell in group)])
            best = [self._best(group) for group in groups]
            self._finish(best)
        return [self._path(cell) for cell in dict.fromkeys([*firsts, *best])]

    def cells(self) -> tuple[list[Cell], list[list[Cell]]]:
        """Return the cells of fixed settings, and the groups of cells from each of which the best one is chosen."""
        firsts, groups = [], []
        for task in self.grid.tasks:
            tested, held_out = self._items(task)
            firsts += [Cell(task, setting, TEST, tested) for setting in self.grid.fixed(task)]
            for name, options in self.grid.choices(task):
                groups.append([Cell(task, setting, VALIDATION, held_out, name) for setting in options])
        return firsts, groups

    def missing(self) -> int:
        """Return the most samples that are left to decode; a chosen setting may turn out to be decoded already."""
        firsts, groups = self.cells()
        cells = [*firsts, *(cell for group in groups for cell in group)]
        chosen = sum(len(self._requests(replace(group[0], items=self._items(group[0].task)[0]))) for group in groups)
        return chosen + sum(len(self._unfinished(cell)) for cell in cells if not self._path(cell).exists())

    def plan(self) -> str:
        """Say how many problems of each task are tested, and of how many subtasks where it has several."""
        said = []
        for name in self.grid.tasks:
            tested, count = self._items(name)[0], len(self.orders[name])
            subtasks = len(self._numbers(name, tested))
            among = "" if len(self.parts[name]) == 1 else f" from {subtasks} of {len(self.parts[name])} subtasks"
            said.append(f"{name} {count if tested is None else len(tested):,} of {count:,}{among}")
        return f"problems tested: {'; '.join(said)}"

    # --- decoding

    def _finish(self, cells: Sequence[Cell]) -> None:
        """Decode and grade cells: this process's share first, then what others leave undone."""
        todo = [cell for cell in cells if not self._path(cell).exists()]
        rank, size = self.ranks.rank, self.ranks.size
        for cell in todo:
            self._decode(cell, (rank, size))
            if size == 1:
                self._grade(cell)
        others = [cell for number, cell in enumerate(todo) if number % size != rank]
        for cell in [*todo[rank::size], *others] if size > 1 else []:  # each process begins to grade with its own cells
            self._wait_for_others(cell)
            if not self._path(cell).exists():
                self._decode(cell, (0, 1))
                self._grade(cell)

    def _decode(self, cell: Cell, share: tuple[int, int]) -> None:
        asked = [_asked(each) for each in self._requests(cell)]
        self.lm.samples(asked, cell.setting, share=share, on_sample=self.on_sample)

    def _unfinished(self, cell: Cell) -> set[str]:
        """Return the keys of a cell's samples that no process has saved."""
        return self._keys(cell) - self.completions.found.keys()

    def _wait_for_others(self, cell: Cell) -> None:
        """Wait until a cell is whole, or all other processes wait too or are gone."""
        keys = self._keys(cell)
        self.completions.read()
        if not keys - self.completions.found.keys():
            return
        with self.completions.resting():
            time.sleep(POLL)  # another one that rests sees that this one does
            while keys - self.completions.found.keys() and self.completions.others_alive():
                time.sleep(POLL)
                self.completions.read()
        self.completions.read()

    def _requests(self, cell: Cell) -> list[Instance]:
        """Return lm-eval's requests of a cell, all of its parts together."""
        if (known := self.requests.get((cell.task, cell.items))) is not None:
            return known
        found: list[Instance] = []
        for name, numbers in self._numbers(cell.task, cell.items).items():
            task = self.parts[cell.task][name]
            task.set_fewshot_seed(SEED)  # its draws go on from call to call
            task.build_all_requests(
                samples=numbers,
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
        self.lm.values, self.lm.stats = cell.setting.flat(), {}
        numbers = self._numbers(cell.task, cell.items)
        parts = {name: self.parts[cell.task][name] for name in numbers}
        for task in parts.values():
            task.set_fewshot_seed(SEED)
        results = evaluate(
            self.lm,
            {"tasks": parts},
            samples=numbers,
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
                name = row["doc_id"] if len(self.parts[cell.task]) == 1 else f"{part}:{row['doc_id']}"
                means = set(row["metrics"]) & _means(self.parts[cell.task][part])
                scores = {f"{metric},{row['filter']}": float(row[metric]) for metric in sorted(means)}
                whole.setdefault(name, {"id": name, "scores": {}})["scores"] |= scores
        requests, numbers = self._requests(cell), self._numbers(cell.task, cell.items)
        for each, key in zip(requests, self.lm.keys([_asked(each) for each in requests], cell.setting), strict=True):
            number = numbers[str(each.task_name)][cast("int", each.doc_id)]  # its place among those that are asked
            name = number if len(self.parts[cell.task]) == 1 else f"{each.task_name}:{number}"
            sample = self.completions.found[key]
            own = {figure: sample["stats"][figure] for figure in ("rounds", "drafted", "accepted")}
            whole[name] |= {"tokens": sample["tokens"], "finish": sample["finish"], **own}
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
            "metrics": {name: asdict(average([each["scores"][name] for each in samples])) for name in names},
            "samples": samples,
            "problems": _digest([[None if self.grid.chat else each.args[0], each.doc] for each in requests])[:12],
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
        """Return the cell of the setting that scored best on the problems for choices, to be tested.

        Of settings that score the same, it takes the one that reads the fewest bytes per token.
        """
        task = next(iter(self.parts[group[0].task].values()))

        def merit(cell: Cell) -> tuple[float, float]:
            result = json.loads(self._path(cell).read_text())
            sign = 1 if (task.higher_is_better() or {}).get(result["metric"].split(",")[0], True) else -1
            return sign * result["metrics"][result["metric"]]["value"], -result["stats"]["bytes_per_token"]

        best = max(group, key=merit)
        return replace(best, split=TEST, items=self._items(best.task)[0])

    def _items(self, name: str) -> tuple[range | None, range]:
        """Return the places in the task's order of the problems that are tested, and of those for choices."""
        limit = self.grid.limit
        tested = None if limit is None else range(min(limit, len(self.orders[name])))
        return tested, range(limit or 0, (limit or 0) + self.grid.validation)

    def _numbers(self, name: str, items: range | None) -> dict[str, list[int]]:
        """Return the numbers of a task's problems, by part; parts that have none are left out.

        items  places in the task's order, None: all
        """
        order = self.orders[name]
        found: dict[str, list[int]] = {}
        for place in range(len(order)) if items is None else items:
            part, number = order[place]
            found.setdefault(part, []).append(number)
        return {part: found[part] for part in self.parts[name] if part in found}

    def _keys(self, cell: Cell) -> set[str]:
        """Return the keys of a cell's samples."""
        return set(self.lm.keys([_asked(each) for each in self._requests(cell)], cell.setting))

    def _path(self, cell: Cell) -> Path:
        """Return the file of a cell's result, whose name holds all that the result depends on."""
        if (known := self.paths.get(cell)) is None:
            versions = [str(task.VERSION) for task in self.parts[cell.task].values()]
            docs = [each.doc for each in self._requests(cell)]  # their answers too
            asked = [sorted(self._keys(cell)), docs, cell.split, cell.choice, version("lm_eval"), *versions]
            digest = _digest(asked)[:12]
            known = self.paths[cell] = self.folder / "cells" / f"{cell.task}-{digest}.json"
        return known


def _asked(request: Instance) -> GenerationRequest:
    return cast("GenerationRequest", request.args)


def _digest(value: Any) -> str:
    """Return a fingerprint of something that JSON can hold, other values by their texts."""
    return sha256(json.dumps(value, default=str).encode()).hexdigest()


def in_order(parts: Mapping[str, Task]) -> list[tuple[str, int]]:
    """Return the problems of a task as (part, number), so that the first N take from each part its share of N.

    So the mean over any first N estimates that of the whole task, in which every problem counts the same.
    """
    counts = {name: len(task.eval_docs) for name, task in parts.items()}
    places = [((2 * number + 1) / count, name, number) for name, count in counts.items() for number in range(count)]
    return [(name, number) for _, name, number in sorted(places)]


def load_parts(grid: Grid, manager: TaskManager, allowed: bool) -> dict[str, dict[str, Task]]:
    """Return lm-eval's tasks that each name of a grid stands for, set up as lm-eval's own command does it.

    allowed  whether code that the model writes may be run

    Raises ConfigError of data that cannot be had, and of tasks that a sweep cannot run.
    """
    return {name: _parts(name, grid, manager, allowed) for name in grid.tasks}


def _parts(name: str, grid: Grid, manager: TaskManager, allowed: bool) -> dict[str, Task]:
    parts = load_tasks([name], manager)
    _check_count(name, sum(len(task.eval_docs) for task in parts.values()), grid)
    if needs_chat(name) and not grid.chat:
        raise ConfigError(f"{name} is a conversation; give --chat, or set chat: true in the grid")
    for part, task in parts.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise ConfigError(
                f"{part} scores given answers ({task.OUTPUT_TYPE}), which the full model does alone, so that no "
                "setting changes it; `sirius eval` runs it"
            )
        if getattr(task, "UNSAFE_CODE", False) and not allowed:
            raise ConfigError(f"{part} runs code that the model writes; give --confirm-run-unsafe-code to allow it")
        if not _means(task):
            raise ConfigError(f"{part} has no metric that is a mean over its items, and a sweep reports no other")
        if grid.shots is not None:
            check_shots(part, task, grid.shots)
            task.set_config("num_fewshot", grid.shots)
        elif task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
    return parts


def _check_count(name: str, count: int, grid: Grid) -> None:
    """Raise ConfigError where a task has too few problems for those tested and those for choices."""
    needed = (grid.limit or 0) + grid.validation
    if grid.validation and needed > count:
        raise ConfigError(
            f"{name} has {count} problems, and limit {grid.limit} and validation {grid.validation} need {needed}; "
            "lower one of them"
        )


def _means(task: Task) -> set[str]:
    """Return the metrics of a task that are means over its items."""
    return {
        name for name, function in (task.aggregation() or {}).items() if getattr(function, "__name__", "") == "mean"
    }
