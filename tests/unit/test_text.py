"""Text out of tokens: nothing is shown too early, nothing is lost, and a text ends where it should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sirius.text import StopAt, TextStream, find_stop, safe_length

PIECES = [b"ab", b"abc", b" a", b"\xe2\x82", b"a\xe2", b"\xacb"]  # the last three cut a euro sign (e2 82 ac) in two


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Token 0..255 is that byte, then come PIECES and three special tokens."""
    letters = bytes_to_unicode()
    symbols = [letters[b] for b in range(256)] + ["".join(letters[b] for b in piece) for piece in PIECES]
    bpe = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<p>", clean_up_tokenization_spaces=False
    )


TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
AB, ABC, _, EU, A_EU, RO_B = range(256, 256 + len(PIECES))

any_tokens = st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=24)
few_tokens = st.lists(st.sampled_from([*b"abc\xe2\x82\xac", *range(256, len(TOKENIZER))]), max_size=16)
few_stops = st.lists(st.text("abc€", min_size=1, max_size=4), max_size=3)
often = settings(max_examples=300, derandomize=True, deadline=None)


def text_of(tokens):
    return TOKENIZER.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def ended(tokens, stops):
    """Say by decoding every beginning anew how many tokens are taken, what text they give, and whether it ended."""
    for count in range(1, len(tokens) + 1):
        text = text_of(tokens[:count])
        if places := [text.index(stop) for stop in stops if stop in text]:
            return count, text[: min(places)], True
        if tokens[count - 1] == END:
            return count, text, True
    return len(tokens), text_of(tokens), False


@often
@given(any_tokens)
def test_pieces_join_to_the_text_of_all_tokens(tokens):
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(token) for token in tokens]
    assert "".join([*pieces, stream.finish()]) == text_of(tokens) == stream.text


@often
@given(any_tokens)
def test_peek_is_the_text_so_far_after_every_token(tokens):
    stream = TextStream(TOKENIZER)
    for count, token in enumerate(tokens, start=1):
        stream.push(token)
        assert stream.peek() == text_of(tokens[:count])


@often
@given(st.text(max_size=12))
def test_a_character_is_shown_with_its_last_byte_and_not_before(text):
    stream = TextStream(TOKENIZER)
    text = text.replace("\N{REPLACEMENT CHARACTER}", "")
    for character in text:
        *first, last = character.encode()
        assert [stream.push(byte) for byte in first] == [""] * len(first)
        assert stream.push(last) == character
    assert stream.finish() == ""


def test_spaces_that_a_tokenizer_strips_from_the_first_token_stand_before_the_others():
    words = Tokenizer(models.WordLevel({"\N{LOWER ONE EIGHTH BLOCK}one": 0, "\N{LOWER ONE EIGHTH BLOCK}": 1, "s": 2}))
    words.decoder = decoders.Metaspace()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False))
    assert [stream.push(token) for token in (0, 2, 0, 1, 0)] == ["one", "s", " one", " ", " one"]


def test_a_character_that_never_comes_whole_is_shown_at_the_end():
    stream = TextStream(TOKENIZER)
    assert [stream.push(token) for token in (*b"x", EU)] == ["x", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_the_earliest_of_several_stops_wins():
    assert find_stop("one two three", ["three", "two"]) == 4
    assert find_stop("one two three", ["one"], begin=1) is None
    assert find_stop("one two three", []) is None


@pytest.mark.parametrize(
    ("text", "stops", "length"),
    [("ends a", ["ab"], 5), ("ends ab", ["abc", "b"], 5), ("ends b", ["ab"], 6), ("aa", ["aab"], 0), ("a", [], 1)],
)
def test_an_ending_that_may_become_a_stop_is_held_back(text, stops, length):
    assert safe_length(text, stops) == length


@often
@given(few_tokens, few_stops, st.integers(1, 5))
def test_a_text_ends_where_decoding_it_anew_says_however_the_tokens_arrive(tokens, stops, at_once):
    count, text, stopped = ended(tokens, stops)
    ending, taken, shown = StopAt(TOKENIZER, frozenset([END]), stops), 0, ""
    while taken < len(tokens) and not ending.stopped:
        taken += ending.push(tokens[taken : taken + at_once])
        assert ending.text.startswith(shown), "what was shown cannot be taken back"
        shown = ending.text
    ending.finish()
    assert (taken, ending.text, ending.stopped) == (count, text, stopped)
    assert ending.text.startswith(shown)


def test_a_stop_split_over_tokens_ends_the_text_before_it():
    ending = StopAt(TOKENIZER, frozenset(), ["€b"])
    assert ending.push([*b"c", A_EU]) == 2
    assert not ending.stopped
    assert ending.push([0x82, RO_B, *b"ccc"]) == 2
    assert (ending.text, ending.stopped) == ("ca", True)


def test_a_stop_in_the_midst_of_a_token_takes_the_whole_token():
    ending = StopAt(TOKENIZER, frozenset(), ["b"])
    assert ending.push([*b"x", ABC, *b"y"]) == 2
    assert (ending.text, ending.stopped) == ("xa", True)


def test_end_of_text_shows_the_beginning_of_a_stop_that_was_held_back():
    ending = StopAt(TOKENIZER, frozenset([END]), ["abcd"])
    assert ending.push([AB]) == 1
    assert ending.text == ""
    assert ending.push([END, AB]) == 1
    assert (ending.text, ending.stopped) == ("ab", True)


def test_a_used_up_budget_shows_what_was_held_back_and_is_no_stop():
    ending = StopAt(TOKENIZER, frozenset([END]), ["abcd"])
    ending.push([AB, *b"c"])
    ending.finish()
    assert (ending.text, ending.stopped) == ("abc", False)


def test_without_a_tokenizer_only_end_tokens_end_a_text():
    ending = StopAt(None, frozenset([7]), [])
    assert ending.push([1, 2, 3]) == 3
    assert ending.push([4, 7, 5]) == 2
    ending.finish()
    assert (ending.text, ending.stopped) == ("", True)


def test_a_stop_string_that_is_a_special_token_ends_the_text_though_it_has_none():
    ending = StopAt(TOKENIZER, frozenset(), ["<p>"])
    assert ending.push([AB, TOKENIZER.pad_token_id, AB]) == 2
    assert ending.stopped and ending.text == "ab"
