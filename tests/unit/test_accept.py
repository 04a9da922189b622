import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius.core import CorrectionConfig
from sirius.decoding.accept import accept_argmax, accept_threshold, make_rule

V = 5


def scores_of(best: list[int], margin: float = 4.0) -> torch.Tensor:
    """Return scores [K, V] whose argmax is `best`, ahead of the rest by `margin`."""
    return torch.nn.functional.one_hot(torch.tensor(best), V) * margin


def windows():
    size = st.integers(0, 8)
    return size.flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, V - 1), min_size=n, max_size=n),
            st.lists(st.lists(st.floats(-5, 5), min_size=V, max_size=V), min_size=n + 1, max_size=n + 1),
        )
    )


@pytest.mark.parametrize(
    ("draft", "best", "kept"),
    [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 0, 3, 4], 1), ([1, 2, 3], [0, 2, 3, 4], 0), ([], [2], 0)],
    ids=["all", "first only", "none, though later ones match", "nothing drafted"],
)
def test_argmax_keeps_the_leading_matches_and_adds_the_row_after_them(draft, best, kept):
    verdict = accept_argmax(torch.tensor(draft, dtype=torch.int64), scores_of(best))
    assert (verdict.kept, verdict.next) == (kept, best[kept])


def test_threshold_is_on_the_tempered_probability():
    scores = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    probability = float(torch.softmax(scores[0] / 0.6, -1)[1])
    draft = torch.tensor([1])
    for threshold, kept in ((probability - 1e-4, 1), (probability + 1e-4, 0)):
        verdict = accept_threshold(draft, scores, threshold=threshold, temperature=0.6)
        assert (verdict.kept, verdict.next) == (kept, 4 if kept else 0)


def test_the_argmax_passes_though_its_probability_is_under_the_threshold():
    scores = torch.zeros(2, V)
    scores[0, 3] = 1e-3
    assert accept_threshold(torch.tensor([3]), scores, threshold=0.9, temperature=0.6).kept == 1
    assert accept_threshold(torch.tensor([2]), scores, threshold=0.9, temperature=0.6).kept == 0


@settings(derandomize=True, deadline=None)
@given(windows(), st.floats(0.5001, 1.0), st.floats(0.05, 5.0))
def test_above_one_half_the_threshold_is_the_argmax_rule(window, threshold, temperature):
    draft, scores = torch.tensor(window[0], dtype=torch.int64), torch.tensor(window[1], dtype=torch.float64)
    assert accept_threshold(draft, scores, threshold=threshold, temperature=temperature) == accept_argmax(draft, scores)


@settings(derandomize=True, deadline=None)
@given(windows(), st.floats(0, 1), st.floats(0, 1))
def test_a_lower_threshold_never_keeps_less(window, one, other):
    draft, scores = torch.tensor(window[0], dtype=torch.int64), torch.tensor(window[1], dtype=torch.float64)
    low, high = sorted((one, other))
    kept = [accept_threshold(draft, scores, threshold=t, temperature=0.6).kept for t in (0.0, low, high)]
    assert kept[0] == len(draft) and kept[1] >= kept[2]


def test_a_configuration_names_its_rule():
    draft, scores = torch.tensor([0]), torch.tensor([[1.0, 1.1], [0.0, 1.0]])
    assert make_rule(CorrectionConfig(accept="argmax"))(draft, scores).kept == 0
    assert make_rule(CorrectionConfig(accept="threshold", threshold=0.2))(draft, scores).kept == 1
    assert make_rule(CorrectionConfig(threshold=0.48, accept_temperature=1e-2))(draft, scores).kept == 0
