"""The library's table of kernels, and what Python refuses before a call reaches the library."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

from sirius.errors import UnsupportedModelError
from sirius.kernels import cpu, ops, reference
from sirius.kernels.launch import Kernel, Launch

needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")

X, PLACES, FLAGS = torch.ones(12), torch.arange(3), torch.ones(3, dtype=torch.bool)
BYTES, WORDS = torch.ones(3, dtype=torch.uint8), torch.ones(3, dtype=torch.int32)
SIZES = (ctypes.c_int64 * 3)(1, 2, 3)
EVERY = Kernel(7, "ipnbfcw")  # an argument of each kind
RIGHT = 3, X, PLACES, FLAGS, 0.5, BYTES, WORDS
WRONG = {  # for each kind, by its place in EVERY
    0: [X, torch.tensor(3), 1.5, None, "3", SIZES],
    1: [3, 0.5, "x", X.numpy(), SIZES, [1.0]],
    2: [3, 0.5, X, FLAGS, PLACES.int(), (ctypes.c_int32 * 3)(), (ctypes.c_double * 3)(), [1]],
    3: [3, 0.5, X, PLACES, FLAGS.to(torch.uint8), SIZES],
    4: [X, torch.tensor(0.5), None, "0.5", SIZES],
    5: [3, X, PLACES, FLAGS, BYTES.to(torch.int8), SIZES],
    6: [3, X, PLACES, BYTES, X, SIZES],
}


def never(*arguments: object) -> int:
    raise AssertionError("the call reached the library")


def slots_of(*arguments: object) -> list[int]:
    return list(Launch.of(never, EVERY, arguments).slots)


def test_each_kind_of_argument_is_one_number_of_the_call():
    real = ctypes.c_double(0.5)
    bits = ctypes.c_int64.from_buffer(real).value
    want = [7, 3, X.data_ptr(), PLACES.data_ptr(), FLAGS.data_ptr(), bits, BYTES.data_ptr(), WORDS.data_ptr()]
    assert slots_of(*RIGHT)[:9] == [*want, 0]
    assert slots_of(True, X, SIZES, None, 1, None, None)[1:5] == [1, X.data_ptr(), ctypes.addressof(SIZES), 0]


@pytest.mark.parametrize(
    ("place", "wrong"), [(place, wrong) for place in WRONG for wrong in WRONG[place]], ids=lambda of: str(of)[:30]
)
def test_an_argument_of_another_kind_is_refused(place, wrong):
    with pytest.raises(TypeError):
        slots_of(*RIGHT[:place], wrong, *RIGHT[place + 1 :])


def test_another_number_of_arguments_is_refused():
    for wrong in (RIGHT[:-1], (*RIGHT, 1), ()):
        with pytest.raises(AssertionError, match="arguments for ipnbfcw"):
            slots_of(*wrong)


def test_numbers_of_two_dtypes_in_a_call_are_refused():
    with pytest.raises(AssertionError, match="several dtypes"):
        Launch.of(never, Kernel(0, "pp"), (X, X.bfloat16()))


def test_a_tensor_that_may_hold_anything_is_refused():
    class Wrapped(torch.Tensor):
        pass

    with pytest.raises(UnsupportedModelError, match="Wrapped"):
        Launch.of(never, Kernel(0, "p"), (X.as_subclass(Wrapped),))


@needs_kernels
def test_a_bias_of_another_dtype_does_not_reach_the_library(monkeypatch):
    monkeypatch.setattr(Launch, "__call__", never)
    x, weight = torch.ones(1, 4), torch.ones(3, 4)
    with pytest.raises(AssertionError, match="several dtypes"):
        cpu.linear(x, weight, torch.ones(3).bfloat16())


@needs_kernels
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LIBRARY", Path("libc.so.6"), "sirius_isa"),
        ("NEEDED", (*cpu.NEEDED, "later"), r"kernels missing: \['later'\]"),
        ("SLOTS", 21, "20 slots for 21"),
    ],
    ids=["no table", "a kernel missing", "slots"],
)
def test_a_library_of_another_version_is_none(monkeypatch, caplog, name, value, message):
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu, name, value)
    try:
        x, weight = torch.randn(2, 8), torch.randn(9, 8)
        assert cpu.library() is None and cpu.instructions() is None
        assert not cpu.fits(x, weight)
        assert torch.equal(ops.linear(x, weight), reference.linear(x, weight))
        [line] = caplog.messages
        assert re.search(f"no compiled CPU kernels .*{message}", line)
    finally:
        cpu.library.cache_clear()
