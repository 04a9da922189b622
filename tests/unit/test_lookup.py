"""Prompt lookup: guesses from the text itself, and when they are used."""

from hypothesis import given
from hypothesis import strategies as st

from sirius.decoding.lookup import FIRST_WAIT, TRIALS, Lookup, NGrams


def test_the_tokens_after_an_earlier_match_are_proposed():
    assert NGrams(3).propose([1, 2, 3, 4, 5, 9, 1, 2, 3], 2) == [4, 5]


def test_a_longer_match_goes_before_a_later_shorter_one():
    assert NGrams(3).propose([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 1) == [7]
    assert NGrams(2).propose([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 1) == [8]


def test_the_latest_of_equal_matches_is_taken():
    assert NGrams(2).propose([1, 2, 7, 1, 2, 8, 1, 2], 1) == [8]


def test_a_text_without_a_match_proposes_nothing():
    assert NGrams(3).propose([1, 2, 3, 4], 5) == []
    assert NGrams(3).propose([1], 5) == []
    assert NGrams(3).propose([1, 5, 2, 5], 5) == [], "one token alone is no match"


def test_a_text_that_ends_before_the_count_is_taken_to_repeat_itself():
    assert NGrams(2).propose([1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(2, 4), st.integers(1, 9))
def test_a_text_that_grows_gives_what_the_whole_text_gives_at_once(tokens, longest, count):
    growing = NGrams(longest)
    for end in range(1, len(tokens) + 1):
        found = growing.propose(tokens[:end], count)
        assert found == NGrams(longest).propose(tokens[:end], count)
        assert len(found) in (0, count)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), st.integers(2, 4))
def test_what_is_proposed_followed_the_last_tokens_before(tokens, longest):
    [guess, *_] = NGrams(longest).propose(tokens, 1) or [None]
    followers = {tokens[i + 2] for i in range(len(tokens) - 2) if tokens[i : i + 2] == tokens[-2:]}
    assert guess in followers if followers else guess is None


REPEATING = (NGrams(2), [1, 2, 3, 1, 2], 9)


def test_windows_grow_while_whole_ones_are_accepted_and_shrink_after():
    lookup = Lookup(3, 15)
    sizes = []
    for tokens in (5, 9, 16, 3):
        [found] = lookup.propose([REPEATING]) or [[]]
        sizes.append(len(found))
        lookup.learn(True, tokens, 1.0)
    assert sizes == [4, 8, 9, 9], "no more than the room of the text"
    assert lookup.count == 4


def test_one_row_without_a_match_leaves_the_guesses_to_the_draft():
    assert Lookup(3, 15).propose([REPEATING, (NGrams(2), [1, 2, 3], 9)]) is None


def test_lookup_stops_where_its_rounds_are_slower_and_is_tried_again_later():
    lookup = Lookup(3, 15)
    lookup.learn(False, 4, 1.0)
    for _ in range(TRIALS):
        assert lookup.propose([REPEATING])
        lookup.learn(True, 1, 1.0)
    waited = 0
    while lookup.propose([REPEATING]) is None:
        waited += 1
    assert waited == FIRST_WAIT
    lookup.learn(True, 1, 1.0)
    waited = 0
    while lookup.propose([REPEATING]) is None:
        waited += 1
    assert waited == 2 * FIRST_WAIT, "each further failure waits twice as long"


def test_lookup_goes_on_where_its_rounds_are_faster():
    lookup = Lookup(3, 15)
    lookup.learn(False, 1, 1.0)
    for _ in range(50):
        assert lookup.propose([REPEATING])
        lookup.learn(True, 3, 1.0)
