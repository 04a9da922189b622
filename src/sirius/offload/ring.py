"""A few buffers that take turns: while one unit of weights is used, the next ones are on their way."""

import os
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import thread as executors
from contextlib import suppress
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sirius.model.memory import page_aligned

V = TypeVar("V")
CHUNK = 1 << 23  # bytes that a thread brings at a time
READERS = 3  # threads; a disk gives its bandwidth to several reads at a time
Task = Callable[[], int]  # brings a part of a unit and returns its bytes


class Unit(Protocol[V]):
    """Weights that come and go together, as those of one block do.

    nbytes  bytes of memory that it takes in a buffer
    moved   bytes that cross the link
    """

    @property
    def nbytes(self) -> int: ...

    @property
    def moved(self) -> int: ...

    def views(self, memory: Tensor) -> V:
        """Return the weights as they lie in a buffer [nbytes] uint8."""
        ...

    def tasks(self, views: V, memory: Tensor) -> Iterable[Task]:
        """Yield what fills those views, part by part, in any order."""
        ...


class Throttle:
    """Lets no more bytes per second pass than it was given, so that a slow link can be tried on a fast machine."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self.rate, self.lock, self.free = bytes_per_second, Lock(), 0.0

    def passed(self, count: int) -> None:
        """Wait until so many bytes have passed, all that came before them included."""
        if self.rate is None:
            return
        with self.lock:
            self.free = max(time.perf_counter(), self.free) + count / self.rate
            until = self.free
        if (left := until - time.perf_counter()) > 0:
            time.sleep(left)


class Mover(ABC):
    """Brings units into buffers, while passes run.

    moved  bytes that have crossed the link so far
    """

    def __init__(self) -> None:
        self.moved = 0

    @abstractmethod
    def memory(self, count: int) -> Tensor:
        """Return a buffer [count] uint8 where passes read weights."""

    @abstractmethod
    def send(self, unit: Unit[Any], views: Any, memory: Tensor, free: Any) -> Any:
        """Begin to bring a unit into a buffer that is free from the event `free` on; return its arrival."""

    @abstractmethod
    def wait(self, arrival: Any) -> None:
        """Let what follows begin when a unit is there; raise what kept it from coming."""

    @abstractmethod
    def used(self) -> Any:
        """Return the event from which on what was used so far is not used any more."""

    @abstractmethod
    def stop(self) -> None:
        """Return when nothing is written to any buffer; what has not come by then need not come."""


class ThreadMover(Mover):
    """Brings units by threads, into memory of the CPU."""

    def __init__(self, throttle: Throttle | None = None) -> None:
        super().__init__()
        self.throttle = throttle or Throttle(None)
        self._make_threads()

    def memory(self, count: int) -> Tensor:
        return page_aligned(count)

    def send(self, unit: Unit[Any], views: Any, memory: Tensor, free: Any) -> list[Future[None]]:
        self.moved += unit.moved
        return [self.threads.submit(_run, task, self.throttle) for task in unit.tasks(views, memory)]

    def wait(self, arrival: list[Future[None]]) -> None:
        wait(arrival)  # all of them, also where one failed: none may write later
        for each in arrival:
            each.result()

    def used(self) -> None:
        return None

    def stop(self) -> None:
        if self.process == os.getpid():
            self.threads.shutdown(wait=True, cancel_futures=True)
        self.end.detach()
        self._make_threads()  # a process that was forked has none of its parent's threads

    def _make_threads(self) -> None:
        self.process = os.getpid()
        self.threads = ThreadPoolExecutor(READERS, thread_name_prefix="sirius-link")
        self.end = weakref.finalize(self, self.threads.shutdown, wait=False, cancel_futures=True)
        self.end.atexit = False


def _run(task: Task, throttle: Throttle) -> None:
    if getattr(executors, "_shutdown", False):  # the interpreter ends, and waits for the threads of executors
        raise RuntimeError("no weights are brought while the interpreter shuts down")
    with torch.inference_mode(False), torch.no_grad():
        throttle.passed(task())


class CudaMover(Mover):
    """Brings units from pinned memory of the host to a GPU, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.stream = device, torch.cuda.Stream(device)

    def memory(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def send(self, unit: Unit[Any], views: Any, memory: Tensor, free: Any) -> Any:
        self.moved += unit.moved
        with torch.cuda.stream(self.stream):
            if free is not None:
                self.stream.wait_event(free)
            for task in unit.tasks(views, memory):
                task()
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        return arrived

    def wait(self, arrival: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(arrival)

    def used(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def stop(self) -> None:
        self.stream.synchronize()


class Pool:
    """Buffers that rings share. What a ring needs now goes before what another one has brought ahead.

    free    buffers that no ring has, each with the event from which on it may be written to
    midway  a ring takes and gives back buffers; where that was interrupted, as by Ctrl-C, it stays True
    lost    a ring is gone, and perhaps buffers with it
    """

    def __init__(self, size: int, count: int, mover: Mover) -> None:
        """Make `count` buffers of `size` bytes, where passes read weights."""
        self.size, self.mover = size, mover
        self.memories = [mover.memory(size) for _ in range(count)]
        self.free: deque[tuple[int, Any]] = deque((number, None) for number in range(count))
        self.rings: weakref.WeakSet[Ring[Any]] = weakref.WeakSet()
        self.midway, self.lost, self.process = False, False, os.getpid()

    @property
    def sound(self) -> bool:
        """Whether every buffer is in `free` or a ring's, and the threads that fill them are this process's."""
        return not (self.midway or self.lost) and self.process == os.getpid()

    def recover(self) -> None:
        """Let every buffer be free, and no ring have one."""
        self.lost = False
        self.mover.stop()
        for ring in self.rings:
            ring.coming.clear()
            ring.held = None
        self.free = deque((number, self.mover.used()) for number in range(len(self.memories)))
        self.process = os.getpid()

    def lose(self) -> None:
        """Take note that a ring is gone; this may be called in the midst of anything."""
        self.lost = True

    def take(self, ring: "Ring[Any]") -> tuple[int, Any]:
        """Return a buffer, and the event from which on it is free, for what a ring needs now."""
        for other in [each for each in self.rings if each is not ring]:
            other.leave()
        if not self.free:
            longest = max(self.rings, key=lambda each: (each is not ring, len(each.coming)))
            if longest.coming:
                longest.drop_last()
            else:  # a ring has gone just now
                self.recover()
        return self.free.popleft()


class Ring(Generic[V]):
    """Units in the order in which passes use them, again and again; the next ones come while one is used.

    Whoever uses it holds the model's lock. A unit that is asked for out of order is waited for.
    """

    def __init__(self, units: Sequence[Unit[V]], pool: Pool) -> None:
        """Bring units into the buffers of a pool; nothing comes before a unit is asked for."""
        assert max(each.nbytes for each in units) <= pool.size, "a unit is larger than the buffers"
        self.units, self.pool = units, pool
        self.views: dict[tuple[int, int], V] = {}  # of a unit in a buffer
        self.coming: deque[tuple[int, int, Any]] = deque()  # unit, buffer, arrival
        self.held: tuple[int, int] | None = None  # the unit in use, and its buffer
        pool.rings.add(self)
        weakref.finalize(self, pool.lose).atexit = False

    def enter(self, number: int) -> V:
        """Return the views of a unit, waiting until it is there; the last one's are not to be used any more.

        Raises FileError where it cannot be read; it may be asked for again.
        """
        if self.pool.sound:
            if self.held is not None and self.held[0] == number:
                return self.views[self.held]
        else:
            self.pool.recover()
        self.pool.midway = True  # also after an error, so that the next entry begins with free buffers
        found = self._enter(number)
        self.pool.midway = False
        return found

    def _enter(self, number: int) -> V:
        self.leave()
        while self.coming and self.coming[0][0] != number:
            self._drop(self.coming.popleft())
        if not self.coming:
            self._send(number, *self.pool.take(self))
        self.pool.mover.wait(self.coming[0][2])
        unit, buffer, _ = self.coming.popleft()
        self.held = unit, buffer
        self._send_ahead()
        return self.views[unit, buffer]

    def leave(self) -> None:
        """Let the buffer of the unit in use take another one."""
        if self.held is not None:
            self.pool.free.append((self.held[1], self.pool.mover.used()))
            self.held = None

    def drop_last(self) -> None:
        """Let the buffer of the unit that was to come last take another one."""
        self._drop(self.coming.pop())

    def _send_ahead(self) -> None:
        assert self.held is not None
        last = self.coming[-1][0] if self.coming else self.held[0]
        while self.pool.free and len(self.coming) + 1 < len(self.units):
            last = (last + 1) % len(self.units)
            self._send(last, *self.pool.free.popleft())

    def _send(self, number: int, buffer: int, event: Any) -> None:
        if (number, buffer) not in self.views:
            self.views[number, buffer] = self.units[number].views(self.pool.memories[buffer])
        memory, views = self.pool.memories[buffer], self.views[number, buffer]
        self.coming.append((number, buffer, self.pool.mover.send(self.units[number], views, memory, event)))

    def _drop(self, coming: tuple[int, int, Any]) -> None:
        """Wait for a unit that is not used after all."""
        with suppress(Exception):  # whoever asks for this unit is told
            self.pool.mover.wait(coming[2])
        self.pool.free.append((coming[1], self.pool.mover.used()))
