"""Acceptance played back: the stated histogram comes out of the real loop, and rollbacks with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Toy, begin
from sirius.benchmark.playback import Playback, geometric, mean_advance
from sirius.decoding.loop import Plan, Row, next_round
from sirius.decoding.period import Period
from sirius.errors import ConfigError
from sirius.offload.plan import acceptance


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 40), st.floats(0, 1))
def test_the_histogram_of_an_advance_brings_that_advance(period, share):
    aal = 1 + share * (period - 1)
    histogram = geometric(acceptance(aal, period), period)
    assert len(histogram) == period
    assert sum(histogram) == pytest.approx(1)
    assert mean_advance(histogram) == pytest.approx(aal, abs=1e-6)


@pytest.mark.parametrize("aal", [0.5, 16.1, float("nan")])
def test_an_advance_that_no_window_has_is_refused(aal):
    with pytest.raises(ConfigError, match="from 1 to 16 on average"):
        acceptance(aal, 16)


@pytest.mark.parametrize("width", [1, 4])
def test_few_windows_have_the_histograms_mean_already(width):
    """Whatever the toy's draft is worth, and with every rejected guess rolled back."""
    period, windows = 8, 50
    histogram = geometric(acceptance(5.5, period), period)
    plan = Plan(Period(period), rule=Playback(histogram), width=width, temperature=0.6)
    row = Row([3, 1, 4], 10_000, 11_000)
    toy = Toy(noise=1.0)
    begin(toy, row)
    before = row.new
    for _ in range(windows):
        [done] = next_round(toy, [row], plan)
        assert done is not None and done.steps == period - 1
        assert len(toy.held[0]) == len(row.tokens) - 1
    assert (row.new - before) / windows == pytest.approx(5.5, abs=0.1)


def test_a_histogram_of_one_bar_passes_that_many_every_time():
    rule = Playback((0, 0, 5))

    class Check:
        class tree:
            depths = torch.tensor([[0, 1, 2, 3]])

    assert all(rule(Check).tolist() == [[True, True, True, False]] for _ in range(9))
