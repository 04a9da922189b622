"""A few buffers that take turns: while one unit of weights is used, the next ones are on their way."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
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


class ThreadMover(Mover):
    """Brings units by threads, into memory of the CPU."""

    def __init__(self, throttle: Throttle | None = None) -> None:
        super().__init__()
        self.throttle = throttle or Throttle(None)
        self.pool = ThreadPoolExecutor(READERS, thread_name_prefix="sirius-link")

    def memory(self, count: int) -> Tensor:
        return page_aligned(count)

    def send(self, unit: Unit[Any], views: Any, memory: Tensor, free: Any) -> list[Future[None]]:
        self.moved += unit.moved
        return [self.pool.submit(self._run, task) for task in unit.tasks(views, memory)]

    def wait(self, arrival: list[Future[None]]) -> None:
        wait(arrival)  # all of them, also where one failed: none may write later
        for each in arrival:
            each.result()

    def used(self) -> None:
        return None

    def _run(self, task: Task) -> None:
        with torch.inference_mode(False), torch.no_grad():
            self.throttle.passed(task())


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


class Ring(Generic[V]):
    """Units in the order in which passes use them, again and again; the next ones come while one is used.

    Whoever uses it holds the model's lock. Out of order, a unit is waited for as it comes.
    """

    def __init__(self, units: Sequence[Unit[V]], buffers: int, mover: Mover) -> None:
        """Hold `buffers` buffers for the largest unit; nothing comes before a unit is asked for."""
        self.units, self.mover = units, mover
        size = max(each.nbytes for each in units)
        memories = [mover.memory(size) for _ in range(min(buffers, len(units)))]
        self.views = [[unit.views(memory) for memory in memories] for unit in units]
        self.memories = memories
        self.free: deque[tuple[int, Any]] = deque((number, None) for number in range(len(memories)))
        self.coming: deque[tuple[int, int, Any]] = deque()  # unit, buffer, arrival
        self.held: tuple[int, int] | None = None  # the unit in use, and its buffer

    def enter(self, number: int) -> V:
        """Return the views of a unit, waiting until it is there; the last one's are not to be used any more.

        Raises FileError where it cannot be read; it may be asked for again.
        """
        if self.held is not None and self.held[0] == number:
            return self.views[number][self.held[1]]
        self.leave()
        while self.coming and self.coming[0][0] != number:
            self._drop()
        if not self.coming:
            self._send(number)
        _, buffer, arrival = self.coming[0]
        try:
            self.mover.wait(arrival)
        except BaseException:
            while self.coming:
                self._drop()
            raise
        self.coming.popleft()
        self.held = number, buffer
        self._send_ahead()
        return self.views[number][buffer]

    def leave(self) -> None:
        """Let the buffer of the unit in use take another one."""
        if self.held is not None:
            self.free.append((self.held[1], self.mover.used()))
            self.held = None

    def _send_ahead(self) -> None:
        assert self.held is not None
        last = self.coming[-1][0] if self.coming else self.held[0]
        while self.free and len(self.coming) + 1 < len(self.units):
            last = (last + 1) % len(self.units)
            self._send(last)

    def _send(self, number: int) -> None:
        buffer, event = self.free.popleft()
        arrival = self.mover.send(self.units[number], self.views[number][buffer], self.memories[buffer], event)
        self.coming.append((number, buffer, arrival))

    def _drop(self) -> None:
        """Wait for the unit that comes next, and let its buffer take another one."""
        _, buffer, arrival = self.coming.popleft()
        with suppress(Exception):  # whoever asks for this unit is told
            self.mover.wait(arrival)
        self.free.append((buffer, self.mover.used()))
