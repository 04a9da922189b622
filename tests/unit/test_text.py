"""Text out of tokens: nothing is shown too early, nothing is lost, and a text ends where it should."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
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


def with_added(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Add two special tokens and one that is not."""
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<s>", special=True)])
    tokenizer.add_tokens([AddedToken("</think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_level() -> PreTrainedTokenizerFast:
    letters = bytes_to_unicode()
    pieces = [*(bytes([b]) for b in b"</>think|ed\n \xe2\x82\xac"), *PIECES, b"</thi", b"nk>", b">\n"]
    symbols = dict.fromkeys("".join(letters[b] for b in piece) for piece in pieces)
    bpe = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    bpe.decoder = decoders.ByteLevel()
    return with_added(bpe)


def byte_fallback() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: a token of one byte for what has no piece of its own, 0x0A among them."""
    names = [f"<0x{b:02X}>" for b in b"\xf0\x9f\x98\x80\xe2\x82\xac\n"]
    pieces = [
        "\N{LOWER ONE EIGHTH BLOCK}",
        "\N{LOWER ONE EIGHTH BLOCK}a",
        *"ab</>think",
        "</thi",
        "nk>",
        "\N{EURO SIGN}b",
    ]
    symbols = {"<unk>": 0, **{symbol: i for i, symbol in enumerate(dict.fromkeys([*names, *pieces]), start=1)}}
    bpe = Tokenizer(models.BPE(vocab=symbols, merges=[], unk_token="<unk>", byte_fallback=True))
    spaces, first = decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.Strip(" ", 1, 0)
    bpe.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), first])
    return with_added(bpe)


def words() -> PreTrainedTokenizerFast:
    block = "\N{LOWER ONE EIGHTH BLOCK}"
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate([f"{block}a", block, "b", "</thi", "nk>"])}))
    known.decoder = decoders.Metaspace()
    return with_added(known)


ADDED = {"byte level": byte_level(), "byte fallback": byte_fallback(), "words": words()}
every_kind = pytest.mark.parametrize("kind", ADDED)
STOPS = [
    "</think>",
    "<|end|>\n",
    "\n<|end|>",
    "a<s>",
    "|>",
    "k>\n",
    "\N{EURO SIGN}",
    "b",
    " a",
    "<s>",
    "\N{EURO SIGN}b",
]


def spelled(tokenizer: PreTrainedTokenizerFast, *pieces: str | int) -> list[int]:
    return [piece if isinstance(piece, int) else tokenizer.convert_tokens_to_ids(piece) for piece in pieces]


def taken(ending: StopAt, tokens: list[int], at_once: int = 1) -> int:
    """Feed tokens as they come and end the text; what was shown is never taken back, and holds no stop string."""
    count, shown = 0, ""
    while count < len(tokens) and not ending.stopped:
        count += ending.push(tokens[count : count + at_once])
        assert ending.text.startswith(shown), "what was shown cannot be taken back"
        shown = ending.text
        assert not any(stop in shown for stop in ending.stops)
    ending.finish()
    assert ending.text.startswith(shown)
    return count


@often
@every_kind
@given(st.data())
def test_the_text_is_what_the_tokenizer_decodes_wherever_it_is_cut(kind, data):
    tokenizer = ADDED[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=16))
    stream, ending = TextStream(tokenizer), StopAt(tokenizer, frozenset(), ())
    pieces = []
    for count, token in enumerate(tokens, start=1):
        pieces.append(stream.push(token))
        assert stream.peek() == tokenizer.decode(tokens[:count], skip_special_tokens=True)
    want = tokenizer.decode(tokens, skip_special_tokens=True)
    assert "".join([*pieces, stream.finish()]) == stream.text == want
    assert taken(ending, tokens) == len(tokens) and ending.text == want


@often
@every_kind
@given(st.data())
def test_a_stop_is_what_the_text_shows_however_it_is_tokenised(kind, data):
    tokenizer = ADDED[kind]
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=16))
    stops = data.draw(st.lists(st.sampled_from(STOPS), min_size=1, max_size=2))
    ending = StopAt(tokenizer, frozenset(), stops)
    count = taken(ending, tokens, data.draw(st.integers(1, 4)))

    def decoded(number: int, special: bool) -> str:
        return tokenizer.decode(tokens[:number], skip_special_tokens=not special)

    def found(number: int) -> bool:
        return any(stop in decoded(number, special) for stop in stops for special in (True, False))

    first = next((number for number in range(len(tokens) + 1) if found(number)), None)
    assert (count, ending.stopped) == (len(tokens) if first is None else first, first is not None)
    if first is None:
        assert ending.text == decoded(len(tokens), False)
        return
    written, shown = decoded(first, True), decoded(first, False)
    place, hidden = find_stop(written, stops), find_stop(shown, stops)
    if hidden is not None:
        assert shown[:hidden].startswith(ending.text)
    if place is None or (hidden is not None and written == shown):
        assert ending.text == shown[:hidden]
    elif hidden is None:
        whole = [n for n in range(first) if decoded(n, True) == written[:place]]
        assert not whole or ending.text in [decoded(n, False) for n in whole]


@every_kind
@pytest.mark.parametrize("spelling", [("</think>",), ("</thi", "nk>"), (*"</think>",)], ids=" ".join)
def test_a_stop_ends_the_text_before_it_as_one_token_or_in_pieces(kind, spelling):
    tokenizer = ADDED[kind]
    if kind == "words" and len(spelling) == 8:
        pytest.skip("it has no letters")
    tokens = spelled(tokenizer, *spelling)
    ending = StopAt(tokenizer, frozenset(), ["</think>"])
    assert taken(ending, [*tokens, tokens[0]]) == len(tokens)
    assert (ending.text, ending.stopped) == ("", True)


def test_a_stop_of_a_special_token_and_text_is_seen_and_the_token_stays_hidden():
    tokenizer = ADDED["byte level"]
    ab, end, line = spelled(tokenizer, "ab", "<|end|>", "\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}")
    for stop, tokens, text in (
        ("<|end|>\n", [ab, end, ab, end, line, ab], "abab"),
        ("\n<|end|>", [ab, line, ab, line, end], "ab\nab"),
        ("<|end|>", [ab, end], "ab"),
        ("b<|end|>a", [ab, line, ab, end, ab], "ab\na"),
    ):
        ending = StopAt(tokenizer, frozenset(), [stop])
        assert taken(ending, tokens) == min(5, len(tokens)) and ending.stopped and ending.text == text


def test_a_character_cut_by_the_budget_is_what_the_tokenizer_makes_of_it():
    tokenizer = ADDED["byte fallback"]
    tokens = spelled(tokenizer, "a", "<0xE2>", "<0x82>", "<0xAC>", "<0xF0>", "<0x9F>")
    for count in range(1, len(tokens) + 1):
        ending = StopAt(tokenizer, frozenset(), ())
        taken(ending, tokens[:count])
        assert ending.text == tokenizer.decode(tokens[:count], skip_special_tokens=True)


def test_a_run_of_bytes_is_shown_with_the_token_after_it():
    tokenizer = ADDED["byte fallback"]
    stream = TextStream(tokenizer)
    tokens = spelled(tokenizer, "a", "<0xE2>", "<0x82>", "<0xAC>", "<s>", "b")
    assert [stream.push(token) for token in tokens] == ["a", "", "", "", "", "\N{EURO SIGN}b"]
