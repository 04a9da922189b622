"""How cost grows: one axis at a time around a base point, and the advance from which correction pays there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sirius.batch import Batch
from sirius.benchmark.ceiling import Ceiling
from sirius.benchmark.decode import FULL, TimedSetting, Times, open_batch, prompt, step
from sirius.benchmark.playback import PUBLISHED_AAL, PUBLISHED_PERIOD, geometric
from sirius.benchmark.timing import timed
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError, FileError
from sirius.model.limits import context_limit
from sirius.offload.plan import acceptance
from sirius.sparsity import find

PLAIN, SPARSE, CORRECTED = "plain", "sparse", "corrected"
PROMPT = 8  # tokens that are really read: their keys and values, over and over, are those of the rest
VALUES: dict[str, tuple[float, ...]] = {  # of each axis, the base point's first
    "context": (256, 1024, 2048, 4096, 8192),
    "batch": (1, 2, 4, 8, 16),
    "period": (16, 4, 8, 32),
    "tree_width": (1, 2, 4, 8),
    "keep": (0.5, 0.25, 0.75),
}
STEPS = 4  # passes of a turn without windows; with them it is one window


@dataclass(frozen=True)
class Point:
    """Where cost is measured; the fields are the axes.

    context     tokens that every row holds when a turn begins
    batch       rows decoded side by side
    period      K of the windows
    tree_width  branches of their drafts
    keep        fraction of the neurons that the draft keeps
    """

    context: int
    batch: int
    period: int
    tree_width: int
    keep: float


@dataclass(frozen=True)
class Workload:
    """What all points have in common: the base point, the draft's method, and the turns of each setting."""

    base: Point
    sparsity: str
    cycles: int
    device: str = "cpu"
    compile: bool = False

    def __post_init__(self) -> None:
        if self.sparsity == "none":
            raise ConfigError("growth compares a sparse draft with the full model; --sparsity none drafts nothing")


@dataclass(frozen=True)
class GrowthFigures:
    """The figures of a point: medians, in milliseconds, of passes over all of its rows at once.

    A step brings every row one token, so that its time is also each row's time per token; `batch` of them come of it.

    full_ms        a step of full decoding
    plain_ratio    over that: a step of a sparse method that drafts nothing (period 1), which reads the same
    sparse_ms      a step of the sparse model alone
    draft_ms       a draft step of a window; it reads `tree_width` tokens of each row
    check_ms       the full model's pass over a window, and the verdict
    rest_ms        of a window: keeping, and the host's book-keeping
    window_ms      a window
    break_even     the AAL (tokens that a window brings each row) at which corrected tokens cost what full ones do:
                   window_ms over full_ms
    acceptance     the chance with which each guess must be accepted for that; None where not even K tokens suffice
    """

    point: Point
    full_ms: float
    plain_ratio: float
    sparse_ms: float
    draft_ms: float
    check_ms: float
    rest_ms: float
    window_ms: float
    break_even: float
    acceptance: float | None


def make_points(values: Mapping[str, Sequence[Any]], axes: Iterable[str]) -> list[Point]:
    """Return the base point, of the first value of each axis, and those that differ from it on one of `axes`.

    values  of every axis; raises ConfigError of another name in `axes`
    """
    if unknown := set(axes) - values.keys():
        raise ConfigError(f"--axis is one of {', '.join(values)}; got {', '.join(sorted(unknown))}")
    base = Point(**{axis: each[0] for axis, each in values.items()})
    return list(dict.fromkeys([base, *(replace(base, **{axis: value}) for axis in axes for value in values[axis])]))


def along(rows: Iterable[GrowthFigures], base: Point, axis: str) -> list[GrowthFigures]:
    """Return the rows that differ from the base point on one axis at most, in its order."""
    on = [row for row in rows if replace(row.point, **{axis: getattr(base, axis)}) == base]
    return sorted(on, key=lambda row: getattr(row.point, axis))


def check_points(points: Iterable[Point], workload: Workload, config: PreTrainedConfig) -> None:
    """Raise ConfigError of a point that cannot be measured, before the others take their time."""
    limit = context_limit(config)
    find(workload.sparsity)
    for point in points:
        make_settings(point, workload.sparsity)
        if point.period < 2:
            raise ConfigError(f"a window that drafts has a --period of at least 2; got {point.period}")
        new = _budget(point, workload.cycles)
        if limit is not None and point.context + new > limit:
            raise ConfigError(
                f"--context {point.context} and {new} tokens decoded after it pass the model's limit of {limit}; "
                + (f"lower --context to at most {limit - new}, or --cycles" if new < limit else "lower --cycles")
            )


def run(
    model: PreTrainedModel,
    points: Sequence[Point],
    workload: Workload,
    done: Iterable[GrowthFigures] = (),
    on_row: Callable[[list[GrowthFigures]], None] = lambda _: None,
) -> list[GrowthFigures]:
    """Measure every point that is not among those done; `on_row` gets all rows so far after each."""
    rows = list(done)
    there = {row.point for row in rows}
    for point in points:
        if point not in there:
            rows.append(measure(model, point, workload))
            on_row(rows)
    return rows


def measure(model: PreTrainedModel, point: Point, workload: Workload) -> GrowthFigures:
    """Time the settings of a point in turns; each turn begins at the point's context."""
    engine = Engine(model, compile=workload.compile)
    settings = make_settings(point, workload.sparsity)
    times = {setting.name: Times() for setting in settings}
    batches = [open_filled(engine, setting, point, workload, times[setting.name]) for setting in settings]
    for _ in range(workload.cycles):
        for setting, batch in zip(settings, batches, strict=True):
            _turn(batch, setting, point, workload.device, times[setting.name])
    return make_row(point, times)


def read_rows(record: Mapping[str, Any]) -> tuple[Workload, list[GrowthFigures]]:
    """Return what a record of growth holds; raise FileError where it is none."""
    try:
        asked = record["workload"]
        workload = Workload(**{**asked, "base": Point(**_positive(asked["base"]))})
        return workload, [_row(row) for row in record["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else error
        raise FileError(f"this is no record of sirius bench growth: {what}") from error


def read_ceiling(record: Mapping[str, Any]) -> Ceiling:
    """Return the ceiling of a record; raise FileError where it has none."""
    try:
        return Ceiling(**_positive(record["ceiling"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"this record has no ceiling: {error!r}") from error


def _row(row: Mapping[str, Any]) -> GrowthFigures:
    figures = {name: value for name, value in row.items() if name not in ("point", "rest_ms", "acceptance")}
    chance, rest = row["acceptance"], row["rest_ms"]  # there may be none of either
    if not isinstance(rest, int | float) or not isinstance(chance, int | float | None):
        raise ValueError(f"rest_ms {rest!r}, acceptance {chance!r}")
    point = Point(**_positive(row["point"]))
    return GrowthFigures(point=point, **_positive(figures), rest_ms=rest, acceptance=chance)


def _positive(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in figures.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value!r}")
    return figures


def make_settings(point: Point, method: str) -> list[TimedSetting]:
    """Return what is timed at a point: full, plain, sparse, corrected."""
    sparse = SparsityConfig(method, point.keep)
    return [
        TimedSetting(FULL, SparsityConfig("none")),
        TimedSetting(PLAIN, sparse, CorrectionConfig(1)),
        TimedSetting(SPARSE, sparse),
        TimedSetting(CORRECTED, sparse, CorrectionConfig(point.period, tree_width=point.tree_width)),
    ]


def open_filled(engine: Engine, setting: TimedSetting, point: Point, workload: Workload, times: Times) -> Batch:
    """Open a setting's batch with every row at the point's context, and run one round that is not timed.

    Only `PROMPT` tokens are read. What the other slots hold changes no speed, but zeros that were never written would:
    they share one page of memory.
    """
    chance = acceptance(PUBLISHED_AAL, PUBLISHED_PERIOD)
    batch = open_batch(engine, setting, geometric(chance, point.period), times, rows=point.batch)
    tokens = prompt(engine.model, min(PROMPT, point.context))
    budget = point.context - len(tokens) + _budget(point, workload.cycles)
    for _ in range(point.batch):
        batch.add(engine.text(tokens, max_new_tokens=budget))
    step(batch)
    batch.session.reserve(point.batch, max(entry.most for entry in batch.active))
    rows, cache = range(point.batch), batch.session.cache
    for row in rows:
        cache.truncate(row, 0)
    over_and_over = torch.arange(point.context) % len(tokens)
    cache.keep(over_and_over.expand(len(rows), -1), torch.full((len(rows),), point.context))
    step(batch)
    times.drafts.clear()
    times.checks.clear()
    return batch


def _turn(batch: Batch, setting: TimedSetting, point: Point, device: str, times: Times) -> None:
    for row in range(point.batch):
        batch.session.cache.truncate(row, point.context)
    for _ in range(1 if setting.guesses else STEPS):
        seconds, updates = timed(lambda: step(batch), device)
        assert all(update.round.steps == setting.guesses for update in updates), "a window was cut"
        times.rounds.append(seconds)


def _budget(point: Point, cycles: int) -> int:
    """Return the most new tokens that a setting's rounds of all cycles may bring a row, and a window to spare."""
    return (cycles + 2) * max(STEPS, point.period)


def make_row(point: Point, times: Mapping[str, Times]) -> GrowthFigures:
    """Return the figures of a point from the times of its settings."""
    full, plain, sparse = (1e3 * median(times[name].rounds) for name in (FULL, PLAIN, SPARSE))
    windows = times[CORRECTED]
    parts = zip(windows.rounds, windows.drafts, windows.checks, strict=True)
    window = 1e3 * median(windows.rounds)
    aal = window / full
    return GrowthFigures(
        point,
        full_ms=round(full, 3),
        plain_ratio=round(plain / full, 3),
        sparse_ms=round(sparse, 3),
        draft_ms=round(1e3 * median(windows.drafts) / (point.period - 1), 3),
        check_ms=round(1e3 * median(windows.checks), 3),
        rest_ms=round(1e3 * median(whole - draft - check for whole, draft, check in parts), 3),
        window_ms=round(window, 3),
        break_even=round(aal, 3),
        acceptance=round(acceptance(max(aal, 1), point.period), 4) if aal <= point.period else None,
    )
