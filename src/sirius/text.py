"""Text out of tokens, piece by piece, and where a stop string ends it."""

import re
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer shows of a character whose bytes are not all there
BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a token of one byte; a run of them is a text, or each is UNFINISHED


class TextStream:
    """The text of a growing list of tokens, without decoding it all again for each.

    Tokens are decoded together with the few before them, since a piece's text can depend on its neighbours; text that
    may still change (the bytes of an unfinished character, a run of tokens of a byte) is held back.

    text     what is certain
    rest     what would follow it if no token did
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: bool = False) -> None:
        """Begin an empty text; `special` writes special tokens out."""
        self.tokenizer, self.special = tokenizer, special
        self.hidden = frozenset() if special else special_tokens(tokenizer)
        self.tokens: list[int] = []
        self.text = self.rest = ""
        self._from = 0  # tokens [_from, _done) are decoded again as the neighbours of the next
        self._done = 0  # tokens [0, _done) stand in `text`
        self._known = ""  # the text of tokens [_from, _done)
        self._in_bytes = False  # whether the last token that shows is one of a byte

    def push(self, token: int) -> str:
        """Add a token and return the text that it makes certain."""
        self.tokens.append(token)
        if token not in self.hidden:
            name = self.tokenizer.convert_ids_to_tokens(token)
            self._in_bytes = isinstance(name, str) and BYTE.fullmatch(name) is not None
        whole = self._decode(self._from)
        piece = self.rest = whole[len(self._known) :]
        if self._in_bytes or whole.endswith(UNFINISHED) or not piece:
            return ""
        self._from, self._done = self._done, len(self.tokens)
        self._known, self.rest = self._decode(self._from), ""
        self.text += piece
        return piece

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        whole = self._decode(0)
        piece = whole[len(self.text) :] if whole.startswith(self.text) else self.rest
        self.text, self.rest = self.text + piece, ""
        return piece

    def peek(self) -> str:
        """Return the text as it would be if nothing followed."""
        return self.text + self.rest

    def upto(self, count: int) -> str:
        """Return the text of the first tokens alone."""
        return self._decode(0, count)

    def _decode(self, begin: int, end: int | None = None) -> str:
        tokens, skip = self.tokens[begin:end], not self.special
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the tokens that a text does not show."""
    added = cast("Any", tokenizer).added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, about in added.items() if about.special}


def find_stop(text: str, stops: Sequence[str], begin: int = 0) -> int | None:
    """Return where the earliest stop string starts in text[begin:], as an index into text, or None."""
    positions = [at for stop in stops if (at := text.find(stop, begin)) >= 0]
    return min(positions) if positions else None


def safe_length(text: str, stops: Sequence[str]) -> int:
    """Return how much of a text can be shown: all but an ending that may be the beginning of a stop string."""
    held = (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
    return len(text) - max(held, default=0)


class StopAt:
    """Where a text ends, token by token: at an end-of-text token, a stop string, or not yet.

    A stop string ends the text where the tokens so far show it, with special tokens written out or left out, however it
    was tokenised. `text` is what may be shown so far, without special tokens; it never holds a stop string, nor an
    ending that may become one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, ends: frozenset[int], stops: Sequence[str]) -> None:
        """Take the token ids in `ends` and the strings in `stops` for the end; stop strings need the tokenizer."""
        self.ends, self.stops = ends, tuple(stops)
        added: dict[str, int] = cast("Any", tokenizer).get_added_vocab() if tokenizer else {}
        self.stop_tokens = {added[stop] for stop in stops if stop in added}
        self.shown = TextStream(tokenizer) if tokenizer else None
        self.written = TextStream(tokenizer, special=True) if tokenizer and stops else None
        self.text = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> int:
        """Take tokens until one ends the text; return how many were taken."""
        for count, token in enumerate(tokens, start=1):
            self._push(token)
            if self.stopped:
                return count
        return len(tokens)

    def finish(self) -> None:
        """Show what was held back, now that nothing follows."""
        if self.shown and not self.stopped:
            self.shown.finish()
            self.text = self.shown.text

    def _push(self, token: int) -> None:
        self.stopped = token in self.ends
        if self.shown is None:
            return
        before = self._before_stop(token)
        if before is not None:
            self.stopped, self.text = True, before if before.startswith(self.text) else self.text
        elif self.stopped:
            self.shown.finish()
            self.text = self.shown.text
        else:
            self.text = self.shown.text[: max(len(self.text), self._safe())]

    def _before_stop(self, token: int) -> str | None:
        """Take a token; return the text before the stop string that it completes, None where there is none."""
        assert self.shown is not None
        longest = max(map(len, self.stops), default=0)
        begin = max(0, len(self.shown.text) - longest)
        self.shown.push(token)
        whole = self.shown.peek()
        found = find_stop(whole, self.stops, begin)
        texts = [] if found is None else [whole[:found]]
        if self.written is not None:
            begin = max(0, len(self.written.text) - longest)
            self.written.push(token)
            found = find_stop(self.written.peek(), self.stops, begin)
            texts += [] if found is None else [self._shown_before(self.written, found)]
        if not texts and token in self.stop_tokens:  # a decoder may write it in another way
            return self.shown.upto(len(self.shown.tokens) - 1)
        return min(texts, key=len, default=None)

    def _shown_before(self, written: TextStream, position: int) -> str:
        """Return what is shown of the text before a position in the one with special tokens written out."""
        assert self.shown is not None
        count = len(written.tokens)
        while (begin := len(written.upto(count - 1))) > position:
            count -= 1
        if begin == position or written.tokens[count - 1] in self.shown.hidden:
            return self.shown.upto(count - 1)
        text, after = self.shown.upto(count), len(written.upto(count)) - position
        return text[: max(0, len(text) - after)]

    def _safe(self) -> int:
        """Return how much can be shown of what is certain."""
        assert self.shown is not None
        safe = safe_length(self.shown.text, self.stops)
        if self.written is None:
            return safe
        if self.written.rest:
            return 0  # nothing more for now
        held = len(self.written.text) - safe_length(self.written.text, self.stops)
        return min(safe, len(self.shown.text) - held)
