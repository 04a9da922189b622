"""How a benchmark looks on a terminal."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.text import Text

from sirius.benchmark import growth, kernels
from sirius.benchmark.ceiling import Ceiling
from sirius.benchmark.decode import DecodeFigures
from sirius.table import Figures

LEGEND = """\
wall: share of the ceiling at which the bytes that a token must read are moved.
full, hf: time over that of our full decoding, and of transformers' generate.
GB: peak memory. time: percent of a corrected window in drafts, check, and rest.
"""
GROWTH = """\
Milliseconds of a pass over all rows: full, a step of full decoding; sparse, of
the sparse model alone; draft, of a window; check, its check; rest, of a window.
plain: a sparse method with nothing drafted (period 1), over full.
AAL: tokens per window and row at which corrected ones cost what full ones do.
guess: the chance with which each guess must be accepted for that.
"""


def decoding(rows: Sequence[DecodeFigures], ceiling: Ceiling, acceptance: str) -> RenderableType:
    """Return the figures of decoding as a table under the ceiling, with where their acceptance comes from."""
    table = Figures(padding=(0, 1, 0, 0))
    for name in ("", "ms/token", "GB/s", "wall", "full", "hf", "GB", "time"):
        table.add_column(name, justify="right" if name else "left", no_wrap=name != "time", overflow="fold")
    for row in rows:
        parts = [row.draft, row.verify, row.rest]
        table.add_row(
            row.name,
            f"{row.ms_per_token:.2f}",
            f"{row.gb_per_s:.1f}",
            f"{row.share_of_ceiling:.2f}",
            f"{row.ratio_to_full:.2f}",
            f"{row.ratio_to_transformers:.2f}",
            "" if row.peak_bytes is None else f"{row.peak_bytes / 1e9:.2f}",
            "/".join(f"{100 * part:.0f}" for part in parts if part is not None),
        )
    played = Text(f"acceptance played back: {acceptance}; of other drafts it is an assumption\n", "dim")
    return Group(_ceiling(ceiling), table, played, Text(LEGEND, "dim"))


def operations(rows: Sequence[kernels.KernelFigures], ceiling: Ceiling) -> RenderableType:
    """Return the figures of the kernels as a table under the ceiling."""
    table = Figures(padding=(0, 1, 0, 0))
    for name in ("operation", "batch", "density", "kernel ms", "reference ms", "GB/s", "wall", "GFLOP/s"):
        table.add_column(name, justify="left" if name == "operation" else "right", no_wrap=True)
    for row in rows:
        figures = (f"{row.density:.2f}", f"{row.kernel_ms:.3f}", f"{row.reference_ms:.3f}", f"{row.gb_per_s:.1f}")
        table.add_row(row.operation, str(row.batch), *figures, f"{row.share_of_ceiling:.2f}", f"{row.gflops:.0f}")
    return Group(_ceiling(ceiling), table)


def growing(workload: growth.Workload, rows: Sequence[growth.GrowthFigures], ceiling: Ceiling) -> RenderableType:
    """Return the figures of growth as a table, axis by axis, under the ceiling."""
    table = Figures(padding=(0, 1, 0, 0))
    for name in ("", "full", "plain", "sparse", "draft", "check", "rest", "AAL", "guess"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, line in _lines(workload, rows):
        for row in line:
            value = f"{name.replace('_', ' ')} {getattr(row.point, name):g}"
            table.add_row(value, *_growth_figures(row), end_section=row is line[-1])
    base = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in asdict(workload.base).items())
    return Group(_ceiling(ceiling), f"{workload.sparsity}; base point: {base}", table, Text(GROWTH, "dim"))


def _lines(
    workload: growth.Workload, rows: Sequence[growth.GrowthFigures]
) -> Iterator[tuple[str, list[growth.GrowthFigures]]]:
    """Yield each axis with its rows; those with the base point alone only where no axis has more."""
    lines = {axis: growth.along(rows, workload.base, axis) for axis in growth.VALUES}
    several = {axis: line for axis, line in lines.items() if len(line) > 1}
    yield from (several or dict([*lines.items()][:1])).items()


def _growth_figures(row: growth.GrowthFigures) -> tuple[str, ...]:
    return (
        f"{row.full_ms:.1f}",
        f"{row.plain_ratio:.2f}",
        f"{row.sparse_ms:.1f}",
        f"{row.draft_ms:.1f}",
        f"{row.check_ms:.1f}",
        f"{row.rest_ms:.1f}",
        f"{row.break_even:.1f}",
        "cannot pay" if row.acceptance is None else f"{row.acceptance:.3f}",
    )


def _ceiling(ceiling: Ceiling) -> str:
    return f"ceiling: {ceiling.gb_per_s:.1f} GB/s (copy {ceiling.copy:.1f}, matrix-vector {ceiling.matvec:.1f})"
