"""Finished samples in a file, one line each: saved as they finish, found again by what was asked."""

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from sirius.errors import FileError


def key_of(prompt: tuple[int, ...], options: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """Return a fingerprint of a prompt's tokens, the options of its text and the setting that decodes it."""
    asked = [list(prompt), dict(options), dict(setting)]
    return sha256(json.dumps(asked, sort_keys=True, default=list).encode()).hexdigest()[:32]


class Completions:
    """Finished samples by their keys: those of every process are read, and this one's are added to a file of its own.

    A line that a killed process left unfinished is passed over.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Open or make a folder of samples; raise FileError where it cannot be written or holds something else."""
        self.folder, self.path = folder, folder / f"rank{rank}.jsonl"
        self.found: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._cut_off_unfinished()
            self.path.touch()
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.read()

    def read(self) -> None:
        """Take up what the processes of all ranks have finished so far."""
        for path in sorted(self.folder.glob("rank*.jsonl")):
            self.found |= {line["key"]: line for line in _lines(path)}

    def add(self, key: str, sample: Mapping[str, Any]) -> None:
        """Save a sample and see it to the disk; raise FileError where that fails."""
        line = {"key": key, **sample}
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.found[key] = json.loads(json.dumps(line))

    def _cut_off_unfinished(self) -> None:
        there = self.path.read_bytes() if self.path.exists() else b""
        whole = there.rfind(b"\n") + 1
        if whole < len(there):
            os.truncate(self.path, whole)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield dict(json.loads(line)) | {"key": json.loads(line)["key"]}
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{path} line {number} is no sample of sirius; choose another folder") from error
