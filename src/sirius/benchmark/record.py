"""Records: facts, the ceiling, what was asked for and the rows that came of it, as one line of JSON."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from socket import gethostname
from typing import Any

from sirius.errors import FileError

GROWING = ("date", "time", "command", "ceiling", "rows")  # may differ between a record's beginning and continuation


def to_line(record: Mapping[str, Any]) -> str:
    """Return a record as it is printed and saved."""
    return json.dumps(record) + "\n"


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a file, the last one where it holds several; raise FileError where it holds none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8").rstrip().rpartition("\n")[2])
    except (OSError, ValueError) as error:
        raise FileError(f"cannot read a record from {path}: {error}; choose another file, or delete it") from error
    if not isinstance(record, dict):
        raise FileError(f"{path} ends in something else than a record")
    return record


def begun(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the record that a file holds, or `record` where there is no file: what is to be gone on with.

    Raises FileError where the file's was measured otherwise: with other options, versions, code or another machine.
    """
    if not path.exists():
        return dict(record)
    there = read_record(path)
    differ = sorted(k for k in {*there, *record} - {*GROWING} if there.get(k) != record.get(k))
    if differ or "rows" not in there or "ceiling" not in there:
        what = ", ".join(differ) or "no rows"
        raise FileError(f"{path} holds another measurement ({what}); choose another --output, or delete it")
    return there


def save(path: Path, record: Mapping[str, Any]) -> None:
    """Put a record in the place of what a file holds, at once; raise FileError where that cannot be written."""
    unfinished = path.with_name(f"{path.name}.{gethostname()}.{os.getpid()}.unfinished")  # others may write it too
    try:
        unfinished.write_text(to_line(record), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise FileError(f"cannot write {path}: {error.strerror or error}") from error
