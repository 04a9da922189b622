"""The GPU's kernels against their plain reference, at odd sizes, into memory full of NaN.

Triton's interpreter runs them on the CPU. On the first GPU: SIRIUS_TEST_GPU=0 pytest tests/unit/test_gpu_kernels.py
"""

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slots import Slots, check_attention
from torch import nn
from transformers import activations

from sirius.kernels import attention, cpu, gpu, reference
from sirius.kernels.activations import ACTIVATIONS, activation_name

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # what a GPU passes over in silence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPSILON = {torch.float32: 2**-22, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # the interpreter cuts digits off
ROWS = [1, 3, 16, 17]
CASES = [(dtype, rows) for dtype in DTYPES for rows in ROWS if dtype is torch.float32 or rows in (1, 17)]
NEURONS, SIZE = 21, 37  # neither fills its blocks


@pytest.fixture(autouse=True)
def device(gpu_device, monkeypatch):
    """Where everything is, and fresh memory full of what no result is."""
    empty = torch.Tensor.new_empty

    def filled(self, *size, **options):
        made = empty(self, *size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else -7)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
    with gpu_device:
        yield gpu_device


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator("cpu").manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=g, device="cpu").to(dtype).to(torch.get_default_device())


def some(count: int, share: float | None) -> torch.Tensor | None:
    """Return a share of the places below count, ascending, with no neuron before, between and after them."""
    if share is None:
        return None
    order = torch.randperm(count, generator=torch.Generator("cpu").manual_seed(count), device="cpu")
    none = torch.tensor([-1], device="cpu")
    first, second = order[: round(share * count)].sort().values.tensor_split(2)
    return torch.cat([none, first, none, second, none, none]).to(torch.get_default_device())


def only(index: torch.Tensor | None, weight: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Return weight with NaN where index has no business."""
    if index is None:
        return weight
    chosen = torch.zeros(weight.shape[dim], dtype=torch.bool).index_fill(0, index[index >= 0], True)
    return torch.where(chosen.unflatten(0, [-1] + [1] * (weight.ndim - 1 - dim)), weight, torch.nan)


def spread(part: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """Return the values of index's neurons with 0 where it has none."""
    if index is None:
        return part
    whole = part.new_zeros(*part.shape[:-1], len(index))
    whole[..., index >= 0] = part
    return whole


def neurons(index: torch.Tensor | None) -> torch.Tensor | None:
    return None if index is None else index[index >= 0]


def doubles(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if each is None else each.double() for each in tensors]


def close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor) -> None:
    """Sums in float32 differ by a share of the sum of magnitudes; the result is rounded once."""
    assert got.shape == want.shape
    bound = 2e-6 * magnitude + EPSILON[got.dtype] * want.abs() + 1e-7
    assert bool(((got.double() - want).abs() <= bound).all())


def products_are_right(x: torch.Tensor, weight: torch.Tensor, bias, index) -> None:
    got = gpu.linear(x, only(index, weight), bias, index)
    want = reference.linear(*doubles(x, weight, bias), neurons(index))
    bound = reference.linear(x.double().abs(), weight.double().abs(), None, neurons(index))
    close(got, spread(want, index), spread(bound, index))


def sums_are_right(z: torch.Tensor, weight: torch.Tensor, bias, index) -> None:
    z = z if index is None else torch.where(index >= 0, z, torch.nan)
    got = gpu.project(z, only(index, weight), bias, index)
    z = z if index is None else z[..., index >= 0]
    want = reference.project(*doubles(z, weight, bias), neurons(index))
    close(got, want, reference.project(z.double().abs(), weight.double().abs(), None, neurons(index)) + want.abs())


@pytest.mark.parametrize(("dtype", "rows"), CASES, ids=str)
@pytest.mark.parametrize("share", [None, 0.0, 0.4, 1.0])
def test_products_equal_the_reference(dtype, rows, share):
    index, weight = some(NEURONS, share), random(dtype, NEURONS, SIZE, seed=1)
    count = NEURONS if index is None else len(index)
    products_are_right(random(dtype, rows, SIZE), weight, random(dtype, NEURONS, seed=3), index)
    sums_are_right(random(dtype, rows, count), weight, random(dtype, SIZE, seed=4), index)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (32, 64), (5, 1100), (3, 2048), (130, 17)], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_products_are_right_at_any_size(size, rows):
    weight = random(torch.float32, *size)
    products_are_right(random(torch.float32, rows, size[1]), weight, None, None)
    sums_are_right(random(torch.float32, rows, size[0]), weight, None, None)


def test_nothing_gives_nothing():
    weight, none = random(torch.float32, NEURONS, SIZE), torch.empty(0, dtype=torch.int64)
    assert gpu.linear(random(torch.float32, 2, SIZE), weight, None, none).shape == (2, 0)
    assert gpu.linear(weight[:0], weight).shape == (0, NEURONS)
    bias = random(torch.float32, SIZE)
    assert torch.equal(gpu.project(random(torch.float32, 2, 0), weight, bias, none), bias.expand(2, -1))


@pytest.mark.parametrize("rows", ROWS)
def test_results_repeat_bit_for_bit(rows):
    weight, index = random(torch.bfloat16, 150, SIZE), some(150, 0.9)
    z = random(torch.bfloat16, rows, len(index))
    assert gpu.split(len(index), 16, 1)[0] > 1
    assert torch.equal(gpu.project(z, weight, None, index), gpu.project(z, weight, None, index))


def test_rows_are_those_of_a_tensor_of_any_layout():
    weight, x = random(torch.float32, NEURONS, SIZE), random(torch.float32, SIZE, 2, 3).movedim(0, 2)
    torch.testing.assert_close(gpu.linear(x, weight), reference.linear(x, weight))
    z = random(torch.float32, NEURONS, 2).t()
    torch.testing.assert_close(gpu.project(z, weight), reference.project(z, weight))


@pytest.mark.parametrize(
    ("count", "least", "grid"), [(7168, 16, 16), (1, 16, 1), (0, 16, 1), (100, 32, 9999), (65, 16, 4)]
)
def test_slices_cover_every_neuron_and_none_is_empty(count, least, grid):
    slices, share = gpu.split(count, least, grid)
    assert slices * share >= count and share % least == 0
    assert slices == 1 or (slices - 1) * share < count


def mlp(dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the weights of gate and up, then their biases."""
    gate, up = (random(dtype, NEURONS, SIZE, seed=seed) / SIZE**0.5 for seed in (1, 2))
    return [gate, up, random(dtype, NEURONS, seed=3), random(dtype, NEURONS, seed=4)]


def weights(gate: torch.Tensor, up: torch.Tensor, gate_bias: torch.Tensor, up_bias: torch.Tensor) -> tuple:
    return (gate, gate_bias), (up, up_bias)


def bound_of(x: torch.Tensor, parts: list[torch.Tensor], index: torch.Tensor | None) -> torch.Tensor:
    """Return how large z could be: magnitudes of gate times those of up."""
    gate, up, gate_bias, up_bias = (each.double().abs() for each in parts)
    x = x.double().abs()
    return reference.linear(x, gate, gate_bias, index) * reference.linear(x, up, up_bias, index)


@pytest.mark.parametrize(("dtype", "rows"), CASES, ids=str)
@pytest.mark.parametrize(("activation", "share"), [("silu", 0.5), ("gelu_tanh", None), ("gelu", 0.0), ("relu", 1.0)])
def test_both_products_in_one_equal_the_reference(dtype, rows, activation, share):
    x, parts, index = 3 * random(dtype, rows, SIZE), mlp(dtype), some(NEURONS, share)
    got = gpu.glu(x, *weights(*(only(index, each) for each in parts)), activation, index)
    wide, *wide_parts = doubles(x, *parts)
    want = reference.glu(wide, *weights(*wide_parts), ACTIVATIONS[activation], neurons(index))
    close(got, spread(want, index), spread(bound_of(x, parts, neurons(index)), index))


@pytest.mark.parametrize(("dtype", "rows"), CASES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu"])
def test_the_gate_alone_equals_the_reference(dtype, rows, activation):
    x, (weight, _, bias, _) = 3 * random(dtype, rows, SIZE), mlp(dtype)
    wide, *gate = doubles(x, weight, bias)
    want = reference.gate(wide, tuple(gate), ACTIVATIONS[activation])
    close(gpu.gate(x, (weight, bias), activation), want, reference.linear(x.double().abs(), weight.double().abs()))


@pytest.mark.parametrize(("dtype", "rows"), CASES, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_rest_of_opened_neurons_equals_the_reference(dtype, rows, share):
    x, gated, index = random(dtype, rows, SIZE), random(dtype, rows, NEURONS), some(NEURONS, share)
    _, up, _, bias = mlp(dtype)
    got = gpu.up_rows(only(index, gated, 1), x, only(index, up), only(index, bias), index)
    want = reference.up_rows(*doubles(gated, x, up, bias), neurons(index))
    bound = reference.up_rows(*(each.double().abs() for each in (gated, x, up, bias)), neurons(index))
    close(got, spread(want, index), spread(bound, index))


def test_values_out_of_range_are_told_and_not_hidden():
    weight = torch.full((5, 9), torch.finfo(torch.float16).max, dtype=torch.float16)
    x = torch.tensor([1.0, -1.0, torch.nan, 0.0]).half()[:, None].expand(-1, 9)
    for got in (gpu.linear(x, weight), torch.stack([gpu.linear(row, weight) for row in x])):
        assert got[0].isposinf().all() and got[1].isneginf().all() and got[2].isnan().all() and (got[3] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 40, 150, 299, 300])
def test_the_largest_equal_the_reference(dtype, count):
    values = random(dtype, 2, 1, 300)
    order = values.float().sort(descending=True, stable=True, dim=-1).indices
    assert torch.equal(gpu.largest(values, count), order[..., :count].sort().values)


@settings(derandomize=True, deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, 1 + 2**-7, -1.0, 2**-24, 3e4, torch.inf, -torch.inf, torch.nan]), min_size=1
    ),
    st.sampled_from(DTYPES),
    st.data(),
)
def test_of_equal_values_the_first_are_found_and_nan_before_all(values, dtype, data):
    count = data.draw(st.integers(1, len(values)))
    line = torch.tensor(values).to(dtype)
    order = sorted(range(len(values)), key=lambda i: (line[i] == line[i], -line[i].nan_to_num(torch.inf).item(), i))
    assert gpu.largest(line, count).tolist() == sorted(order[:count])
    if dtype is torch.float32 and line.min() >= 0 and cpu.library() is not None:
        assert torch.equal(gpu.largest(line, count).cpu(), cpu.largest(line.cpu(), count))


def test_the_largest_of_a_line_too_long_are_refused():
    with pytest.raises(AssertionError, match="65537 values"):
        gpu.largest(torch.zeros(2**16 + 1), 1)


@pytest.mark.parametrize(("dtype", "softcap"), list(zip(DTYPES, [None, 3.0, None], strict=True)), ids=str)
def test_attention_equals_the_reference_and_reads_no_slot_that_is_not_seen(dtype, softcap):
    check_attention(attention.attend, dtype, softcap, EPSILON[dtype])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 2, 64), (2, 1, 3, 16), (1, 3, 6, 3)], ids=str)
def test_attention_is_right_at_any_size_and_repeats_bit_for_bit(shape):
    slots = Slots(torch.float32, *shape)
    want, got = slots.wanted(0.2, None), slots.attend(attention.attend, 0.2, None)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
    assert torch.equal(slots.attend(attention.attend, 0.2, None), got)


def test_attention_is_that_of_pytorch():
    slots = Slots(torch.float32)
    slots.held[:], slots.seen[:] = 100, True
    mask = (torch.arange(slots.keys.shape[1]) < 100 + slots.seen.shape[2])[None]
    k, v = (each.transpose(1, 2) for each in (slots.keys, slots.values))
    want = F.scaled_dot_product_attention(slots.query, k, v, mask, scale=0.2, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(slots.attend(reference.attend, 0.2, None), want)


def samples() -> dict[str, tuple]:
    x, parts, index = (
        random(torch.float32, 2, 5),
        [random(torch.float32, 3, 5) for _ in range(2)],
        torch.tensor([-1, 2]),
    )
    slots = Slots(torch.float32, 1, 1, 1, 4)
    view = (slots.query[:1], slots.keys[:1, :20], slots.values[:1, :20], slots.held[1:2], slots.seen[:1])
    return {
        "project": (gpu.project, (x[:, :2], parts[0], x[0], index)),
        "products": (gpu.products, (x, parts[0], [None, parts[1], parts[0][:, 0]], None, index, "silu")),
        "largest": (gpu.largest, (x, 2)),
        "attend": (attention.attend, (*view, 0.5, None)),
    }


NAMES = ["products", "project", "largest", "attend"]


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_what_a_compiler_expects(name):
    _, arguments = samples()[name]
    torch.library.opcheck(getattr(torch.ops.sirius, name).default, arguments)


def test_compiled_calls_are_the_same_calls():
    calls = list(samples().values())
    compiled = torch.compile(lambda: [call(*arguments) for call, arguments in calls], backend="eager", fullgraph=True)
    assert all(torch.equal(got, call(*arguments)) for got, (call, arguments) in zip(compiled(), calls, strict=True))


def test_the_kernels_are_taken_where_they_fit_and_nowhere_else(device, monkeypatch):
    weight, x = random(torch.float32, 9, 8), random(torch.float32, 2, 8)
    fits = {
        "as it is": (gpu.fits(x, weight), True),
        "other dtypes": (gpu.fits(x, weight.half()), False),
        "float64": (gpu.fits(x.double(), weight.double()), False),
        "a transposed weight": (gpu.fits(x, random(torch.float32, 8, 9).t()), False),
        "a stack": (gpu.fits(x, weight[None]), False),
        "meta": (gpu.fits(x.to("meta"), weight.to("meta")), False),
    }
    assert {name: got for name, (got, _) in fits.items()} == {name: want for name, (_, want) in fits.items()}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not gpu.fits(x.cpu(), weight.cpu())


def test_activations_are_known_by_what_they_compute():
    x = torch.linspace(-4, 4, 41)
    known = [
        *(nn.SiLU(), nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), F.silu, F.gelu, F.relu, torch.relu),
        *(activations.ACT2FN[name] for name in ("silu", "swish", "gelu", "relu", "gelu_pytorch_tanh", "gelu_new")),
        *(
            activations.GELUActivation(use_gelu_python=True),
            activations.PytorchGELUTanh(),
            activations.ACT2FN["gelu_fast"],
        ),
    ]
    for activation in known:
        name = activation_name(activation)
        torch.testing.assert_close(ACTIVATIONS[name](x), activation(x))
    unknown = [nn.Tanh(), torch.tanh, nn.LeakyReLU(), activations.ACT2FN["relu2"], activations.ACT2FN["gelu_10"]]
    assert {activation_name(each) for each in [*unknown, partial(F.gelu, approximate="tanh"), lambda x: x]} == {None}


def test_triton_is_imported_when_a_kernel_runs_and_no_sooner():
    code = "import sys; from sirius.kernels import attention, gpu; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_triton_one_line_in_the_log_says_so(monkeypatch, caplog):
    gpu.available.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        weight = random(torch.float32, 9, 8)
        assert not gpu.fits(weight, weight) and not gpu.fits(weight, weight)
        [line] = caplog.messages
        assert "no GPU kernels" in line
    finally:
        gpu.available.cache_clear()
