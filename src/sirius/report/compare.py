"""Which cells stand side by side: those of one task asked in one way, and those that differ in one option only."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from sirius.report.cells import TEST, Cell, Variant
from sirius.report.estimate import Estimate, paired

KINDS = ("understanding", "reasoning", None)  # in the order of the tables
SPARSE = ("sparsity", "keep", "sparsity_threshold", "per_branch", "shared_set", "draft_bits")  # what a draft reads
APART = ("sparsity", "correct", "ablate")  # options with tables of their own
ORDER = ("threshold", "period", "tree_width", "keep", "sparsity_threshold")  # of the sweeps; others come after
Entry = TypeVar("Entry")
ORACLE = {"period": 2, "accept": "threshold", "ablate": ["interleave"]}


@dataclass(frozen=True)
class Line:
    """Cells of one task that differ in one option only, in the order of its values."""

    name: str
    cells: tuple[Cell, ...]

    @property
    def oracle(self) -> bool:
        """Whether its windows have one guess and no token of the full model between them: Sirius' oracle study."""
        setting = self.cells[0].setting
        return self.name == "threshold" and all(setting.get(name) == value for name, value in ORACLE.items())

    @property
    def values(self) -> list[Any]:
        """The option's value in each cell."""
        return [cell.setting[self.name] for cell in self.cells]


class ModelCells:
    """The cells of one model."""

    def __init__(self, model: Mapping[str, Any], cells: Iterable[Cell]) -> None:
        """Take all cells of the model; of two with one setting and the same items the later one stays."""
        self.model = model
        cells = list(cells)
        self.validation = _each_once(cell for cell in cells if cell.split != TEST)
        self.cells = _each_once(cell for cell in cells if cell.split == TEST)
        self.kinds = {cell.variant: cell.kind for cell in self.cells}
        self.by_variant: dict[Variant, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            self.by_variant[cell.variant].append(cell)
        self.variants = list(self.by_variant)

    def of(self, variant: Variant, wanted: Callable[[Cell], bool] = lambda cell: True) -> list[Cell]:
        """Return the cells of a variant that are wanted."""
        return [cell for cell in self.by_variant.get(variant, ()) if wanted(cell)]

    def full(self, variant: Variant) -> Cell | None:
        """Return the full model's cell of a variant."""
        return next(iter(self.of(variant, lambda cell: cell.full)), None)

    def alone(self, cell: Cell) -> Cell | None:
        """Return the cell in which the same sparse model decoded alone."""
        return next(
            (
                each
                for each in self.of(cell.variant, lambda each: not each.full and not each.corrected)
                if sparse_part(each) == sparse_part(cell)
            ),
            None,
        )

    def difference(self, cell: Cell) -> Estimate | None:
        """Return the paired difference of a cell to the full model's; None without one, and of the full model."""
        full = self.full(cell.variant)
        return None if full is None or cell.full else paired(cell.scores, full.scores)

    @cached_property
    def lines(self) -> list[Line]:
        """All groups of at least two cells that differ in one option only."""
        names = {name for cell in self.cells for name in cell.setting} - set(APART)
        ordered = sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
        return [line for name in ordered for line in vary(self.cells, name)]

    def main(self, variant: Variant, method: str) -> list[Cell]:
        """Return the corrected cells of a sparsity method that stand for it, with whatever width.

        Those are the chosen ones, and the ones in which most sweeps cross.
        """
        own = self.of(variant, lambda cell: cell.corrected and not cell.ablated and cell.setting["sparsity"] == method)
        most = max((self._crossing[id(cell)] for cell in own), default=0)
        centre = [frozen(cell.setting, "tree_width") for cell in own if self._crossing[id(cell)] == most]
        return [cell for cell in own if cell.choice is not None or frozen(cell.setting, "tree_width") in centre]

    @cached_property
    def _crossing(self) -> Counter[int]:
        """The number of sweeps that each cell is in, by the cell's id."""
        return Counter(id(cell) for line in self.lines for cell in line.cells)

    def components(self) -> list[list[Cell]]:
        """Return groups of cells that differ in the parts left out and the tree's width only."""
        groups: dict[Any, list[Cell]] = defaultdict(list)
        for cell in self.cells:
            if cell.corrected:
                groups[cell.variant, frozen(cell.setting, "ablate", "tree_width")].append(cell)
        several = [group for group in groups.values() if len({cell.ablated for cell in group}) > 1]
        return [
            sorted(group, key=lambda cell: (cell.ablated, _rank(cell.setting.get("tree_width")))) for group in several
        ]

    def options(self, cell: Cell) -> list[Cell]:
        """Return the cells on validation items among which a setting was chosen."""
        return [
            each
            for each in self.validation
            if (each.task, each.shots, each.chat, each.choice) == (cell.task, cell.shots, cell.chat, cell.choice)
        ]


def by_model(cells: Sequence[Cell]) -> list[ModelCells]:
    """Return the cells of each model that has been tested."""
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[json.dumps(cell.model, sort_keys=True)].append(cell)
    found = [ModelCells(group[0].model, group) for group in groups.values()]
    return [each for each in found if each.cells]


def vary(cells: Iterable[Cell], name: str) -> list[Line]:
    """Return the groups of cells of a task that differ in the option `name` only and have several values of it."""
    groups: dict[Any, list[Cell]] = defaultdict(list)
    for cell in cells:
        if name in cell.setting:
            groups[cell.variant, frozen(cell.setting, name)].append(cell)
    return [
        Line(name, tuple(sorted(group, key=lambda cell: _rank(cell.setting[name]))))
        for group in groups.values()
        if len(group) > 1
    ]


def frozen(setting: Mapping[str, Any], *but: str) -> str:
    """Return a setting without some of its options, as a text that tells settings apart."""
    return json.dumps({name: value for name, value in setting.items() if name not in but}, sort_keys=True)


def sparse_part(cell: Cell) -> list[Any]:
    """Return the values of the options that say what a draft reads."""
    return [cell.setting.get(name) for name in SPARSE]


def chunks(entries: Sequence[Entry], most: int) -> list[Sequence[Entry]]:
    """Return the entries in groups of `most`, the last one maybe smaller."""
    return [entries[start : start + most] for start in range(0, len(entries), most)]


def in_order(values: Iterable[Any]) -> list[Any]:
    """Return each value once: numbers by size, then the others."""
    return sorted({json.dumps(value): value for value in values}.values(), key=_rank)


def _rank(value: Any) -> tuple[int, float, str]:
    if isinstance(value, int | float):
        return 0, float(value), ""
    return 1, 0.0, str(value)


def _each_once(cells: Iterable[Cell]) -> list[Cell]:
    """Keep the later one of two cells of one setting and the same items; it counts as chosen if either was."""
    kept: dict[Any, Cell] = {}
    for cell in sorted(cells, key=lambda cell: (cell.origins.get("date", ""), cell.origins.get("time", ""))):
        key = cell.variant, frozen(cell.setting), None if cell.split == TEST else cell.choice
        before = kept.pop(key, None)
        chosen = cell.choice or (before.choice if before else None)
        kept[key] = replace(cell, choice=chosen)
    return sorted(kept.values(), key=_place)


def _place(cell: Cell) -> tuple[Any, ...]:
    """Order the tasks by their kind, and the settings of each: full, then each sparse one alone, then corrected."""
    kind = KINDS.index(cell.kind) if cell.kind in KINDS else len(KINDS)
    task = (kind, cell.task, len(cell.scores), sorted(cell.scores), cell.chat, cell.shots or 0, cell.metric)
    values = [_rank(cell.setting.get(name)) for name in ("keep", "period", "threshold", "tree_width")]
    return (*task, not cell.full, cell.setting["sparsity"], cell.corrected, *values, frozen(cell.setting))
