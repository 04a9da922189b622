"""How far windows go: acceptance by position and the number of accepted guesses."""

from collections.abc import Callable, Sequence

from sirius.report import labels
from sirius.report.cells import Cell, Variant
from sirius.report.compare import ModelCells, chunks
from sirius.report.document import Block, Column, Curve, Figure, Panel, Part, Point, Rows, Table
from sirius.report.estimate import Estimate, acceptance_by_position, lengths

MOST = 6  # settings of a table and a figure
DEFINITION = (
    "Acceptance by position is the share of all windows whose first i guesses were accepted, whatever happened before "
    "(unconditional, as vLLM counts it). A window that was cut short, by the end of the text, counts as one that "
    "accepted no further guess. The number accepted leaves out the full model's own token, which the AAL includes."
)


def windows(cells: ModelCells) -> Part | None:
    """Return the acceptance of one corrected setting of each task, draft and K; None without any."""
    blocks: list[Block] = []
    for variant in cells.variants:
        task = labels.variant_labels(cells.variants)[variant]
        for some in chunks(_chosen(cells, variant), MOST):
            blocks += _both(cells, some, task)
    return Part("How far windows go", [DEFINITION, *blocks]) if blocks else None


def _chosen(cells: ModelCells, variant: Variant) -> list[Cell]:
    """Return one corrected cell of each draft and K: one of those that stand for its sparsity method, if there is."""
    found: dict[tuple[str, str, str], Cell] = {}
    plain = cells.of(variant, lambda cell: cell.corrected and not cell.ablated)
    methods = dict.fromkeys(cell.setting["sparsity"] for cell in plain)
    main = [cell for method in methods for cell in cells.main(variant, method)]
    chosen_first = sorted(main, key=lambda cell: cell.choice is None)
    for cell in [*chosen_first, *plain]:
        if cell.stats.drafted and sum(cell.stats.acceptance_histogram):
            found.setdefault((*_draft(cell), str(cell.stats.period)), cell)
    return sorted(found.values(), key=lambda cell: (*_draft(cell), len(cell.stats.acceptance_histogram)))


def _draft(cell: Cell) -> tuple[str, str]:
    return cell.setting["sparsity"], str(cell.setting.get("draft_bits", 0))


def _both(cells: ModelCells, shown: Sequence[Cell], task: str) -> list[Block]:
    seldom = labels.differing(shown)
    named, common = labels.told_apart([labels.pieces(cell.setting, seldom=seldom) for cell in shown])
    notes = [f"Windows: {'; '.join(_count(*each) for each in zip(named, shown, strict=True))}."]
    heading = f"{task} ({common})" if common else task
    columns = [Column("i")]
    for name in named:
        columns += [Column("first i accepted", group=name), Column("exactly i accepted", group=name)]
    first = [_line(cell, acceptance_by_position, 1) for cell in shown]
    exact = [_line(cell, lengths, 0) for cell in shown]
    both = [line for pair in zip(first, exact, strict=True) for line in pair]
    most = max(max(line, default=0) for line in both)
    rows = [[str(i), *(labels.score(line.get(i)) for line in both)] for i in range(most + 1)]
    panels = [
        Panel("position of the guess", "first i guesses accepted", _curves(first, named), share=True),
        Panel("guesses accepted", "share of windows", _curves(exact, named), share=True, steps=True),
    ]
    alt = f"Plots of acceptance by position and of the number of guesses accepted for {task}: {'; '.join(named)}."
    alt += " The table has the numbers."
    return [
        Table(f"Acceptance by position, and number of guesses accepted: {heading}", columns, [Rows(rows)], notes),
        Figure(f"Acceptance by position, and number of guesses accepted: {heading}", alt, panels),
    ]


def _count(name: str, cell: Cell) -> str:
    return f"{sum(cell.stats.acceptance_histogram)} ({name})"


def _line(cell: Cell, function: Callable[[Sequence[int]], list[Estimate]], first: int) -> dict[int, Estimate]:
    """Return the values of a cell by the number of guesses, up to the last one that any window accepted."""
    histogram = list(cell.stats.acceptance_histogram)
    if isinstance(cell.stats.period, str):  # the longest windows that may be chosen need not occur
        while len(histogram) > 2 and not histogram[-1]:
            histogram.pop()
    return dict(enumerate(function(histogram), start=first))


def _curves(series: Sequence[dict[int, Estimate]], named: Sequence[str]) -> list[Curve]:
    return [
        Curve(name, [Point(i, value) for i, value in line.items()], colour)
        for colour, (name, line) in enumerate(zip(named, series, strict=True))
    ]
