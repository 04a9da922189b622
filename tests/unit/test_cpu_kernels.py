"""The C++ kernels against their plain reference, at odd sizes, into memory full of NaN, by every instruction set."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slots import Slots, check_attention

from sirius.errors import ConfigError
from sirius.kernels import cpu, ops, reference
from sirius.kernels.activations import ACTIVATIONS
from sirius.kernels.tape import Tape
from sirius.model.matrix import Dense, Neurons
from sirius.model.memory import side_by_side
from sirius.model.norm import FORMS

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 5), (37, 64), (130, 97), (303, 520)]  # F, H; half of 303 rows is odd
SHARES = [None, 0.0, 0.3, 1.0]  # of the rows that are asked for
GRID = [  # every size with every share; each of both with and without a bias
    (size, share, (i + j) % 2 == 0) for i, size in enumerate(SIZES) for j, share in enumerate(SHARES)
]
TOLERANCE = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}  # of the sum of magnitudes, and rounding
LEVELS = ["generic", "avx2", "avx512", "avx512bf16", "amx", "emulated"]
DOTS = LEVELS[3:]  # these multiply pairs of bfloat16


@cache
def kernels_of(level: str, folder: Path) -> cpu.Library:
    """A copy of the library, which makes its choice once, limited to an instruction set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIRIUS_ISA", level)
        patch.setattr(cpu, "LIBRARY", Path(shutil.copy(cpu.LIBRARY, folder / f"{level}.so")))
        found = cpu.library.__wrapped__()
    assert found is not None
    return found


@pytest.fixture(params=LEVELS)
def level(request, monkeypatch, tmp_path_factory):
    found = kernels_of(request.param, tmp_path_factory.getbasetemp())
    if found.isa != request.param:
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(cpu, "library", lambda: found)
    return request.param


@pytest.fixture(autouse=True)
def fresh_memory_is_full_of_nan(monkeypatch):
    empty = torch.Tensor.new_empty

    def filled(self, *size, **options):
        fresh = empty(self, *size, **options)
        return fresh.fill_(torch.nan if fresh.is_floating_point() else -1)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def some(count: int, share: float) -> torch.Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    return order[: round(share * count)].sort().values


def close(got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, case: object = None) -> None:
    """Both are sums of products; rounding is bounded by the sum of the products' magnitudes."""
    assert got.shape == want.shape, case
    bound = TOLERANCE[got.dtype] * (magnitude + want.abs()) + 1e-7
    assert bool(((got.double() - want).abs() <= bound).all()), case


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let the kernels run by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_equal_the_reference(level, dtype):
    for case in GRID:
        (f, h), share, bias = case
        weight = random(dtype, f, h, seed=1)
        index = None if share is None else some(f, share)
        count = f if index is None else len(index)
        of_f, of_h = (random(dtype, n, seed=3) if bias else None for n in (f, h))
        wide, of_f_wide, of_h_wide = (None if each is None else each.double() for each in (weight, of_f, of_h))
        for rows in (1, 2, 3, 4, 5, 8, 12, 16, 17):
            x, z = random(dtype, rows, h), random(dtype, rows, count, seed=2)
            got = cpu.linear(x, weight, of_f, index)
            want = reference.linear(x.double(), wide, of_f_wide, index)
            close(got, want, reference.linear(x.double().abs(), wide.abs(), None, index), (case, rows))
            got = cpu.project(z, weight, of_h, index)
            want = reference.project(z.double(), wide, of_h_wide, index)
            close(got, want, reference.project(z.double().abs(), wide.abs(), None, index), (case, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_bit_for_bit_in_any_company_and_with_any_threads(level, dtype):
    for count, width in ((1, 520), (2, 520), (5, 20), (9, 2100), (301, 520)):
        weight, x, z = random(dtype, count, width), random(dtype, 23, width), random(dtype, 23, count)
        index = some(count, 0.4)
        products = torch.stack([cpu.linear(row, weight) for row in x])
        sums = torch.stack([cpu.project(row, weight) for row in z])
        for many in (1, 2, 3):
            for rows in (1, 2, 3, 4, 6, 7, 8, 12, 23):
                case = f"{count} neurons of {width}, {many} threads, {rows} rows"
                with threads(many):
                    assert torch.equal(cpu.linear(x[:rows], weight), products[:rows]), case
                    assert torch.equal(cpu.project(z[:rows], weight), sums[:rows]), case
                    assert torch.equal(cpu.linear(x[:rows], weight, None, index), products[:rows, index]), case


@pytest.mark.parametrize("level", ["avx512bf16", "amx"], indirect=True)
@pytest.mark.parametrize("scale", [1.0, 1e-19], ids=["usual", "products that are denormal"])
def test_a_token_is_the_same_bit_for_bit_among_seventy(level, scale):
    for f, h in ((16, 32), (33, 31), (129, 66), (301, 97), (1040, 64)):
        weight, x, z = (random(torch.bfloat16, *shape) * scale for shape in ((f, h), (70, h), (70, f)))
        index, apart = some(f, 0.6), side_by_side(weight, weight)[1]
        products, sums = (
            torch.stack([run(row, weight) for row in rows]) for run, rows in ((cpu.linear, x), (cpu.project, z))
        )
        chosen = torch.stack([cpu.project(row[index], weight, None, index) for row in z])
        for many, rows in product((1, 2), (1, 2, 3, 15, 16, 17, 31, 32, 33, 48, 64, 65, 70)):
            with threads(many):
                for w in (weight, apart):
                    case = f"{f} x {h}, {many} threads, {rows} rows"
                    assert torch.equal(cpu.linear(x[:rows], w), products[:rows]), case
                    assert torch.equal(cpu.linear(x[:rows], w, None, index), products[:rows, index]), case
                    assert torch.equal(cpu.project(z[:rows], w), sums[:rows]), case
                    assert torch.equal(cpu.project(z[:rows, index], w, None, index), chosen[:rows]), case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_weight_reaches_its_own_column_alone(level, dtype):
    weight = random(dtype, 40, 70)
    want = weight.double().sum(0)
    weight[3, 4] = torch.inf
    for rows in (1, 3):
        got = cpu.project(torch.ones(rows, 40, dtype=dtype), weight)
        assert got[:, 4].isposinf().all() and got.isfinite().sum() == 69 * rows
        assert torch.equal(got[0], got[-1])
        others = torch.arange(70) != 4
        close(got[0, others], want[others], weight[:, others].double().abs().sum(0))


@pytest.mark.parametrize("level", ["amx"], indirect=True)
def test_pytorchs_own_tiles_are_left_alone(level):
    weight, x = random(torch.bfloat16, 128, 256), random(torch.bfloat16, 64, 256)
    before = torch.nn.functional.linear(x, weight)
    ours = cpu.linear(x, weight)
    for _ in range(3):
        assert torch.equal(torch.nn.functional.linear(x, weight), before)
        assert torch.equal(cpu.linear(x, weight), ours)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_out_of_range_are_told_and_not_hidden(level, dtype):
    weight = torch.full((5, 9), torch.finfo(dtype).max, dtype=dtype)
    x = torch.tensor([[1.0] * 9, [-1.0] * 9, [float("nan")] * 9, [0.0] * 9]).to(dtype)
    got = cpu.linear(x, weight)
    assert got[0].isposinf().all() and got[1].isneginf().all() and got[2].isnan().all() and (got[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_are_widened_and_rounded_as_torch_does(level, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    ones = torch.ones(1, 1, dtype=dtype)
    numbers = every[every.isfinite()]
    want = numbers
    if level in DOTS and dtype is torch.bfloat16:
        want = numbers.where(numbers.abs() >= torch.finfo(dtype).tiny, 0)  # the instruction takes denormals as zeros
    assert torch.equal(cpu.linear(numbers[:, None], ones)[:, 0], want)
    assert torch.equal(cpu.project(numbers[:, None], ones)[:, 0], want)
    weight = random(torch.float32, 4099, 1).double() * 10.0 ** torch.arange(-9, 5).repeat(293)[:4099, None]
    parts = torch.stack([weight.to(dtype), (weight - weight.to(dtype).double()).to(dtype)], 2)[:, 0]
    got = cpu.linear(torch.ones(1, 2, dtype=dtype), parts.contiguous())
    assert torch.equal(got[0], parts.float().sum(1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "held"),
    [((2, 3, 2, 20), (130, 0, 257)), ((1, 5, 17, 7), (513, 0, 1090)), ((3, 1, 4, 64), (31, 0, 512))],
    ids=str,
)
def test_attention_equals_the_reference_and_reads_no_slot_that_is_not_seen(level, dtype, shape, held):
    for softcap in (None, 3.0):
        check_attention(cpu.attend, dtype, softcap, 2 * TOLERANCE[dtype], *shape, held=held)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_sees_the_same_bit_for_bit_in_any_company_and_with_any_threads(level, dtype):
    slots, together = Slots(dtype, 2, 3, 5, 20, held=(130, 0, 1090)), []
    for many in (1, 2, 3):
        with threads(many):
            together.append(slots.attend(cpu.attend, 0.3, None))
    for b in range(3):
        for t in range(5):
            row = (each[b : b + 1] for each in (slots.keys, slots.values, slots.held))
            alone = cpu.attend(slots.query[b : b + 1, :, t : t + 1], *row, slots.seen[b : b + 1, t : t + 1], 0.3)
            assert all(torch.equal(each[b, t], alone[0, 0]) for each in together)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("held", [0, 5, 130, 500], ids=lambda held: f"{held} held")
def test_a_branch_of_a_tree_gets_the_bits_of_a_chain(level, dtype, held):
    """The same keys and values, where the branch's slots lie apart and where they follow one another."""
    after, size, heads = 61, 24, 6
    keys, values = (random(dtype, 1, held + after, 2, size, seed=seed) for seed in (1, 2))
    query, holds = random(dtype, 1, heads, 3, size, seed=3), torch.tensor([held])
    branches = [[0, 2, 5, 40, 60], [0, 1, 2], sorted({0, *range(3, 60, 2), 60})]
    seen = torch.zeros(1, 3, after, dtype=torch.bool)
    for token, branch in enumerate(branches):
        seen[0, token, branch] = True
    got = cpu.attend(query, keys, values, holds, seen, 0.3)
    for token, branch in enumerate(branches):
        places = torch.tensor([*range(held), *(held + place for place in branch)])
        chain = torch.ones(1, 1, len(branch), dtype=torch.bool)
        one = query[:, :, token : token + 1]
        want = cpu.attend(one, keys[:, places], values[:, places], holds, chain, 0.3)
        assert torch.equal(got[:, token], want[:, 0])


def test_scores_that_are_no_numbers_make_values_that_are_none(level):
    slots = Slots(torch.float32)
    slots.query[0, 0], slots.keys[2, 5, 1] = torch.nan, torch.inf
    got, want = slots.attend(cpu.attend, 0.3, None), slots.wanted(0.3, None)
    assert want.isnan().any() and torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", cpu.ACTIVATIONS)
def test_gated_neurons_equal_the_reference(level, dtype, name):
    gate, up = (random(dtype, 130, 37, seed=seed) for seed in (1, 2))
    biases = [random(dtype, 130, seed=seed) for seed in (3, 4)]
    act = ACTIVATIONS[name]
    for share, rows in product((None, 0.0, 0.3), (1, 2, 5, 17)):
        index = None if share is None else some(130, share)
        x = random(dtype, rows, 37)
        first, second = (cpu.linear(x, w, b, index).double() for w, b in zip((gate, up), biases, strict=True))
        got = cpu.glu(x, (gate, biases[0]), (up, biases[1]), name, index)
        close(got, act(first) * second, (first.abs() + 1) * second.abs())
        got = cpu.gate(x, (gate, None), name, index)
        first = cpu.linear(x, gate, None, index).double()
        close(got, act(first), first.abs() + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_neurons_come_to_what_up_and_down_make_one_after_the_other(level, dtype):
    for case in GRID:
        (f, h), share, bias = case
        up, down = random(dtype, f, h, seed=1), random(dtype, f, h, seed=2)
        of_f, of_h = (random(dtype, n, seed=3) if bias else None for n in (f, h))
        index, beside = None if share is None else some(f, share), side_by_side(up, down)
        for rows in (1, 2, 3, 4, 5, 17):
            x, gated = random(dtype, rows, h), random(dtype, rows, f, seed=4)
            chosen = gated if index is None else gated[:, index]
            want = cpu.project(chosen * cpu.linear(x, up, of_f, index), down, of_h, index)
            for first, second in ((up, down), beside, (up, beside[1]), (beside[0], down)):
                weights = (first, of_f), (second, of_h)
                assert torch.equal(cpu.finish(gated, x, *weights, index), want), (case, rows)
                assert torch.equal(cpu.finish(chosen, x, *weights, index, gathered=True), want), (case, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_neurons_come_to_the_same_bit_for_bit_in_any_company_and_with_any_threads(level, dtype):
    weights = [(weight, None) for weight in side_by_side(random(dtype, 301, 520), random(dtype, 301, 520, seed=1))]
    x, gated, index = random(dtype, 5, 520), random(dtype, 5, 301), some(301, 0.9)
    alone = torch.stack([cpu.finish(gated[row], x[row], *weights, index) for row in range(5)])
    for many, rows in product((1, 2, 3), (1, 2, 3, 4, 5)):
        with threads(many):
            got = cpu.finish(gated[:rows], x[:rows], *weights, index)
        assert torch.equal(got, alone[:rows]), f"{many} threads, {rows} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_apart(level, dtype):
    weights = random(dtype, 303, 520), random(dtype, 303, 520, seed=1)
    apart, index = side_by_side(*weights), some(303, 0.3)
    for rows in (1, 2, 5, 17):
        x, z = random(dtype, rows, 520), random(dtype, rows, 303)
        for kept in (None, index):
            for one, other in zip(weights, apart, strict=True):
                assert torch.equal(cpu.linear(x, other, None, kept), cpu.linear(x, one, None, kept))
                some_z = z if kept is None else z[:, kept]
                assert torch.equal(cpu.project(some_z, other, None, kept), cpu.project(some_z, one, None, kept))
            pairs = weights, apart, (weights[0], apart[1])
            want, *others = (cpu.glu(x, (a, None), (b, None), "silu", kept) for a, b in pairs)
            assert all(torch.equal(other, want) for other in others)


@pytest.mark.parametrize("name", cpu.ACTIVATIONS)
def test_activations_are_exact_at_every_size_of_number(level, name):
    sizes = torch.cat([torch.linspace(-30, 30, 4001), 10.0 ** torch.arange(-38, 38), torch.tensor([0.0, torch.inf])])
    numbers = torch.cat([sizes, -sizes, torch.tensor([torch.nan])])
    got = cpu.gate(numbers[:, None], (torch.ones(1, 1), None), name)[:, 0].double()
    want = ACTIVATIONS[name](numbers.double())
    want = torch.where(numbers == -torch.inf, got, want)  # of -inf torch makes NaN or 0, by the vector's length
    assert torch.equal(got.isnan(), want.isnan())
    assert bool(((got - want).abs() <= 4e-7 * numbers.abs()).where(want.isfinite(), got == want)[~want.isnan()].all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_norms_equal_the_reference(level, dtype, form):
    for size, rows in product((1, 5, 16, 37, 2048), (1, 3, 17)):
        weight = random(dtype, size, seed=1)
        x = random(dtype, rows, 2, size) * 10.0 ** torch.arange(rows)[:, None, None].clamp(max=3)
        got = cpu.norm(x.to(dtype), weight, 1e-5, form)
        want = reference.norm(x.to(dtype), weight, 1e-5, form)
        assert got.dtype == want.dtype == dtype
        close(got, want.double(), want.abs().double())
        assert dtype is torch.float32 or (got == want).double().mean() > 0.99  # rounded where the form says so


def lying(tensor: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """Return the same numbers, their dimensions in another order in memory and with gaps between lines."""
    moved = tensor.permute(order)
    room = moved.new_empty(*moved.shape[:-1], moved.shape[-1] + 3)
    room[..., :-3] = moved
    return room[..., :-3].permute([order.index(i) for i in range(tensor.ndim)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_are_turned_as_pytorch_turns_them(level, dtype):
    for size, (rows, heads, count) in product((2, 6, 64, 90), ((1, 3, 1), (2, 1, 5), (2, 40, 7))):
        x = lying(random(dtype, rows, heads, count, size), (0, 2, 1, 3))
        cos, sin = (random(dtype, rows, 1, count, size, seed=seed).expand(x.shape) for seed in (1, 2))
        y = lying(x.new_empty(x.shape), (2, 0, 1, 3))
        cpu.rotation(x, cos, sin, y)()
        want = reference.rotate(x, cos, sin)
        assert torch.allclose(y, want, rtol=0, atol=1e-6) if dtype is torch.float32 else torch.equal(y, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_are_pytorchs(level, dtype):
    for count in (1, 37, 2048, 50_001):
        a, b = (random(dtype, count, seed=seed) * 10.0 ** (seed * 6 - 3) for seed in range(2))
        y = a.new_empty(count)
        cpu.addition(a, b, y)()
        assert torch.equal(y, a + b), count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_written_to_their_slots_and_to_no_others(dtype):
    whole = random(dtype, 4, 12, 3, 5)
    store = whole[1:, 2:11]
    rows, slots = torch.tensor([[2], [0]]).expand(2, 3), torch.tensor([[8, 0, -3], [1, 5, 2]])
    values, want = lying(random(dtype, 2, 3, 3, 5, seed=1), (2, 0, 1, 3)), whole.clone()
    want[1:, 2:11][rows, slots] = values
    cpu.put(store, rows, slots, values)
    assert torch.equal(whole, want)
    for row, slot in (3, 0), (-4, 0), (0, 9), (0, -10):
        with pytest.raises(IndexError, match=rf"row {row}, slot {slot} of 3 rows of 9 slots"):
            cpu.put(store, torch.tensor([[0, row]]), torch.tensor([[0, slot]]), values[:1, :2])


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
    neurons, index = neurons_of(dtype, 45, 37), some(45, 0.4)
    x, act = random(dtype, 2, 3, 37), torch.nn.functional.silu
    want = neurons.rows([index]).mlp(x, act)
    assert torch.equal(neurons.mlp(x, act, index), want)
    assert torch.equal(neurons.finish(neurons.activated(x, act), x, index), want)


def neurons_of(dtype: torch.dtype, f: int, h: int, bias: bool = True, beside: bool = False) -> Neurons:
    gate, up, down = (random(dtype, f, h, seed=seed) for seed in range(3))
    biases = [random(dtype, n, seed=9) if bias else None for n in (f, f, h)]
    weights = gate, *(side_by_side(up, down) if beside else (up, down))
    return Neurons(*(Dense(*each) for each in zip(weights, biases, strict=True)))


def draw_sets(data: st.DataObject, f: int, rows: int) -> list[torch.Tensor]:
    """Return neurons for each row: of more or less overlap, of one size or several, ascending or in any order."""
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    apart, ascending = data.draw(st.sampled_from([0, 0.5, 9])), data.draw(st.booleans())
    counts = data.draw(st.one_of(st.integers(1, f).map(lambda n: [n] * rows), st.lists(st.integers(0, f), min_size=9)))
    scores = torch.randn(f, generator=g) + apart * torch.randn(rows, f, generator=g)
    found = [row.topk(count).indices for row, count in zip(scores, counts, strict=False)]
    return [index.sort().values for index in found] if ascending else found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(deadline=None, derandomize=True, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_row_with_neurons_of_its_own_is_what_it_is_alone_bit_for_bit(level, dtype, data):
    rows, count, f = (data.draw(st.integers(1, most)) for most in (9, 5, 300))
    h, threads = data.draw(st.sampled_from([1, 31, 64, 97, 200])), data.draw(st.integers(1, 3))
    neurons = neurons_of(dtype, f, h, bias=data.draw(st.booleans()), beside=data.draw(st.booleans()))
    sets, x = draw_sets(data, f, rows), random(dtype, rows, count, h)
    act = data.draw(st.sampled_from([torch.nn.SiLU(), torch.nn.GELU("tanh"), torch.nn.ReLU()]))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = neurons.mlp_each(x, act, torch.cat(sets), [len(index) for index in sets])
    finally:
        torch.set_num_threads(before)
    alone = [neurons.mlp(row, act, index) for row, index in zip(x, sets, strict=True)]
    assert torch.equal(got, torch.stack(alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_neurons_that_a_row_does_not_have_do_not_reach_it(level, dtype):
    neurons, x, sets = (
        neurons_of(dtype, 70, 40),
        random(dtype, 3, 2, 40),
        [some(70, share) for share in (0.5, 0.4, 0.6)],
    )
    own = [index[index != 7] for index in sets]
    want = neurons.mlp_each(x, ACTIVATIONS["silu"], torch.cat(own), [len(index) for index in own])
    for matrix in neurons:
        matrix.weight[7] = torch.nan
    own[1] = torch.cat([own[1], torch.tensor([7])])
    got = neurons.mlp_each(x, ACTIVATIONS["silu"], torch.cat(own), [len(index) for index in own])
    assert torch.equal(got[[0, 2]], want[[0, 2]]) and got[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_neurons_of_their_own_are_replayed_with_the_neurons_there_are_by_then(dtype):
    neurons, x, counts = neurons_of(dtype, 70, 40), random(dtype, 3, 2, 40), [30, 21, 35]
    index = torch.cat([torch.randperm(70)[:count].sort().values for count in counts])
    with torch.no_grad(), Tape() as tape:
        got = neurons.mlp_each(x, ACTIVATIONS["silu"], index, counts)
    assert tape.repeatable
    x.copy_(x.flip(0))
    index.copy_(torch.cat([torch.randperm(70)[:count] for count in counts]))
    got.fill_(torch.nan)
    tape.replay()
    assert torch.equal(got, neurons.mlp_each(x, ACTIVATIONS["silu"], index, counts))


def test_activations_and_dtypes_without_a_kernel_take_the_rows_one_by_one():
    index, counts = torch.tensor([0, 4, 1, 2, 8]), [2, 3]
    for dtype, act in (torch.float64, ACTIVATIONS["silu"]), (torch.float32, torch.sigmoid):
        neurons, x = neurons_of(dtype, 9, 8), random(dtype, 2, 3, 8)
        got = neurons.mlp_each(x, act, index, counts)
        for row, own in enumerate(index.split(counts)):
            assert torch.equal(got[row], neurons.mlp(x[row], act, own))


def test_the_kernels_are_taken_where_they_fit_and_nowhere_else():
    weight, x = random(torch.float32, 9, 8), random(torch.float32, 2, 8)
    fits = {
        "as it is": (cpu.fits(x, weight), True),
        "other dtypes": (cpu.fits(x, weight.half()), False),
        "float64": (cpu.fits(x.double(), weight.double()), False),
        "a transposed weight": (cpu.fits(x, random(torch.float32, 8, 9).t()), False),
        "a stack": (cpu.fits(x, weight[None]), False),
        "rows apart": (cpu.fits(x, side_by_side(weight, weight)[1]), True),
        "rows that overlap": (cpu.fits(x, weight.as_strided((9, 8), (4, 1))), False),
        "meta": (cpu.fits(x, weight.to("meta")), False),
    }
    assert {name: got for name, (got, _) in fits.items()} == {name: want for name, (_, want) in fits.items()}


def test_a_compiled_model_is_left_to_the_compiler():
    weight, x = random(torch.float32, 9, 8), random(torch.float32, 2, 8)
    compiled = torch.compile(ops.linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), reference.linear(x, weight))


def test_training_goes_through_torch():
    weight, x = random(torch.float32, 9, 8).requires_grad_(), random(torch.float32, 2, 8)
    ops.linear(x, weight).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert torch.equal(ops.linear(x, weight), cpu.linear(x, weight))


@pytest.mark.parametrize("learns", ["gate", "up", "down", "x"])
def test_whatever_of_an_mlp_learns_has_its_gradient(learns):
    tensors = {name: random(torch.float32, 9, 8, seed=s) for s, name in enumerate(("gate", "up", "down"))}
    tensors["x"] = random(torch.float32, 1, 8)
    of, act, index = tensors[learns].requires_grad_(), torch.nn.functional.silu, torch.tensor([1, 4, 7])
    neurons = Neurons(*(Dense(tensors[name], None) for name in ("gate", "up", "down")))
    neurons.mlp(tensors["x"], act).sum().backward()
    assert of.grad is not None
    of.grad = None
    neurons.finish(neurons.activated(tensors["x"], act), tensors["x"], index).sum().backward()
    assert of.grad is not None


def test_no_tokens_are_no_error(level):
    weight, none = random(torch.float32, 9, 8), torch.empty(0, 8)
    assert cpu.linear(none, weight).shape == (0, 9)
    assert cpu.project(torch.empty(0, 9), weight).shape == (0, 8)
    assert cpu.finish(torch.empty(0, 9), none, (weight, None), (weight, None)).shape == (0, 8)


def test_the_emulation_is_taken_only_by_name(monkeypatch, tmp_path):
    monkeypatch.delenv("SIRIUS_ISA", raising=False)
    monkeypatch.setattr(cpu, "LIBRARY", Path(shutil.copy(cpu.LIBRARY, tmp_path)))
    assert cpu.library.__wrapped__().isa in LEVELS[:-1]


def test_kernels_limited_to_older_instructions_stand_for_an_older_cpu(level):
    here = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert cpu.multiplies_halves.__wrapped__() == (here and level in DOTS)


@pytest.mark.parametrize("level", ["avx512bf16", "emulated"], indirect=True)
def test_the_upper_one_of_a_pair_is_added_first_and_each_sum_is_rounded(level):
    """A vector has 16 pairs, so elements 0, 1 and then 32, 33 meet in one sum."""
    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    weight[:, 1] = 1
    weight[0, 32:34] = torch.tensor([2.0**-24, -1])
    weight[1, 32:34] = torch.tensor([-1, 2.0**-24])
    for rows in (1, 3):
        got = cpu.linear(torch.ones(rows, 64, dtype=torch.bfloat16), weight)
        assert torch.equal(got, torch.tensor([[2.0**-24, 0]] * rows).to(torch.bfloat16))


def test_infinity_in_the_last_row_of_an_odd_number_stays_infinity(level):
    for dtype in DTYPES:
        weight, z = torch.ones(5, 70, dtype=dtype), torch.ones(3, 5, dtype=dtype)
        weight[4], z[1, 4] = torch.inf, -torch.inf
        for rows in (z, z[1]):
            assert torch.equal(cpu.project(rows, weight), reference.project(rows.float(), weight.float()).to(dtype))


@pytest.mark.parametrize("row", [-1, 9, 2**62, -(2**63)])
def test_a_row_that_the_weight_does_not_have_is_an_error_that_names_it(row):
    weight, index = random(torch.float32, 9, 8), torch.tensor([0, 3, row, 9])
    x, z, gated = (random(torch.float32, 2, n) for n in (8, 4, 9))
    both = weight, None
    calls = [
        lambda: cpu.linear(x, weight, None, index),
        lambda: cpu.project(z, weight, None, index),
        lambda: cpu.glu(x, both, both, "silu", index),
        lambda: cpu.finish(gated, x, both, both, index),
        lambda: cpu.each(x[:, None], [both] * 3, "silu", index, [1, 3]),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=rf"neuron {row} is asked for, at index 2, of a weight of 9 rows.*0 to 8"):
            call()


def test_weights_of_more_neurons_than_there_are_are_an_error():
    with pytest.raises(ConfigError, match=r"neuron 9 .* of 9 rows"):
        cpu.project(random(torch.float32, 2, 10), random(torch.float32, 9, 8))


def test_an_index_of_another_length_or_dtype_is_an_error():
    weight, z = random(torch.float32, 9, 8), random(torch.float32, 2, 4)
    with pytest.raises(ConfigError, match=r"an index of 3 torch.int64 for 4 neurons"):
        cpu.project(z, weight, None, torch.arange(3))
    with pytest.raises(ConfigError, match=r"an index of 4 torch.int32"):
        cpu.project(z, weight, None, torch.arange(4, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"an index of 3 torch.int64 for 4 neurons"):
        cpu.each(random(torch.float32, 2, 1, 8), [(weight, None)] * 3, "silu", torch.arange(3), [2, 2])


def test_without_the_library_plain_torch_takes_over_with_one_line_in_the_log(monkeypatch, caplog, tmp_path):
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "none.so")
    try:
        weight, x = random(torch.float32, 9, 8), random(torch.float32, 2, 8)
        for _ in range(2):
            assert torch.equal(ops.linear(x, weight), reference.linear(x, weight))
            assert torch.equal(ops.largest(x.abs(), 3), reference.largest(x.abs(), 3))
        assert not ops.reads_rows(weight)
        [line] = caplog.messages
        assert "no compiled CPU kernels" in line
    finally:
        cpu.library.cache_clear()
