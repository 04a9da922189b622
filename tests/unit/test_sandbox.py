"""Programs that try to do harm: each is contained and does not pass; a right one passes."""

import os
import platform
import re
import socket
import tempfile
from pathlib import Path

import pytest

from sirius.errors import SandboxError
from sirius.evaluation import sandbox, seccomp
from sirius.evaluation.sandbox import Limits, Protections, run, run_all

SHORT = Limits(cpu_seconds=1)  # for a program that ends no other way
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
PATIENT_FORKS = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
THREADS = """
import threading
threading.stack_size(65536)
gate = threading.Event()
while True:
    threading.Thread(target=gate.wait).start()
"""
REMOVING = """
import mmap, os
held, maps = [], []
for i in range(8):
    held.append(open('one', 'w+b', buffering=0))
    held[-1].write(bytes(15 << 20))
    os.unlink('one')"""
DAEMON = """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            pass
"""


@pytest.fixture(autouse=True)
def contained():
    """Skip where the machine cannot contain programs: `run` refuses there."""
    try:
        sandbox.check()
    except SandboxError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["here", "no Landlock"])
def protections(request) -> Protections:
    return sandbox.check() if request.param == "here" else Protections(landlock=0)


@pytest.mark.parametrize("program", ["x = 1", "", "# -*- coding: ascii -*-\nassert 'ä' == '\\xe4'\r\n"])
def test_a_right_program_passes(program, protections):
    assert sandbox._run(program, Limits(), protections).reason == "passed"


def test_numpy_and_threads_work(protections):
    program = """
import threading
import numpy as np
thread = threading.Thread(target=lambda: np.ones((200, 200)) @ np.ones((200, 200)))
thread.start()
thread.join()
"""
    assert sandbox._run(program, Limits(), protections).passed


def test_the_scratch_folder_can_be_written_and_is_gone_afterwards(tmp_path, monkeypatch):
    if not sandbox.check().landlock:
        pytest.skip("no Landlock: nothing can be written")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    program = """
import os, tempfile
with open("a", "w") as file:
    file.write("text")
os.rename("a", "b")
assert open("b").read() == "text"
os.remove("b")
assert tempfile.gettempdir() == os.getcwd() == os.environ["HOME"]
tempfile.NamedTemporaryFile(delete=False).write(b"left")
"""
    outcome = run(program)
    assert outcome.passed, outcome.errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert False", "failed"),
        ("while True: pass", "timed out"),
        ("import os\nwhile True: os.fork()", "failed"),
        (PATIENT_FORKS, "timed out"),
        (THREADS, "too many threads"),
        ("x = bytearray(10 << 30)", "out of memory"),
        ("import mmap; mmap.mmap(-1, 10 << 30)", "failed"),
        ("while True: print('x' * 10**7)", "timed out"),
        ("import sys\nwhile True: sys.stderr.write('x' * 10**7)", "timed out"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
        ("import os; os.execv('/bin/true', ['true'])", "failed"),
        ("import os; os.system('true') == 0 or 1 / 0", "failed"),
        ("import subprocess; subprocess.run(['/bin/true'])", "failed"),
        ("import multiprocessing as m; p = m.get_context('fork').Process(); p.start()", "failed"),
        ("import os; os.kill(os.getppid(), 9)", "failed"),
        ("import os; os.kill(-1, 0)", "failed"),
        (DAEMON, "failed"),
        ("syntax error", "failed"),
        ("a\0b", "failed"),
        ("'\ud800'", "failed"),
        ("(" * 100_000, "failed"),
    ],
    ids=lambda value: value[:30],
)
def test_a_harmful_or_wrong_program_ends_and_does_not_pass(program, reason, protections):
    outcome = sandbox._run(program, SHORT if reason == "timed out" else Limits(), protections)
    assert (outcome.passed, outcome.reason) == (False, reason), outcome.errors
    assert len(outcome.errors) <= 2000


def test_a_sleeping_program_is_stopped():
    outcome = run("import time; time.sleep(600)", Limits(wall_seconds=1.0))
    assert outcome.reason == "timed out"
    assert outcome.seconds < 300


@pytest.mark.parametrize(
    "program",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "raise SystemExit",
        "import threading, os; threading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
        "import os; os.closerange(0, 64)",
        "import os, atexit; atexit.register(os._exit, 0); 1 / 0",
        "import sys; sys.excepthook = lambda *_: None; sys.__excepthook__ = None; 1 / 0",
    ],
)
def test_leaving_before_the_end_is_no_pass(program, protections):
    assert not sandbox._run(program, Limits(), protections).passed


@pytest.mark.parametrize(
    "attempt",
    [
        "os.unlink(path)",
        "open(path, 'w')",
        "open(path, 'a').write('more')",
        "open(path, 'r+').write('x')",
        "os.open(path, os.O_RDONLY | os.O_TRUNC)",
        "os.open(path, 3 | os.O_TRUNC)",
        "os.truncate(path, 0)",
        "os.chmod(path, 0)",
        "os.utime(path, (0, 0))",
        "os.rename(path, 'mine')",
        "os.rename('program.py', path)",
        "os.link(path, 'mine')",
        "os.symlink(path, path + '2')",
        "os.symlink(path, 'mine'); open('mine', 'w')",
        "os.mkdir(path + '2')",
        "os.mkfifo(path + '2')",
        "os.rmdir(os.path.dirname(path) + '/empty')",
        "shutil.rmtree(os.path.dirname(path))",
        "os.setxattr(path, 'user.a', b'b')",
        "assert ctypes.CDLL(None).syscall(OPENAT2, -100, path.encode(), (ctypes.c_uint64 * 3)(1, 0, 0), 24) >= 0",
    ],
)
def test_files_outside_the_scratch_folder_stay_as_they_are(attempt, protections, tmp_path):
    (tmp_path / "empty").mkdir()
    kept = tmp_path / "kept"
    kept.write_text("kept")
    before = kept.stat()
    outcome = sandbox._run(
        f"import ctypes, os, shutil\nOPENAT2, path = 437, {str(kept)!r}\n{attempt}", Limits(), protections
    )
    assert outcome.reason == "failed", outcome
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "kept"]
    assert kept.read_text() == "kept"
    after = kept.stat()
    assert (before.st_mode, before.st_mtime_ns, before.st_nlink) == (after.st_mode, after.st_mtime_ns, after.st_nlink)


@pytest.mark.parametrize(
    "program",
    [
        "for i in range(10**6): open(str(i), 'w')",
        "for i in range(8): open(str(i), 'wb').write(bytes(15 << 20))\nwhile 1: 0",
        f"{REMOVING}\nwhile 1: 0",
        f"{REMOVING}\n    maps.append(mmap.mmap(held[-1].fileno(), 4096)); held.pop().close()\nwhile 1: 0",
        "import os\nheld = [os.open('.', os.O_TMPFILE | os.O_RDWR) for i in range(8)]\n"
        "for each in held: os.write(each, bytes(15 << 20))\nwhile 1: 0",
    ],
    ids=["many", "large", "removed", "mapped", "nameless"],
)
def test_the_scratch_folder_is_bounded(program, tmp_path):
    if not sandbox.check().landlock:
        pytest.skip("no Landlock: nothing can be written")
    if "O_TMPFILE" in program:
        try:
            os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
        except OSError as error:
            pytest.skip(f"no files without a name here: {error}")
    assert run(program, Limits(cpu_seconds=30)).reason == "scratch folder full"


def test_nothing_reaches_the_network(protections):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        program = f"import socket; socket.create_connection(('127.0.0.1', {server.getsockname()[1]})).send(b'out')"
        assert sandbox._run(program, Limits(), protections).reason == "failed"
        with pytest.raises(BlockingIOError):
            server.accept()


# fork, vfork, ptrace, setns, unshare, mount, bpf, io_uring_setup, userfaultfd, perf_event_open, process_vm_writev
FORBIDDEN = {
    "x86_64": (57, 58, 101, 308, 272, 165, 321, 425, 323, 298, 311),
    "aarch64": (117, 268, 97, 40, 280, 425, 282, 241, 271),
}


def test_other_ways_to_a_socket_or_a_process_are_closed(protections):
    program = f"""
import ctypes, errno, socket
libc = ctypes.CDLL(None, use_errno=True)
for number in {FORBIDDEN[platform.machine()]}:
    assert libc.syscall(number, 0, 0, 0, 0, 0) == -1
    assert ctypes.get_errno() in (errno.EPERM, errno.ENOSYS)
assert libc.fork() == -1
try:
    socket.socketpair()
except OSError:
    pass
else:
    raise AssertionError
"""
    outcome = sandbox._run(program, Limits(), protections)
    assert outcome.passed, outcome.errors


def test_the_secrets_of_the_environment_stay_unread(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "s3cret")
    outcome = run("import os, sys; print(dict(os.environ), file=sys.stderr); 1 / 0")
    assert "TMPDIR" in outcome.errors
    assert "s3cret" not in outcome.errors
    assert "SOME_TOKEN" not in outcome.errors
    if sandbox.check().landlock:
        assert run("import os; open(f'/proc/{os.getppid()}/environ').read()").reason == "failed"


@pytest.mark.parametrize("end", ["", "1 / 0", "while True: pass"], ids=["passes", "fails", "endless"])
def test_no_process_is_left(end):
    program = f"import os, sys; print('I am', os.getpid(), file=sys.stderr, flush=True)\n{end}"
    number = re.search(r"I am (\d+)", run(program, SHORT).errors)
    assert number
    with pytest.raises(ProcessLookupError):
        os.kill(int(number[1]), 0)


def test_outcomes_keep_the_order_of_their_programs():
    programs = ["import time; time.sleep(0.5)", "1 / 0", "x = 1", "raise SystemExit"]
    assert [each.reason for each in run_all(programs, workers=3)] == ["passed", "failed", "passed", "exited early"]


def test_a_filter_that_lets_through_is_noticed(monkeypatch):
    """The probe reports protections that are set without an error and do not work."""
    allow = seccomp._give(seccomp.ALLOW)
    monkeypatch.setattr(seccomp, "build", lambda *_, **__: seccomp.encode([allow]))
    with pytest.raises(SandboxError, match="no protection of: network, processes, signals"):
        sandbox.check.__wrapped__()


def test_what_cannot_be_set_up_is_named(monkeypatch):
    monkeypatch.setattr(seccomp, "build", lambda *_, **__: b"")
    with pytest.raises(
        SandboxError, match=r"network and processes: seccomp: Invalid argument.*run code tasks on Linux"
    ):
        run("x = 1")


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(SandboxError, match="no sandbox for linux on riscv64"):
        sandbox.check.__wrapped__()


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_numbers_of_system_calls_are_the_kernels(machine):
    if not HEADERS[machine].is_file():
        pytest.skip(f"no {HEADERS[machine]}")
    text = HEADERS[machine].read_text()
    theirs = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    theirs |= {"newfstatat": theirs.get("fstatat", theirs.get("newfstatat", 0))}
    for table in (seccomp.ANY_ARGUMENTS, seccomp.NAMES_OF_FILES, seccomp.BY_ARGUMENTS):
        for name, number in seccomp.numbers(table, machine).items():
            assert theirs[name] == number, name
