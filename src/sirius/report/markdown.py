"""A report as Markdown: headings, texts and tables. Figures are left out, as each has a table with its numbers."""

from collections.abc import Iterator, Sequence

from sirius.report.document import MISSING, Block, Facts, Report, Table

SPECIAL = "\\`*_[]<>|#~"


def markdown(report: Report) -> str:
    """Return a report as Markdown with the tables of GitHub."""
    lines = [f"# {escape(report.title)}", "", *(f"{escape(text)}\n" for text in report.lead)]
    for chapter in report.chapters:
        lines += [f"## {escape(chapter.title)}", ""]
        for part in chapter.parts:
            lines += [f"### {escape(part.title)}", ""]
            for block in part.blocks:
                lines += _block(block)
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Return a text such that Markdown shows it as it is, in one line."""
    one_line = " ".join(text.split())
    return "".join("\\" + sign if sign in SPECIAL else sign for sign in one_line)


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, str):
        yield from (escape(block), "")
    elif isinstance(block, Facts):
        yield from _facts(block)
    elif isinstance(block, Table):
        yield from _table(block)


def _facts(facts: Facts) -> Iterator[str]:
    for name, values in facts.rows:
        shown = [_code(value) if name in facts.code else escape(value) for value in values]
        yield f"- {escape(name)}: {', '.join(shown)}"
    yield ""


def _code(text: str) -> str:
    """Return a text as code, between more backticks than it has in a row."""
    one_line = " ".join(text.split())
    fence = "`"
    while fence in one_line:
        fence += "`"
    return f"{fence} {one_line} {fence}" if "`" in one_line else f"`{one_line}`"


def _table(table: Table) -> Iterator[str]:
    yield from (f"**{escape(table.caption)}**", "")
    yield _row([escape(f"{each.group}: {each.name}" if each.group else each.name) for each in table.columns])
    yield _row(["---" if each.text else "---:" for each in table.columns])
    for section in table.sections:
        if section.heading:
            yield _row([f"**{escape(section.heading)}**", *[""] * (len(table.columns) - 1)])
        for row in section.rows:
            yield _row([cell if cell == MISSING else escape(cell) for cell in row])
    yield ""
    for note in table.notes:
        yield from (escape(note), "")


def _row(entries: Sequence[str]) -> str:
    return f"| {' | '.join(entries)} |"
