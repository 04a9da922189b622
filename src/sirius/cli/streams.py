"""Standard output as a user has it: in any encoding, full, closed, or a pipe that no one reads any more."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from sirius.errors import FileError


class Output(io.TextIOWrapper):
    """Standard output that shows what it can, and whose failures are told apart from those of other files."""

    def write(self, text: str, /) -> int:
        """Write a text, as `TextIOWrapper` does; raise FileError, or BrokenPipeError where no one reads it."""
        with _named():
            return super().write(text)

    def flush(self) -> None:
        """Write what waits; raise as `write` does."""
        with _named():
            super().flush()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FileError(f"cannot write to standard output: {error.strerror or error}") from error


@contextmanager
def guarded() -> Iterator[None]:
    """Let standard output be an `Output`; all of it is written at the end, or what `Output.write` raises is raised."""
    plain = cast("io.TextIOWrapper", sys.stdout) if sys.stdout is not None else _closed()
    sys.stdout = output = Output(
        plain.buffer,
        encoding=plain.encoding,
        errors="replace",
        line_buffering=plain.line_buffering,
        write_through=plain.write_through,
    )
    try:
        yield
    finally:
        sys.stdout = plain
        try:
            output.flush()
        except OSError:
            _give_up(output)
            raise
        finally:
            output.detach()


def _closed() -> io.TextIOWrapper:
    """Return a stream that cannot be written, in the place of a closed one: another file would take its number."""
    return os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")


def _give_up(output: Output) -> None:
    """Throw away what waits: the interpreter would try, and complain, once more when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output.fileno())
    os.close(nowhere)
