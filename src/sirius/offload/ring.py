"""A few buffers that take turns: while one unit of weights is used, the next ones are on their way."""

import os
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures import thread as executors
from threading import Lock
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sirius.model.memory import page_aligned

V = TypeVar("V")
CHUNK = 1 << 23  # bytes that a thread brings at a time
READERS = 3  # threads; a disk gives its bandwidth to several reads at a time
Task = Callable[[], int]  # brings a part of a unit and returns its bytes


class Unit(Protocol[V]):
    """Weights that come and go together, as those of one MLP do; equal to no other unit.

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
    def drop(self, unit: Unit[Any], arrival: Any) -> None:
        """Bring no more of a unit than has begun; return when its buffer may be given to `send` with no event."""

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
        return page_aligned(count).zero_()  # a system may find fresh pages more slowly than a disk reads

    def send(self, unit: Unit[Any], views: Any, memory: Tensor, free: Any) -> list[Future[int]]:
        self.moved += unit.moved
        return [self.threads.submit(_run, task, self.throttle) for task in unit.tasks(views, memory)]

    def wait(self, arrival: list[Future[int]]) -> None:
        wait(arrival)  # all of them, also where one failed: none may write later
        for each in arrival:
            each.result()

    def drop(self, unit: Unit[Any], arrival: list[Future[int]]) -> None:
        begun = [each for each in arrival if not each.cancel()]
        wait(begun)
        self.moved -= unit.moved - sum(each.result() for each in begun if each.exception() is None)

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


def copy(source: Tensor, target: Tensor) -> int:
    """Copy bytes [n] uint8 of the host's memory, to a GPU without waiting for it; return how many they are."""
    if target.device.type == "cpu":
        np.copyto(target.numpy(), source.numpy())
    else:
        target.copy_(source, non_blocking=True)
    return len(target)


def _run(task: Task, throttle: Throttle) -> int:
    """Bring a part of a unit and return its bytes."""
    if getattr(executors, "_shutdown", False):  # the interpreter ends, and waits for the threads of executors
        raise RuntimeError("no weights are brought while the interpreter shuts down")
    with torch.inference_mode(False), torch.no_grad():
        throttle.passed(count := task())
    return count


class CudaMover(Mover):
    """Brings units from pinned memory of the host to a GPU, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.stream = device, torch.cuda.Stream(device)

    def memory(self, count: int) -> Tensor:
        memory = torch.empty(count, dtype=torch.uint8, device=self.device)
        memory.record_stream(self.stream)  # else it could serve another tensor while a copy still writes to it
        return memory

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

    def drop(self, unit: Unit[Any], arrival: Any) -> None:
        return None  # what is sent next begins when this has come: one stream carries both

    def used(self) -> Any:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def stop(self) -> None:
        self.stream.synchronize()


class Order(Generic[V]):
    """Units in the order in which passes of one kind use them, again and again."""

    def __init__(self, units: Iterable[Unit[V]]) -> None:
        """Take units in their order; each one is used once in a pass."""
        self.units = tuple(units)
        self.places = {unit: place for place, unit in enumerate(self.units)}

    def after(self, unit: Unit[V], count: int) -> list[Unit[V]]:
        """Return the units that follow one, so many or all others."""
        place = self.places[unit]
        return [*self.units[place + 1 :], *self.units[:place]][:count]


class Ring:
    """A few buffers in which units come; while one unit is used, those that follow it are on their way.

    Passes of several kinds, each with an order of its own, may use the same units. Which kind a pass is shows at the
    first unit that is not in the order of the pass before. A unit that nobody expected is waited for.
    Whoever uses a ring holds the model's lock.

    memories  the buffers [size] uint8, made when the first unit is sent
    free      buffers in which nothing is, each with the event from which on it may be written to
    coming    units on their way or there, each with its buffer and arrival
    current   the unit in use, and its buffer
    midway    buffers are being handed on; where that was interrupted, as by Ctrl-C, it stays True
    """

    def __init__(self, size: int, count: int, mover: Mover) -> None:
        """Have `count` buffers of `size` bytes, where passes read weights."""
        self.size, self.count, self.mover = size, count, mover
        self.memories: list[Tensor] = []
        self.free: deque[tuple[int, Any]] = deque()
        self.coming: dict[Unit[Any], tuple[int, Any]] = {}
        self.current: tuple[Unit[Any], int] | None = None
        self.views: weakref.WeakKeyDictionary[Unit[Any], dict[int, Any]] = weakref.WeakKeyDictionary()
        self.order: weakref.ref[Order[Any]] | None = None  # of the pass at work; what it is of may be gone
        self.midway, self.process = True, os.getpid()  # `recover` makes the buffers

    def enter(self, unit: Unit[V], order: Order[V]) -> V:
        """Return the views of a unit, waiting until it is there; those of the last one are not to be used any more.

        order  that of the only kind of passes that use this unit, or of one of them

        Raises FileError where it cannot be read; it may be asked for again.
        """
        if self.midway or self.process != os.getpid():
            self.recover()
        elif self.current is not None and self.current[0] is unit:
            return self.views[unit][self.current[1]]
        self.midway = True  # also after an error, so that the next entry begins with free buffers
        found = self._enter(unit, order)
        self.midway = False
        return found

    def leave(self) -> None:
        """Let the buffer of the unit in use take another one."""
        if self.current is not None:
            self.free.append((self.current[1], self.mover.used()))
            self.current = None

    def recover(self) -> None:
        """Let every buffer be there and free, whatever was interrupted. A forked process has none of the threads."""
        self.mover.stop()
        self.coming.clear()
        self.current = None
        self.memories += [self.mover.memory(self.size) for _ in range(self.count - len(self.memories))]
        self.free = deque((number, self.mover.used()) for number in range(self.count))
        self.process = os.getpid()

    def _enter(self, unit: Unit[V], order: Order[V]) -> V:
        self.leave()
        now = self.order() if self.order is not None else None
        if now is None or unit not in now.places:
            now, self.order = order, weakref.ref(order)
        ahead = now.after(unit, self.count - 1)
        for each in self.coming.keys() - {unit, *ahead}:
            buffer, arrival = self.coming.pop(each)
            self.mover.drop(each, arrival)
            self.free.append((buffer, None))
        for each in (unit, *ahead):
            if each not in self.coming:
                self._send(each)
        buffer, arrival = self.coming.pop(unit)
        self.mover.wait(arrival)
        self.current = unit, buffer
        return self.views[unit][buffer]

    def _send(self, unit: Unit[Any]) -> None:
        assert unit.nbytes <= self.size, f"a unit of {unit.nbytes} bytes is larger than the buffers of {self.size}"
        buffer, free = self.free.popleft()
        views = self.views.setdefault(unit, {})
        if buffer not in views:
            views[buffer] = unit.views(self.memories[buffer])
        self.coming[unit] = buffer, self.mover.send(unit, views[buffer], self.memories[buffer], free)
