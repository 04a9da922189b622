"""The gated MLP by every route against the formula, at odd sizes, with fresh memory full of NaN."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from sirius import sparsity
from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.model.adopt import obstacle
from sirius.model.mlp import Roles, SparseMLP, adopt_mlp, agrees
from sirius.model.prepared import Pass, Prepared, Slots
from sirius.runtime.neurons import Chosen, Observe, Route, Tally, fixed_routes
from sirius.sparsity import PromptSparsity, TokenSparsity
from sirius.sparsity.coarse import CoarseSparsity

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
def nan_filled_memory(monkeypatch):
    """Fresh memory holds NaN, so an output that was never written cannot pass by luck."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr("torch.utils.deterministic.fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[(f, b) for f in (False, True) for b in (False, True)], ids=["plain", "bias", "fused", "both"])
def original(request):
    return Gated(*request.param).double()


def sparse_mlp(original: Gated) -> SparseMLP:
    return adopt_mlp(deepcopy(original), Roles(FUSED if original.fused else SEPARATE, "act_fn"), 0, Prepared())


def tokens(count: int = 5, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, count, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def coarse(x: torch.Tensor, mlp: SparseMLP, **options) -> PromptSparsity:
    """Return a method that has seen a prompt x [1, T, H]."""
    method = sparsity.create(SparsityConfig("coarse", **options), (F,))
    assert isinstance(method, PromptSparsity)
    routed(mlp, Observe(lambda z: method.observe(0, z.flatten(0, -2))), x)
    return method


def fine(keep: float = 0.5, **options) -> TokenSparsity:
    method = sparsity.create(SparsityConfig("fine", keep, **options), (F,))
    assert isinstance(method, TokenSparsity)
    return method


def tally(x: torch.Tensor) -> Tally:
    return Tally(1, len(x), x.device)


def sizes(mlp: SparseMLP, x: torch.Tensor) -> torch.Tensor:
    """Return |act(gate(x))| [..., F]."""
    return nn.functional.silu(nn.functional.linear(x, *mlp.neurons.gate)).abs()


def marked(index: torch.Tensor) -> torch.Tensor:
    return torch.zeros(F, dtype=torch.bool).index_fill(0, index, True)


def masked(mlp: SparseMLP, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The definition: a neuron that is not kept sends nothing on."""
    gate, up, down = mlp.neurons
    z = nn.functional.silu(nn.functional.linear(x, *gate)) * nn.functional.linear(x, *up)
    return (z * kept) @ down.weight + (0 if down.bias is None else down.bias)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = got.detach(), want.detach()
    assert float((got - want).square().mean().sqrt() / want.square().mean().sqrt()) < 1e-14


def routed(mlp: SparseMLP, route: Route | None, x: torch.Tensor, branches: torch.Tensor | None = None) -> torch.Tensor:
    """Return what an MLP makes of x [B, T, H] in a pass; its branches are equally likely, unless they are given."""
    likely = torch.full(x.shape[:2], 1 / x.shape[1]) if branches is None else branches
    none = torch.zeros(0, dtype=torch.int64)
    with mlp.prepared.running(Pass([route], Slots(none, none, 0, 0), none, none, likely, False, False)):
        return mlp(x)


def test_the_dense_route_computes_what_the_original_did(original):
    x = tokens()
    want = original(x)
    close(sparse_mlp(original)(x), want)


def test_weights_are_neuron_major_and_kept_once(original):
    before = sum(p.numel() for p in original.parameters())
    mlp = sparse_mlp(original.eval())
    assert sum(p.numel() for p in mlp.parameters()) == before
    for matrix, _ in mlp.neurons:
        assert matrix.shape == (F, H) and matrix.stride() == (H, 1)
        owners = {p.untyped_storage().data_ptr() for p in mlp.parameters()}
        assert matrix.untyped_storage().data_ptr() in owners


def test_a_checkpoint_looks_as_before(original):
    before = {name: value.clone() for name, value in original.state_dict().items()}
    after = sparse_mlp(original).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_restoring_gives_the_original_back(original):
    before = {name: value for name, value in vars(original).items() if not name.startswith("_")}
    mlp = sparse_mlp(original)
    mlp.restore()
    assert type(mlp) is Gated
    assert {name: value for name, value in vars(mlp).items() if not name.startswith("_")} == before
    assert mlp.down_proj.weight.is_contiguous()
    assert torch.equal(mlp(tokens()), original(tokens()))


def test_layers_with_hooks_are_called(original):
    mlp, x = sparse_mlp(original), tokens()
    mlp.down_proj.register_forward_hook(lambda module, given, result: 2 * result)
    close(mlp(x), 2 * original(x))


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_layer_with_any_hook_is_not_read_past_itself(register):
    layer = nn.Linear(3, 3)
    assert obstacle(layer) is None
    hook = getattr(layer, f"register_{register}")(lambda *given: None)
    assert "hooks, which would not be called" in str(obstacle(layer))
    hook.remove()
    assert obstacle(layer) is None


def test_what_is_observed_is_each_neurons_output(original):
    mlp, x, seen = sparse_mlp(original), tokens(), []
    out = routed(mlp, Observe(seen.append), x)
    close(out, original(x))
    assert seen[0].shape == (1, 5, F)
    weight, bias = mlp.neurons.down
    close(seen[0] @ weight + (0 if bias is None else bias), out)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_the_coarse_route_is_the_mlp_of_its_neurons(original, keep):
    mlp = sparse_mlp(original)
    method = coarse(tokens(), mlp, keep=keep)
    for count in (1, 4):
        x = tokens(count)
        close(routed(mlp, fixed_routes([method], [mlp])[0], x), masked(mlp, x, marked(method.select(0))))


@pytest.mark.parametrize("shared_set", [True, False], ids=["one set", "a set for each row"])
def test_rows_of_prompts_share_a_set_or_have_their_own(original, shared_set):
    mlp, x = sparse_mlp(original), tokens(2, rows=3)
    methods = [coarse(tokens(9)[:, 3 * row : 3 * row + 3], mlp, keep=0.4, shared_set=shared_set) for row in range(3)]
    own, together = [each.select(0) for each in methods], methods[0].select(0, methods[1:])
    assert len({tuple(index.tolist()) for index in (*own, together)}) == 4
    got = routed(mlp, fixed_routes(methods, [mlp])[0], x)
    for row in range(3):
        close(got[row], masked(mlp, x[row], marked(together if shared_set else own[row])))


@pytest.mark.parametrize("shared_set", [False, True])
def test_a_method_that_keeps_every_neuron_is_the_dense_route(original, shared_set):
    mlp = sparse_mlp(original)
    assert fixed_routes([coarse(tokens(), mlp, keep=1.0, shared_set=shared_set)] * 2, [mlp]) == [None]


@pytest.mark.parametrize("rows", [1, 3], ids=["rows gathered", "mask"])
@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_the_fine_route_is_the_mlp_of_each_tokens_neurons(original, keep, rows):
    mlp, x, method = sparse_mlp(original), tokens(1, rows), fine(keep)
    close(routed(mlp, Chosen(method, 0, tally(x)), x), masked(mlp, x, method.choose(0, sizes(mlp, x))))


@pytest.mark.parametrize("rows", [1, 2], ids=["rows gathered", "mask"])
def test_a_rows_branches_share_the_neurons_of_their_weighed_mean(original, rows):
    mlp, x, method = sparse_mlp(original), tokens(3, rows), fine(0.4)
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]])[:rows]
    mean = sum(weights[:, [t], None].double() * sizes(mlp, x)[:, [t]] for t in range(3))
    assert isinstance(mean, torch.Tensor) and mean.shape == (rows, 1, F)
    close(routed(mlp, Chosen(method, 0, tally(x)), x, weights), masked(mlp, x, method.choose(0, mean)))


@pytest.mark.parametrize("rows", [1, 2])
def test_branches_have_neurons_of_their_own_where_that_is_asked_for(original, rows):
    mlp, x, method = sparse_mlp(original), tokens(3, rows), fine(0.4, per_branch=True)
    close(routed(mlp, Chosen(method, 0, tally(x)), x), masked(mlp, x, method.choose(0, sizes(mlp, x))))


@pytest.mark.parametrize("per_branch", [False, True])
def test_what_a_rows_steps_read_is_counted_for_it_alone(original, per_branch):
    mlp, x, method = sparse_mlp(original), tokens(2, 3), fine(threshold=0.2, per_branch=per_branch)
    book = Tally(2, 3, x.device)
    branches = torch.tensor([[0.8, 0.2], [1.0, 0.0], [0.0, 0.0]])  # whole, half dead, not drafted for
    for _ in range(2):
        routed(mlp, Chosen(method, 1, book), x, branches)
    size = sizes(mlp, x)
    first = (size[0] > 0.2).any(0) if per_branch else (0.8 * size[0, 0] + 0.2 * size[0, 1]) > 0.2
    want = [int(first.sum()) / F, int((size[1, 0] > 0.2).sum()) / F, 1.0]
    assert 0 < want[1] != want[0] < 1
    assert [book.shares(row) for row in range(3)] == [(share, (1.0, share)) for share in want]
    book.move(2, 0)
    assert [book.shares(row)[0] for row in range(3)] == [want[2], want[1], 1.0]


def test_a_threshold_that_nothing_passes_leaves_the_bias_alone(original):
    mlp, x = sparse_mlp(original), tokens(1)
    got = routed(mlp, Chosen(fine(threshold=1e9), 0, tally(x)), x)
    assert torch.equal(got, masked(mlp, x, torch.zeros(F)))


def test_a_difference_is_noticed(original):
    mlp = sparse_mlp(original)
    x = tokens(2)
    want = original(x)
    assert agrees(mlp, x, want)
    mlp.act_fn = nn.GELU()
    assert not agrees(mlp, x, want)


@pytest.mark.parametrize(
    "answer",
    [torch.ones(F, dtype=torch.bool), torch.tensor([1, 1]), torch.tensor([F]), torch.tensor([-1]), torch.tensor([[1]])],
    ids=["mask", "repeated", "too large", "negative", "not flat"],
)
@pytest.mark.parametrize("shared_set", [False, True])
def test_what_is_no_set_of_neurons_is_refused(original, answer, shared_set, monkeypatch):
    monkeypatch.setattr(CoarseSparsity, "select", lambda self, layer, others=(): answer)
    mlp = sparse_mlp(original)
    with pytest.raises(ConfigError, match=r"CoarseSparsity.select must give distinct neurons of 45"):
        fixed_routes([coarse(tokens(), mlp, shared_set=shared_set)], [mlp])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "got NoneType"),
        (torch.ones(F, dtype=torch.bool), r"got \[45\] torch.bool"),
        (torch.ones(1, 1, F), r"got \[1, 1, 45\] torch.float"),
    ],
    ids=["nothing", "flat", "floats"],
)
def test_a_choice_that_is_no_mask_of_neurons_is_refused(original, answer, words, monkeypatch):
    mlp, x, method = sparse_mlp(original), tokens(1), fine(threshold=0.2)
    monkeypatch.setattr(method, "choose", lambda layer, size: answer)
    with pytest.raises(ConfigError, match=rf"FineSparsity.choose must give .* \[1, 1, 45\] bool; {words}"):
        routed(mlp, Chosen(method, 0, tally(x)), x)
