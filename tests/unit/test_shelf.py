"""What drafts read and memory has no room for comes back from its place as it was."""

import errno
import gc
import os
from functools import partial

import pytest
import torch
from torch import nn

from sirius.errors import FileError
from sirius.kernels.quantized import dequantize, quantize
from sirius.model.matrix import Dense, Neurons
from sirius.model.memory import page_aligned
from sirius.offload import checkpoint, shelf
from sirius.offload.checkpoint import PAGE
from sirius.offload.ring import Ring, ThreadMover
from sirius.offload.shelf import BlockShelf, FileStore, HostStore

GENERATOR = torch.Generator().manual_seed(0)


def failing(number: int):
    """Return what raises an error of the system in place of one of its calls."""

    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


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
