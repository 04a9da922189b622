"""The C++ kernels against their plain reference, at odd sizes, into memory full of NaN, by every instruction set."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius.kernels import cpu, dispatch, reference
from sirius.kernels.gated import Neurons, gated_mlp, gated_mlp_rows

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 5), (37, 64), (130, 97), (301, 520)]  # F, H
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}  # of the sum of magnitudes, and rounding


@pytest.fixture(autouse=True)
def fresh_memory_is_full_of_nan(monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *size, **options: empty(self, *size, **options).fill_(torch.nan)
    )


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def some(count: int, share: float) -> torch.Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order[: round(share * count)].sort().values


def close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Both are sums of products; rounding is bounded by the sum of the products' magnitudes."""
    assert got.shape == want.shape
    bound = TOLERANCE[got.dtype] * (magnitude + want.abs()) + 1e-7
    assert bool(((got.double() - want).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_products_equal_the_reference(dtype, size, share, bias):
    f, h = size
    weight = random(dtype, f, h, seed=1)
    index = None if share is None else some(f, share)
    count = f if index is None else len(index)
    for rows in (1, 2, 3, 4, 5, 7, 16, 17):
        x, z = random(dtype, rows, h), random(dtype, rows, count, seed=2)
        of_f, of_h = (random(dtype, n, seed=3) if bias else None for n in (f, h))
        got = cpu.linear(x, weight, of_f, index)
        want = reference.linear(x.double(), weight.double(), None if of_f is None else of_f.double(), index)
        close(got, want, reference.linear(x.double().abs(), weight.double().abs(), None, index))
        got = cpu.project(z, weight, of_h, index)
        want = reference.project(z.double(), weight.double(), None if of_h is None else of_h.double(), index)
        close(got, want, reference.project(z.double().abs(), weight.double().abs(), None, index))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_row_is_the_same_bit_for_bit_in_any_company_and_with_any_threads(dtype, threads):
    weight, x, z = random(dtype, 301, 520), random(dtype, 23, 520), random(dtype, 23, 301)
    index = some(301, 0.4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        together = [cpu.linear(x, weight), cpu.project(z, weight), cpu.linear(x, weight, None, index)]
    finally:
        torch.set_num_threads(before)
    for row in range(23):
        assert torch.equal(together[0][row], cpu.linear(x[row], weight))
        assert torch.equal(together[1][row], cpu.project(z[row], weight))
        assert torch.equal(together[2][row], together[0][row, index])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_out_of_range_are_told_and_not_hidden(dtype):
    weight = torch.full((5, 9), torch.finfo(dtype).max, dtype=dtype)
    x = torch.tensor([[1.0] * 9, [-1.0] * 9, [float("nan")] * 9, [0.0] * 9]).to(dtype)
    got = cpu.linear(x, weight)
    assert got[0].isposinf().all() and got[1].isneginf().all() and got[2].isnan().all() and (got[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_widened_and_rounded_as_torch_does(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    ones = torch.ones(1, 1, dtype=dtype)
    numbers = every[every.isfinite()]
    assert torch.equal(cpu.linear(numbers[:, None], ones)[:, 0], numbers)
    weight = random(torch.float32, 4099, 1).double() * 10.0 ** torch.arange(-9, 5).repeat(293)[:4099, None]
    parts = torch.stack([weight.to(dtype), (weight - weight.to(dtype).double()).to(dtype)], 2)[:, 0]
    got = cpu.linear(torch.ones(1, 2, dtype=dtype), parts.contiguous())
    assert torch.equal(got[0], parts.float().sum(1).to(dtype))


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1e9, width=32), min_size=1, max_size=70), st.data())
def test_the_largest_are_found_with_ties_to_the_first(values, data):
    count = data.draw(st.integers(1, len(values)))
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert cpu.largest(torch.tensor(values), count).tolist() == sorted(order)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 4096, 8191])
def test_the_largest_of_16_bit_values_are_those_of_the_same_values_in_float32(dtype, count):
    values = random(dtype, 8192).abs()  # many are equal
    assert torch.equal(cpu.largest(values, count), cpu.largest(values.float(), count))


def test_nan_is_among_the_largest():
    values = random(torch.float32, 9).abs()
    values[5] = torch.nan
    for dtype in DTYPES:
        assert cpu.largest(values.to(dtype), 1).tolist() == [5]


def test_the_largest_of_many_rows_equal_the_reference():
    values = random(torch.float32, 3, 2, 14_336).abs()
    assert torch.equal(cpu.largest(values, 7000), reference.largest(values, 7000))
    assert torch.equal(cpu.largest(values, 14_336), torch.arange(14_336).expand(3, 2, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_mlp_of_some_neurons_is_that_of_copies_of_them(dtype):
    gate, up, down = (random(dtype, 45, 37, seed=s) for s in range(3))
    biases = [random(dtype, n, seed=9) for n in (45, 45, 37)]
    neurons, index = Neurons(gate, up, down, *biases), some(45, 0.4)
    x, act = random(dtype, 2, 3, 37), torch.nn.functional.silu
    want = gated_mlp(x, neurons.rows(index), act)
    assert torch.equal(gated_mlp(x, neurons, act, index), want)
    gated = act(dispatch.linear(x, gate, biases[0]))
    assert torch.equal(gated_mlp_rows(gated, x, neurons, index), want)


def test_the_kernels_are_taken_where_they_fit_and_nowhere_else():
    weight, x = random(torch.float32, 9, 8), random(torch.float32, 2, 8)
    fits = {
        "as it is": (cpu.fits(x, weight), True),
        "other dtypes": (cpu.fits(x, weight.half()), False),
        "float64": (cpu.fits(x.double(), weight.double()), False),
        "a transposed weight": (cpu.fits(x, random(torch.float32, 8, 9).t()), False),
        "a stack": (cpu.fits(x, weight[None]), False),
        "meta": (cpu.fits(x, weight.to("meta")), False),
    }
    assert {name: got for name, (got, _) in fits.items()} == {name: want for name, (_, want) in fits.items()}


def test_a_compiled_model_is_left_to_the_compiler():
    weight, x = random(torch.float32, 9, 8), random(torch.float32, 2, 8)
    compiled = torch.compile(dispatch.linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), reference.linear(x, weight))


def test_training_goes_through_torch():
    weight, x = random(torch.float32, 9, 8).requires_grad_(), random(torch.float32, 2, 8)
    dispatch.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert torch.equal(dispatch.linear(x, weight), cpu.linear(x, weight))


def test_every_instruction_set_of_this_machine_gives_right_products():
    """In a process each, since the choice is made once."""
    code = (
        "import torch; from sirius.kernels import cpu; torch.manual_seed(0)\n"
        "x, w = torch.randn(3, 97).half(), torch.randn(130, 97).half()\n"
        "want = x.double() @ w.double().T\n"
        "assert (cpu.linear(x, w).double() - want).abs().max() < .05\n"
        "assert (cpu.project(want.half(), w).double() - want.half().double() @ w.double()).abs().max() < 2\n"
        "print(cpu.instructions())"
    )
    for limit in ("generic", "avx2", "avx512"):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "SIRIUS_ISA": limit},
            capture_output=True,
            text=True,
            check=True,
        )
        order = ["generic", "avx2", "avx512"]
        assert order.index(run.stdout.strip()) <= order.index(limit)


def test_without_the_library_plain_torch_takes_over_with_one_line_in_the_log(monkeypatch, caplog, tmp_path):
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    try:
        weight, x = random(torch.float32, 9, 8), random(torch.float32, 2, 8)
        for _ in range(2):
            assert torch.equal(dispatch.linear(x, weight), reference.linear(x, weight))
            assert torch.equal(dispatch.largest(x.abs(), 3), reference.largest(x.abs(), 3))
        assert not dispatch.reads_rows(weight)
        [line] = caplog.messages
        assert "no compiled CPU kernels" in line
    finally:
        cpu.library.cache_clear()
