"""A report as one page of HTML that needs nothing besides itself: no script, no font and no file from elsewhere."""

from collections.abc import Iterator
from html import escape
from itertools import count, groupby

from sirius.report import plots
from sirius.report.document import Block, Chapter, Column, Facts, Figure, Report, Rows, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --faint: #57606a; --line: #d0d7de;
  --band: #f3f5f8; --link: #0b5cad; SERIES_LIGHT }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #14171c; --faint: #a3acb8; --line: #3a414b;
  --band: #1d222a; --link: #7cbcff; SERIES_DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif }
a { color: var(--link) }
p, li, figcaption, .notes { max-width: 46rem }
h1, h2, h3 { line-height: 1.25 }
h2 { margin-top: 3rem; padding-top: .5rem; border-top: 2px solid var(--line) }
h3 { margin-top: 2.25rem }
nav ul { padding-left: 1.25rem }
code { font: .875em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; overflow-wrap: anywhere }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .2rem 1.25rem }
dt { color: var(--faint) }
dd { margin: 0; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin: 1.25rem 0 .5rem }
.wide:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
caption { text-align: left; font-weight: 600; padding-bottom: .4rem }
th, td { padding: .3rem .55rem; text-align: right; vertical-align: bottom; white-space: nowrap }
thead th { border-bottom: 1px solid var(--ink); white-space: normal; font-weight: 600; max-width: 11rem }
tbody tr { border-bottom: 1px solid var(--line) }
tbody th { font-weight: 400 }
th.text, td.text { text-align: left }
th[scope=rowgroup] { background: var(--band); font-weight: 600; text-align: left }
th[scope=colgroup] { text-align: center; border-bottom: 1px solid var(--line) }
.notes { color: var(--faint); font-size: .9rem; margin: .25rem 0 }
figure { margin: 1rem 0 1.5rem }
figure svg { max-width: 100%; height: auto; color: var(--ink) }
figure svg * { stroke-linejoin: round; stroke-linecap: butt }
figure svg text { font-family: "DejaVu Sans", Verdana, sans-serif !important }
figcaption { color: var(--faint); font-size: .9rem }
@media (max-width: 40rem) { dl { display: block } dd { margin-bottom: .5rem } }
@media print { :root { color-scheme: light; --ink: #000; --paper: #fff; --faint: #444; --line: #bbb; --band: #eee;
  --link: #000; SERIES_LIGHT }
  @page { size: A4 landscape; margin: 12mm }
  html { font-size: 10pt } body { max-width: none; padding: 0 } tbody th { white-space: normal }
  nav { display: none } .wide { overflow: visible }
  table { font-size: 7.5pt } th, td { padding: .15rem .3rem } h2, h3, caption { break-after: avoid }
  figure, tr { break-inside: avoid } thead { display: table-header-group } }
"""


def page(report: Report) -> str:
    """Return a report as HTML; raises ConfigError where there is no matplotlib for its plots."""
    plots.check_plots()
    numbers = count(1)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(report.title)}</title>",
        f"<style>{_style()}</style>",
        "</head>",
        "<body>",
        f"<header><h1>{escape(report.title)}</h1>",
        *(f"<p>{escape(text)}</p>" for text in report.lead),
        "</header>",
        *_contents(report),
        "<main>",
    ]
    for place, chapter in enumerate(report.chapters, start=1):
        lines += _chapter(chapter, place, numbers)
    return "\n".join([*lines, "</main>", "</body>", "</html>"]) + "\n"


def _style() -> str:
    names = {"SERIES_LIGHT": plots.COLOURS, "SERIES_DARK": plots.DARK}
    style = STYLE
    for name, colours in names.items():
        style = style.replace(name, " ".join(f"--series-{i}: {colour};" for i, colour in enumerate(colours)))
    return style


def _contents(report: Report) -> Iterator[str]:
    yield '<nav aria-label="Contents"><ul>'
    for place, chapter in enumerate(report.chapters, start=1):
        yield f'<li><a href="#c{place}">{escape(chapter.title)}</a><ul>'
        for number, part in enumerate(chapter.parts, start=1):
            yield f'<li><a href="#c{place}-{number}">{escape(part.title)}</a></li>'
        yield "</ul></li>"
    yield "</ul></nav>"


def _chapter(chapter: Chapter, place: int, numbers: Iterator[int]) -> Iterator[str]:
    yield f'<section aria-labelledby="c{place}"><h2 id="c{place}">{escape(chapter.title)}</h2>'
    for number, part in enumerate(chapter.parts, start=1):
        yield f'<h3 id="c{place}-{number}">{escape(part.title)}</h3>'
        for block in part.blocks:
            yield from _block(block, f"b{next(numbers)}")
    yield "</section>"


def _block(block: Block, name: str) -> Iterator[str]:
    if isinstance(block, str):
        yield f"<p>{escape(block)}</p>"
    elif isinstance(block, Facts):
        yield from _facts(block)
    elif isinstance(block, Table):
        yield from _table(block, name)
    else:
        yield from _figure(block, name)


def _facts(facts: Facts) -> Iterator[str]:
    yield "<dl>"
    for name, values in facts.rows:
        yield f"<dt>{escape(name)}</dt>"
        for value in values:
            yield f"<dd><code>{escape(value)}</code></dd>" if name in facts.code else f"<dd>{escape(value)}</dd>"
    yield "</dl>"


def _figure(figure: Figure, name: str) -> Iterator[str]:
    yield f'<figure><div role="img" aria-label="{escape(figure.alt)}">'
    yield plots.svg(figure, name)
    yield f"</div><figcaption>{escape(figure.caption)}</figcaption></figure>"


def _table(table: Table, name: str) -> Iterator[str]:
    yield f'<div class="wide" role="region" tabindex="0" aria-labelledby="{name}"><table>'
    yield f'<caption id="{name}">{escape(table.caption)}</caption>'
    yield from _head(table)
    for section in table.sections:
        yield from _rows(section, table)
    yield "</table></div>"
    yield from (f'<p class="notes">{escape(note)}</p>' for note in table.notes)


def _head(table: Table) -> Iterator[str]:
    yield "<thead>"
    if any(column.group for column in table.columns):
        yield "<tr>"
        for group, columns in groupby(table.columns, key=lambda column: column.group):
            width = len(list(columns))
            yield (
                f'<th scope="colgroup" colspan="{width}">{escape(group)}</th>'
                if group
                else f'<td colspan="{width}"></td>'
            )
        yield "</tr>"
    yield "<tr>"
    yield from (f'<th scope="col"{_class(column)}>{escape(column.name)}</th>' for column in table.columns)
    yield "</tr></thead>"


def _rows(section: Rows, table: Table) -> Iterator[str]:
    yield "<tbody>"
    if section.heading:
        yield f'<tr><th scope="rowgroup" colspan="{len(table.columns)}">{escape(section.heading)}</th></tr>'
    for row in section.rows:
        cells = [f'<th scope="row"{_class(table.columns[0])}>{escape(row[0])}</th>']
        for column, entry in zip(table.columns[1:], row[1:], strict=True):
            cells.append(f"<td{_class(column)}>{escape(entry)}</td>")
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody>"


def _class(column: Column) -> str:
    return ' class="text"' if column.text else ""
