"""How many texts join those at work where memory was planned for so many slots."""

import pytest

from sirius.runtime.room import fitting


@pytest.mark.parametrize(
    ("active", "waiting", "joining"),
    [
        ([], [], 0),
        ([], [100], 1),
        ([], [101], 1),  # it is refused by name when it is read
        ([30], [101], 0),
        ([], [50, 50], 2),
        ([], [50, 51], 1),
        ([20, 20], [20, 20, 20, 20], 3),
        ([20, 20], [34, 5, 5], 0),
        ([20, 20], [33, 5, 5], 1),
        ([60], [5], 0),
    ],
)
def test_as_many_texts_join_as_have_the_slots_of_the_longest_one(active, waiting, joining):
    assert fitting(100, active, waiting) == joining
