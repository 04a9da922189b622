"""Append rows to a record, with the facts they depend on: `python runs/record.py FILE COMMAND THREADS < rows.json`."""

import json
import sys
from pathlib import Path

from sirius.benchmark.facts import facts


def append(path: Path, known: dict[str, object], rows: list[dict[str, object]], before: str = "") -> str:
    """Add a line to the record at `path`, and return it: facts taken when the measurement began, and what it gave.

    before  an earlier line of the same measurement, in whose place this one is written
    """
    line = json.dumps({**known, "rows": rows}) + "\n"
    if before:
        others = [each for each in path.read_text().splitlines(keepends=True) if each != before]
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join([*others, line]))
        beside.replace(path)
    else:
        with path.open("a") as record:
            record.write(line)
    return line


if __name__ == "__main__":
    known = facts(sys.argv[2], int(sys.argv[3]))
    append(Path(sys.argv[1]), known, json.load(sys.stdin))
