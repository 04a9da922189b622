from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius import sparsity
from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.sparsity import PromptSparsity, Sparsity, TokenSparsity, base
from sirius.sparsity.fine import FineSparsity
from sirius.stats import Touched

F = 45


def coarse(keep: float = 0.5, method: str = "coarse", neurons: int = F, **options) -> PromptSparsity:
    made = sparsity.create(SparsityConfig(method, keep, **options), (neurons,))
    assert isinstance(made, PromptSparsity)
    return made


def fine(keep: float = 0.5, method: str = "fine", neurons: int = F, **options) -> TokenSparsity:
    made = sparsity.create(SparsityConfig(method, keep, **options), (neurons,))
    assert isinstance(made, TokenSparsity)
    return made


def observed(*pieces: torch.Tensor, **options) -> PromptSparsity:
    method = coarse(**options)
    for piece in pieces:
        method.observe(0, piece)
    return method


def activations(tokens: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, F, generator=torch.Generator().manual_seed(seed))


def griffin_by_hand(z: torch.Tensor, keep: float) -> list[int]:
    """Score neuron by neuron, in plain Python."""
    norms = [sum(float(v) ** 2 for v in row) ** 0.5 for row in z]
    score = [sum((float(row[j]) / norm) ** 2 for row, norm in zip(z, norms, strict=True)) ** 0.5 for j in range(F)]
    return sorted(sorted(range(F), key=lambda j: -score[j])[: int(keep * F)])


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_coarse_scores_as_griffin_does(tokens, keep):
    z = activations(tokens).double()
    assert observed(z, keep=keep).select(0).tolist() == griffin_by_hand(z, keep)


def test_coarse_sees_a_prompt_in_pieces_as_it_sees_it_whole():
    z = activations(9)
    assert torch.equal(observed(z).select(0), observed(*z.split(4)).select(0))


def test_coarse_outlives_a_token_that_activates_nothing():
    method = observed(torch.cat([torch.zeros(1, F), activations(3)]))
    assert len(method.select(0)) == int(0.5 * F)
    assert bool(method.score(0).isfinite().all())


def shares(z: torch.Tensor) -> list[float]:
    """Return each neuron's mean share of a token's energy, neuron by neuron."""
    energy = [sum(float(v) ** 2 for v in row) for row in z]
    return [sum(float(row[j]) ** 2 / e for row, e in zip(z, energy, strict=True)) / len(z) for j in range(F)]


@pytest.mark.parametrize("share", [0.1, 0.7, 1.0])
def test_a_refresh_gives_checked_windows_their_share_of_the_statistic(share):
    prompt, *windows = (activations(count, seed).double() for seed, count in enumerate((9, 3, 1)))
    method, want = observed(prompt, refresh=share), shares(prompt)
    for window in windows:
        method.refresh(0, window)
        want = [(1 - share) * old + share * new for old, new in zip(want, shares(window), strict=True)]
    torch.testing.assert_close(method.score(0), torch.tensor(want).double().sqrt())


def test_a_refresh_changes_its_own_layer_alone():
    method = observed(activations(), refresh=0.5)
    method.observe(1, activations())
    method.refresh(1, activations(seed=1))
    assert torch.equal(method.score(0), observed(activations()).score(0))


def test_rows_that_share_a_set_weigh_the_same_however_long_their_prompts():
    """Each row's scores are scaled to unit length before their squares are added."""
    z = [activations(count, seed).double() for seed, count in enumerate((2, 40, 5))]
    first, *others = (observed(each) for each in z)
    mean = [sum(column) for column in zip(*map(shares, z), strict=True)]
    want = sorted(sorted(range(F), key=lambda j: -mean[j])[: int(0.5 * F)])
    assert first.select(0, others).tolist() == want != first.select(0).tolist()


def test_a_row_alone_shares_with_nobody():
    method = observed(activations())
    assert torch.equal(method.select(0), method.select(0, ()))
    assert torch.equal(method.select(0), method.select(0, [observed(activations())]))


@settings(derandomize=True, deadline=None)
@given(keep=st.floats(0.03, 1.0), tokens=st.integers(1, 4), seed=st.integers(0, 99))
def test_fine_drops_the_smallest_activations_of_each_token(keep, tokens, seed):
    size = activations(tokens, seed).abs()
    kept = fine(keep).choose(0, size)
    assert kept.sum(-1).tolist() == [F - int((1 - keep) * F)] * tokens
    for row, chosen in zip(size, kept, strict=True):
        assert chosen.all() or row[chosen].min() >= row[~chosen].max()


def test_rounding_follows_the_published_code():
    """CSparse keeps int(.2 * 672) = 134 neurons, FSparse drops int(.8 * 672) and keeps 135."""
    assert coarse(0.2, neurons=672).touched().gate == 134 / 672
    assert fine(0.2, neurons=672).touched(1.0).up == 135 / 672


def test_fine_with_a_threshold_keeps_what_is_above_it():
    size = activations(5).abs()
    assert torch.equal(fine(threshold=0.7).choose(0, size), size > 0.7)


def test_touched_rows_are_those_of_the_method():
    kept = int(0.5 * F) / F
    assert coarse().touched() == Touched(kept, kept, kept)
    kept = (F - int(0.5 * F)) / F
    assert fine().touched(1.0) == Touched(1.0, kept, kept)
    measured = Touched(1.0, 0.7, 0.7)
    assert fine(threshold=0.7).touched(0.7) == fine(per_branch=True).touched(0.7) == measured


def test_a_method_of_fixed_sizes_touches_those():
    class Half(TokenSparsity):
        def choose(self, layer, size):
            raise NotImplementedError

        def fixed(self, layer):
            return self.neurons[layer] // 2

    assert Half(SparsityConfig(), (100, 60)).touched(1.0) == Touched(1.0, 0.5, 0.5)


def test_aliases_make_the_same_method():
    assert type(coarse(method="griffin")) is type(coarse())
    assert type(fine(method="cats")) is type(fine())


def test_none_makes_no_method():
    assert sparsity.create(SparsityConfig("none"), (F,)) is None


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'dense'.*cats, coarse, fine, griffin, none"):
        sparsity.create(SparsityConfig("dense"), (F,))


def test_coarse_refuses_to_keep_no_neuron_and_to_take_a_threshold():
    with pytest.raises(ConfigError, match=r"keep 0.01 of 45 neurons keeps none; keep at least 0.0223"):
        coarse(0.01)
    with pytest.raises(ConfigError, match="no threshold"):
        coarse(threshold=0.1)


def test_a_refresh_is_refused_where_there_is_nothing_to_refresh():
    with pytest.raises(ConfigError, match=r"fine.*nothing to refresh"):
        fine(refresh=0.1)
    with pytest.raises(ConfigError, match="first cannot be refreshed"):
        First(SparsityConfig("first", refresh=0.1), (F,))


class First(PromptSparsity):
    """A third party's method: the first neurons stay."""

    def observe(self, layer, z): ...

    def score(self, layer):
        return torch.arange(F, 0, -1.0)


@pytest.fixture
def clean_register(monkeypatch):
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))


def test_a_third_party_adds_a_method_with_the_decorator(clean_register):
    assert sparsity.register("first")(First) is First
    made = sparsity.create(SparsityConfig("first", 0.1), (F,))
    assert isinstance(made, First) and made.select(0).tolist() == [0, 1, 2, 3]
    assert "first" in sparsity.known()
    with pytest.raises(ConfigError, match="already there"):
        sparsity.register("first")(type("Other", (First,), {}))


def test_what_is_neither_per_prompt_nor_per_token_is_refused(clean_register):
    class Odd(Sparsity):
        pass

    sparsity.register("odd")(Odd)
    with pytest.raises(ConfigError, match="'odd' is a Odd: neither per prompt nor per token"):
        sparsity.create(SparsityConfig("odd"), (F,))


def test_an_entry_point_that_cannot_be_loaded_is_named(monkeypatch):
    point = EntryPoint("broken", "no_such_package:Method", "sirius.sparsity")
    monkeypatch.setattr(base, "entry_points", lambda group, name=None: [point] if name in (None, "broken") else [])
    with pytest.raises(ConfigError, match=r"'broken' \(no_such_package:Method\) cannot be loaded: No module"):
        sparsity.create(SparsityConfig("broken"), (F,))


def test_a_third_party_adds_a_method_by_entry_point(monkeypatch):
    class Point:
        name = "theirs"

        def load(self):
            return FineSparsity

    def entry_points(group, name=None):
        assert group == "sirius.sparsity"
        return [Point()] if name in (None, "theirs") else []

    monkeypatch.setattr(base, "entry_points", entry_points)
    assert type(sparsity.create(SparsityConfig("theirs"), (F,))) is FineSparsity
    assert "theirs" in sparsity.known()
