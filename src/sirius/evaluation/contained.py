"""A script of the sandbox: it takes its own rights away for good, then runs one program.

`sandbox.py` starts it as `python -I -S -B contained.py ORDER`, an order being the values of `Order`. It imports nothing
but the standard library, and no file of this package, since a fresh interpreter is to start in milliseconds.

It writes to the pipe `results`: "ready" (or what could not be set up, and then it runs nothing), then how the program
ended. A program that ran to its end earns the secret, which lies unread in the pipe `secrets` until then.
"""

import ctypes
import os
import resource
import sys
import types
from typing import NamedTuple

SIGKILL = 9  # importing `signal` takes milliseconds
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 1, 22, 38, 47
SECCOMP_MODE_FILTER, AMBIENT_CLEAR_ALL, CAPABILITY_VERSION = 2, 4, 0x20080522
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT, PATH_BENEATH = 444, 445, 446, 1
# Landlock's rights: write, read files, list folders, remove a folder or a file, make seven kinds of entries, truncate.
WRITE, READ, LIST, REMOVE_FILE, MAKE_FILE, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
JUDGED = sum(1 << bit for bit in range(1, 13))
UNREADABLE = {"dev", "proc", "run", "sys"}  # devices, terminals and other processes
HARMLESS_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
READABLE_FACTS = ("/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu")


class Order(NamedTuple):
    """What the sandbox asks for, in the order of the command line.

    secrets, results  numbers of open pipes
    parent            the process whose end ends this one
    landlock          version of the kernel's Landlock, 0 where it has none
    cpu               seconds
    memory, file      bytes: of the address space, of each file
    files             how many may be open
    scratch           folder that may be written
    program           file to run
    filter            of seccomp, in hexadecimal
    paths             folders of installed packages, joined by ":"
    """

    secrets: int
    results: int
    parent: int
    landlock: int
    cpu: int
    memory: int
    file: int
    files: int
    scratch: str
    program: str
    filter: str
    paths: str


class Filter(ctypes.Structure):
    """The kernel's `sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


class Rule(ctypes.Structure):
    """The kernel's `landlock_path_beneath_attr`."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("rights", ctypes.c_uint64), ("folder", ctypes.c_int32))


LIBC = ctypes.CDLL(None, use_errno=True)


def demand(result: int, what: str) -> int:
    """Return the result of a call to the C library; raises OSError if it failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def call(number: int, *arguments: object) -> int:
    """Make a system call of Landlock's."""
    return demand(LIBC.syscall(ctypes.c_long(number), *arguments), f"files: system call {number} (Landlock)")


def prctl(option: int, what: str, *values: object) -> None:
    """Set one of the kernel's options of this process."""
    padded = [*values, *[ctypes.c_ulong(0)] * (4 - len(values))]
    demand(LIBC.prctl(option, *padded), what)


def limit(order: Order) -> None:
    """Bound time, memory and files by resource limits; a lower limit that is already there stays."""
    wanted = {
        resource.RLIMIT_CPU: (order.cpu, order.cpu + 1),
        resource.RLIMIT_AS: (order.memory, order.memory),
        resource.RLIMIT_FSIZE: (order.file, order.file),
        resource.RLIMIT_NOFILE: (order.files, order.files),
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
    }
    for kind, values in wanted.items():
        highest = resource.getrlimit(kind)[1]
        soft, hard = (value if highest == resource.RLIM_INFINITY else min(value, highest) for value in values)
        resource.setrlimit(kind, (soft, hard))


def drop_capabilities(order: Order) -> None:
    """Give up what root may do beyond others, and end with the parent."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    demand(LIBC.capset(header, (ctypes.c_uint32 * 6)()), "rights of root: capset")
    prctl(PR_SET_NO_NEW_PRIVS, "rights of root: no_new_privs", ctypes.c_ulong(1))
    prctl(PR_SET_PDEATHSIG, "processes: parent-death signal", ctypes.c_ulong(SIGKILL))
    if os.getppid() != order.parent:  # it died before the line above
        os._exit(1)


def rights(order: Order) -> dict[str, int]:
    """Return what Landlock is to allow, for each file or folder."""
    truncate = TRUNCATE if order.landlock >= 3 else 0
    allowed = {f"/{name}": READ | LIST for name in os.listdir("/") if name not in UNREADABLE}
    allowed |= dict.fromkeys((sys.prefix, sys.base_prefix, *order.paths.split(":")), READ | LIST)
    allowed |= dict.fromkeys((*READABLE_FACTS, f"/proc/{os.getpid()}"), READ | LIST)
    allowed |= dict.fromkeys(HARMLESS_DEVICES, READ | WRITE | truncate)
    return allowed | {order.scratch: READ | LIST | WRITE | REMOVE_FILE | MAKE_FILE | truncate}


def restrict_files(order: Order) -> None:
    """Let Landlock refuse to write, make or remove anything but plain files in the scratch folder."""
    judged = ctypes.c_uint64(JUDGED | (TRUNCATE if order.landlock >= 3 else 0))
    ruleset = call(LANDLOCK_CREATE, ctypes.byref(judged), ctypes.c_size_t(8), ctypes.c_uint32(0))
    for path, right in rights(order).items():
        if not os.path.exists(path):
            continue
        folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = Rule(right if os.path.isdir(path) else right & ~(LIST | REMOVE_FILE | MAKE_FILE), folder)
        call(LANDLOCK_ADD, ruleset, PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(folder)
    call(LANDLOCK_RESTRICT, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def refuse_calls(order: Order) -> None:
    """Let seccomp refuse new processes, sockets and signals."""
    steps = bytes.fromhex(order.filter)
    program = Filter(len(steps) // 8, steps)
    what = "network and processes: seccomp"
    prctl(PR_SET_SECCOMP, what, ctypes.c_ulong(SECCOMP_MODE_FILTER), ctypes.byref(program))


def contain(order: Order) -> None:
    """Take the rights of this process away; raises OSError where the machine does not let it."""
    limit(order)
    drop_capabilities(order)
    if order.landlock:
        restrict_files(order)
    refuse_calls(order)


def execute(order: Order) -> bytes:
    """Run the program and return how it ended: the secret, or a word."""
    show, read = sys.__excepthook__, os.read  # as they were before the program could change them
    module = types.ModuleType("program")  # not "__main__": a block for that name stays unrun, as in lm-eval
    try:
        with open(order.program, encoding="utf-8", errors="surrogatepass") as file:
            code = compile(file.read(), order.program, "exec")
        sys.modules["program"], sys.argv = module, [order.program]
        exec(code, module.__dict__)  # the purpose of this script
        return read(order.secrets, 64)
    except SystemExit:
        return b"exited early"
    except BaseException as error:
        ending = b"out of memory" if isinstance(error, MemoryError) else b"failed"
        own = error.__traceback__.tb_next if error.__traceback__ else None  # without the line of `exec`
        show(type(error), error.with_traceback(own), own)
        return ending


def main() -> None:
    """Obey the command line."""
    values = sys.argv[1:]
    order = Order._make([*map(int, values[:8]), *values[8:]])
    write, leave = os.write, os._exit
    sys.path += filter(None, order.paths.split(":"))
    try:
        contain(order)
    except OSError as error:
        write(order.results, f"refused {error.strerror}\n".encode())
        leave(1)
    write(order.results, b"ready\n")
    write(order.results, execute(order))
    leave(0)


if __name__ == "__main__":
    main()
