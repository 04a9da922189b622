"""Checkpoints read in part: bytes of files, tensors by name and rows, and layers as they lie in a buffer."""

import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sirius.errors import FileError, ModelError
from sirius.model.memory import page_aligned
from sirius.offload.checkpoint import PAGE, File, read_checkpoint
from sirius.offload.ring import CHUNK
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
