"""What a report consists of, whatever it is written as: texts, tables and figures under headings."""

from collections.abc import Sequence
from dataclasses import dataclass

from sirius.report.estimate import Estimate

MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    text   whether it holds words, which stand at the left; figures stand at the right
    group  a heading over neighbouring columns
    """

    name: str
    text: bool = False
    group: str | None = None


@dataclass(frozen=True)
class Rows:
    """Rows of a table under a heading of their own, if there is one; the first entry of a row names it."""

    rows: Sequence[Sequence[str]]
    heading: str | None = None


@dataclass(frozen=True)
class Table:
    """A table with its caption above and its notes below."""

    caption: str
    columns: Sequence[Column]
    sections: Sequence[Rows]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Point:
    """A point of a curve; x is a number, or the place of a tick."""

    x: float
    y: Estimate


@dataclass(frozen=True)
class Curve:
    """Points that are joined; curves of one `colour` belong together."""

    label: str
    points: Sequence[Point]
    colour: int


@dataclass(frozen=True)
class Level:
    """A value that does not change along the axis; `colour` None is that of the text."""

    label: str
    value: Estimate
    colour: int | None = None


@dataclass(frozen=True)
class Panel:
    """A plot of curves.

    ticks  names of the places 0, 1, ... on an axis of values at even distances, None: the axis is of numbers
    share  whether y is a share, so that the axis ends at 0 and 1
    steps  whether the curves are histograms
    """

    x: str
    y: str
    curves: Sequence[Curve]
    levels: Sequence[Level] = ()
    ticks: Sequence[str] | None = None
    title: str = ""
    share: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Bar:
    """A horizontal bar; `colour` None is that of the text."""

    label: str
    value: Estimate
    colour: int | None = None


@dataclass(frozen=True)
class Bars:
    """A plot of bars, the first one on top."""

    x: str
    bars: Sequence[Bar]
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """Plots side by side; `alt` says to someone who cannot see them what they show."""

    caption: str
    alt: str
    panels: Sequence[Panel | Bars]


@dataclass(frozen=True)
class Facts:
    """Names with their values; `code` names those that are commands."""

    rows: Sequence[tuple[str, Sequence[str]]]
    code: frozenset[str] = frozenset()


Block = str | Table | Figure | Facts  # a text is a paragraph


@dataclass(frozen=True)
class Part:
    """Blocks under a heading."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Chapter:
    """Parts under a heading."""

    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    lead: Sequence[str]
    chapters: Sequence[Chapter]
