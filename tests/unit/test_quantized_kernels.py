"""Weights of 4 and 8 bits: the format, and the C++ kernels against their plain reference by every instruction set."""

import math
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cpu_kernels import DTYPES, TOLERANCE, fresh_memory_is_full_of_nan, level, random, some, threads

from sirius.errors import ConfigError
from sirius.kernels import cpu, ops, quantized, reference
from sirius.kernels.activations import ACTIVATIONS
from sirius.kernels.quantized import Quantized
from sirius.kernels.tape import Tape

needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")
fixtures = fresh_memory_is_full_of_nan, level  # used by name

SIZES = [(1, 1), (3, 5), (5, 64), (37, 65), (130, 97), (303, 520), (18, 1600)]  # F, H
ROUNDING = 1e-5  # of the sum of magnitudes: sums of float32
PER_TYPE = settings(
    deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def same(one: Quantized, other: Quantized) -> bool:
    return one[3:] == other[3:] and all(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def decibels(weight: torch.Tensor, bits: int) -> float:
    error = weight - reference.dequantize(ops.quantize(weight, bits))
    return 10 * math.log10(float(weight.double().square().sum() / error.double().square().sum()))


def close(got: torch.Tensor, x: torch.Tensor, weight: Quantized, bias: torch.Tensor | None, case: object) -> None:
    """Compare a product with the same one in float64: of the rounded tokens, which both take, with the same numbers."""
    values, wide = quantized.rounded(x).double(), reference.dequantize(weight).double()
    of_bias = 0 if bias is None else bias.double()
    want, magnitude = values @ wide.T + of_bias, values.abs() @ wide.abs().T
    bound = ROUNDING * magnitude + TOLERANCE[got.dtype] * (want.abs() + 1e-7)
    assert got.shape == want.shape and got.dtype is x.dtype, case
    assert bool(((got.double() - want).abs() <= bound).all()), case


def spoilt(f: int, h: int, seed: int = 0) -> torch.Tensor:
    """Return a weight whose rows and groups differ much in size; some of them are all zeros."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(f, h, generator=g) * 10 ** torch.randint(-6, 4, (f, 1), generator=g)
    weight *= 10 ** torch.randint(-5, 1, (f, -(-h // 32)), generator=g).float().repeat_interleave(32, 1)[:, :h]
    weight[torch.rand(f, generator=g) < 0.1] = 0
    weight[:, :32][torch.rand(f, generator=g) < 0.2] = 0
    return weight


@pytest.mark.parametrize(("bits", "least"), [(4, 21.3), (8, 40)])
def test_normal_numbers_are_kept_to_so_many_decibels(bits, least):
    """With 4 bits this leaves .28 dB below the mean of such rows, far beyond their deviation."""
    assert decibels(random(torch.float32, 64, 2048), bits) > least


@pytest.mark.parametrize("bits", quantized.BITS)
def test_zeros_stay_zeros(bits):
    weight = random(torch.float32, 6, 100)
    weight[2], weight[4, :64] = 0, 0
    got = reference.dequantize(ops.quantize(weight, bits))
    assert got.shape == weight.shape and torch.equal(got == 0, (got == 0) | (weight == 0))
    assert bool((reference.dequantize(reference.quantize(torch.zeros(2, 65), bits)) == 0).all())


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-12, 1.0, 1e15])
@pytest.mark.parametrize("bits", quantized.BITS)
def test_numbers_of_any_size_come_back(bits, value):
    weight = torch.full((1, 3), value)
    weight[0, 1] = -value
    for quantize in (reference.quantize, ops.quantize):
        got = reference.dequantize(quantize(weight, bits))
        assert bool(((got - weight).abs() <= 0.08 * weight.abs() + 2.0**-126).all())


def test_the_extreme_of_a_group_may_be_of_either_sign():
    weight = torch.tensor([[8.0, 1, -7] + [0] * 29 + [-8, 1, 7] + [0] * 29])
    assert torch.equal(reference.dequantize(ops.quantize(weight, 4)), weight)


def test_other_numbers_of_bits_are_refused():
    for quantize, bits in product((ops.quantize, reference.quantize), (0, 3, 16)):
        with pytest.raises(ConfigError, match=f"{bits} bits; give 4 or 8"):
            quantize(random(torch.float32, 2, 3), bits)


@pytest.mark.parametrize("bits", quantized.BITS)
def test_the_layout_is_the_one_that_is_described(bits):
    numbers = torch.randint(-8, 8, (1, 70), generator=torch.Generator().manual_seed(1))
    numbers[0, [5, 37, 69]], numbers[0, [6, 38]] = -8, 7  # so that no scale but 1 has no error
    got = ops.quantize(numbers.float() * 127 / 8 if bits == 8 else numbers.float(), bits)
    first, second = (torch.nn.functional.pad(numbers[0], (0, 58)) + 8).view(2, 64)
    if bits == 4:
        want = torch.cat([half[:32] + 16 * half[32:] for half in (first, second)])
        assert got.codes[0].tolist()[:64] == want.tolist()
        assert got.scales.shape == (1, 4) and got.base.dtype is torch.int32
    else:
        assert got.codes.shape == (1, 128) and got.codes[0, [5, 37, 69, 70, 127]].tolist() == [1, 1, 1, 128, 128]
        assert got.scales.shape == (1, 0) and got.base.tolist() == [1.0]


@pytest.mark.parametrize("bits", quantized.BITS)
@pytest.mark.parametrize("size", [(1, 1), (7, 1), (1, 70), (65, 130)], ids=str)
def test_a_weight_whose_neurons_are_its_columns_is_rounded_alike(bits, size, monkeypatch):
    """Two of its rows are rounded at a time."""
    monkeypatch.setattr(ops, "CHUNK", 2 * size[1])
    weight = random(torch.bfloat16, *size[::-1]).t()
    assert same(ops.quantize(weight, bits), reference.quantize(weight, bits))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", quantized.BITS)
def test_the_kernel_rounds_weights_to_the_same_bits_as_the_reference(level, dtype, bits):
    for (f, h), seed in product(SIZES, range(3)):
        weight = spoilt(f, h, seed).clamp(-6e4, 6e4).to(dtype)
        apart = torch.cat([weight, torch.full_like(weight, torch.nan)], 1)[:, :h]
        want = reference.quantize(weight, bits)
        for many in (1, 2):
            with threads(many):
                assert same(cpu.quantize(weight, bits), want) and same(cpu.quantize(apart, bits), want), (f, h)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", quantized.BITS)
def test_products_equal_the_reference(level, dtype, bits):
    for case, (f, h) in enumerate(SIZES):
        weight = reference.quantize(random(torch.float32, f, h, seed=1), bits)
        bias = random(dtype, f, seed=3) if case % 2 else None
        for rows, share in product((1, 2, 3, 4, 5, 33), (None, 0.0, 0.4)):
            index = None if share is None else some(f, share).flip(0)
            x = random(dtype, rows, h) * 10.0 ** (torch.arange(rows) % 3)[:, None]
            got = cpu.quantized_linear(x.to(dtype), weight, bias, index)
            own = (weight, bias) if index is None else (weight.rows(index), None if bias is None else bias[index])
            close(got, x.to(dtype), *own, (f, h, rows, share))


@needs_kernels
@pytest.mark.parametrize("bits", quantized.BITS)
@PER_TYPE
@given(data=st.data())
def test_a_token_is_the_same_bit_for_bit_in_any_company_and_with_any_threads(level, bits, data):
    f, h, rows = (data.draw(st.integers(1, most)) for most in (70, 700, 20))
    dtype, many = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 3))
    weight, x = reference.quantize(random(torch.float32, f, h), bits), random(dtype, rows, h)
    index = data.draw(st.none() | st.lists(st.integers(0, f - 1), max_size=80).map(torch.LongTensor))
    with threads(1):
        alone = torch.cat([cpu.quantized_linear(row[None], weight) for row in x])
    with threads(many):
        got = cpu.quantized_linear(x, weight, None, index)
    assert torch.equal(got, alone if index is None else alone[:, index])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "bits"), list(product(cpu.ACTIVATIONS, quantized.BITS)))
def test_gated_neurons_are_what_their_two_products_make(level, dtype, name, bits):
    gate, up = (reference.quantize(random(torch.float32, 37, 97, seed=seed), bits) for seed in (1, 2))
    biases = [random(dtype, 37, seed=seed) for seed in (3, 4)]
    for rows, index, many in product((1, 2, 5, 17), (None, some(37, 0.4)), (1, 2)):
        x = random(dtype, rows, 97)
        first, second = (
            cpu.quantized_linear(x, weight, bias, index).double()
            for weight, bias in zip((gate, up), biases, strict=True)
        )
        with threads(many):
            got = cpu.quantized_glu(x, gate, biases[0], up, biases[1], name, index)
        want = ACTIVATIONS[name](first) * second
        assert got.dtype is dtype
        assert bool(((got.double() - want).abs() <= 2 * TOLERANCE[dtype] * (1 + first.abs()) * second.abs()).all())


@needs_kernels
def test_without_a_kernel_gated_neurons_are_left_to_the_caller_and_products_to_the_reference():
    weight, x = ops.quantize(random(torch.float32, 9, 70), 4), random(torch.float32, 2, 70)
    assert ops.quantized_glu(x, weight, None, weight, None, torch.sigmoid) is None
    assert ops.quantized_glu(x.double(), weight, None, weight, None, ACTIVATIONS["silu"]) is None
    assert torch.equal(ops.quantized_linear(x.double(), weight), reference.quantized_linear(x.double(), weight))
    want = reference.quantized_glu(x, weight, None, weight, None, ACTIVATIONS["silu"])
    torch.testing.assert_close(ops.quantized_glu(x, weight, None, weight, None, ACTIVATIONS["silu"]), want)


@needs_kernels
@pytest.mark.parametrize(("value", "bits"), list(product([torch.nan, torch.inf, -torch.inf], quantized.BITS)))
def test_values_that_are_no_numbers_make_products_that_are_none(level, value, bits):
    weight, x = reference.quantize(random(torch.float32, 5, 97), bits), random(torch.float32, 3, 97)
    x[1, 70] = value
    got, want = cpu.quantized_linear(x, weight), reference.quantized_linear(x, weight)
    assert torch.equal(got.isnan(), want.isnan()) and want[1].isnan().all() and not want[[0, 2]].isnan().any()


@needs_kernels
@pytest.mark.parametrize("bits", quantized.BITS)
def test_tokens_of_zeros_and_of_tiny_numbers_are_no_error(level, bits):
    weight = reference.quantize(random(torch.float32, 5, 97), bits)
    x = torch.stack([torch.zeros(97), torch.full((97,), 1e-40), torch.full((97,), 1e30)])
    got = cpu.quantized_linear(x, weight)
    assert bool((got[:2] == 0).all()) and bool(got[2].isfinite().all())
    assert cpu.quantized_linear(torch.empty(0, 97), weight).shape == (0, 5)


@needs_kernels
@pytest.mark.parametrize("row", [-1, 9, 2**62])
def test_a_row_that_the_weight_does_not_have_is_an_error_that_names_it(row):
    weight, x, index = ops.quantize(random(torch.float32, 9, 8), 4), random(torch.float32, 2, 8), torch.tensor([0, row])
    calls = [
        lambda index: ops.quantized_linear(x, weight, None, index),
        lambda index: ops.quantized_glu(x, weight, None, weight, None, ACTIVATIONS["silu"], index),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=rf"neuron {row} is asked for, at index 1, of a weight of 9 rows.*0 to 8"):
            call(index)
        with pytest.raises(ConfigError, match=r"torch.int32"):
            call(index.clamp(0, 8).int())


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_captured_pass_is_replayed_with_the_tokens_there_are_by_then(monkeypatch, dtype):
    monkeypatch.undo()  # the tape would capture how fresh memory is filled
    gate, up, down = (ops.quantize(random(dtype, *shape), 4) for shape in ((70, 97), (70, 97), (30, 70)))
    x = random(dtype, 3, 97)

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = ops.quantized_glu(x, gate, None, up, None, ACTIVATIONS["silu"])
        assert z is not None
        scores = ops.quantized_linear(z, down)
        return scores, ops.highest(scores, 4)

    with torch.no_grad(), Tape() as tape:
        got = forward(x)
    assert tape.repeatable and len(tape.calls) == 1
    x.copy_(x.flip(0) * 2)
    for each, wrong in zip(got, (torch.nan, -1), strict=True):
        each.fill_(wrong)
    tape.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, forward(x), strict=True))


@needs_kernels
@PER_TYPE
@given(data=st.data())
def test_the_highest_are_those_of_a_sorted_list_and_the_first_of_equal_ones(level, data):
    size = data.draw(st.integers(1, 1200))
    count = data.draw(st.integers(0, min(size, 40)))
    values = random(torch.float32, size, seed=data.draw(st.integers(0, 99)))
    values = (values * data.draw(st.sampled_from([1, 100]))).round(decimals=data.draw(st.integers(0, 3))) + 0.0
    values = values.sort(descending=data.draw(st.booleans())).values if data.draw(st.booleans()) else values
    values = (values * data.draw(st.sampled_from([1, -1]))).to(data.draw(st.sampled_from(DTYPES))) + 0
    order = sorted(range(size), key=lambda i: (-float(values[i]), i))[:count]
    assert sorted(cpu.highest(values, count).tolist()) == sorted(order)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_highest_of_long_rows_equal_the_reference(level, dtype):
    values = random(torch.float32, 3, 2, 50_001).to(dtype)
    for count in (1, 16, 100):
        got, want = cpu.highest(values, count), reference.highest(values, count)
        assert got.shape == want.shape and got.dtype is want.dtype
        assert torch.equal(values.gather(-1, got).sort().values, values.gather(-1, want).sort().values)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_have_their_places(level, dtype):
    values = random(dtype, 4000)
    values[[7, 3999]], values[2000], values[0] = torch.inf, torch.nan, -torch.inf
    assert sorted(ops.highest(values, 3).tolist()) == [7, 2000, 3999]
    for every in (torch.full((300,), torch.nan), torch.full((300,), -torch.nan), torch.full((300,), -torch.inf)):
        assert sorted(ops.highest(every.to(dtype), 5).tolist()) == [0, 1, 2, 3, 4]
