"""Each token's part of a text: the parts join to the text, and bytes of one character stay together."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sirius.trace.pieces import Piece, piece_after, split


def byte_level() -> PreTrainedTokenizerFast:
    """Token 0..255 is that byte; 256 is "a" and the first byte of a euro sign, then come special tokens."""
    letters = bytes_to_unicode()
    symbols = [letters[b] for b in range(256)] + [letters[ord("a")] + letters[0xE2]]
    return made(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]), decoders.ByteLevel())


def byte_fallback() -> PreTrainedTokenizerFast:
    """Token 0..255 is that byte by its number; 256 is "b", 257 " b"."""
    symbols = [f"<0x{b:02X}>" for b in range(256)] + ["b", "▁b", "<unk>"]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    model = models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[], byte_fallback=True, unk_token="<unk>")
    return made(model, decoders.Sequence(steps))


def made(model: models.Model, decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


LEVEL, FALLBACK = byte_level(), byte_fallback()


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, tokens, text=None):
    return split(tokenizer, tokens, text_of(tokenizer, tokens) if text is None else text)


@pytest.mark.parametrize("tokenizer", [LEVEL, FALLBACK], ids=["byte level", "byte fallback"])
@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 257), st.sampled_from([*"é€😀\n".encode()])), max_size=16), st.integers(0, 9))
def test_pieces_join_to_the_text_wherever_it_was_cut(tokenizer, tokens, cut):
    whole = text_of(tokenizer, tokens)
    text = whole[: len(whole) - cut] if cut < len(whole) else whole
    pieces = pieces_of(tokenizer, tokens, text)
    assert len(pieces) == len(tokens)
    assert "".join(piece.text for piece in pieces) == text
    assert "".join(piece.text + piece.unused for piece in pieces) == whole
    for index, piece in enumerate(pieces):
        first = index - piece.part + 1
        assert [each.part for each in pieces[first : first + piece.parts]] == list(range(1, piece.parts + 1))
        assert piece.part == 1 or piece.text == piece.unused == ""


@pytest.mark.parametrize("tokenizer", [LEVEL, FALLBACK], ids=["byte level", "byte fallback"])
def test_the_bytes_of_each_character_are_a_group(tokenizer):
    tokens = [*"a\n€é".encode()]
    want = [Piece("a"), Piece("\n"), *(Piece("€" if n == 1 else "", "", n, 3) for n in (1, 2, 3)), Piece("é", "", 1, 2)]
    assert pieces_of(tokenizer, tokens) == [*want, Piece("", "", 2, 2)]


def test_a_token_that_ends_within_a_character_belongs_to_its_group():
    assert pieces_of(LEVEL, [256, 0x82, 0xAC, 0x61]) == [
        Piece("a€", "", 1, 3),
        Piece("", "", 2, 3),
        Piece("", "", 3, 3),
        Piece("a"),
    ]


def test_bytes_that_are_no_character_stand_alone():
    assert pieces_of(LEVEL, [0xE2, 0x61, 0xFF]) == [Piece("\N{REPLACEMENT CHARACTER}"), Piece("a"), Piece("\ufffd")]


def test_special_tokens_show_nothing_and_a_stop_string_is_left_out():
    end = LEVEL.eos_token_id
    assert pieces_of(LEVEL, [*b"ab", end]) == [Piece("a"), Piece("b"), Piece("")]
    assert pieces_of(LEVEL, [*b"ab\n"], "a") == [Piece("a"), Piece("", "b"), Piece("", "\n")]


def test_a_text_that_is_no_beginning_of_the_tokens_stands_at_the_first():
    assert pieces_of(LEVEL, [*b"ab"], "other") == [Piece("other", "", 1, 2), Piece("", "", 2, 2)]


def test_a_guess_shows_what_it_adds_to_the_token_before_it():
    assert piece_after(FALLBACK, 256, 257) == " b"
    assert piece_after(LEVEL, ord("a"), 0xE2) == ""
