"""Offloading piece by piece: files read in parts, buffers that take turns, and shelves for what drafts read."""

import errno
import gc
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from sirius.errors import FileError, ModelError
from sirius.kernels.quantized import dequantize, quantize
from sirius.model.matrix import Dense, Neurons
from sirius.model.memory import page_aligned
from sirius.offload import checkpoint, ring, shelf
from sirius.offload.checkpoint import PAGE, File, read_checkpoint
from sirius.offload.ring import CHUNK, READERS, CudaMover, Mover, Order, Ring, ThreadMover, Throttle
from sirius.offload.shelf import BlockShelf, FileStore, HostStore
from sirius.offload.stream import BlockPart, HostPart, Streamed

SHM = Path("/dev/shm")
GENERATOR = torch.Generator().manual_seed(0)


# --- files


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A file whose size is a multiple of nothing."""
    path = tmp_path_factory.mktemp("written") / "file"
    path.write_bytes(np.random.default_rng(0).bytes(5 * PAGE + 123))
    return path


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 5 * PAGE + 123), st.integers(0, 3 * PAGE), st.booleans())
def test_any_bytes_of_a_file_are_read_past_the_cache_or_through_it(written, begin, count, direct):
    file, content = File(written), written.read_bytes()
    file.direct &= direct
    count = min(count, len(content) - begin)
    assert file.read(begin, count).tobytes() == content[begin : begin + count]


@pytest.mark.skipif(not SHM.is_dir(), reason="no file system in memory")
def test_a_file_system_that_cannot_be_read_past_its_cache_is_read_through_it(monkeypatch):
    path, opened = SHM / f"sirius-test-{os.getpid()}", os.open

    def refused(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    try:
        path.write_bytes(bytes(range(256)) * 40)
        file = File(path)
        assert file.read(9999, 241).tobytes() == (bytes(range(256)) * 40)[9999:]
        assert not file.direct
    finally:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
def test_a_read_that_gives_less_than_was_asked_for_is_gone_on_with(written, monkeypatch, direct):
    file, content = File(written), written.read_bytes()
    preadv = os.preadv
    file.direct &= direct
    file.open()

    def little(handle, into, at):
        found = min(preadv(handle, into, at), PAGE + 512 if direct else 77)  # a disk gives blocks, a network anything
        into[0][found:] = bytes(len(into[0]) - found)
        return found

    monkeypatch.setattr(os, "preadv", little)
    assert file.read(10, 4 * PAGE).tobytes() == content[10 : 10 + 4 * PAGE]


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "cached"])
@pytest.mark.parametrize("left", [0, 1000, PAGE, 2 * PAGE + 1])
def test_a_file_that_is_cut_off_after_it_was_opened_is_named_with_the_byte(tmp_path, direct, left):
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    file = File(path)
    file.direct &= direct
    file.read(0, 4 * PAGE)
    os.truncate(path, left)
    with pytest.raises(FileError, match=rf"file ends at byte {left}, and {3 * PAGE + 10} are needed; it was cut off"):
        file.read(10, 3 * PAGE)
    path.write_bytes(bytes([7]) * 4 * PAGE)  # the same file, whole again
    assert set(file.read(10, 3 * PAGE).tobytes()) == {7}


def test_a_file_that_is_not_there_or_fails_is_named(tmp_path, written, monkeypatch):
    with pytest.raises(FileError, match=r"cannot read .*nothing at byte 0: No such file"):
        File(tmp_path / "nothing").read(5, 5)
    with pytest.raises(FileError, match=r"cannot open .*nothing: No such file"):
        File(tmp_path / "nothing").open()
    file = File(written)
    file.open()
    monkeypatch.setattr(os, "preadv", failing(errno.EIO))
    with pytest.raises(FileError, match=r"cannot read .*file at byte 4096: Input/output error"):
        file.read(5000, 10)


def failing(number: int):
    """Return what raises an error of the system in place of one of its calls."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def test_files_are_closed_when_nobody_reads_them_any_more(written):
    before = len(os.listdir("/proc/self/fd"))
    files = [File(written) for _ in range(5)]
    for file in files:
        file.read(0, 10)
    assert len(os.listdir("/proc/self/fd")) == before + 5
    del files, file
    assert len(os.listdir("/proc/self/fd")) == before


def test_threads_read_one_file_at_the_same_time(written):
    file, content, wrong = File(written), written.read_bytes(), []

    def read(seed):
        draw = np.random.default_rng(seed)
        for _ in range(200):
            begin = int(draw.integers(0, len(content) - 1000))
            if file.read(begin, 1000).tobytes() != content[begin : begin + 1000]:
                wrong.append(begin)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    [each.start() for each in threads]
    [each.join() for each in threads]
    assert not wrong


# --- checkpoints

TENSORS = {
    "a": torch.randn(7, 5, generator=GENERATOR),
    "b": torch.randn(33, generator=GENERATOR).bfloat16(),
    "c": torch.tensor(1.5),
    "d": torch.randn(3, 2, 2, generator=GENERATOR).half(),
    "e": torch.arange(4),
}


def rewrite(path: Path, change) -> None:
    """Change the header of a safetensors file, and leave its data as they are."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def test_tensors_of_a_file_are_found_whole_and_by_rows(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    rewrite(tmp_path / "model.safetensors", lambda header: {**header, "__metadata__": {"odd": "x"}})
    found = read_checkpoint(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, want in TENSORS.items():
        assert torch.equal(found[name].whole(), want) and found[name].nbytes == want.nbytes
    assert torch.equal(found["a"].rows(2, 6), TENSORS["a"][2:6])
    assert list(found["a"].chunks(45)) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert list(found["a"].chunks(1)) == [(row, row + 1) for row in range(7)]


def test_a_tensor_larger_than_a_chunk_is_read_in_parts(tmp_path):
    save_file({"a": torch.arange(3 * CHUNK // 4).view(-1, 48).int()}, tmp_path / "model.safetensors")
    [stored] = read_checkpoint(tmp_path).values()
    assert torch.equal(stored.whole().flatten(), torch.arange(3 * CHUNK // 4).int())


def test_an_index_names_the_files_and_others_are_not_looked_at(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    (tmp_path / "other.safetensors").write_text("rubbish")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    assert read_checkpoint(tmp_path).keys() == {"a", "b"}
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lacks 1 of 2 files of weights, first two.safetensors; fetch the model anew"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 9999])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index.json is no index of weights: .*; fetch the model anew"):
        read_checkpoint(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "consolidated.safetensors")
    with pytest.raises(ModelError, match=r"lacks 1 of 1 files of weights, first model.safetensors"):
        read_checkpoint(tmp_path)


def moved(name: str, begin: int, end: int):
    return lambda header: {**header, name: {**header[name], "data_offsets": [begin, end]}}


def described(**changes: object):
    return lambda header: {**header, "a": {**header["a"], **changes}}


BROKEN = {
    "no object": lambda header: [1],
    "no description": lambda header: {**header, "a": 5},
    "no offsets": lambda header: {**header, "a": {"dtype": "F32", "shape": [7, 5]}},
    "another shape": described(shape=[7, 6]),
    "a negative shape": described(shape=[-7, -5]),
    "a shape of fractions": described(shape=[7.0, 5.0]),
    "offsets before the file": moved("a", -140, 0),
    "offsets in turn": moved("a", 140, 0),
    "offsets that overlap": moved("b", 100, 166),
    "offsets of text": described(data_offsets=["0", "140"]),
    "one offset": described(data_offsets=[0]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_header_that_contradicts_itself_is_refused(tmp_path, name):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, path := tmp_path / "model.safetensors")
    rewrite(path, BROKEN[name])
    with pytest.raises(ModelError, match=r"model.safetensors is no safetensors file: .*; fetch the file anew"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"abc", b"\xff" * 100, (90).to_bytes(8, "little") + b"x" * 40, b"\1" + bytes(20)])
def test_a_file_that_is_none_of_safetensors_is_refused(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(ModelError, match=r"model.safetensors is no safetensors file"):
        read_checkpoint(tmp_path)


def test_a_truncated_file_is_refused_with_both_sizes(tmp_path):
    save_file({"a": TENSORS["a"]}, path := tmp_path / "model.safetensors")
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(ModelError, match=rf"cut off: it has {size - 1} bytes, and a ends at {size}; fetch the file"):
        read_checkpoint(tmp_path)


def test_numbers_of_unknown_kinds_are_left_to_whoever_needs_them(tmp_path):
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, path := tmp_path / "model.safetensors")
    rewrite(path, described(dtype="F4"))
    assert read_checkpoint(tmp_path).keys() == {"b"}


# --- layers as they lie in a buffer


def stored_mlp(folder: Path, dtype: torch.dtype, hidden: int = 24, neurons: int = 40):
    """Return a gated MLP's weights, and where they are stored."""
    shapes = {"gate": (neurons, hidden), "up": (neurons, hidden), "down": (hidden, neurons)}
    weights = {name: torch.randn(shape, generator=GENERATOR).to(dtype) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return weights, read_checkpoint(folder)


@pytest.mark.parametrize("held", [False, True], ids=["files", "host"])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_an_mlp_lies_in_a_buffer_neuron_by_neuron(tmp_path, stored, dtype, beside, held):
    weights, where = stored_mlp(tmp_path, stored)
    layers = [
        Streamed(1, where["gate"]),
        Streamed(2, where["up"]),
        Streamed(3, where["down"], transposed=True, beside=beside),
    ]
    part = BlockPart(layers, dtype)
    unit = HostPart(part) if held else part
    memory = page_aligned(unit.nbytes + 5 * PAGE)
    memory.fill_(255)  # as numbers: NaN
    views = unit.views(memory)
    assert sum(task() for task in unit.tasks(views, memory)) == unit.moved
    assert unit.moved == (part.nbytes if held else sum(each.nbytes for each in weights.values()))
    for key, want in {1: weights["gate"], 2: weights["up"], 3: weights["down"].t()}.items():
        assert torch.equal(views[key], want.to(dtype))
        assert views[key].stride() == ((48 if beside and key > 1 else 24), 1)
        assert views[key].data_ptr() % (64 if not beside else dtype.itemsize) == 0
    assert bool((memory[unit.nbytes :] == 255).all()), "what is behind it is another one's"
    if beside:
        assert views[3].data_ptr() - views[2].data_ptr() == 24 * dtype.itemsize


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name_however_often_they_are_asked_for(tmp_path, value):
    weights, _ = stored_mlp(tmp_path, torch.bfloat16)
    weights["up"][17, 3] = value
    save_file(weights, tmp_path / "model.safetensors")
    part = BlockPart([Streamed(key, each) for key, each in read_checkpoint(tmp_path).items()], torch.bfloat16)
    memory = page_aligned(part.nbytes)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"up, rows 0 to 40: numbers that are not finite"):
            [task() for task in part.tasks(part.views(memory), memory)]


# --- buffers


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


# --- shelves


def linears(count: int, blocks: int) -> tuple[list[nn.Linear], dict[int, int]]:
    layers = [nn.Linear(2, 2) for _ in range(count * blocks)]
    return layers, {id(each): number // count for number, each in enumerate(layers)}


STORES = {"host": lambda folder: HostStore(), "file": FileStore}


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_weights_come_back_from_a_shelf_as_they_were(tmp_path, store, bits):
    layers, blocks = linears(2, 4)
    shelf = BlockShelf(blocks, partial(STORES[store], tmp_path), Ring(1 << 20, 2, ThreadMover()), {})
    weights = {id(each): torch.randn(9 + i, 65 * i + 3, generator=GENERATOR) for i, each in enumerate(layers)}
    for each in layers:
        assert shelf.takes(each) and not shelf.takes(nn.Linear(1, 1))
        shelf.put(each, quantize(weights[id(each)], bits))
    for each in [*layers, *layers, layers[5], layers[0]]:
        got, want = shelf.get(each), quantize(weights[id(each)], bits)
        assert (got.bits, got.length) == (want.bits, want.length)
        assert all(torch.equal(part, own) for part, own in zip(got[:3], want[:3], strict=True))
        assert torch.equal(dequantize(got), dequantize(want))
    assert not list(tmp_path.iterdir()), "the file has no name"


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(13, 36), (3, 13, 36)], ids=["one set", "three sets"])
def test_kept_neurons_come_back_from_a_shelf_as_they_were(tmp_path, store, biased, shape):
    layers, blocks = linears(1, 5)
    shelf = BlockShelf(blocks, partial(STORES[store], tmp_path), Ring(1 << 20, 2, ThreadMover()), {})

    def made(number: int) -> Neurons:
        draw = torch.Generator().manual_seed(number)
        biases = [torch.randn(shape[:-1], generator=draw) if biased else None for _ in range(2)]
        biases.append(torch.randn(36, generator=draw) if biased else None)
        return Neurons(*(Dense(torch.randn(shape, generator=draw).bfloat16(), bias) for bias in biases))

    for number, each in enumerate(layers):
        shelf.put(each, made(number))
    for number in (0, 1, 2, 3, 4, 0, 4):
        for got, want in zip(shelf.get(layers[number]), made(number), strict=True):
            assert torch.equal(got.weight, want.weight)
            assert (got.bias is want.bias is None) or torch.equal(got.bias, want.bias)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync"])
def test_a_full_disk_is_named_with_its_folder_and_a_way_out(tmp_path, monkeypatch, call):
    layers, blocks = linears(1, 3)
    shelf = BlockShelf(blocks, partial(FileStore, tmp_path), Ring(1 << 16, 2, ThreadMover()), {})
    value = quantize(torch.randn(8, 64, generator=GENERATOR), 4)
    shelf.put(layers[0], value)
    with monkeypatch.context() as full:
        full.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(FileError) as caught:
            shelf.put(layers[1], value)
    message = str(caught.value)
    assert str(tmp_path) in message and "No space left" in message
    assert "set TMPDIR to a folder with more room, or raise the memory budget" in message


def test_advice_that_the_system_does_not_take_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fadvise", failing(errno.EINVAL))
    read = FileStore(tmp_path).write([torch.arange(200).byte()])
    target = page_aligned(PAGE)
    assert read(0, target) == PAGE and torch.equal(target[:200], torch.arange(200).byte())


def test_a_folder_in_memory_is_passed_over_for_one_on_a_disk(tmp_path, monkeypatch):
    memory, disk, deep = tmp_path / "a b", tmp_path / "disk", tmp_path / "a b" / "deep"
    deep.mkdir(parents=True)
    disk.mkdir()
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\ntmpfs {str(memory).replace(' ', chr(92) + '040')} tmpfs rw 0 0\n")
    monkeypatch.setattr(shelf, "MOUNTS", mounts)
    monkeypatch.setattr(shelf, "LASTING", disk)
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    assert shelf.spare_folder() == disk
    monkeypatch.setattr(shelf, "LASTING", memory)
    with pytest.raises(FileError, match="deep is in memory, not on a disk; set TMPDIR to a folder on a disk"):
        FileStore()
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    assert shelf.spare_folder() == disk
    monkeypatch.setattr(shelf, "MOUNTS", tmp_path / "nothing")
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    assert shelf.spare_folder() == deep


def test_a_folder_that_the_environment_names_is_not_replaced_by_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    with pytest.raises(FileError, match=r"TMPDIR names .*nowhere, where no file can be made; set it to a folder on"):
        FileStore()


def test_a_folder_for_temporary_files_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileError, match=r"cannot make a temporary file: .*nowhere.*; set TMPDIR"):
        FileStore(tmp_path / "nowhere")


def test_a_temporary_file_that_cannot_be_opened_again_leaves_nothing_behind(tmp_path, monkeypatch):
    gc.collect()  # what other tests left
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(checkpoint.File, "_open", lambda self: failing(errno.EMFILE)())
    with pytest.raises(FileError, match="Too many open files"):
        FileStore(tmp_path)
    gc.collect()  # the exception holds it
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) <= before
