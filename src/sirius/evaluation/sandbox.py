"""Run a generated Python program so that it can harm nothing, and say whether it ran to its end.

Each program gets a fresh interpreter, which gives up its rights before it reads the program (`contained.py`):

- seccomp refuses new processes, sockets, signals and every other system call that Python does not need;
- Landlock refuses to write, make or remove a file outside a scratch folder, and to read devices and other processes;
- resource limits bound the memory, the processor time, the size of a file and the number of open ones;
- this side bounds the wall time, the number of threads and the size of the scratch folder, and kills the process.

All of it works without special rights, for root too, and inside containers. Where the kernel has no Landlock, seccomp
lets no file be opened for writing at all. Where one of these cannot be had, `check` raises and nothing is run.
"""

import ctypes
import os
import platform
import secrets
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from io import FileIO
from pathlib import Path
from typing import Literal

from sirius.errors import SandboxError
from sirius.evaluation import contained, seccomp

Reason = Literal[
    "passed",
    "failed",
    "exited early",
    "timed out",
    "out of memory",
    "too many threads",
    "scratch folder full",
    "killed",
]
READY = b"ready\n"
TOLD: dict[bytes, Reason] = {b"failed": "failed", b"exited early": "exited early", b"out of memory": "out of memory"}
START_SECONDS = 120.0  # for a bare interpreter on an overloaded machine
POLL_SECONDS = 0.02
TAIL_BYTES = 2000
REMOVED = " (deleted)"  # how the system shows the name of a file that has none any more
LANDLOCK_VERSION = 1  # a flag of the system call that otherwise makes a ruleset
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
WAYS_OUT = "run code tasks on Linux 5.13 or newer (x86_64 or aarch64, also in a container), or leave them out"


# What is tried has no lasting effect where it succeeds. The names of what succeeded are the error.
PROBE = """
import mmap, os, socket

def fork():
    if os.fork() == 0:
        os._exit(0)

attempts = {{
    "network": lambda: socket.socket(),
    "processes": fork,
    "signals to other processes": lambda: os.kill(os.getppid(), 0),
    "writing outside the scratch folder": lambda: open({victim!r}, "a"),
    "deleting outside the scratch folder": lambda: os.unlink({victim!r}),
    "memory": lambda: mmap.mmap(-1, {memory}),
}}
succeeded = []
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError:
        continue
    succeeded.append(name)
if succeeded:
    raise SystemError("no protection of: " + ", ".join(succeeded))
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    wall_seconds   from the start of the program to its end
    cpu_seconds    whole seconds of processor time, all threads together
    memory_bytes   of address space
    file_bytes     size of each file
    scratch_bytes  of all files in the scratch folder, and of those removed from it and still held
    files          in the scratch folder, and open at once
    threads        at once
    """

    wall_seconds: float = 60.0
    cpu_seconds: int = 10
    memory_bytes: int = 4 << 30
    file_bytes: int = 16 << 20
    scratch_bytes: int = 64 << 20
    files: int = 64
    threads: int = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    passed   whether it ran to its end
    seconds  of wall time, from its start to its end
    errors   the last 2000 bytes that it wrote to stderr
    """

    passed: bool
    reason: Reason
    seconds: float
    errors: str = ""


@dataclass(frozen=True)
class Protections:
    """What this machine offers beyond what every run has: the version of Landlock, 0 for none."""

    landlock: int

    @property
    def writable(self) -> str:
        """Where a program can write."""
        return "the scratch folder" if self.landlock else "nowhere"


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run a program contained; it passes if it reaches the end of its last statement without an error.

    Raises SandboxError where this machine cannot contain a program. What the program is or does raises nothing.
    """
    return _run(program, limits or Limits(), check())


def run_all(programs: Iterable[str], workers: int, limits: Limits | None = None) -> list[Outcome]:
    """Run programs, as many at once as there are workers, and return the outcomes in their order."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda program: run(program, limits), programs))


@cache
def check() -> Protections:
    """Return how this machine contains programs; raises SandboxError, with what is missing, where it cannot.

    A harmless program tries what must not work; this is done once.
    """
    if sys.platform != "linux" or platform.machine() not in seccomp.ARCHITECTURES:
        raise SandboxError(f"no sandbox for {sys.platform} on {platform.machine()}; {WAYS_OUT}")
    if not os.path.exists("/proc/self/status"):
        raise SandboxError(f"threads cannot be counted: /proc is not mounted; mount it, or {WAYS_OUT}")
    found = Protections(_landlock_version())
    limits = Limits()
    with tempfile.TemporaryDirectory(prefix="sirius-outside-") as outside:
        victim = Path(outside, "file")
        victim.write_text("kept")
        outcome = _run(PROBE.format(victim=str(victim), memory=2 * limits.memory_bytes), limits, found)
    if not outcome.passed:
        last = (outcome.errors.strip().splitlines() or [outcome.reason])[-1]
        raise SandboxError(f"programs are not contained on this machine: {last}; {WAYS_OUT}")
    return found


def _landlock_version() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    null = ctypes.c_void_p(None)
    return max(0, libc.syscall(contained.LANDLOCK_CREATE, null, ctypes.c_size_t(0), ctypes.c_uint32(LANDLOCK_VERSION)))


def _run(program: str, limits: Limits, protections: Protections) -> Outcome:
    secret = secrets.token_hex(16).encode()
    with (
        tempfile.TemporaryDirectory(prefix="sirius-program-") as folder,
        _pipe() as (secrets_out, secrets_in),
        _pipe() as (results_out, results_in),
    ):
        scratch = os.path.realpath(folder)
        file = Path(scratch, "program.py")
        file.write_bytes(program.encode("utf-8", "surrogatepass"))
        secrets_in.write(secret)
        order = contained.Order(
            secrets=secrets_out.fileno(),
            results=results_in.fileno(),
            parent=os.getpid(),
            landlock=protections.landlock,
            cpu=limits.cpu_seconds,
            memory=limits.memory_bytes,
            file=limits.file_bytes,
            files=limits.files,
            scratch=scratch,
            program=str(file),
            filter=seccomp.build(platform.machine(), writing=protections.landlock > 0).hex(),
            paths=":".join(_installed()),
        )
        with _start(order) as process:
            results_in.close()
            return _Watch(process, results_out.fileno(), limits, scratch).until_the_end(secret)


@contextmanager
def _pipe() -> Iterator[tuple[FileIO, FileIO]]:
    out, into = os.pipe()
    with FileIO(out, "rb") as reader, FileIO(into, "wb") as writer:
        yield reader, writer


def _installed() -> list[str]:
    """Return the folders of installed packages; numpy is looked for there."""
    return [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]


def _start(order: contained.Order) -> subprocess.Popen[bytes]:
    scratch = order.scratch
    environment = {"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", **ONE_THREAD}
    if "LD_LIBRARY_PATH" in os.environ:  # the interpreter itself may need it
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", contained.__file__, *map(str, order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=scratch,
            env=environment,
            pass_fds=(order.secrets, order.results),
            start_new_session=True,
        )
    except OSError as error:
        raise SandboxError(f"no process for a program: {error}; run fewer at once") from error


class _Watch:
    """One running program: reads its pipes, and names the first limit that it breaks."""

    def __init__(self, process: subprocess.Popen[bytes], results: int, limits: Limits, scratch: str) -> None:
        assert process.stderr is not None
        self.process, self.limits, self.scratch = process, limits, scratch
        self.streams = {results: b"", process.stderr.fileno(): b""}
        self.results, self.errors = self.streams
        self.open = selectors.DefaultSelector()
        for stream in self.streams:
            os.set_blocking(stream, False)
            self.open.register(stream, selectors.EVENT_READ)
        self.since, self.ready, self.ended = time.monotonic(), False, 0.0

    def until_the_end(self, secret: bytes) -> Outcome:
        """Return the outcome; the process is gone then, whatever happened."""
        broken: Reason | None = None
        try:
            looked = time.monotonic()
            while self.process.poll() is None and not broken:
                self._read_or_wait()
                if time.monotonic() - looked >= POLL_SECONDS:
                    broken, looked = self._broken_limit(), time.monotonic()
        finally:
            self.process.kill()
            self.process.wait()
            self.ended = time.monotonic()
            self.open.close()
        self._read(self.streams)
        return self._outcome(broken, secret)

    def _read_or_wait(self) -> None:
        """Wait until there is something to read, or the process has ended, or for one poll at most."""
        if self.open.get_map():
            self._read(key.fd for key, _ in self.open.select(POLL_SECONDS))
        else:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(POLL_SECONDS)

    def _read(self, streams: Iterable[int]) -> None:
        for stream in streams:
            try:
                chunk = os.read(stream, 1 << 16)
            except BlockingIOError:
                continue
            if chunk:
                text = self.streams[stream] + chunk
                self.streams[stream] = text[:TAIL_BYTES] if stream == self.results else text[-TAIL_BYTES:]
            elif self.process.returncode is None:
                self.open.unregister(stream)
        if not self.ready and self.streams[self.results].startswith(READY):
            self.since, self.ready = time.monotonic(), True

    def _broken_limit(self) -> Reason | None:
        seconds = self.limits.wall_seconds if self.ready else START_SECONDS
        if time.monotonic() - self.since > seconds:
            return "timed out"
        if self._threads() > self.limits.threads:
            return "too many threads"
        return "scratch folder full" if self._scratch_is_full() else None

    def _threads(self) -> int:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
                if line.startswith("Threads:"):
                    return int(line.split()[1])
        return 0

    def _scratch_is_full(self) -> bool:
        count = size = 0
        with os.scandir(self.scratch) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # it has just been removed
                    size += 512 * entry.stat(follow_symlinks=False).st_blocks
                count += 1
                if count > self.limits.files + 1 or size > self.limits.scratch_bytes:  # one is the program itself
                    return True
        return size + self._removed_bytes() > self.limits.scratch_bytes

    def _removed_bytes(self) -> int:
        """Return the bytes of files that were removed from the scratch folder and are still held.

        The system tells the size of an open file; one that is only mapped counts as the largest that a file may be.
        """
        place, inside = Path(f"/proc/{self.process.pid}"), f"{os.path.realpath(self.scratch)}/"
        held: dict[int, int] = {}
        with suppress(OSError):  # the process has just ended
            for line in (place / "maps").read_text(errors="replace").splitlines():
                if line.endswith(REMOVED) and inside in line:
                    held[int(line.split()[4])] = self.limits.file_bytes
            for handle in place.glob("task/*/fd/*"):
                with suppress(OSError):  # it has just been closed
                    if (path := os.readlink(handle)).endswith(REMOVED) and path.startswith(inside):
                        found = handle.stat()
                        held[found.st_ino] = 512 * found.st_blocks
        return sum(held.values())

    def _outcome(self, broken: Reason | None, secret: bytes) -> Outcome:
        told, errors = self.streams[self.results], self.streams[self.errors].decode(errors="replace")
        code = self.process.returncode
        if not told.startswith(READY):
            why = told.decode(errors="replace").strip() or f"{broken or 'ended'} before it began, exit code {code}"
            raise SandboxError(f"a program could not be contained: {why} {errors.strip()}; {WAYS_OUT}")
        verdict = told.removeprefix(READY)
        if not broken and code == 0 and verdict == secret:
            return Outcome(True, "passed", self.ended - self.since, errors)
        if code == -signal.SIGXCPU:
            broken = "timed out"
        elif code < 0:
            broken = broken or "killed"
        return Outcome(False, broken or TOLD.get(verdict, "exited early"), self.ended - self.since, errors)
