"""Finished samples in files, one line each: saved as they finish, found again by prompt, options and setting."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from threading import Event, Lock, Thread
from typing import Any

from sirius.benchmark.record import save
from sirius.errors import FileError

BEAT = 2.0  # seconds between two signs of life of a process
PATIENCE = 30.0  # seconds without a sign of life, after which another process counts as dead


def key_of(prompt: tuple[int, ...], options: Mapping[str, Any], setting: Mapping[str, Any]) -> str:
    """Return a fingerprint of a prompt's tokens, the options of its text and the setting that decodes it."""
    asked = [list(prompt), dict(options), dict(setting)]
    return sha256(json.dumps(asked, sort_keys=True, default=list).encode()).hexdigest()[:32]


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; raise FileError where that fails or files cannot be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise FileError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error


class Completions:
    """Finished samples by their keys: those of every process are read, and this one's are added to a file of its own.

    A last line that a killed process left unfinished is ignored. Where two processes saved the same sample, that of the
    lower rank is used.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Open or make a folder of samples; raise FileError where it cannot be written or holds something else."""
        self.folder, self.path = folder, folder / f"rank{rank}.jsonl"
        self.found: dict[str, dict[str, Any]] = {}
        self._read: dict[Path, int] = {}  # bytes of each file that are known
        self.sign, self._signing, self._rests = self.path.with_suffix(".alive"), Lock(), False
        with self._writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._cut_off_unfinished()
            self.path.touch()
        self.read()

    def read(self) -> None:
        """Take up what the processes of all ranks have finished since the last call."""
        for path in sorted(self.folder.glob("rank*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                new = file.read()
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = self._read.get(path, 0) + len(whole)
            for line in _lines(path, whole):
                self.found.setdefault(line["key"], line)

    def add(self, key: str, sample: Mapping[str, Any]) -> None:
        """Save a sample and see it to the disk; raise FileError where that fails."""
        line = {"key": key, **sample}
        with self._writing(self.path), self.path.open("ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.found.setdefault(key, json.loads(json.dumps(line)))

    def check_model(self, name: str, fingerprint: str) -> None:
        """Note a model's weights; raise FileError where samples of other weights have the same name.

        name         all that is known of the model before it is loaded
        fingerprint  of its weights
        """
        path = self.folder / "models.json"
        with self._writing(path):
            known = _known(path)
            if known.setdefault(name, fingerprint) != fingerprint:
                raise FileError(f"{self.folder} holds samples of other weights under {name}; choose another folder")
            save(path, known)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Show other processes for the length of the block that this one is at work, but while it rests."""
        over = Event()

        def beat() -> None:
            while not over.wait(BEAT):
                with suppress(FileError):  # a full disk may have room again
                    self._show()

        self._show()
        beating = Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join()
            self.sign.unlink(missing_ok=True)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Show other processes for the length of the block that they need not wait for this one."""
        with self._signing, self._writing(self.sign):
            self._rests = True
            self.sign.unlink(missing_ok=True)
        try:
            yield
        finally:
            self._rests = False
            self._show()

    def _show(self) -> None:
        with self._signing, self._writing(self.sign):
            if not self._rests:
                self.sign.touch()

    def others_alive(self) -> bool:
        """Tell whether another process is at work here, by the signs of life of the last `PATIENCE` seconds."""
        now = time.time()
        for path in self.folder.glob("rank*.alive"):
            with suppress(FileNotFoundError):  # it has just been removed
                if path != self.sign and now - path.stat().st_mtime < PATIENCE:
                    return True
        return False

    def _cut_off_unfinished(self) -> None:
        there = self.path.read_bytes() if self.path.exists() else b""
        whole = there.rfind(b"\n") + 1
        if whole < len(there):
            os.truncate(self.path, whole)

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except FileError:
            raise
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error


def _known(path: Path) -> dict[str, str]:
    """Return the models of a folder; raise FileError where their file is damaged."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise FileError(f"{path} is damaged ({error}); choose another folder, or delete the file") from error


def _lines(path: Path, text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.split(b"\n")[:-1]:
        try:
            found = json.loads(line)
            yield {**found, "key": found["key"]}
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{path} has a line that is no sample of sirius; choose another folder") from error
