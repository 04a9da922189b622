"""Logits processors of transformers over the rows of a batch, each of which has a length of its own."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as known

from sirius.decoding.stateless import copied, is_stateless
from sirius.processors import RepetitionPenalty, look_at_lines
from sirius.scoring import Lines, Processor, ask


@dataclass(frozen=True)
class BatchProcessors:
    """The processors of a batch of B rows, which are shown what transformers shows them.

    ids     [B, P] int64, the padded prompts.
    pads    [B], how many tokens of each are padding.
    pad     The token that fills rows which have ended.
    tokens  Returns the new tokens of a row so far.
    """

    processors: LogitsProcessorList
    ids: Tensor
    pads: Sequence[int]
    pad: int
    tokens: Callable[[int], Sequence[int]]

    @cached_property
    def by_line(self) -> bool:
        """Whether lines of any rows may go together."""
        return look_at_lines(self.processors)

    @cached_property
    def of_rows(self) -> list[LogitsProcessorList]:
        """The processors of each row, where they look at each line alone."""
        return [LogitsProcessorList(_of_row(each, row) for each in self.processors) for row in range(len(self.ids))]

    def __call__(self, lines: Sequence[Lines]) -> list[Tensor]:
        """Return the scores of rows' lines as the processors leave them.

        A processor that may hold something for every row is shown a batch of B. Where all rows have as many tokens, as
        all do without a draft, it is the batch itself. Else each row is shown alone, B times.
        """
        padded = [Lines(each.text, self._padded(each), each.scores) for each in lines]
        if self.by_line:  # row by row: memory for all of them together would be fetched anew each time
            return [_ask(self.of_rows[each.text], each.tokens, each.scores) for each in padded]
        if all(len(each.tokens) == 1 for each in padded) and len({each.tokens.shape for each in padded}) == 1:
            return self._as_batch(padded)
        return [self._repeated(each) for each in padded]

    def are_stateless(self, vocabulary: int) -> bool:
        """Tell whether the processors keep no state from call to call; only copies of them are asked."""
        if self.by_line:
            return True
        return is_stateless(self.processors, self.ids, vocabulary) and self._are_of_rows(vocabulary)

    def _are_of_rows(self, vocabulary: int) -> bool:
        """Tell whether what a row is given does not depend on its neighbours; warn where it does."""
        if len(self.ids) == 1:
            return True
        scores = torch.randn(len(self.ids), vocabulary, generator=torch.Generator().manual_seed(0)).to(self.ids.device)
        try:
            together = _ask(copied(self.processors), self.ids.clone(), scores.clone())
            alone = [
                _ask(copied(self.processors), ids.repeat(len(scores), 1), line.repeat(len(scores), 1))[row]
                for row, (ids, line) in enumerate(zip(self.ids, scores, strict=True))
            ]
        except Exception:  # whatever a user's function raises is told of where it is used
            return True
        if not (same := torch.equal(torch.stack(alone).nan_to_num(), together.nan_to_num())):
            logging.getLogger("sirius").warning("nothing is drafted, as a logits processor looks at a row's neighbours")
        return same

    def _padded(self, lines: Lines) -> Tensor:
        pads = self.ids[lines.text, : self.pads[lines.text]].to(lines.tokens)
        return torch.cat([pads.expand(len(lines.tokens), -1), lines.tokens], 1)

    def _as_batch(self, lines: Sequence[Lines]) -> list[Tensor]:
        asked = {each.text: each for each in lines}
        length = lines[0].tokens.shape[1]
        tokens = [asked[row].tokens[0] if row in asked else self._ended(row, length) for row in range(len(self.ids))]
        scores = [asked.get(row, lines[0]).scores[0] for row in range(len(self.ids))]
        answers = _ask(self.processors, torch.stack(tokens), torch.stack(scores))
        return [answers[each.text, None] for each in lines]

    def _ended(self, row: int, length: int) -> Tensor:
        """Return the tokens of a row about which nothing is asked, filled up to a length."""
        new = [*self.tokens(row)]
        fill = [self.pad] * (length - self.ids.shape[1] - len(new))
        return torch.cat([self.ids[row], self.ids.new_tensor(new + fill)])[:length]

    def _repeated(self, lines: Lines) -> Tensor:
        rows = len(self.ids)
        pairs = zip(lines.tokens, lines.scores, strict=True)
        batches = (_ask(self.processors, ids.repeat(rows, 1), scores.repeat(rows, 1)) for ids, scores in pairs)
        return torch.stack([batch[lines.text] for batch in batches])


def _ask(processors: LogitsProcessorList, tokens: Tensor, scores: Tensor) -> Tensor:
    return ask(cast("Processor", processors), tokens, scores)


def _of_row(processor: LogitsProcessor, row: int) -> LogitsProcessor:
    """Return a processor for one row alone; the commonest one as ours, which does the same in less time."""
    if not isinstance(processor, known.RepetitionPenaltyLogitsProcessor):
        return processor
    lengths = processor.prompt_ignore_length
    ignored = int(lengths[row]) if isinstance(lengths, Tensor) else lengths or 0
    return cast("LogitsProcessor", RepetitionPenalty(processor.penalty, ignored))
