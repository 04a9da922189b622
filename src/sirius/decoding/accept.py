"""Rules of acceptance: pure functions of a draft and the full model's scores of it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sirius.core import CorrectionConfig, Verdict

Rule = Callable[[Tensor, Tensor], Verdict]


def accept_argmax(draft: Tensor, scores: Tensor) -> Verdict:
    """Keep the longest run of guesses that are the full model's own choice.

    draft   [K-1]   int64  guesses, oldest first
    scores  [K, V]  float  row i judges draft[i]; the row after the last kept guess gives one more token

    Lossless: the tokens of plain greedy decoding, whatever the draft.
    """
    return _verdict(draft == scores[:-1].argmax(-1), scores)


def accept_threshold(draft: Tensor, scores: Tensor, *, threshold: float, temperature: float) -> Verdict:
    """Keep the longest run of guesses that the full model finds likely enough, its own choice always among them.

    draft        [K-1]   int64  guesses, oldest first
    scores       [K, V]  float  row i judges draft[i]; the row after the last kept guess gives one more token
    threshold    the least softmax(scores / temperature)[guess]

    Lossy up to threshold 0.5. Source: Sirius (arXiv 2409.03856), section 4; that the argmax passes at any threshold is
    ours: rejecting it would only write it again.
    """
    judges = scores[:-1]
    likely = torch.softmax(judges / temperature, dim=-1).gather(-1, draft[:, None])[:, 0] >= threshold
    return _verdict(likely | (draft == judges.argmax(-1)), scores)


def make_rule(config: CorrectionConfig) -> Rule:
    """Return the rule that a configuration names."""
    if config.accept == "argmax":
        return accept_argmax
    return partial(accept_threshold, threshold=config.threshold, temperature=config.accept_temperature)


def _verdict(passed: Tensor, scores: Tensor) -> Verdict:
    kept = int(passed.long().cumprod(0).sum())  # up to the first failure
    return Verdict(kept, next=int(scores[kept].argmax()))
