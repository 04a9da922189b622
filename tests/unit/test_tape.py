"""A tape runs again what ran while it was on, with what its inputs hold by then."""

import gc

import pytest
import torch
from torch import Tensor

from sirius.errors import ConfigError
from sirius.kernels import cpu
from sirius.kernels.launch import running
from sirius.kernels.tape import Tape

X, Y = torch.arange(12.0).square().view(3, 4) / 16, torch.tensor([2.0, -1.0, 0.5, 3.0])
ROWS, PLACES = torch.tensor([[2], [0]]), torch.arange(5).flip(0)[None]
OTHER = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(2))


def taken_down(compute, *inputs: Tensor) -> tuple[Tape, Tensor]:
    with torch.no_grad(), Tape() as tape:
        return tape, compute(*inputs)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, y: x * y + 1,
        lambda x, y: torch.cat([x, -x], -1).transpose(0, 1).contiguous()[1:3],
        lambda x, y: x.to(torch.bfloat16).float().softmax(-1),
        lambda x, y: x.topk(2, -1).values,
        lambda x, y: x[torch.tensor([2, 0])],
        lambda x, y: (x @ y[:, None]).squeeze(-1).clone(),
        lambda x, y: torch.zeros(3, 4).index_put_((torch.tensor([1]),), y).add_(x),
        lambda x, y: torch.arange(3).mul_(2) * x[:, 0],
        lambda x, y: x.new_empty(3).copy_(x[:, 1]) + x.sum(-1),
        lambda x, y: x.repeat_interleave(2, 0).split(2)[1] * y,
    ],
)
def test_a_replay_computes_what_the_calls_would(compute):
    x, y = X.clone(), Y.clone()
    tape, got = taken_down(compute, x, y)
    assert tape.repeatable and torch.equal(got, compute(X, Y))
    for _ in range(2):
        x.copy_(x.flip(0) - 0.5), y.copy_(y.roll(1))
        with torch.no_grad():
            want = compute(x.clone(), y.clone())
            tape.replay()
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x * float(x.sum()),
        lambda x: x if x.max() > 3 else -x,
        lambda x: x.nonzero(),
        lambda x: x[x > 3],
        lambda x: torch.masked_select(x, x > 3),
        lambda x: x.unique(),
        lambda x: x * torch.tensor(x.tolist()),
        lambda x: x + torch.from_numpy(x.numpy() * 2),
        lambda x: x + torch.from_dlpack(x),
    ],
)
def test_what_depends_on_numbers_is_not_to_be_replayed(compute):
    tape, got = taken_down(compute, X)
    assert not tape.repeatable and torch.equal(got, compute(X))


def test_it_is_not_for_inference_mode():
    with torch.inference_mode(), pytest.raises(AssertionError), Tape():
        pass
    assert running() is None


def test_nothing_runs_on_a_tape_that_is_off():
    with pytest.raises(ZeroDivisionError), Tape():
        raise ZeroDivisionError
    tape, _ = taken_down(lambda x: x + 1, X)
    count = len(tape.calls)
    X + 1
    assert running() is None and len(tape.calls) == count == 1


needs_kernels = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return (x * cos) + (torch.cat((-x[..., half:], x[..., :half]), -1) * sin)


def positions(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return states [2, 3, 5, 6] as attention has them, and numbers in the place of cosines and sines."""
    g = torch.Generator().manual_seed(0)
    x, cos, sin = (torch.randn(2, 5, heads, 6, generator=g).to(dtype).transpose(1, 2) for heads in (3, 1, 1))
    return x, cos, sin


def turned_the_other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (torch.cat((x[..., 3:], -x[..., :3]), -1) * sin)


def its_halves_elsewhere(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (torch.cat((-x[..., 3:], x[..., 1:4]), -1) * sin)


def seen_in_between(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight = x * cos
    turned = straight + (torch.cat((-x[..., 3:], x[..., :3]), -1) * sin)
    return turned * straight


def turned_alone(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    _straight = x * cos
    return x + (torch.cat((-x[..., 3:], x[..., :3]), -1) * sin)


def turned_for_nothing(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight, _turned = x * cos, torch.cat((-x[..., 3:], x[..., :3]), -1) * sin
    return straight + x


def joined_for_nothing(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight, _joined = x * cos, torch.cat((-x[..., 3:], x[..., :3]), -1)
    return straight + x * sin


def negated_for_nothing(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight, _negated = x * cos, -x[..., 3:]
    return straight + (torch.cat((x[..., 3:], x[..., :3]), -1) * sin)


def its_first_half_twice(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return (x * cos) + (torch.cat((-x[..., :3], x[..., :3]), -1) * sin)


def negated_is_used(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight, negated = x * cos, -x[..., 3:]
    return (straight + (torch.cat((negated, x[..., :3]), -1) * sin))[..., 3:] * negated


def joined_is_used(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight, joined = x * cos, torch.cat((-x[..., 3:], x[..., :3]), -1)
    return (straight + (joined * sin)) * joined


def turned_is_used(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight, turned = x * cos, torch.cat((-x[..., 3:], x[..., :3]), -1) * sin
    return (straight + turned) * turned


def a_kernel_of_ours_uses_it(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight = x * cos
    turned = straight + (torch.cat((-x[..., 3:], x[..., :3]), -1) * sin)
    return turned * cpu.linear(straight.transpose(1, 2), WEIGHT.to(x.dtype)).transpose(1, 2)


def added_to_another(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    straight = x * cos
    return (torch.cat((-x[..., 3:], x[..., :3]), -1) * sin) + straight


def twice_the_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.add(x * cos, torch.cat((-x[..., 3:], x[..., :3]), -1) * sin, alpha=2)


def written(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    store = cos.new_zeros(3, 9, 3, 6)
    store[ROWS, PLACES] = x.transpose(1, 2)
    return store


def written_by_one_index(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    store = cos.new_zeros(3, 3, 5, 6)
    store[ROWS[:, 0]] = x
    return store


def written_to_flat_places(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    store = cos.new_zeros(3, 9, 3, 6)
    store[ROWS[:, 0], PLACES[0, :2]] = x[:, :, 0]
    return store


def written_across(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    store = cos.new_zeros(3, 9, 6, 3).transpose(2, 3)
    store[ROWS, PLACES] = x.transpose(1, 2)
    return store


def written_from_across(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    store = cos.new_zeros(3, 9, 6, 5)
    store[ROWS, PLACES[:, :3]] = x.transpose(2, 3)
    return store


def added_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    store = cos.new_zeros(3, 9, 3, 6)
    return store.index_put_((ROWS, PLACES), x.transpose(1, 2), accumulate=True)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("compute", "calls"),
    [
        (rotated, 1),
        (lambda x, cos, sin: rotated(x[..., :5], cos[..., :5], sin[..., :5]), 5),
        (lambda x, cos, sin: rotated(x[:, :, :, :4], cos[..., :4], sin[..., :4]), 1),
        (lambda x, cos, sin: rotated(x[0], cos[0], sin[0]), 5),
        (lambda x, cos, sin: rotated(cos, x, x), 5),
        (lambda x, cos, sin: rotated(x, cos, sin) + rotated(x * 2, sin, cos), 4),
        (turned_the_other_way, 5),
        (its_halves_elsewhere, 5),
        (seen_in_between, 6),
        (its_first_half_twice, 5),
        (negated_is_used, 6),
        (joined_is_used, 6),
        (turned_is_used, 6),
        (turned_alone, 5),
        (lambda x, cos, sin: torch.add(cos, sin, alpha=2), 1),
        (lambda x, cos, sin: cos + sin.float(), 2),
        (turned_for_nothing, 5),
        (joined_for_nothing, 5),
        (negated_for_nothing, 5),
        (added_to_another, 5),
        (twice_the_turned, 5),
        (written, 2),
        (written_by_one_index, 2),
        (written_to_flat_places, 2),
        (written_across, 2),
        (written_from_across, 2),
        (lambda x, cos, sin: rotated(*(each.transpose(2, 3)[..., :4] for each in (x, cos, sin))), 5),
        (lambda x, cos, sin: rotated(x, cos, sin.to(OTHER.get(x.dtype, x.dtype))), 6),
        (added_in_place, 2),
        (lambda x, cos, sin: x.contiguous() + x.contiguous() + x.contiguous(), 5),
        (lambda x, cos, sin: x[:, :1] + cos, 1),
    ],
)
def test_operations_that_a_kernel_does_are_left_to_it_bit_for_bit(dtype, compute, calls):
    inputs = positions(dtype)
    tape, got = taken_down(compute, *inputs)
    for _ in range(2):
        for each in inputs:
            each.copy_(each.flip(-1) * 1.5 + 0.25)
        want = compute(*(each.clone() for each in inputs))
        got.fill_(torch.nan)
        with torch.no_grad():
            tape.replay()
        assert torch.equal(got, want)
    if dtype is not torch.float32:
        assert len(tape.calls) == calls


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_a_kernel_of_ours_reads_is_computed(dtype):
    inputs = positions(dtype)
    tape, got = taken_down(a_kernel_of_ours_uses_it, *inputs)
    inputs[0].mul_(1.5)
    with torch.no_grad():
        tape.replay()
        assert torch.equal(got, a_kernel_of_ours_uses_it(*inputs))


@needs_kernels
def test_of_joined_kernels_the_one_that_failed_complains_and_later_ones_do_not_run():
    x, weight = torch.ones(1, 4), torch.ones(3, 4)
    places = [torch.tensor([0, place]) for place in (1, 2, 0)]
    tape, got = taken_down(lambda x: [cpu.linear(x, weight, None, place) for place in places], x)
    assert len(tape.calls) == 1
    places[1][1] = 7
    for each in got:
        each.fill_(torch.nan)
    with pytest.raises(ConfigError, match=r"neuron 7 .*at index 1,"):
        tape.replay()
    assert [bool(each.isnan().any()) for each in got] == [False, True, True]


@needs_kernels
def test_kernels_are_taken_down_with_the_memory_that_they_use():
    x, weight, index = torch.randn(1, 4), torch.randn(3, 4), torch.tensor([0, 2])
    want = cpu.linear(x + 1, weight, None, index)
    tape, got = taken_down(lambda x: cpu.linear(x + 1, weight, None, index), x)
    assert torch.equal(got, want)
    weight.data = torch.zeros(3, 4)
    gc.collect()
    got.fill_(torch.nan)
    with torch.no_grad():
        tape.replay()
    assert torch.equal(got, want)


@needs_kernels
def test_a_replay_refuses_rows_that_a_weight_does_not_have():
    x, weight, index = torch.randn(1, 4), torch.randn(3, 4), torch.tensor([0, 2])
    tape, _ = taken_down(lambda x: cpu.linear(x, weight, None, index), x)
    index[1] = 3
    with pytest.raises(ConfigError, match=r"neuron 3 .* of 3 rows"):
        tape.replay()
