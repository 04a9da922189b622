"""Text out of tokens, piece by piece, and where a stop string ends it."""

from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer shows of a character whose bytes are not all there


class TextStream:
    """The text of a growing list of tokens, without decoding it all again for each.

    Tokens are decoded together with the few before them, since a piece's text can depend on its neighbours; text that
    may still change (the bytes of an unfinished character) is held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.text = ""
        self._from = 0  # tokens [_from, _done) are decoded again as the neighbours of the next
        self._done = 0  # tokens [0, _done) stand in `text`

    def push(self, token: int) -> str:
        """Add a token and return the text that it makes certain."""
        self.tokens.append(token)
        known = self._decode(self._from, self._done)
        whole = self._decode(self._from, len(self.tokens))
        if whole.endswith(UNFINISHED) or len(whole) <= len(known):
            return ""
        self._from, self._done = self._done, len(self.tokens)
        return self._add(whole[len(known) :])

    def finish(self) -> str:
        """Return what was held back, now that nothing follows."""
        rest = self._decode(self._from, len(self.tokens))[len(self._decode(self._from, self._done)) :]
        self._from = self._done = len(self.tokens)
        return self._add(rest)

    def peek(self) -> str:
        """Return the text as it would be if nothing followed."""
        rest = self._decode(self._from, len(self.tokens))[len(self._decode(self._from, self._done)) :]
        return self.text + rest

    def _add(self, piece: str) -> str:
        self.text += piece
        return piece

    def _decode(self, begin: int, end: int) -> str:
        tokens = self.tokens[begin:end]
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def find_stop(text: str, stops: Sequence[str], begin: int = 0) -> int | None:
    """Return where the earliest stop string starts in text[begin:], as an index into text, or None."""
    places = [at for stop in stops if (at := text.find(stop, begin)) >= 0]
    return min(places) if places else None


def safe_length(text: str, stops: Sequence[str]) -> int:
    """Return how much of a text can be shown: all but an ending that may be the beginning of a stop string."""
    held = (n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
    return len(text) - max(held, default=0)


class StopAt:
    """Where a text ends, token by token: at an end-of-text token, a stop string, or not yet.

    `text` is what may be shown so far; it never holds a stop string, nor an ending that may become one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, ends: frozenset[int], stops: Sequence[str]) -> None:
        """Take the token ids in `ends` and the strings in `stops` for the end; stop strings need the tokenizer."""
        special: dict[str, int] = cast("Any", tokenizer).get_added_vocab() if tokenizer else {}
        self.ends = ends | {special[stop] for stop in stops if stop in special}  # such tokens have no text
        self.stops = tuple(stop for stop in stops if stop not in special)
        self.stream = TextStream(tokenizer) if tokenizer else None
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
        if self.stream and not self.stopped:
            self.stream.finish()
            self.text = self.stream.text

    def _push(self, token: int) -> None:
        self.stopped = token in self.ends
        if self.stream is None:
            return
        shown = len(self.stream.text)
        self.stream.push(token)
        if self.stopped:
            self.stream.finish()
        whole = self.stream.peek()
        found = find_stop(whole, self.stops, begin=max(0, shown - max(map(len, self.stops), default=0)))
        if found is not None:
            self.stopped, self.text = True, whole[:found]
        elif self.stopped:
            self.text = self.stream.text
        else:
            self.text = self.stream.text[: safe_length(self.stream.text, self.stops)]
