"""How likely the full model finds given tokens: many texts in few passes, without a cache."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sirius.errors import ConfigError
from sirius.model.inputs import cache_argument
from sirius.model.limits import MOST_READ, rescaling_length
from sirius.model.prepared import prepared_of
from sirius.runtime.session import ordinary

MOST_SCORES = 2**27  # numbers of one pass: half a gigabyte in float32
PLANNED_SCORES = 2**23  # the same under a memory budget


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

    Texts that differ in their last token alone are read once. Under a memory budget fewer are read in a pass, and a
    long one in several passes. Raises ConfigError of a batch size below 1, and what the model raises.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ConfigError(f"batch_size is a whole number of texts, at least 1; got {batch_size!r}")
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, (prompt, following) in enumerate(texts):
        alike.setdefault((*prompt, *following)[:-1], []).append(index)
    ordered = sorted(alike, key=len, reverse=True)
    limits = Limits.of(model)
    while ordered:
        batch = ordered[: min(batch_size, limits.texts(len(ordered[0])))]
        kept = max(len(texts[index][1]) for read in batch for index in alike[read])
        batch = batch[: max(1, limits.scored // kept)]
        del ordered[: len(batch)]
        found: dict[int, list[Likelihood]] = {index: [] for read in batch for index in alike[read]}
        left = kept  # tokens at the end of each text whose scores are still to come
        for scores in _passes(model, batch, kept, limits):
            for row, read in zip(scores, batch, strict=True):
                for index in alike[read]:
                    found[index] += _likelihood(row, texts[index][1], left)
            left -= scores.shape[1]
        for index, parts in found.items():
            yield index, Likelihood(*(tuple(chain(*each)) for each in zip(*map(_fields, parts), strict=True)))


class Limits(NamedTuple):
    """What one pass of a model may read.

    read    tokens of all texts together; None: any number
    scored  tokens whose scores are kept, of all texts together
    """

    read: int | None
    scored: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Limits":
        """Return the limits of a model, which are narrow where memory was planned for a prompt's pass."""
        vocabulary = model.config.get_text_config().vocab_size
        if prepared_of(model).slots is None:
            return cls(None, MOST_SCORES // vocabulary)
        return cls(MOST_READ, max(1, PLANNED_SCORES // vocabulary))

    def texts(self, length: int) -> int:
        """Return how many texts of a length one pass may read, at least one."""
        return sys.maxsize if self.read is None else max(1, self.read // length)


def _passes(model: PreTrainedModel, batch: Sequence[Sequence[int]], kept: int, limits: Limits) -> Iterator[Tensor]:
    """Yield the scores after the last `kept` tokens of each row, in parts [B, n, V]: in one pass if limits let it."""
    longest = max(map(len, batch))
    rescaled = rescaling_length(model.config)  # past it the passes of a text would differ in the scale of positions
    short = limits.read is None or (longest <= limits.read and kept <= limits.scored)
    if short or (rescaled is not None and longest > rescaled):
        yield _read(model, batch, kept)
        return
    (tokens,) = batch  # more of them would be over the limits
    assert limits.read is not None
    first = longest - kept
    begins = [*range(0, first, limits.read), *range(first, longest, min(limits.read, limits.scored))]
    cache = {cache_argument(model): DynamicCache(config=model.config), "use_cache": True}
    for begin, end in pairwise([*begins, longest]):
        ids, positions = torch.tensor([tokens[begin:end]]), torch.arange(begin, end)[None]
        scores = _run(model, ids, position_ids=positions, logits_to_keep=1 if begin < first else 0, **cache)
        if begin >= first:
            yield scores


def _read(model: PreTrainedModel, batch: Sequence[Sequence[int]], kept: int) -> Tensor:
    """Return the scores [B, kept, V] after the last tokens of each row."""
    longest = max(map(len, batch))
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):  # rows end together, so that the scores of all are neighbours
        ids[row, longest - len(tokens) :] = torch.tensor(tokens)
        mask[row, longest - len(tokens) :] = 1
    options: dict[str, Any] = {"attention_mask": mask} if len(batch) > 1 else {}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return _run(model, ids, position_ids=positions, use_cache=False, logits_to_keep=kept, **options)


def _run(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Return the scores of a pass over ids [B, T] int64, the only one of the model meanwhile."""
    placed = {name: each.to(model.device) if isinstance(each, Tensor) else each for name, each in options.items()}
    with prepared_of(model).lock, ordinary():
        return model(ids.to(model.device), **placed).logits


def _likelihood(scores: Tensor, following: Sequence[int], left: int) -> list[Likelihood]:
    """Return the likelihood of those tokens of a continuation that scores [n, V] come before; none, or one in a list.

    left  tokens that are still to come, of which the first n have their scores here
    """
    count, skipped = len(scores), max(0, left - len(following))
    begin = max(0, len(following) - left)
    tokens = torch.tensor(following[begin : max(0, len(following) - left + count)], device=scores.device)
    if not len(tokens):
        return []
    own = scores[skipped:]
    logprobs = own.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return [Likelihood(tuple(logprobs.tolist()), tuple((own.argmax(-1) == tokens).tolist()))]


def _fields(part: Likelihood) -> tuple[tuple[float, ...], tuple[bool, ...]]:
    return part.logprobs, part.greedy
