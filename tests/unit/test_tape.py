"""A tape runs again what ran while it was on, with what its inputs hold by then."""

import gc

import pytest
import torch
from torch import Tensor

from sirius.errors import ConfigError
from sirius.kernels import cpu
from sirius.kernels.tape import Tape, running

X, Y = torch.arange(12.0).square().view(3, 4) / 16, torch.tensor([2.0, -1.0, 0.5, 3.0])


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
    assert tape.steady and torch.equal(got, compute(X, Y))
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
    assert not tape.steady and torch.equal(got, compute(X))


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
