"""`sirius report`: the results of sweeps as Markdown and as a page of HTML."""

from pathlib import Path
from typing import Annotated

import typer

from sirius.cli.terminal import out, remark
from sirius.errors import ConfigError, FileError

MARKDOWN, PAGE = (".md", ".markdown"), (".html", ".htm")


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="Folders that `sirius sweep` wrote, or JSONL files of their cells."),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Write a page of HTML with tables and plots to this file.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the tables as Markdown to this file.")] = None,
) -> None:
    """Show the results of sweeps, those of several folders together; without a file, as Markdown on the terminal."""
    from sirius.report.build import build
    from sirius.report.markdown import markdown as as_markdown

    _check(output, "--output", PAGE)
    _check(markdown, "--markdown", MARKDOWN)
    if output is not None:
        from sirius.report.plots import check_plots

        check_plots()
    found = build(folders)
    if output is not None:
        from sirius.report.page import page

        _write(output, page(found))
    if markdown is not None:
        _write(markdown, as_markdown(found))
    if output is None and markdown is None:
        out.print(as_markdown(found).rstrip("\n"), markup=False, highlight=False)


def _check(path: Path | None, option: str, endings: tuple[str, ...]) -> None:
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise ConfigError(f"{option} writes a file that ends in {' or '.join(endings)}; got {path}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{option}: there is no folder {path.absolute().parent}")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
    remark(f"written: {path}")
