"""How a record of growth looks on paper: the advance at which correction begins to pay, axis by axis."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sirius.benchmark.extras import need
from sirius.benchmark.growth import VALUES, GrowthFigures, Workload, along
from sirius.benchmark.playback import PUBLISHED_AAL, PUBLISHED_PERIOD
from sirius.errors import ConfigError, FileError

SUFFIXES = (".svg", ".png")
INCHES = 3.2  # of a panel


def check_plot(path: Path) -> None:
    """Raise ConfigError where nothing could be drawn there: another kind of file, no such folder, or no matplotlib."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot writes {' or '.join(SUFFIXES)}; got {path}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.absolute().parent}")
    need("matplotlib.figure", "plot", "--plot")


def draw(workload: Workload, rows: Sequence[GrowthFigures], path: Path) -> None:
    """Draw the break-even AAL against each axis that has several points.

    Raises ConfigError as `check_plot` does and where no axis has, FileError where the file cannot be written.
    """
    check_plot(path)
    lines = {axis: along(rows, workload.base, axis) for axis in VALUES}
    lines = {axis: line for axis, line in lines.items() if len(line) > 1}
    if not lines:
        raise ConfigError("one point makes no line; measure an axis at two values at least")
    figure = need("matplotlib.figure", "plot", "--plot").Figure(
        figsize=(INCHES * len(lines), INCHES), layout="constrained"
    )
    panels = figure.subplots(1, len(lines), squeeze=False)[0]
    for panel, (axis, line) in zip(panels, lines.items(), strict=True):
        _draw_axis(panel, axis, line)
    panels[0].set_ylabel("break-even AAL")
    columns = 3 if len(lines) > 2 else 1
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def _draw_axis(panel: Any, axis: str, line: Sequence[GrowthFigures]) -> None:
    values = [getattr(row.point, axis) for row in line]
    periods = [row.point.period for row in line]
    published = [PUBLISHED_AAL if period == PUBLISHED_PERIOD else float("nan") for period in periods]
    panel.plot(values, [row.break_even for row in line], "o-", label="break-even")
    panel.plot(values, periods, "-", color="0.6", label="K: above it correction cannot pay")
    panel.plot(values, published, "_--", color="C3", label=f"published AAL {PUBLISHED_AAL}, K {PUBLISHED_PERIOD}")
    panel.set_xlabel(axis.replace("_", " "))
    panel.set_xscale("linear" if axis == "keep" else "log", **({} if axis == "keep" else {"base": 2}))
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
