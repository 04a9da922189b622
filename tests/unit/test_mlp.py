"""The gated MLP by every route against the formula, at odd sizes, with fresh memory full of NaN."""

import pytest
import torch
from torch import nn

from sirius import sparsity
from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.kernels.reference import Neurons, gated_mlp, gated_mlp_rows
from sirius.model.mlp import SparseMLP, agrees, observing, sparse
from sirius.sparsity import Sparsity

H, F = 37, 45
SEPARATE = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
FUSED = {"gate_up": "gate_up_proj", "down": "down_proj"}


class Gated(nn.Module):
    """A gated MLP as transformers writes it, fused or not, with or without biases."""

    def __init__(self, fused: bool, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.act_fn = fused, nn.SiLU()
        if fused:
            self.gate_up_proj = nn.Linear(H, 2 * F, bias)
        else:
            self.gate_proj, self.up_proj = nn.Linear(H, F, bias), nn.Linear(H, F, bias)
        self.down_proj = nn.Linear(F, H, bias)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1) if self.fused else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(self.act_fn(gate) * up)


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """Fresh memory holds NaN, so an output that was never written cannot pass by luck."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[(f, b) for f in (False, True) for b in (False, True)], ids=["plain", "bias", "fused", "both"])
def original(request):
    return Gated(*request.param).double()


def sparse_mlp(original: Gated) -> SparseMLP:
    return SparseMLP(original, FUSED if original.fused else SEPARATE, original.act_fn)


def tokens(count: int = 5) -> torch.Tensor:
    return torch.randn(1, count, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masked(mlp: SparseMLP, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The definition: a neuron that is not kept sends nothing on."""
    n = mlp.neurons
    gate_bias = 0 if n.gate_bias is None else n.gate_bias
    up_bias = 0 if n.up_bias is None else n.up_bias
    down_bias = 0 if n.down_bias is None else n.down_bias
    z = nn.functional.silu(x @ n.gate.T + gate_bias) * (x @ n.up.T + up_bias)
    return (z * kept) @ n.down + down_bias


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = got.detach(), want.detach()
    assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < 1e-14


def routed(mlp: SparseMLP, method: Sparsity, x: torch.Tensor) -> torch.Tensor:
    mlp.route = sparse(method, 0, mlp)
    try:
        return mlp(x)
    finally:
        mlp.route = None


def test_the_dense_route_computes_what_the_original_did(original):
    x = tokens()
    want = original(x)
    close(sparse_mlp(original)(x), want)


def test_weights_are_neuron_major_and_kept_once(original):
    before = sum(p.numel() for p in original.parameters())
    mlp = sparse_mlp(original)
    assert sum(p.numel() for p in mlp.parameters()) == before
    for matrix in (mlp.neurons.gate, mlp.neurons.up, mlp.neurons.down):
        assert matrix.shape == (F, H) and matrix.stride() == (H, 1)
        owners = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
        assert matrix.untyped_storage().data_ptr() in owners


def test_a_checkpoint_looks_as_before(original):
    before = {name: value.clone() for name, value in original.state_dict().items()}
    after = sparse_mlp(original).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_restoring_gives_the_original_back(original):
    mlp = sparse_mlp(original)
    assert mlp.restore() is original
    assert original.down_proj.weight.is_contiguous()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_coarse_route_is_the_mlp_of_its_neurons(original, keep):
    mlp, x = sparse_mlp(original), tokens()
    method = sparsity.create(SparsityConfig("coarse", keep), (F,))
    mlp.route = observing(method, 0)
    close(mlp(x), original(x))
    mlp.route = None
    kept = torch.zeros(F, dtype=torch.bool)
    kept[method.select(0)] = True
    for count in (1, 4):
        close(routed(mlp, method, tokens(count)), masked(mlp, tokens(count), kept))


def test_what_is_observed_is_each_neurons_output(original):
    mlp, x, seen = sparse_mlp(original), tokens(), []
    method = sparsity.create(SparsityConfig("coarse"), (F,))
    method.observe = lambda layer, z: seen.append((layer, z))
    mlp.route = observing(method, 3)
    out = mlp(x)
    (layer, z), bias = seen[0], mlp.neurons.down_bias
    assert layer == 3 and z.shape == (5, F)
    close(z @ mlp.neurons.down + (0 if bias is None else bias), out[0])


@pytest.mark.parametrize("count", [1, 4], ids=["rows gathered", "mask"])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_the_fine_route_is_the_mlp_of_each_tokens_neurons(original, keep, count):
    mlp, x = sparse_mlp(original), tokens(count)
    method = sparsity.create(SparsityConfig("fine", keep), (F,))
    gated = nn.functional.silu(nn.functional.linear(x, mlp.neurons.gate, mlp.neurons.gate_bias))
    close(routed(mlp, method, x), masked(mlp, x, method.choose(0, gated)))


def test_a_threshold_that_nothing_passes_leaves_the_bias_alone(original):
    mlp, x = sparse_mlp(original), tokens(1)
    got = routed(mlp, sparsity.create(SparsityConfig("fine", threshold=1e9), (F,)), x)
    assert torch.equal(got, masked(mlp, x, torch.zeros(F)))


@pytest.mark.parametrize("k", [1, 2, 44, 45])
def test_gathered_rows_equal_the_whole_mlp_of_those_rows(k):
    g = torch.Generator().manual_seed(k)
    gate, up, down = (torch.randn(F, H, dtype=torch.float64, generator=g) for _ in range(3))
    neurons, x = Neurons(gate, up, down), tokens(1)
    index = torch.randperm(F, generator=g)[:k]
    gated = nn.functional.silu(x @ gate.T)
    close(gated_mlp_rows(gated, x, neurons, index), gated_mlp(x, neurons.rows(index), nn.functional.silu))


def test_a_difference_is_noticed(original):
    mlp = sparse_mlp(original)
    assert agrees(mlp, original)
    mlp.activation = nn.GELU()
    assert not agrees(mlp, original)


@pytest.mark.parametrize(
    "answer",
    [torch.ones(F, dtype=torch.bool), torch.tensor([1, 1]), torch.tensor([F]), torch.tensor([-1]), torch.tensor([[1]])],
    ids=["mask", "repeated", "too large", "negative", "not flat"],
)
def test_what_is_no_set_of_neurons_is_refused(original, answer):
    method = sparsity.create(SparsityConfig("coarse"), (F,))
    method.select = lambda layer: answer
    with pytest.raises(ConfigError, match=r"CoarseSparsity.select must give distinct neurons of 45"):
        sparse(method, 0, sparse_mlp(original))
