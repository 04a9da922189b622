"""The results of sweeps as their files hold them: one cell for each task and setting."""

import gzip
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from sirius.errors import ConfigError, FileError
from sirius.report.estimate import Estimate, accepted_spread

TEST = "test"
EVERY = "none"  # the sparsity method that keeps every neuron
GUESSING = ("draft_bits", "draft_ngram")  # options by which there are guesses though every neuron is kept
FACTS = ("machine", "gpu", "kernels", "threads", "sirius", "lm_eval", "torch", "transformers", "python")
ORIGINS = (*FACTS, "commit", "date", "time", "command")


@dataclass(frozen=True)
class Figures:
    """What decoding the items did, see `sirius.stats.Stats`; its other figures are not reported.

    advance_error  standard error of the AAL, by the spread of accepted guesses; None where it is not known
    """

    aal: float | None
    aal_complete: float | None
    advance_error: float | None
    period: int | str
    drafted: int
    accepted: int
    corrections_per_token: float
    density: float
    effective_density: float
    bytes_per_token: float
    acceptance_histogram: tuple[int, ...]
    lossless: bool

    @property
    def advance(self) -> Estimate | None:
        """The AAL with its standard error."""
        return None if self.aal is None else Estimate(self.aal, self.advance_error)

    @property
    def advance_share(self) -> Estimate | None:
        """AAL/K over windows that no end of a text cut short, 0 to 1; None where K is chosen anew for each window."""
        if self.aal_complete is None or isinstance(self.period, str):
            return None
        error = self.advance_error
        return Estimate(self.aal_complete / self.period, None if error is None else error / self.period)

    @property
    def acceptance_rate(self) -> float | None:
        """The share of the guesses that stand in the text; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    def formula(self, aal: float | None) -> float | None:
        """Return the paper's effective density, ((K-1) d + 1) / AAL, which takes every window as whole."""
        if not aal or isinstance(self.period, str):
            return None
        return ((self.period - 1) * self.density + 1) / aal


@dataclass(frozen=True)
class Variant:
    """A task as it was asked. Only scores of one variant are compared.

    problems  see `Cell`
    """

    task: str
    metric: str
    shots: int | None
    chat: bool
    items: frozenset[str]
    problems: str | None


@dataclass(frozen=True)
class Cell:
    """The result of one task under one setting.

    kind     "understanding", "reasoning" or None
    setting  every option by its name
    choice   the group that the setting was chosen from on validation items, None where it was not chosen
    scores   the score of each item by its number
    model    name, revision, dtype, end tokens and parameters
    origins  machine, versions, commit, date, time and command, as texts
    problems  a digest of prompts and answers, None in results of older versions
    """

    task: str
    kind: str | None
    setting: Mapping[str, Any]
    choice: str | None
    split: str
    metric: str
    score: Estimate
    scores: Mapping[str, float]
    stats: Figures
    chance: float | None
    lossless: bool
    model: Mapping[str, Any]
    shots: int | None
    chat: bool
    origins: Mapping[str, str]
    problems: str | None = None

    @cached_property
    def variant(self) -> Variant:
        """The task, its metric, and how and on which items it was asked."""
        return Variant(self.task, self.metric, self.shots, self.chat, frozenset(self.scores), self.problems)

    @property
    def full(self) -> bool:
        """Whether the full model alone decoded."""
        return self.setting["sparsity"] == EVERY and not any(self.setting.get(name) for name in GUESSING)

    @property
    def corrected(self) -> bool:
        """Whether the full model corrected a sparse one."""
        return bool(self.setting.get("correct"))

    @property
    def ablated(self) -> tuple[str, ...]:
        """The parts of the correction that are left out."""
        return tuple(self.setting.get("ablate") or ())


def load_cells(places: Sequence[Path]) -> list[Cell]:
    """Return the cells of folders that sweeps wrote, or of JSONL files of such cells, in the order of tasks.

    Raises FileError of a place that is not there and of a broken file, ConfigError where a place has no results.
    """
    found: list[Cell] = []
    for place in dict.fromkeys(places):
        if not place.exists():
            raise FileError(f"there is no folder {place}; `sirius sweep GRID --output {place}` makes one")
        cells = read_folder(place) if place.is_dir() else read_file(place)
        if not cells:
            raise ConfigError(f"{place} has no results; `sirius sweep GRID --output FOLDER` decodes and grades some")
        found += cells
    if not any(cell.split == TEST for cell in found):
        raise ConfigError(
            f"all {len(found)} results are of validation items, so nothing is tested yet; run `sirius sweep` to its end"
        )
    return sorted(found, key=lambda cell: cell.task)


def read_folder(folder: Path) -> list[Cell]:
    """Return the cells of a sweep's folder; raise FileError, naming the file, where one holds none."""
    return [cell for path in sorted((folder / "cells").glob("*.json")) for cell in read_file(path)]


def read_file(path: Path) -> list[Cell]:
    """Return the cells of a file, one on each line, compressed or not; raise FileError where a line holds none."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return [_of_line(line) for line in raw.decode().split("\n") if line.strip()] or [_of_line("")]
    except (OSError, EOFError, ValueError, zlib.error) as error:
        own = path.parent.name == "cells"
        way = "delete it and run the sweep again, which decodes nothing twice" if own else "name a sweep's folder"
        raise FileError(f"{path} is no result of a sweep: {error}; {way}") from error


def _of_line(line: str) -> Cell:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return _cell(record)


def _cell(record: Mapping[str, Any]) -> Cell:
    setting = _take(record, "setting", dict)
    _take(setting, "sparsity", str)
    metric = _take(record, "metric", str)
    scores = {}
    for sample in _take(record, "samples", list):
        name = sample.get("id") if isinstance(sample, dict) else None
        if name is None:
            raise ValueError("an entry of samples has no id")
        scores[str(name)] = _number(_take(sample, "scores", dict), metric)
    if not scores:
        raise ValueError("samples is empty")
    shown = _take(_take(record, "metrics", dict), metric, dict)
    error = _number(shown, "stderr") if len(scores) > 1 else None
    return Cell(
        task=_take(record, "task", str),
        kind=_take(record, "kind", str | None),
        setting=setting,
        choice=_take(record, "choice", str | None),
        split=_take(record, "split", str),
        metric=metric,
        score=Estimate(_number(shown, "value"), error),
        scores=scores,
        stats=_figures(_take(record, "stats", dict), "interleave" not in (setting.get("ablate") or ())),
        chance=None if record.get("chance") is None else _number(record, "chance"),
        lossless=_take(record, "lossless", bool),
        model=_take(record, "model", dict),
        shots=_take(record, "shots", int | None),
        chat=_take(record, "chat", bool),
        origins={name: str(record[name]) for name in ORIGINS if record.get(name) is not None},
        problems=_take({"problems": None, **record}, "problems", str | None),
    )


def _figures(stats: Mapping[str, Any], interleaved: bool) -> Figures:
    """Return the figures of a record.

    interleaved  each window adds one token to its accepted guesses, so that the AAL has their spread
    """
    histogram = _take(stats, "acceptance_histogram", list)
    if not all(type(count) is int and count >= 0 for count in histogram):
        raise ValueError("acceptance_histogram is no list of counts")
    return Figures(
        aal=None if _take(stats, "aal", float | int | None) is None else _number(stats, "aal"),
        aal_complete=None if stats.get("aal_complete") is None else _number(stats, "aal_complete"),
        advance_error=accepted_spread(histogram) if interleaved else None,
        period=_take(stats, "period", int | str),
        drafted=_take(stats, "drafted", int),
        accepted=_take(stats, "accepted", int),
        corrections_per_token=_number(stats, "corrections_per_token"),
        density=_number(stats, "density"),
        effective_density=_number(stats, "effective_density"),
        bytes_per_token=_number(stats, "bytes_per_token"),
        acceptance_histogram=tuple(histogram),
        lossless=_take(stats, "lossless", bool),
    )


def _take(record: Mapping[str, Any], name: str, kind: Any) -> Any:
    """Return a value of a record; raise ValueError where it is not there, or of another kind."""
    if name not in record:
        raise ValueError(f"{name} is missing")
    value = record[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}")
    return value


def _number(record: Mapping[str, Any], name: str) -> float:
    value = _take(record, name, float | int)
    if not isfinite(value):
        raise ValueError(f"{name} is {value!r}")
    return float(value)
