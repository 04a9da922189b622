"""Where a trace is written: never over a file that is something else."""

import os
from pathlib import Path

from sirius.errors import FileError
from sirius.trace.collect import KIND
from sirius.trace.page import GENERATOR

HEAD = 400  # bytes in which a trace says that it is one
MARKS = f'<meta name="generator" content="{GENERATOR}', f'{{"kind": "{KIND}"'


def check_target(path: Path, force: bool = False) -> None:
    """Raise FileError where a trace cannot be written to a file, or would overwrite one that is no trace.

    force  let it overwrite any file
    """
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a folder; name a file in it")
    folder = path.parent
    if not folder.is_dir():
        raise FileError(f"cannot write {path}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise FileError(f"cannot write {path}: permission denied; choose another folder")
    if path.exists() and not force and not _is_trace(path):
        raise FileError(f"{path} is there and no trace of sirius; choose another file, or give --force to overwrite it")


def write(path: Path, text: str) -> None:
    """Write a trace to a file; raise FileError where that fails."""
    try:
        path.write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def _is_trace(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            head = file.read(HEAD).decode("utf-8", "replace")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    return any(mark in head for mark in MARKS)
