"""The tables of a model: what was run, sparsity alone on both kinds of tasks, and sparsity with correction."""

from collections.abc import Iterable, Sequence

from sirius.report import labels, published
from sirius.report.cells import FACTS, Cell, Variant
from sirius.report.compare import ModelCells, frozen
from sirius.report.document import MISSING, Block, Column, Facts, Part, Rows, Table

MEASURES = (
    Column("score"),
    Column("difference to full"),
    Column("AAL / K"),
    Column("acceptance rate"),
    Column("density"),
    Column("effective density"),
    Column("by formula"),
    Column("bytes per token"),
    Column("text", text=True),
)
PAPER = f"Published figures ({published.SOURCE}"
SWEPT = (
    "Of settings that were swept, the ones in which most sweeps cross are shown here, with every width of the tree. "
    "The others are in the tables of the options below."
)
LOSSY = "Sparse models without correction are lossy."
OTHERS = "The models differ from ours, so the shape is to be compared and not the values."


def measured(cells: ModelCells, cell: Cell) -> list[str]:
    """Return the figures of a cell under `MEASURES`."""
    stats = cell.stats
    drafted = stats.drafted > 0
    return [
        labels.score(cell.score),
        labels.gain(cells.difference(cell)),
        labels.advance(cell),
        labels.number(stats.acceptance_rate),
        labels.number(stats.density),
        labels.number(stats.effective_density),
        labels.number(stats.formula(stats.aal) if drafted else None),
        labels.amount(stats.bytes_per_token),
        labels.promise(cell),
    ]


def what_was_run(cells: ModelCells) -> Part:
    """Return the model, the machine, versions and commands, and the number of items of each task."""
    model = cells.model
    parameters = model.get("parameters")
    rows = [
        ("model", [str(model.get("model") or model.get("name") or MISSING)]),
        ("revision", [str(model["revision"])] if model.get("revision") else []),
        ("dtype", [labels.dtype_name(model)]),
        ("parameters", [f"{parameters:,}" if isinstance(parameters, int) else MISSING]),
        *((name, _origins(cells, name)) for name in FACTS),
        ("commit of sirius", _origins(cells, "commit")),
        ("date", _origins(cells, "date")),
        ("command", _origins(cells, "command")),
    ]
    shown = [(name.replace("_", "-"), values) for name, values in rows if values]
    return Part("What was run", [Facts(shown, frozenset({"command"})), _items(cells)])


def _origins(cells: ModelCells, name: str) -> list[str]:
    return sorted({cell.origins[name] for cell in cells.cells if name in cell.origins})


def _items(cells: ModelCells) -> Table:
    names, rows = labels.variant_labels(cells.variants), []
    for variant in cells.variants:
        chances = {cell.chance for cell in cells.of(variant)}
        rows.append(
            [
                names[variant],
                cells.kinds[variant] or MISSING,
                variant.metric,
                str(len(variant.items)),
                MISSING if variant.shots is None else str(variant.shots),
                "chat template" if variant.chat else "plain text",
                labels.number(next(iter(chances))),
                str(len(cells.of(variant))),
            ]
        )
    columns = [
        Column("task", text=True),
        Column("kind", text=True),
        Column("metric of the scores", text=True),
        Column("items per setting"),
        Column("worked examples"),
        Column("prompts", text=True),
        Column("chance level"),
        Column("settings"),
    ]
    return Table("The tasks, and how they were asked", columns, [Rows(rows)])


# --- understanding against reasoning


def understanding_against_reasoning(cells: ModelCells) -> Part | None:
    """Return the table of sparse models alone on both kinds of tasks; None where no setting has results of both."""
    settings: dict[str, list[Cell]] = {}
    for cell in cells.cells:
        if not cell.full and not cell.corrected:
            settings.setdefault(frozen(cell.setting), []).append(cell)
    both = {"understanding", "reasoning"}
    rows = [group for group in settings.values() if both <= {cell.kind for cell in group}]
    if not rows:
        return None
    tasks = [each for each in cells.variants if any(cell.variant == each for group in rows for cell in group)]
    blocks: list[Block] = [_first_table(cells, rows, tasks)]
    if (paper := _published_first({each.task for each in tasks})) is not None:
        blocks.append(paper)
    return Part("Understanding against reasoning", blocks)


def _first_table(cells: ModelCells, groups: Sequence[Sequence[Cell]], tasks: Sequence[Variant]) -> Table:
    names = labels.variant_labels(cells.variants)
    full = {task: cells.full(task) for task in tasks}
    seldom = labels.differing([group[0] for group in groups])
    chances = [next(iter(cells.of(task))).chance for task in tasks]
    rows = [
        ["chance level", *(labels.number(chance) for chance in chances)],
        [labels.FULL, *(labels.score(cell.score if (cell := full[task]) else None) for task in tasks)],
    ]
    for group in groups:
        own = {cell.variant: cell for cell in group}
        name = ", ".join(labels.pieces(group[0].setting, seldom=seldom))
        rows.append([name, *(labels.score(own[task].score if task in own else None) for task in tasks)])
        gains = (labels.gain(cells.difference(own[task]) if task in own else None) for task in tasks)
        rows.append([f"{name}: difference to full", *gains])
    columns = [Column("setting", text=True)]
    columns += [Column(names[task], group=cells.kinds[task] or "other") for task in tasks]
    return Table("The sparse models without correction: scores of each task", columns, [Rows(rows)], [LOSSY])


def _published_first(tasks: Iterable[str]) -> Table | None:
    known = [task for task in published.METRICS if task in set(tasks)]
    if not known:
        return None
    sections = []
    for model, scores in published.TABLE_1.items():
        lines = zip(*(scores[task] for task in known), strict=True)
        names = ("full", "coarse 0.5, alone", "fine 0.5, alone")
        rows = [[name, *(f"{value:g}" for value in line)] for name, line in zip(names, lines, strict=True)]
        sections.append(Rows(rows, model))
    columns = [Column("setting", text=True), *(Column(f"{task} ({published.METRICS[task]})") for task in known)]
    return Table(f"{PAPER}, Table 1)", columns, sections, [OTHERS])


# --- with correction


def with_correction(cells: ModelCells) -> Part | None:
    """Return a table for each sparsity method: full, sparse alone and corrected; None without sparse results."""
    methods = dict.fromkeys(cell.setting["sparsity"] for cell in cells.cells if not cell.full)
    blocks: list[Block] = []
    for method in methods:
        blocks.append(_second_table(cells, method))
        if (paper := _published_second(cells, method)) is not None:
            blocks.append(paper)
    return Part("Sparsity and correction", blocks) if blocks else None


def shown_in_second(cells: ModelCells, variant: Variant, method: str) -> list[Cell]:
    """Return the cells of a task in the table of a sparsity method: sparse alone, then corrected."""
    corrected = cells.main(variant, method)
    alone = cells.of(variant, lambda cell: not cell.full and not cell.corrected and cell.setting["sparsity"] == method)
    beside = [id(each) for cell in corrected if (each := cells.alone(cell)) is not None]
    return [*(cell for cell in alone if not corrected or id(cell) in beside), *corrected]


def _second_table(cells: ModelCells, method: str) -> Table:
    names = labels.variant_labels(cells.variants)
    sections, notes = [], []
    for variant in cells.variants:
        if not (shown := shown_in_second(cells, variant, method)):
            continue
        rows, seldom = [], labels.differing(shown)
        for cell in filter(None, [cells.full(variant), *shown]):
            name = ", ".join(labels.pieces(cell.setting, seldom=seldom))
            if cell.choice is not None:
                notes.append(_how_chosen(cells, cell, names[variant]))
            rows.append([f"{name} (chosen)" if cell.choice is not None else name, *measured(cells, cell)])
        sections.append(Rows(rows, names[variant]))
    return Table(
        f"{labels.METHODS.get(method, method)}: the full model, the draft model alone, and the draft model corrected",
        [Column("setting", text=True), *MEASURES],
        sections,
        [*notes, SWEPT] if _some_hidden(cells, method) else notes,
    )


def _some_hidden(cells: ModelCells, method: str) -> bool:
    shown = sum(len(cells.main(variant, method)) for variant in cells.variants)
    corrected = [cell for cell in cells.cells if cell.corrected and cell.setting["sparsity"] == method]
    return shown < sum(not cell.ablated for cell in corrected)


def _how_chosen(cells: ModelCells, cell: Cell, task: str) -> str:
    options = cells.options(cell)
    chosen = ", ".join(labels.pieces(cell.setting))
    if not options:
        return f"{task}: {chosen} was chosen ({cell.choice}); the validation results are not in the folders given."
    named, _ = labels.told_apart([labels.pieces(each.setting) for each in options])
    return (
        f"{task}: {chosen} was chosen as the best of {'; '.join(named)} on {len(options[0].scores)} validation items, "
        "which are not tested."
    )


def _published_second(cells: ModelCells, method: str) -> Table | None:
    names, sections = labels.variant_labels(cells.variants), []
    for variant in cells.variants:
        lines = published.TABLE_2.get((variant.task, method))
        ours = [cell for cell in shown_in_second(cells, variant, method) if cell.corrected]
        if lines is None or not ours:
            continue
        rows = [_line_of_ours(cells, cell) for cell in ours]
        kept = f"{method} {published.KEEP.get(variant.task, 0.5)}"
        sections.append(Rows([*rows, *(_line_of_paper(line, kept) for line in lines)], names[variant]))
    if not sections:
        return None
    columns = [Column("model", text=True), Column("full"), Column(f"{method}, alone"), Column("corrected"), Column("w")]
    columns += [Column("AAL / K"), Column("effective density")]
    return Table(
        f"{method}: ours beside the published figures ({published.SOURCE}, Table 2)", columns, sections, [OTHERS]
    )


def _line_of_ours(cells: ModelCells, cell: Cell) -> list[str]:
    """Return our figures as the paper counts them: its code for trees leaves out the window that a text's end cuts."""
    full, alone = cells.full(cell.variant), cells.alone(cell)
    aal = cell.stats.aal if cell.setting.get("tree_width", 1) == 1 else cell.stats.aal_complete
    return [
        f"ours: {labels.model_name(cells.model)}, {labels.pieces(cell.setting)[0]}",
        labels.score(None if full is None else full.score),
        labels.score(None if alone is None else alone.score),
        labels.score(cell.score),
        str(cell.setting.get("tree_width", MISSING)),
        MISSING if aal is None else f"{aal:.2f} / {cell.stats.period}",
        labels.number(cell.stats.formula(aal)),
    ]


def _line_of_paper(line: published.Published, kept: str) -> list[str]:
    scores = (f"{each:g}" for each in (line.full, line.sparse, line.corrected))
    advance = f"{line.aal:.2f} / {line.period}"
    return [f"{line.model}, {kept}", *scores, str(line.width), advance, f"{line.effective_density:.3f}"]
