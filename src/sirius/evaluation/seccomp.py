"""The system calls that a contained program may make, as a filter for Linux's seccomp.

The filter lists what is allowed, so a call that nobody thought of is refused. It reads no memory, only numbers.
It leaves out every call that makes a process or a socket, sends a signal, or changes a file other than by an open one.
"""

import errno
import struct
from functools import cache

# Name, number on x86_64, number on aarch64 ("-": that machine has no such call).
ANY_ARGUMENTS = """
    read 0 63, write 1 64, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
    mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
    pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
    mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -, nanosleep 35 101, getitimer 36 102, alarm 37 -,
    setitimer 38 103, getpid 39 172, sendfile 40 71, exit 60 93, uname 63 160, fsync 74 82, fdatasync 75 83,
    ftruncate 77 46, getcwd 79 17, chdir 80 49, fchdir 81 50, readlink 89 -, umask 95 166, gettimeofday 96 169,
    getrlimit 97 163, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176, geteuid 107 175,
    getegid 108 177, getppid 110 173, getpgrp 111 -, getgroups 115 158, getpgid 121 155, getsid 124 156,
    rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133, sigaltstack 131 132, statfs 137 43,
    fstatfs 138 44, arch_prctl 158 -, gettid 186 178, time 201 -, futex 202 98, sched_getaffinity 204 123,
    epoll_create 213 -, getdents64 217 61, set_tid_address 218 96, restart_syscall 219 128, fadvise64 221 223,
    clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, exit_group 231 94, epoll_wait 232 -,
    epoll_ctl 233 21, newfstatat 262 79, readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73,
    set_robust_list 273 99, get_robust_list 274 100, epoll_pwait 281 22, eventfd 284 -, eventfd2 290 19,
    epoll_create1 291 20, dup3 292 24, pipe2 293 59, preadv 295 69, pwritev 296 70, getcpu 309 168, getrandom 318 278,
    membarrier 324 283, statx 332 291, rseq 334 293, close_range 436 436, faccessat2 439 439
"""
NAMES_OF_FILES = (
    "rename 82 -, unlink 87 -, unlinkat 263 35, renameat 264 38, renameat2 316 276"  # Landlock judges these
)
BY_ARGUMENTS = "open 2 -, ioctl 16 29, clone 56 220, fcntl 72 25, prctl 157 167, openat 257 56, prlimit64 302 261"
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # as the kernel tells a filter

LOAD, AND, RETURN = 0x20, 0x54, 0x06
IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT = 0x15, 0x35, 0x45
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
NEW_CALLS = 424  # from here on; a C library takes its older way only where such a call "is not there" (ENOSYS)

CLONE_THREAD = 0x10000
OPEN_MODE, O_CREAT, O_TRUNC, O_TMPFILE = 3, 0x40, 0x200, 0x400000
IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX
FCNTLS = (0, 1, 2, 3, 4, 1030, 1032)  # duplicate, read or set flags, size of a pipe; not: whom to send signals to
PRCTLS = (15, 16)  # the name of a thread

Instruction = tuple[int, int, int, int]  # operation, steps to skip if true, if false, constant


def numbers(table: str, machine: str) -> dict[str, int]:
    """Return the numbers of a table's calls on a machine ("x86_64" or "aarch64"), without those that it lacks."""
    column = 1 + list(ARCHITECTURES).index(machine)
    rows = [entry.split() for entry in table.split(",")]
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}


def _argument(index: int) -> Instruction:
    return (LOAD, 0, 0, 16 + 8 * index)  # its low 32 bits: all of the arguments looked at are ints


def _give(value: int) -> Instruction:
    return (RETURN, 0, 0, value)


def _refuse(number: int) -> Instruction:
    return _give(REFUSE | number)


def _only(index: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow the call if an argument is one of these."""
    cases = [step for value in values for step in ((IF_EQUAL, 0, 1, value), _give(ALLOW))]
    return [_argument(index), *cases, _refuse(errno.EPERM)]


def _threads_only() -> list[Instruction]:
    return [_argument(0), (IF_ANY_BIT, 0, 1, CLONE_THREAD), _give(ALLOW), _refuse(errno.EPERM)]


def _opening(index: int, writing: bool) -> list[Instruction]:
    """Judge the flags of an open: with Landlock all but the ways around its older versions, without it no writing."""
    if not writing:
        bits = OPEN_MODE | O_CREAT | O_TRUNC | O_TMPFILE
        return [_argument(index), (IF_ANY_BIT, 0, 1, bits), _refuse(errno.EPERM), _give(ALLOW)]
    emptying = [(IF_EQUAL, 0, 1, O_TRUNC | mode) for mode in (0, OPEN_MODE)]  # opened for reading, emptied even so
    refusals = [step for test in emptying for step in (test, _refuse(errno.EPERM))]
    return [_argument(index), (AND, 0, 0, OPEN_MODE | O_TRUNC), *refusals, _give(ALLOW)]


@cache
def build(machine: str, writing: bool) -> bytes:
    """Return the filter as the kernel takes it.

    machine  "x86_64" or "aarch64"
    writing  whether files may be opened for writing, removed and renamed; then Landlock must say which
    """
    bodies = {
        "open": _opening(1, writing),
        "openat": _opening(2, writing),
        "ioctl": _only(1, IOCTLS),
        "fcntl": _only(1, FCNTLS),
        "prctl": _only(0, PRCTLS),
        "prlimit64": _only(0, (0,)),  # its own limits
        "clone": _threads_only(),
    }
    free = numbers(ANY_ARGUMENTS, machine) | (numbers(NAMES_OF_FILES, machine) if writing else {})
    program = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, ARCHITECTURES[machine]), _give(KILL), (LOAD, 0, 0, 0)]
    for number in free.values():
        program += [(IF_EQUAL, 0, 1, number), _give(ALLOW)]
    for name, number in numbers(BY_ARGUMENTS, machine).items():
        program += [(IF_EQUAL, 0, len(bodies[name]), number), *bodies[name]]
    program += [(IF_AT_LEAST, 0, 1, NEW_CALLS), _refuse(errno.ENOSYS), _refuse(errno.EPERM)]
    return encode(program)


def encode(program: list[Instruction]) -> bytes:
    """Return instructions as the kernel takes them, 8 bytes each."""
    return b"".join(struct.pack("=HBBI", *step) for step in program)
