"""How likely the full model finds given tokens: many texts in few passes, without a cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sirius.model.prepared import prepared_of
from sirius.runtime.session import ordinary

MOST_SCORES = 2**27  # numbers of one pass: half a gigabyte in float32


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is after its prompt, token by token.

    logprobs  the natural log of the full model's probability of each token, at temperature 1
    greedy    whether each token is the likeliest one
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation."""
        return sum(self.logprobs)


def score_tokens(
    model: PreTrainedModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int
) -> Iterator[tuple[int, Likelihood]]:
    """Yield the index and likelihood of each text, a pair of a prompt's tokens and those after it; longest texts first.

    Texts that differ in their last token alone are read once. Raises what the model raises.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, following) in enumerate(texts):
        alike.setdefault((*prompt, *following)[:-1], []).append(index)
    ordered = sorted(alike, key=len, reverse=True)
    vocabulary = model.config.get_text_config().vocab_size
    while ordered:
        batch = ordered[:batch_size]
        kept = max(len(texts[index][1]) for read in batch for index in alike[read])
        batch = batch[: max(1, MOST_SCORES // (kept * vocabulary))]
        del ordered[: len(batch)]
        scores = _read(model, batch, kept)
        for row, read in zip(scores, batch, strict=True):
            for index in alike[read]:
                following = torch.tensor(texts[index][1], device=row.device)
                yield index, _likelihood(row[kept - len(following) :], following)


def _read(model: PreTrainedModel, batch: Sequence[Sequence[int]], kept: int) -> Tensor:
    """Return the scores [B, kept, V] after the last tokens of each row."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):  # rows end together, so that the scores of all are neighbours
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    options: dict[str, Any] = {"attention_mask": mask.to(model.device)} if len(batch) > 1 else {}
    positions = (mask.cumsum(1) - 1).clamp(min=0).to(model.device)
    with prepared_of(model).lock, ordinary():
        out = model(ids.to(model.device), position_ids=positions, use_cache=False, logits_to_keep=kept, **options)
    return out.logits


def _likelihood(scores: Tensor, following: Tensor) -> Likelihood:
    """Return the likelihood of tokens [n] int64, of scores [n, V] before each."""
    logprobs = scores.float().log_softmax(-1).gather(1, following[:, None])[:, 0]
    return Likelihood(tuple(logprobs.tolist()), tuple((scores.argmax(-1) == following).tolist()))
