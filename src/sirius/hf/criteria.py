"""Stopping criteria of transformers over the rows of a batch, each of which has a length of its own."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation import stopping_criteria as known

from sirius.errors import RequestError

Ask = Callable[[Tensor, None], Any]  # with no scores, as in assisted decoding

BY_ROW = known.MaxLengthCriteria, known.MaxTimeCriteria, known.EosTokenCriteria, known.StopStringCriteria


def parted(criteria: Sequence[StoppingCriteria], rows: int) -> tuple[StoppingCriteriaList, StoppingCriteriaList]:
    """Part criteria into those by which each row ends alone, and those that are asked about the whole batch.

    Where no token ends a text, transformers lets every row go on until all have ended.
    """
    alone = BY_ROW if ends_rows(criteria) else (known.MaxLengthCriteria,)
    own = StoppingCriteriaList(each for each in criteria if rows == 1 or type(each) in alone)
    return own, StoppingCriteriaList(each for each in criteria if not any(each is other for other in own))


def ends_rows(criteria: Sequence[StoppingCriteria]) -> bool:
    """Tell whether rows end each for itself, as transformers tells."""
    return any(hasattr(each, "eos_token_id") for each in criteria)


class RowEnding:
    """The criteria that look at one row, asked after every token."""

    def __init__(self, criteria: StoppingCriteriaList, ids: Tensor) -> None:
        """Take the row's ids [1, P] int64, padding included, as transformers shows them."""
        self.ask, self.ids = cast("Ask", criteria), ids
        self.text, self.stopped = "", False

    def push(self, tokens: Sequence[int]) -> int:
        """Take tokens until one ends the text; return how many were taken."""
        for count, token in enumerate(tokens, start=1):
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
            if _stops(self.ask, self.ids)[0]:
                self.stopped = True
                return count
        return len(tokens)

    def finish(self) -> None:
        """Nothing is held back."""


class BatchCriteria:
    """Criteria that may hold something for every row, asked about the whole batch once for each token, in order.

    Rows advance each at its own pace. So the batch is asked about when the slowest row has come to a length. A row that
    is to end there loses what it has beyond.
    """

    def __init__(self, criteria: StoppingCriteriaList, ids: Tensor, pad: int, together: bool) -> None:
        """Take the batch's prompts [B, P] int64, padding included, and what fills rows that have ended.

        together  rows end when the last of them is to
        """
        self.ask, self.ids, self.pad, self.together = cast("Ask", criteria), ids, pad, together
        self.asked = 0  # new tokens of each row that the criteria have seen
        self.stopped: set[int] = set()  # rows that were asked to end
        self.ended: dict[int, int] = {}  # rows that have been ended, each with its new tokens

    def catch_up(self, rows: Sequence[Sequence[int]], over: Sequence[bool]) -> Iterator[tuple[int, int]]:
        """Yield each row that now ends, and after how many new tokens.

        rows  the new tokens of each
        over  whether a row gets no more
        """
        while self._next(rows, over):
            self.asked += 1
            new = [[*row[: self.ended.get(i, self.asked)]][: self.asked] for i, row in enumerate(rows)]
            filled = self.ids.new_tensor([row + [self.pad] * (self.asked - len(row)) for row in new])
            stops = _stops(self.ask, torch.cat([self.ids, filled], 1))
            self.stopped |= {row for row, stop in enumerate(stops) if stop and len(new[row]) == self.asked}
            if self.together and len(self.stopped) < len(rows):
                continue
            for row in sorted(self.stopped - self.ended.keys()):
                self.ended[row] = self.asked
                yield row, self.asked

    def _next(self, rows: Sequence[Sequence[int]], over: Sequence[bool]) -> bool:
        """Tell whether every row that goes on has a further token, and any does."""
        lengths = {i: len(row) for i, row in enumerate(rows) if i not in self.ended}
        waits = any(length <= self.asked and not over[i] for i, length in lengths.items())
        return not waits and any(length > self.asked for length in lengths.values())


def _stops(ask: Ask, ids: Tensor) -> list[bool]:
    """Return which rows of ids [B, n] int64 criteria stop; one answer is every row's."""
    try:
        return torch.as_tensor(ask(ids, None)).bool().expand(len(ids)).tolist()
    except Exception as error:  # whatever a user's criterion raises, or returns
        raise RequestError(f"a stopping criterion failed: {error!r}") from error
