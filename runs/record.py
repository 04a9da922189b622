"""Append rows to a record, with the facts they depend on: `python runs/record.py FILE COMMAND THREADS < rows.json`."""

import json
import sys
from pathlib import Path

from sirius.benchmark.facts import facts


def append(path: Path, known: dict[str, object], rows: list[dict[str, object]]) -> None:
    """Add a line to the record at `path`: facts taken when the measurement began, and what it gave."""
    with path.open("a") as record:
        record.write(json.dumps({**known, "rows": rows}) + "\n")


if __name__ == "__main__":
    known = facts(sys.argv[2], int(sys.argv[3]))
    append(Path(sys.argv[1]), known, json.load(sys.stdin))
