"""Files of prompts in, files of completions out: line by line, saved as it goes, resumed where it stopped."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

from sirius.core import Request, SamplingConfig
from sirius.engine import Completion, Prompt, TextOptions, is_chat
from sirius.errors import ConfigError, FileError

Identity = str | int

OPENING = b'{"id": '  # how every line that `Output` writes begins
DETAILS = ("origins", "logprobs")
UNTOLD = ("setting",)  # of a completion, what its figures tell
SAMPLING = tuple(each.name for each in fields(SamplingConfig))
OPTIONS = ("max_new_tokens", "stop", *SAMPLING)  # what a line may say for itself


@dataclass(frozen=True)
class Job:
    """One line of an input file.

    line     its number from 1
    id       the number where it gives none
    options  those of `OPTIONS` that it gives, which go before the command's
    """

    line: int
    id: Identity
    prompt: Prompt
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """A fingerprint of prompt and options, so that a resumed file cannot give one prompt another's text."""
        asked = [self.prompt, self.options] if self.options else self.prompt
        return sha256(json.dumps(asked).encode()).hexdigest()

    def over(self, common: Mapping[str, Any]) -> TextOptions:
        """Return the line's options, in the place of the common ones."""
        own = {name: value for name, value in self.options.items() if name not in SAMPLING}
        sampled = {name: value for name, value in self.options.items() if name in SAMPLING}
        return cast("TextOptions", {**own, "sampling": replace(common["sampling"], **sampled)})


@dataclass(frozen=True)
class BadLine:
    """A line that is no job, and why."""

    line: int
    reason: str


def read_jobs(path: Path) -> Iterator[Job | BadLine]:
    """Read a JSONL file; a line has `prompt` (text or chat messages) or `prompt_ids`, and may have `id` and `OPTIONS`.

    Whatever else a line holds is the user's own.
    Blank lines are passed over, broken ones are yielded as `BadLine`. Raises FileError where it cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold the other line breaks
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path}: {_reason(error)}") from error
    first: dict[Identity, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        job = _parse(number, line)
        if isinstance(job, Job) and job.id in first:
            job = BadLine(number, f"id {job.id!r} is line {first[job.id]}'s (its number, if it gives no id)")
        elif isinstance(job, Job):
            first[job.id] = number
        yield job


def _parse(number: int, line: str) -> Job | BadLine:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return BadLine(number, "half of a surrogate pair (\\ud800 to \\udfff alone), which is no character")
    except json.JSONDecodeError as error:
        return BadLine(number, f"not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadLine(number, f"not JSON: {error}")
    if not isinstance(record, dict):
        return BadLine(number, f"not an object: {line.strip()[:40]}")
    given = [name for name in ("prompt", "prompt_ids") if name in record]
    if len(given) != 1:
        return BadLine(number, f"give one of prompt and prompt_ids; got {' and '.join(given) or 'neither'}")
    prompt, identity = record[given[0]], record.get("id", number)
    if not _is_identity(identity):
        return BadLine(number, f"id must be a string or a whole number; got {identity!r}")
    if given == ["prompt_ids"] and not (isinstance(prompt, list) and all(isinstance(t, int) for t in prompt)):
        return BadLine(number, "prompt_ids must be a list of whole numbers")
    if given == ["prompt"] and not (isinstance(prompt, str) or is_chat(prompt)):
        return BadLine(number, 'prompt must be a string or a list of {"role": ..., "content": ...}')
    options = {name: record[name] for name in OPTIONS if record.get(name) is not None}
    try:
        SamplingConfig(**{name: value for name, value in options.items() if name in SAMPLING})
        Request((0,), options.get("max_new_tokens", 1), _stops(options.get("stop", ())))
    except ConfigError as error:
        return BadLine(number, str(error))
    return Job(number, identity, prompt, options)


def _stops(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_identity(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def to_record(job: Job | None, done: Completion, settings: Mapping[str, Any], details: bool) -> dict[str, Any]:
    """Return a completion as the JSON object that sirius writes; `details` are each token's origin and logprob."""
    asked = {} if job is None else {"id": job.id}
    digest = {} if job is None else {"prompt_sha256": job.digest}
    own = {"options": job.options} if job and job.options else {}
    left_out = UNTOLD if details else (*UNTOLD, *DETAILS)
    shown = {name: value for name, value in asdict(done).items() if name not in left_out}
    return {**asked, **shown, **digest, **own, "settings": dict(settings)}


class Output:
    """A JSONL file that grows by a line for each finished job.

    Opening one that is there takes up where it stopped: `done` knows its whole lines, and an unfinished last
    line is cut off. Raises FileError where it cannot be written, or was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], details: bool = False) -> None:
        """Open or create the file at `path` for results of `settings`, `details` as for `to_record`."""
        self.path, self.settings, self.details = path, dict(settings), details
        self.done: dict[Identity, str] = {}  # ids of the file's lines, each with its prompt's digest
        with self._writing():
            there = path.read_bytes() if path.is_file() else b""
        whole = there[: there.rfind(b"\n") + 1]
        if not there[len(whole) :].startswith(OPENING[: len(there) - len(whole)]):
            raise FileError(f"{path} ends in a line that is no result of sirius; choose another output")
        for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
            identity, digest = self._result(number, line)
            self.done[identity] = digest
        with self._writing():
            if whole != there:
                os.truncate(path, len(whole))
            self._file: BinaryIO = path.open("ab")

    def write(self, job: Job, done: Completion) -> None:
        """Add a line and see it to the disk."""
        record = to_record(job, done, self.settings, self.details)
        with self._writing():
            self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done[job.id] = job.digest

    def has(self, job: Job) -> bool:
        """Tell whether a job's line stands in the file; raise FileError where it was made from another prompt."""
        if self.done.get(job.id, job.digest) != job.digest:
            raise FileError(
                f"{self.path} holds {job.id!r} with another prompt or options than line {job.line} of the input; "
                "choose another output"
            )
        return job.id in self.done

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):  # a line that could not be written was told of by `write`
            self._file.close()

    def _result(self, number: int, line: bytes) -> tuple[Identity, str]:
        """Return id and digest of a line of the file, or raise FileError where it is no result of `settings`."""
        try:
            record = json.loads(line)
            identity, digest, settings = record["id"], str(record["prompt_sha256"]), dict(record["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{self.path} line {number} is no result of sirius; choose another output") from error
        if not _is_identity(identity):
            raise FileError(f"{self.path} line {number} is no result of sirius; choose another output")
        if settings != self.settings:
            differ = sorted(k for k in {*settings, *self.settings} if settings.get(k) != self.settings.get(k))
            raise FileError(
                f"{self.path} was made with other settings ({', '.join(differ)}); choose another output, or delete it"
            )
        return identity, digest

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(f"cannot write {self.path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
