"""Files of prompts in, files of completions out: line by line, saved as it goes, resumed where it stopped."""

import codecs
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

from sirius.core import CorrectionConfig, Request, SamplingConfig, SparsityConfig
from sirius.engine import Completion, Prompt, TextOptions, is_chat
from sirius.errors import ConfigError, FileError

Identity = str | int

OPENING = b'{"id": '  # how every line that `Output` writes begins
DETAILS = ("origins", "logprobs")
UNTOLD = ("setting",)  # of a completion, what its figures tell
SAMPLING = tuple(each.name for each in fields(SamplingConfig))
HOT = ("top_p", "top_k", "min_p", "seed")  # those that choose among tokens, so that greedy text has no use for them
OPTIONS = ("max_new_tokens", "stop", *SAMPLING)  # what a line may say for itself
PROMPTS = ("prompt", "messages", "prompt_ids")
KEYS = ("id", *PROMPTS, *OPTIONS)
WHOLE = {  # what only the command may say, for all lines
    *(each.name for kind in (CorrectionConfig, SparsityConfig) for each in fields(kind)),
    *("sparsity", "preset", "chat", "logprobs", "model", "revision", "dtype", "device", "threads", "batch_size"),
} - {"method"}
STDIN = Path("-")


@dataclass(frozen=True)
class Job:
    """One line of an input file.

    line     its number from 1
    id       the number where it gives none
    options  those of `OPTIONS` that it gives, which go before the command's
    named    whether it gives an id
    """

    line: int
    id: Identity
    prompt: Prompt
    options: dict[str, Any] = field(default_factory=dict)
    named: bool = field(default=True, compare=False)

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


def read_jobs(path: Path, temperature: float = 0.0) -> Iterator[Job | BadLine]:
    """Read a JSONL file in UTF-8, `STDIN` being standard input; a line has one of `PROMPTS`, and others of `KEYS`.

    prompt       a text, or chat messages
    messages     chat messages: [{"role": ..., "content": ...}, ...]
    prompt_ids   token ids
    temperature  the command's, which holds where a line gives none

    Blank lines are passed over, broken ones are yielded as `BadLine`, as are those with other keys than `KEYS`, or with
    one that would change nothing. Raises FileError where the file cannot be read.
    """
    first: dict[Identity, Job] = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # a text may hold the other line breaks
        if not line.strip():
            continue
        job = _parse(number, line, temperature)
        if isinstance(job, Job):
            before = first.setdefault(job.id, job)
            yield job if before is job else BadLine(number, _used(job, before))
        else:
            yield job


def read_text(path: Path) -> str:
    """Return what a file in UTF-8 holds, or standard input; raise FileError where it cannot be read."""
    if path == STDIN and sys.stdin is None:  # so Python calls one that was closed
        raise FileError(f"cannot read {name_of(path)}: it is closed")
    try:
        raw = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = f"0x{error.object[error.start]:02x}"
        raise FileError(f"cannot read {name_of(path)}: byte {byte} in line {line} is not UTF-8") from error
    except OSError as error:
        raise FileError(f"cannot read {name_of(path)}: {_reason(error)}") from error


def name_of(path: Path) -> str:
    """Return what messages call an input."""
    return "standard input" if path == STDIN else str(path)


def _used(job: Job, before: Job) -> str:
    own = "" if job.named else "; this line gives none, so its number is its id"
    other = "" if before.named else ", whose number it is, as that line gives no id"
    return f"id {job.id!r} was used before, by line {before.line}{other}{own}; give each line an id of its own"


def _parse(number: int, line: str, temperature: float) -> Job | BadLine:
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
    try:
        return _job(number, record, temperature)
    except ConfigError as error:
        return BadLine(number, str(error))


def _job(number: int, record: dict[str, Any], temperature: float) -> Job:
    """Return the job of a line; raise ConfigError where it says what it cannot."""
    if whole := [f"--{name.replace('_', '-')}" for name in record if name in WHOLE]:
        raise ConfigError(f"an option of the whole command, not of a line: {', '.join(whole)}")
    if unknown := [name for name in record if name not in KEYS]:
        raise ConfigError(f"unknown {', '.join(unknown)}; a line may have {', '.join(KEYS)}")
    given = [name for name in PROMPTS if name in record]
    if len(given) != 1:
        raise ConfigError(f"give one of {', '.join(PROMPTS)}; got {' and '.join(given) or 'none'}")
    prompt, identity = record[given[0]], record.get("id")
    _check_prompt(given[0], prompt)
    if not (identity is None or _is_identity(identity)):
        raise ConfigError(f"id must be a string or a whole number; got {identity!r}")
    options = {name: record[name] for name in OPTIONS if record.get(name) is not None}
    SamplingConfig(**{name: value for name, value in options.items() if name in SAMPLING})
    Request((0,), options.get("max_new_tokens", 1), _stops(options.get("stop", ())))
    if not options.get("temperature", temperature) and (idle := [name for name in HOT if name in options]):
        raise ConfigError(
            f"{', '.join(idle)} would change nothing at temperature 0, which is greedy; give the line a temperature, "
            "or the command --temperature"
        )
    return Job(number, number if identity is None else identity, prompt, options, named=identity is not None)


def _check_prompt(name: str, prompt: Any) -> None:
    if name == "prompt_ids" and not (isinstance(prompt, list) and all(isinstance(t, int) for t in prompt)):
        raise ConfigError("prompt_ids must be a list of whole numbers")
    if name == "prompt" and not (isinstance(prompt, str) or is_chat(prompt)):
        raise ConfigError('prompt must be a string or a list of {"role": ..., "content": ...}')
    if name == "messages" and not (is_chat(prompt) and prompt):
        raise ConfigError('messages must be a list of {"role": ..., "content": ...}, at least one')


def _stops(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _is_identity(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool)


def to_record(
    job: Job | None, done: Completion, settings: Mapping[str, Any], details: bool, prompt_tokens: int
) -> dict[str, Any]:
    """Return a completion as the JSON object that sirius writes.

    details        whether each token's origin and logprob are in it
    prompt_tokens  the prompt's length, for `usage`, which has the names of other programs
    """
    asked = {} if job is None else {"id": job.id}
    digest = {} if job is None else {"prompt_sha256": job.digest}
    own = {"options": job.options} if job and job.options else {}
    left_out = UNTOLD if details else (*UNTOLD, *DETAILS)
    shown = {name: value for name, value in asdict(done).items() if name not in left_out}
    shown["stats"] |= {name: getattr(done.stats, name) for name in ("acceptance_rate", "mean_acceptance_length")}
    new = len(done.token_ids)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": new, "total_tokens": prompt_tokens + new}
    return {**asked, **shown, "usage": usage, **digest, **own, "settings": dict(settings)}


def to_line(record: Mapping[str, Any], encoding: str = "utf-8") -> str:
    """Return an object as a line of JSON, by ASCII alone where an encoding may not have its characters."""
    line = json.dumps(record, ensure_ascii=codecs.lookup(encoding).name != "utf-8")
    try:
        line.encode()
    except UnicodeEncodeError:  # a byte of a file's name that is no UTF-8
        line = json.dumps(record)
    return line + "\n"


class Output:
    """A JSONL file that grows by a line for each finished job.

    Opening one that is there takes up where it stopped: `done` knows its whole lines, and an unfinished last
    line is cut off. A pipe or a device holds nothing to take up. Raises FileError where it cannot be written, or was
    made with other settings.
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

    def write(self, job: Job, done: Completion, prompt_tokens: int) -> None:
        """Add a line and see it to the disk, if it is a file on one; arguments as for `to_record`."""
        record = to_record(job, done, self.settings, self.details, prompt_tokens)
        with self._writing():
            self._file.write(to_line(record).encode())
            self._file.flush()
            if self.path.is_file():
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
