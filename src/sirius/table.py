"""A table of figures that a narrow terminal shows too."""

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

CUT = "\N{HORIZONTAL ELLIPSIS}"  # how rich ends what it cuts off


class Figures(Table):
    """Rows under headings; where a terminal is too narrow for the columns, each row is a list of its figures."""

    def __init__(self, **options: Any) -> None:
        """Take the options of rich's tables."""
        super().__init__(**{"box": SIMPLE_HEAD, "title_justify": "left", "title_style": "bold", **options})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Show the columns, or the lists."""
        parts = list(super().__rich_console__(console, options))
        cut = any(CUT in part.text for part in parts if isinstance(part, Segment))
        yield from [Text("\n").join(self._lines())] if cut else parts

    def _lines(self) -> Iterator[Text]:
        if self.title:
            yield Text(str(self.title), str(self.title_style))
        headings = [str(column.header) for column in self.columns]
        for row in zip(*(column.cells for column in self.columns), strict=True):
            for index, (heading, figure) in enumerate(zip(headings, map(str, row), strict=True)):
                if figure:
                    yield Text(f"  {heading}: {figure}" if index else f"{heading} {figure}".strip())
