"""Append rows to a record, with the facts they depend on: `python runs/record.py FILE COMMAND THREADS < rows.json`."""

import json
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch


def facts(command: str, threads: int) -> dict[str, object]:
    """Return machine, versions and commit of a measurement made with `command` on so many threads."""
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    return {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "machine": f"{len(cpus)} x {cpus[0]}" if cpus else platform.processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "sirius": version("sirius-llm"),
        "command": command,
    }


def append(path: Path, known: dict[str, object], rows: list[dict[str, object]]) -> None:
    """Add a line to the record at `path`: facts taken when the measurement began, and what it gave."""
    with path.open("a") as record:
        record.write(json.dumps({**known, "rows": rows}) + "\n")


if __name__ == "__main__":
    known = facts(sys.argv[2], int(sys.argv[3]))
    append(Path(sys.argv[1]), known, json.load(sys.stdin))
