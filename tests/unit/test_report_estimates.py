"""Errors and paired differences of a report, against numpy."""

import numpy as np
import pytest

from sirius.report.estimate import Estimate, acceptance_by_position, accepted_spread, average, lengths, paired


def test_a_paired_difference_is_the_mean_of_the_differences_with_their_error():
    rng = np.random.default_rng(0)
    full = rng.integers(0, 2, 50).astype(float)
    ours = np.where(rng.random(50) < 0.2, 1 - full, full)
    found = paired({str(i): x for i, x in enumerate(ours)}, {str(i): x for i, x in enumerate(full)})
    differences = ours - full
    assert found is not None
    assert found.value == pytest.approx(differences.mean())
    assert found.stderr == pytest.approx(differences.std(ddof=1) / np.sqrt(50))
    apart = np.sqrt(ours.var(ddof=1) / 50 + full.var(ddof=1) / 50)
    assert found.stderr < apart  # what an unpaired comparison would say


def test_only_items_that_both_decoded_are_paired():
    assert paired({"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 0.0, "c": 0.0, "d": 5.0}) == Estimate(1.0, 0.0)
    assert paired({"a": 1.0}, {"b": 1.0}) is None


def test_one_item_has_no_error():
    assert average([0.5]) == Estimate(0.5, None)
    assert str(average([0.5])) == "0.500"


def test_a_difference_is_written_with_its_sign():
    assert Estimate(0.25, 0.125).shown("+.3f") == "+0.250 ± 0.125"
    assert Estimate(-0.25, 0.125).shown("+.3f") == "-0.250 ± 0.125"


def test_acceptance_by_position_is_of_all_windows():
    found = acceptance_by_position([1, 2, 0, 5])  # of 8 windows 7 kept a first guess, 5 a second and a third one
    assert [each.value for each in found] == [7 / 8, 5 / 8, 5 / 8]
    assert found[1].stderr == pytest.approx(np.sqrt(5 / 8 * 3 / 8 / 8))


def test_lengths_are_shares_that_add_up_to_one():
    found = lengths([1, 2, 0, 5])
    assert [each.value for each in found] == [1 / 8, 2 / 8, 0, 5 / 8]


def test_the_spread_of_accepted_guesses_is_that_of_the_windows_one_by_one():
    windows = np.repeat(np.arange(4), [1, 2, 0, 5])
    assert accepted_spread([1, 2, 0, 5]) == pytest.approx(windows.std(ddof=1) / np.sqrt(8))
    assert accepted_spread([0, 1]) is None
