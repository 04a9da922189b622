"""Results that differ in one option only, as a table and a plot of each task: ablations and the oracle's curve."""

from collections import defaultdict
from collections.abc import Sequence

from sirius.report import labels, published
from sirius.report.cells import Cell, Variant
from sirius.report.compare import Line, ModelCells, chunks, in_order
from sirius.report.document import Bar, Bars, Block, Column, Curve, Figure, Level, Panel, Part, Point, Rows, Table
from sirius.report.estimate import Estimate
from sirius.report.tables import MEASURES, OTHERS, measured

MOST = 6  # curves of a figure
SCORE = "score"
BY_DENSITY = ("keep", "sparsity_threshold")  # options whose effect is the density


def ablations(cells: ModelCells) -> list[Part]:
    """Return a part for each option that was varied, with a table and a plot of each task."""
    names = dict.fromkeys(line.name for line in cells.lines)
    return [part for name in names if (part := _ablation(cells, name)) is not None]


def _ablation(cells: ModelCells, name: str) -> Part | None:
    blocks: list[Block] = []
    for variant, lines in _by_task([line for line in cells.lines if line.name == name and not line.oracle]).items():
        task = labels.variant_labels(cells.variants)[variant]
        for some in chunks(lines, MOST):
            blocks.append(_table(cells, some, f"{labels.option_name(name)}: {task}"))
            blocks.append(_density_figure(cells, some, task) if name in BY_DENSITY else _figure(cells, some, task))
    return Part(labels.option_name(name), blocks) if blocks else None


def _by_task(lines: Sequence[Line]) -> dict[Variant, list[Line]]:
    found: dict[Variant, list[Line]] = defaultdict(list)
    for line in lines:
        found[line.cells[0].variant].append(line)
    return found


def _settings(lines: Sequence[Line]) -> list[list[str]]:
    """Return what each line has besides the option that it varies, in pieces."""
    seldom = labels.differing([line.cells[0] for line in lines])
    return [labels.pieces(line.cells[0].setting, [line.name], seldom) for line in lines]


def _table(cells: ModelCells, lines: Sequence[Line], caption: str) -> Table:
    name = lines[0].name
    sections = [Rows(_references(cells, [line.cells[0] for line in lines], name))]
    for line, setting in zip(lines, _settings(lines), strict=True):
        rows = [[labels.value_shown(cell.setting[name]), *measured(cells, cell)] for cell in line.cells]
        sections.append(Rows(rows, ", ".join(setting)))
    first = Column(labels.SHORT.get(name, name.replace("_", " ")), text=True)
    return Table(caption, [first, *MEASURES], [each for each in sections if each.rows])


def _references(cells: ModelCells, firsts: Sequence[Cell], name: str = "") -> list[list[str]]:
    """Return rows of the full model, and of the sparse models alone unless they differ in the option themselves."""
    full = cells.full(firsts[0].variant)
    alone = [cells.alone(cell) for cell in firsts if cell.corrected and name not in BY_DENSITY]
    found = {id(cell): cell for cell in [full, *alone] if cell is not None}.values()
    return [[", ".join(labels.pieces(cell.setting)), *measured(cells, cell)] for cell in found]


def _figure(cells: ModelCells, lines: Sequence[Line], task: str) -> Figure:
    """Return the plot of an option whose values stand at even distances."""
    name, values = lines[0].name, in_order(value for line in lines for value in line.values)
    ticks = [labels.value_shown(value) for value in values]
    curves, advances, levels = [], [], _full_level(cells, lines[0].cells[0])
    named, common = labels.told_apart(_settings(lines))
    share = name == "period"
    for colour, (line, label) in enumerate(zip(lines, named, strict=True)):
        places = [values.index(value) for value in line.values]
        curves.append(Curve(label, _points(places, [cell.score for cell in line.cells]), colour))
        own = [cell.stats.advance_share if share else cell.stats.advance for cell in line.cells]
        if points := _points(places, own):
            advances.append(Curve(label, points, colour))
        if line.cells[0].corrected and (alone := cells.alone(line.cells[0])) is not None:
            levels.append(Level(", ".join(labels.pieces(alone.setting)), alone.score, colour))
    axis = labels.option_name(name)
    panels = [Panel(axis, SCORE, curves, _each_once(levels), ticks)]
    if advances:
        panels.append(
            Panel(axis, "AAL / K" if share else "AAL (tokens per window)", advances, ticks=ticks, share=share)
        )
    caption = f"{axis}, {task}" + (f" ({common})" if common else "")
    return Figure(caption, _alt(axis, task, named, len(panels) > 1), panels)


def _density_figure(cells: ModelCells, lines: Sequence[Line], task: str) -> Figure:
    """Return the plot of the score against the share of the weights that is read."""
    named, common = labels.told_apart(_settings(lines))
    panels = []
    for axis, field in (("density of the draft", "density"), ("effective density, per token", "effective_density")):
        curves = []
        for colour, (line, label) in enumerate(zip(lines, named, strict=True)):
            places = [getattr(cell.stats, field) for cell in line.cells]
            curves.append(Curve(label, _points(places, [cell.score for cell in line.cells]), colour))
        panels.append(Panel(axis, SCORE, curves, _full_level(cells, lines[0].cells[0])))
    caption = f"Score against density, {task}" + (f" ({common})" if common else "")
    return Figure(caption, _alt("density", task, named, second=False), panels)


def _points(places: Sequence[float], values: Sequence[Estimate | None]) -> list[Point]:
    return [Point(x, y) for x, y in zip(places, values, strict=True) if y is not None]


def _full_level(cells: ModelCells, cell: Cell) -> list[Level]:
    full = cells.full(cell.variant)
    chance = [Level("chance", Estimate(cell.chance))] if cell.chance else []
    return [*([] if full is None else [Level(labels.FULL, full.score)]), *chance]


def _each_once(levels: Sequence[Level]) -> list[Level]:
    return list({level.label: level for level in reversed(levels)}.values())[::-1]


def _alt(axis: str, task: str, named: Sequence[str], second: bool) -> str:
    more = " A second plot shows the AAL along the same axis." if second else ""
    return f"Plot of the score of {task} against: {axis}. Curves: {'; '.join(named)}.{more} The table has the numbers."


# --- the parts of the correction


def components(cells: ModelCells) -> Part | None:
    """Return what each part of the correction is worth: tables and bars; None where no part was left out."""
    blocks: list[Block] = []
    for group in cells.components():
        task = labels.variant_labels(cells.variants)[group[0].variant]
        named, common = labels.told_apart([labels.pieces(each.setting) for each in group])
        named = [_component(cell, label) for cell, label in zip(group, named, strict=True)]
        rows = [[name, *measured(cells, cell)] for name, cell in zip(named, group, strict=True)]
        columns = [Column("setting", text=True), *MEASURES]
        sections = [each for each in (Rows(_references(cells, group)), Rows(rows, common)) if each.rows]
        method = group[0].setting["sparsity"]
        caption = f"Parts of the correction: {task}, {labels.METHODS.get(method, method)}"
        blocks.append(Table(caption, columns, sections))
        blocks.append(_component_bars(cells, group, named, f"{task} ({common})"))
    return Part("Parts of the correction", blocks) if blocks else None


def _component(cell: Cell, label: str) -> str:
    width = f"w {cell.setting.get('tree_width')}"
    whole = [] if cell.ablated else ["whole"]
    return ", ".join([*whole, *(f"no {part}" for part in cell.ablated), *([width] if width in label else [])])


def _component_bars(cells: ModelCells, group: Sequence[Cell], named: Sequence[str], task: str) -> Figure:
    full, alone = cells.full(group[0].variant), cells.alone(group[0])
    bars = [Bar(labels.FULL, full.score)] if full else []
    bars += [Bar(", ".join(labels.pieces(alone.setting)), alone.score, 1)] if alone else []
    bars += [Bar(name, cell.score, 2 if cell.ablated else 0) for name, cell in zip(named, group, strict=True)]
    advances = [
        Bar(name, aal, 2 if cell.ablated else 0)
        for name, cell in zip(named, group, strict=True)
        if (aal := cell.stats.advance) is not None
    ]
    panels = [Bars(SCORE, bars), *([Bars("AAL (tokens per window)", advances)] if advances else [])]
    alt = f"Bars of the score of {task}: {'; '.join(bar.label for bar in bars)}. The table has the numbers."
    return Figure(f"Parts of the correction, {task}", alt, panels)


# --- the oracle


def oracle(cells: ModelCells) -> Part | None:
    """Return the score against the share of tokens that the full model replaced; None where that was not studied."""
    blocks: list[Block] = []
    for variant, lines in _by_task([line for line in cells.lines if line.oracle]).items():
        task = labels.variant_labels(cells.variants)[variant]
        columns = [Column("threshold", text=True), Column("tokens replaced"), *MEASURES[:2]]
        sections, curves = [Rows(_oracle_references(cells, lines))], []
        named, _ = labels.told_apart(_settings(lines))
        for colour, (line, label) in enumerate(zip(lines, named, strict=True)):
            rows = [_oracle_row(cells, cell) for cell in line.cells]
            sections.append(Rows(rows, ", ".join(_settings(lines)[colour])))
            start = cells.alone(line.cells[0])
            points = [Point(_replaced(cell), cell.score) for cell in [*([start] if start else []), *line.cells]]
            curves.append(Curve(label, points, colour))
        axis = "tokens replaced (%)"
        ours = Panel(axis, SCORE, curves, _full_level(cells, lines[0].cells[0]), title="ours")
        alt = _alt("share of tokens replaced", task, named, second=False)
        caption = f"Tokens replaced and score: {task}, and {_PAPER_ORACLE}. {OTHERS}"
        blocks += [
            Table(f"How few tokens must be replaced: {task}", columns, [each for each in sections if each.rows]),
            Figure(caption, f"{alt} Beside it the published curves of GSM8K.", [ours, _published_oracle(axis)]),
        ]
    return Part("Oracle: how few tokens must be replaced", [_ORACLE, *blocks]) if blocks else None


_PAPER_ORACLE = f"the published curves of GSM8K, coarse, read off a plot ({published.SOURCE}, motivation)"
_ORACLE = (
    "Each window has one guess, whose keys and values are the full model's, and the full model adds no token of its "
    "own after a guess that passed. So it replaces only those tokens that fall below the threshold. The point of the "
    "sparse model alone replaces none. All of these settings are lossy."
)


def _replaced(cell: Cell) -> float:
    return 100 * cell.stats.corrections_per_token


def _oracle_row(cells: ModelCells, cell: Cell) -> list[str]:
    name = labels.value_shown(cell.setting["threshold"])
    return [name, f"{_replaced(cell):.2f}%", labels.score(cell.score), labels.gain(cells.difference(cell))]


def _oracle_references(cells: ModelCells, lines: Sequence[Line]) -> list[list[str]]:
    rows = []
    for row in _references(cells, [line.cells[0] for line in lines]):
        rows.append([row[0], labels.MISSING, row[1], row[2]])
    return rows


def _published_oracle(axis: str) -> Panel:
    curves = [
        Curve(model, [Point(x, Estimate(y)) for x, y in points], colour)
        for colour, (model, points) in enumerate(published.ORACLE.items(), start=3)
    ]
    return Panel(axis, SCORE, curves, title="published, GSM8K")
