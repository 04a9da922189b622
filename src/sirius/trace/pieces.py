"""Which part of a text each of its tokens stands for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from sirius.text import UNFINISHED, TextStream


@dataclass(frozen=True)
class Piece:
    """A token's part of a text.

    Tokens that hold the bytes of one character are a group: the first one has the group's text, the others have none.

    text    the part; "" of a special token
    unused  what the token would show after the place where a stop string ended the text
    part    the token's number in its group, from 1
    parts   how many tokens are in the group; 1 of most tokens
    """

    text: str
    unused: str = ""
    part: int = 1
    parts: int = 1


def split(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], text: str) -> list[Piece]:
    """Return each token's piece; the pieces' texts join to `text`, which a stop string may have cut short."""
    pieces = [piece for group in _groups(tokenizer, tokens) for piece in group]
    whole = "".join(piece.text for piece in pieces)
    if not whole.startswith(text):  # a decoder whose texts of fewer tokens are no beginnings of it
        return _group(text, len(tokens))
    return _cut(pieces, len(text))


def piece_after(tokenizer: PreTrainedTokenizerBase, before: int, token: int) -> str:
    """Return what a token shows after another one; "" where that is not a whole character."""
    first, both = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in ([before], [before, token])
    )
    shown = both[len(first) :] if both.startswith(first) else ""
    return "" if UNFINISHED in shown else shown


def _groups(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[list[Piece]]:
    """Return the tokens in groups whose text is certain by itself."""
    stream, groups, begin, shown = TextStream(tokenizer), [], 0, 0
    for count, token in enumerate(tokens, start=1):
        piece = stream.push(token)
        if piece or not stream.rest:
            groups += _smaller(stream, begin, count, shown)
            begin, shown = count, len(stream.text)
    if begin < len(tokens):
        stream.finish()
        groups += _smaller(stream, begin, len(tokens), shown)
    return groups


def _smaller(stream: TextStream, begin: int, end: int, shown: int) -> list[list[Piece]]:
    """Return tokens [begin, end) of a stream in groups as small as may be; `shown` is the text's length before them.

    Text is held back longer than its characters need where tokens of single bytes follow each other.
    """
    groups, last, at = [], begin, shown
    for count in range(begin + 1, end):
        text = stream.upto(count)
        if stream.text.startswith(text) and len(text) >= at:
            groups.append(_group(text[at:], count - last))
            last, at = count, len(text)
    return [*groups, _group(stream.text[at:], end - last)]


def _group(text: str, tokens: int) -> list[Piece]:
    return [Piece(text if part == 1 else "", "", part, tokens) for part in range(1, tokens + 1)]


def _cut(pieces: list[Piece], length: int) -> list[Piece]:
    """Return pieces of which the text ends after `length` characters."""
    done, left = [], length
    for piece in pieces:
        done.append(replace(piece, text=piece.text[:left], unused=piece.text[left:]))
        left = max(0, left - len(piece.text))
    return done
