"""Buffers that take turns: units of weights come ahead in the order of a pass, by threads or a GPU's stream."""

import os
import subprocess
import sys
import threading
from time import perf_counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius.errors import FileError
from sirius.model.memory import page_aligned
from sirius.offload import ring
from sirius.offload.checkpoint import PAGE
from sirius.offload.ring import READERS, CudaMover, Mover, Order, Ring, ThreadMover, Throttle


class FakeMover(Mover):
    """Writes what it was asked for when that is waited for, and knows which buffers are being written to."""

    def __init__(self) -> None:
        super().__init__()
        self.writing: dict[int, list] = {}
        self.interrupted = 0  # calls until one is interrupted; 0: none

    def memory(self, count):
        return torch.zeros(count, dtype=torch.uint8)

    def send(self, unit, views, memory, free):
        self.tick()
        assert memory.data_ptr() not in self.writing, "a buffer is written to twice at the same time"
        self.writing[memory.data_ptr()] = list(unit.tasks(views, memory))
        self.tick()
        return memory.data_ptr()

    def wait(self, arrival):
        self.tick()
        for task in self.writing.pop(arrival):
            task()
        self.tick()

    def drop(self, unit, arrival):
        self.tick()
        del self.writing[arrival]

    def used(self):
        return None

    def stop(self):
        self.writing.clear()

    def tick(self):
        self.interrupted -= 1
        if self.interrupted == 0:
            raise KeyboardInterrupt


class FakeUnit:
    """A unit of some bytes of one number."""

    def __init__(self, number: int, size: int = 8) -> None:
        self.number, self.nbytes, self.moved, self.broken = number, size, size, False

    def views(self, memory):
        return memory[: self.nbytes]

    def tasks(self, views, memory):
        def write():
            if self.broken:
                raise FileError(f"unit {self.number} is broken")
            views.fill_(self.number)
            return self.nbytes

        yield write


def entered(ring: Ring, unit: FakeUnit, order: Order) -> Tensor:
    views = ring.enter(unit, order)
    assert set(views.tolist()) == {unit.number}
    return views


def check_buffers(ring: Ring) -> None:
    """Raise AssertionError where a buffer is nobody's, or belongs to two."""
    held = [ring.current[1]] if ring.current else []
    coming = [buffer for buffer, _ in ring.coming.values()]
    assert sorted([number for number, _ in ring.free] + held + coming) == list(range(ring.count))


def numbers(ring: Ring) -> set[int]:
    """Return the numbers of the units that are on their way."""
    return {unit.number for unit in ring.coming}


SIZES = st.tuples(st.integers(1, 4), st.integers(0, 4), st.integers(1, 4))  # of one order, of both, of the other one
ENTRIES = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 7), st.sampled_from(["", "", "", "broken", "new"])))


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.integers(2, 4), SIZES, ENTRIES, st.integers(0, 60))
def test_a_ring_gives_the_units_that_are_asked_for_in_any_order(count, sizes, entries, interrupted):
    """Where units fail, orders go and new ones come, and Ctrl-C interrupts anything."""
    ring, units = Ring(8, count, FakeMover()), [FakeUnit(number) for number in range(sum(sizes))]
    owned = units[: sizes[0] + sizes[1]], units[sizes[0] :]
    orders = [Order(each) for each in owned]
    ring.mover.interrupted = interrupted
    for which, number, what in entries:
        unit = owned[which][number % len(owned[which])]
        if what == "new":
            orders[which] = Order(owned[which])
        unit.broken = what == "broken"
        before = ring.current
        try:
            entered(ring, unit, orders[which])
            assert not unit.broken or (before is not None and before[0] is unit)
            check_buffers(ring)
        except FileError as error:
            assert str(error) == f"unit {unit.number} is broken" and unit.broken
        except KeyboardInterrupt:
            pass
        unit.broken = False
    ring.mover.interrupted = 0
    for each, order in zip(owned, orders, strict=True):
        [entered(ring, unit, order) for unit in each]
    check_buffers(ring)
    ring.recover()
    assert len(ring.free) == count and not ring.coming and not ring.current


def test_units_come_ahead_in_turn_while_one_is_used():
    ring, order = Ring(8, 3, FakeMover()), Order([FakeUnit(number) for number in range(4)])
    entered(ring, order.units[2], order)
    assert numbers(ring) == {3, 0}
    entered(ring, order.units[3], order)
    assert numbers(ring) == {0, 1}
    before = ring.mover.writing.copy()
    entered(ring, order.units[3], order)  # it is there already
    assert ring.mover.writing == before


def test_a_pass_of_another_kind_is_known_by_the_first_unit_that_is_its_own():
    ring, units = Ring(8, 3, FakeMover()), [FakeUnit(number) for number in range(6)]
    full, draft = Order(units), Order([units[0], own := FakeUnit(10), units[2], other := FakeUnit(12)])
    entered(ring, units[0], full)
    assert numbers(ring) == {1, 2}
    entered(ring, own, draft)
    assert numbers(ring) == {2, 12}, "the unit that both kinds use goes on coming"
    entered(ring, units[2], full)
    entered(ring, other, draft)
    entered(ring, units[0], full)
    assert numbers(ring) == {10, 2}, "the next draft pass is expected"
    entered(ring, units[1], full)
    assert numbers(ring) == {2, 3}


def test_buffers_of_an_order_that_is_gone_are_used_again():
    ring, kept = Ring(8, 3, FakeMover()), Order([FakeUnit(number) for number in range(5)])
    for _ in range(5):
        passing = Order([FakeUnit(9), FakeUnit(8), FakeUnit(7)])
        entered(ring, passing.units[0], passing)
        del passing
        entered(ring, kept.units[0], kept)
        check_buffers(ring)
        assert numbers(ring) == {1, 2}, "all three buffers are at work"


@pytest.mark.parametrize("sized", [1, 200])
def test_threads_bring_units_into_real_buffers(sized):
    ring = Ring(sized * PAGE, 3, ThreadMover())
    units = [FakeUnit(number, sized * PAGE) for number in range(6)]
    order = Order(units)
    for number in [*range(6), 0, 3, 3, 5, *range(6)]:
        entered(ring, units[number], order)
    units[3].broken = True
    with pytest.raises(FileError, match="unit 3 is broken"):
        entered(ring, units[3], order)
    units[3].broken = False
    [entered(ring, units[number], order) for number in (3, 4, 2)]
    assert ring.mover.moved >= 17 * sized * PAGE


def test_what_was_not_brought_of_a_unit_that_is_dropped_is_not_counted():
    began, go = threading.Event(), threading.Event()

    class Parts(FakeUnit):
        def tasks(self, views, memory):
            return [lambda: (began.set(), go.wait(10), 10)[-1]] * 9

    mover, unit = ThreadMover(), Parts(1, 90)
    arrival = mover.send(unit, None, None, None)
    assert began.wait(10) and mover.moved == 90
    threading.Timer(0.2, go.set).start()
    mover.drop(unit, arrival)
    assert all(each.done() for each in arrival) and 10 <= mover.moved <= 10 * READERS


class FakeStream:
    """A stream of a GPU, and who waited for what on it, in order."""

    def __init__(self, log: list, name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event):
        self.log.append(("wait", self.name, event))

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("count", [2, 3])
def test_a_gpus_copies_wait_for_the_last_use_of_a_buffer_and_each_use_waits_for_its_copy(monkeypatch, count):
    log: list = []
    compute = FakeStream(log, "compute")

    class Event:
        def record(self, stream):
            log.append(("record", stream.name, self))

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, "copies"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(CudaMover, "memory", lambda self, count: page_aligned(count))

    class Copied(FakeUnit):
        def tasks(self, views, memory):
            yield lambda: log.append(("copy", memory.data_ptr(), None))

    ring, order = Ring(8, count, CudaMover(torch.device("cpu"))), Order([Copied(number) for number in range(4)])
    draft = Order([order.units[0], Copied(9)])
    for unit, kind in [*((each, order) for each in order.units * 2), *((each, draft) for each in draft.units * 2)]:
        log.append(("use", ring.enter(unit, kind).data_ptr(), None))
    uses = [place for place, entry in enumerate(log) if entry[0] == "use"]
    for place in [place for place, entry in enumerate(log) if entry[0] == "copy"]:
        last = max([use for use in uses if use < place and log[use][1] == log[place][1]], default=None)
        assert last is None or waited(log, "compute", last, "copies", place)
    for place in uses:
        copied = max(at for at in range(place) if log[at][:2] == ("copy", log[place][1]))
        assert waited(log, "copies", copied, "compute", place)


def waited(log: list, done_on: str, after: int, waits: str, before: int) -> bool:
    """Tell whether a stream waited, between two entries of the log, for an event that another one recorded there."""
    events = [event for kind, name, event in log[after + 1 : before] if (kind, name) == ("record", done_on)]
    return any((kind, name) == ("wait", waits) and event in events for kind, name, event in log[after + 1 : before])


def test_threads_end_with_their_mover_and_what_is_left_to_bring_is_not_brought():
    before, began, go = set(threading.enumerate()), threading.Semaphore(0), threading.Event()
    brought = []

    class Slow(FakeUnit):
        def tasks(self, views, memory):
            for part in range(10):
                yield lambda part=part: (began.release(), go.wait(10), brought.append(part), 0)[-1]

    mover = ThreadMover()
    mover.send(Slow(1), None, None, None)
    began.acquire(timeout=10)
    del mover
    go.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
    assert len(brought) < 10


PROGRAM = """
import os, sys
from sirius.offload.ring import Order, Ring, ThreadMover, Throttle

class Unit:
    nbytes = moved = 100

    def __init__(self, number):
        self.number, self.parts = number, 1

    def views(self, memory):
        return memory

    def tasks(self, views, memory):
        return [lambda: views.fill_(self.number) is None or 100] * self.parts

units = [Unit(number) for number in range(9)]
ring, order = Ring(100, 3, ThreadMover(Throttle(1000.0))), Order(units)
assert set(ring.enter(units[0], order).tolist()) == {0}
if not (child := os.fork()):
    assert all(set(ring.enter(units[number], order).tolist()) == {number} for number in (5, 6))
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert set(ring.enter(units[0], order).tolist()) == {0}, "the child wrote into its parent's buffers"
for unit in units[5:]:
    unit.parts = 100
assert set(ring.enter(units[4], order).tolist()) == {4}
print("there", flush=True)
"""


def test_a_forked_process_brings_units_too_and_a_process_ends_while_units_are_on_their_way():
    """The units to come next would take 20 seconds, and a part of them a tenth."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"there\n"
        began = perf_counter()
        assert process.wait(60) == 0
        assert perf_counter() - began < 5


def test_a_throttle_lets_bytes_pass_at_its_rate_all_threads_together(monkeypatch):
    clock = SimpleNamespace(now=100.0, slept=[])
    clock.perf_counter = lambda: clock.now
    clock.sleep = clock.slept.append
    monkeypatch.setattr(ring, "time", clock)
    throttle = Throttle(1000.0)
    throttle.passed(500)
    throttle.passed(250)  # as another thread would, while the first one sleeps
    assert clock.slept == [0.5, 0.75]
    clock.now += 10
    throttle.passed(100)
    assert clock.slept[2] == pytest.approx(0.1), "time without transfers is not saved up"
    Throttle(None).passed(10**12)
    assert len(clock.slept) == 3
