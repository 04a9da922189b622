from importlib.metadata import EntryPoint

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius import sparsity
from sirius.core import SparsityConfig
from sirius.errors import ConfigError
from sirius.sparsity import PromptSparsity, TokenSparsity, base
from sirius.stats import Touched

F = 45


def make(method: str, keep: float = 0.5, threshold: float | None = None, neurons: tuple[int, ...] = (F,)):
    made = sparsity.create(SparsityConfig(method, keep, threshold), neurons)
    assert made is not None
    return made


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
    method, z = make("coarse", keep), activations(tokens).double()
    method.observe(0, z)
    assert method.select(0).tolist() == griffin_by_hand(z, keep)


def test_coarse_sees_a_prompt_in_pieces_as_it_sees_it_whole():
    z, whole, pieces = activations(9), make("griffin"), make("griffin")
    whole.observe(0, z)
    for piece in z.split(4):
        pieces.observe(0, piece)
    assert torch.equal(whole.select(0), pieces.select(0))


def test_coarse_outlives_a_token_that_activates_nothing():
    method = make("coarse")
    method.observe(0, torch.cat([torch.zeros(1, F), activations(3)]))
    assert len(method.select(0)) == int(0.5 * F)
    assert bool(method.energy[0].isfinite().all())


@settings(derandomize=True, deadline=None)
@given(keep=st.floats(0.03, 1.0), tokens=st.integers(1, 4), seed=st.integers(0, 99))
def test_fine_drops_the_smallest_activations_of_each_token(keep, tokens, seed):
    gated = activations(tokens, seed)
    kept = make("cats", keep).choose(0, gated)
    assert kept.sum(-1).tolist() == [F - int((1 - keep) * F)] * tokens
    for row, chosen in zip(gated.abs(), kept, strict=True):
        assert chosen.all() or row[chosen].min() >= row[~chosen].max()


def test_rounding_follows_the_published_code():
    """CSparse keeps int(.2 * 672) = 134 neurons, FSparse drops int(.8 * 672) and keeps 135."""
    assert make("coarse", 0.2, neurons=(672,)).counts == (134,)
    assert make("fine", 0.2, neurons=(672,)).counts == (135,)


def test_fine_with_a_threshold_reports_what_it_kept():
    method = make("fine", threshold=0.7)
    assert method.touched() == Touched(1.0, 1.0, 1.0)
    gated = activations(5)
    kept = method.choose(0, gated)
    assert torch.equal(kept, gated.abs() > 0.7)
    share = float((gated.abs() > 0.7).float().mean())
    assert method.touched().up == method.touched().down == pytest.approx(share)


def test_touched_rows_are_those_of_the_method():
    kept = int(0.5 * F) / F
    assert make("coarse").touched() == Touched(kept, kept, kept)
    assert make("fine").touched() == Touched(1.0, (F - int(0.5 * F)) / F, (F - int(0.5 * F)) / F)


def test_aliases_make_the_same_method():
    assert type(make("griffin")) is type(make("coarse"))
    assert type(make("cats")) is type(make("fine"))


def test_none_makes_no_method():
    assert sparsity.create(SparsityConfig("none"), (F,)) is None


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'dense'.*cats, coarse, fine, griffin, none"):
        make("dense")


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_keep_outside_its_range_is_refused(keep):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        SparsityConfig(keep=keep)


def test_coarse_refuses_to_keep_no_neuron_and_to_take_a_threshold():
    with pytest.raises(ConfigError, match=r"keep 0.01 of 45 neurons keeps none; keep at least 0.0223"):
        make("coarse", 0.01)
    with pytest.raises(ConfigError, match="no threshold"):
        make("coarse", threshold=0.1)
    with pytest.raises(ConfigError, match="at least 0"):
        SparsityConfig("fine", threshold=-1.0)


@pytest.fixture
def clean_register(monkeypatch):
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))


def test_a_third_party_adds_a_method_with_the_decorator(clean_register):
    @sparsity.register("first")
    class First(PromptSparsity):
        def observe(self, layer, z): ...
        def select(self, layer):
            return torch.arange(3)

        def touched(self):
            return Touched(3 / F, 3 / F, 3 / F)

    assert isinstance(make("first"), First)
    assert "first" in sparsity.known()
    with pytest.raises(ConfigError, match="already there"):
        sparsity.register("first")(type("Other", (First,), {}))


def test_an_entry_point_that_cannot_be_loaded_is_named(monkeypatch):
    point = EntryPoint("broken", "no_such_package:Method", "sirius.sparsity")
    monkeypatch.setattr(base, "entry_points", lambda group, name=None: [point] if name in (None, "broken") else [])
    with pytest.raises(ConfigError, match=r"'broken' \(no_such_package:Method\) cannot be loaded: No module"):
        make("broken")


def test_a_third_party_adds_a_method_by_entry_point(monkeypatch):
    class Point:
        name = "theirs"

        def load(self):
            return sparsity.fine.FineSparsity

    def entry_points(group, name=None):
        assert group == "sirius.sparsity"
        return [Point()] if name in (None, "theirs") else []

    monkeypatch.setattr(base, "entry_points", entry_points)
    assert isinstance(make("theirs"), TokenSparsity)
    assert "theirs" in sparsity.known()
