"""The gated MLP's definition: stacks of weights and gathered rows against a loop and the formula, at odd sizes."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from sirius.model.matrix import Dense, Neurons

F, H = 23, 7


def neurons_of(g: torch.Generator, neurons: int, size: int, bias: bool, down_bias: Tensor | None = None) -> Neurons:
    gate, up, down = (torch.randn(neurons, size, dtype=torch.float64, generator=g) for _ in range(3))
    gate_bias, up_bias = (torch.randn(neurons, dtype=torch.float64, generator=g) if bias else None for _ in range(2))
    return Neurons(Dense(gate, gate_bias), Dense(up, up_bias), Dense(down, down_bias))


def x_of(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=g)


def close(got: Tensor, want: Tensor) -> None:
    assert got.shape == want.shape
    assert float((got - want).norm()) < 1e-13 * float(want.norm())


def one_by_one(x: Tensor, n: Neurons) -> Tensor:
    """The definition for a token x [H]: what each neuron sends on, added up."""
    down, bias = n.down
    out = torch.zeros_like(x) if bias is None else bias.clone()
    for j in range(len(down)):
        gate, up = (weight[j] @ x + (0 if b is None else b[j]) for weight, b in (n.gate, n.up))
        out += silu(gate) * up * down[j]
    return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("neurons", "size"), [(1, 1), (F, H), (8, 33)])
def test_the_mlp_is_the_sum_of_what_its_neurons_send_on(neurons, size, bias):
    g = torch.Generator().manual_seed(0)
    n, x = neurons_of(g, neurons, size, bias, x_of(g, size) if bias else None), x_of(g, 2, 3, size)
    close(n.mlp(x, silu), torch.stack([one_by_one(t, n) for t in x.flatten(0, 1)]).view_as(x))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (1, 4), (3, 1), (5, 3)])
@pytest.mark.parametrize(("neurons", "size"), [(1, 1), (F, H), (8, 33)])
def test_copied_neurons_equal_a_loop_over_the_rows(neurons, size, rows, count, bias):
    g = torch.Generator().manual_seed(1)
    n, x = neurons_of(g, neurons, size, bias, x_of(g, size) if bias else None), x_of(g, rows, count, size)
    sets = [torch.randperm(neurons, generator=g)[: (neurons + 1) // 2] for _ in range(rows)]
    got = n.rows(sets).mlp(x, silu)
    close(got, torch.stack([n.mlp(line, silu, own) for line, own in zip(x, sets, strict=True)]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("k", [1, 2, F - 1, F])
def test_gathered_rows_equal_the_whole_mlp_of_those_rows(k, bias):
    g = torch.Generator().manual_seed(k)
    n, x = neurons_of(g, F, H, bias, x_of(g, H) if bias else None), x_of(g, 1, 4, H)
    index = torch.randperm(F, generator=g)[:k]
    gated = silu(torch.nn.functional.linear(x, *n.gate))
    close(n.finish(gated, x, index), n.rows([index]).mlp(x, silu))


@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_copied_with_their_biases(bias):
    g = torch.Generator().manual_seed(0)
    n, index = neurons_of(g, F, H, bias, x_of(g, H) if bias else None), torch.tensor([4, 0, 22])
    taken = n.rows([index])
    wholes, parts = ((*each.gate, *each.up, each.down.weight) for each in (n, taken))
    for whole, part in zip(wholes, parts, strict=True):
        assert whole is part is None or torch.equal(part, torch.stack([whole[4], whole[0], whole[22]]))
    assert taken.down.bias is n.down.bias
    assert taken.gate.weight.untyped_storage().data_ptr() != n.gate.weight.untyped_storage().data_ptr()
