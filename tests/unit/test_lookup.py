"""Prompt lookup: guesses from the text itself, and when they are used."""

from hypothesis import given
from hypothesis import strategies as st

from sirius.decoding.lookup import FIRST_WAIT, OTHERS_EVERY, TRIALS, Lookup, NGrams, Used


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
    lookup.learn(None, 1, 1.0)
    sizes = []
    for tokens, whole in ((5, True), (9, True), (10, True), (3, False), (1, False)):
        [found] = lookup.propose([REPEATING]) or [[]]
        sizes.append(len(found))
        lookup.learn(Used(len(found), whole), tokens, 0.1)
    assert sizes == [4, 8, 9, 9, 4], "no more than the room of the text"
    assert lookup.count == 2


def test_a_short_window_that_was_accepted_whole_does_not_shrink_the_next():
    lookup = Lookup(3, 15)
    lookup.learn(Used(1, True), 2, 0.1)
    assert lookup.count == 4


def test_one_row_without_a_match_leaves_the_guesses_to_the_draft():
    assert Lookup(3, 15).propose([REPEATING, (NGrams(2), [1, 2, 3], 9)]) is None


def test_lookup_stops_where_its_rounds_are_slower_and_is_tried_again_later():
    lookup = Lookup(3, 15)
    lookup.learn(None, 4, 1.0)
    for _ in range(TRIALS):
        assert lookup.propose([REPEATING])
        lookup.learn(Used(4, False), 1, 1.0)
    assert passed_over(lookup) == FIRST_WAIT
    lookup.learn(Used(4, False), 1, 1.0)
    assert passed_over(lookup) == 2 * FIRST_WAIT, "each further failure waits twice as long"


def passed_over(lookup: Lookup) -> int:
    """Return how many offers are passed over before the next one is used."""
    count = 0
    while lookup.propose([REPEATING]) is None:
        count += 1
    return count


def test_lookup_goes_on_where_its_rounds_are_faster_and_others_are_timed_now_and_then():
    lookup = Lookup(3, 15)
    lookup.learn(None, 1, 1.0)
    others = 0
    for _ in range(2 * OTHERS_EVERY + 2):
        if lookup.propose([REPEATING]):
            lookup.learn(Used(4, False), 3, 1.0)
        else:
            others += 1
            lookup.learn(None, 1, 1.0)
    assert others == 2


def test_a_text_that_always_matches_and_is_always_wrong_is_not_looked_up_for_ever():
    lookup, looked_up = Lookup(3, 15), 0
    for _ in range(200):
        if lookup.propose([REPEATING]):
            looked_up += 1
            lookup.learn(Used(4, False), 1, 2.0)
        else:
            lookup.learn(None, 1, 1.0)
    assert looked_up <= 10
