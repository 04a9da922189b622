"""What changes scores before a token is chosen: transformers' own processors, made from a `SamplingConfig`."""

from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import logits_process as known

from sirius.core import SamplingConfig
from sirius.scoring import Processor


class RepetitionPenalty:
    """transformers' repetition penalty, which reads and writes the scores of a text's tokens alone, in place.

    ignored  so many first tokens do not count: padding

    Source: CTRL (arXiv 1909.05858), section 4.1.
    """

    def __init__(self, penalty: float, ignored: int = 0) -> None:
        self.penalty, self.ignored = penalty, ignored

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Change the scores [m, V] of what follows tokens [m, n] int64, and return them."""
        held, vocabulary = tokens[:, self.ignored :], scores.shape[1]
        if held.numel() and int(held.max()) >= vocabulary:  # a head of fewer tokens than the embedding has
            for line, own in zip(held, scores, strict=True):
                self._act(line[None, line < vocabulary], own[None])
            return scores
        return self._act(held, scores)

    def _act(self, held: Tensor, scores: Tensor) -> Tensor:
        found = scores.gather(1, held)
        return scores.scatter_(1, held, torch.where(found < 0, found * self.penalty, found / self.penalty))


BY_LINE = (  # those that look at each line alone, and keep nothing
    RepetitionPenalty,
    known.EpsilonLogitsWarper,
    known.EtaLogitsWarper,
    known.ExponentialDecayLengthPenalty,
    known.ForcedBOSTokenLogitsProcessor,
    known.ForcedEOSTokenLogitsProcessor,
    known.InfNanRemoveLogitsProcessor,
    known.LogitNormalization,
    known.MinLengthLogitsProcessor,
    known.MinNewTokensLengthLogitsProcessor,
    known.MinPLogitsWarper,
    known.NoBadWordsLogitsProcessor,
    known.NoRepeatNGramLogitsProcessor,
    known.RepetitionPenaltyLogitsProcessor,
    known.SequenceBiasLogitsProcessor,
    known.SuppressTokensAtBeginLogitsProcessor,
    known.SuppressTokensLogitsProcessor,
    known.TemperatureLogitsWarper,
    known.TopKLogitsWarper,
    known.TopPLogitsWarper,
    known.TypicalLogitsWarper,
)


def look_at_lines(process: object) -> bool:
    """Tell whether a list holds none but known processors, so that lines of any texts may go together."""
    return isinstance(process, LogitsProcessorList) and all(type(each) in BY_LINE for each in process)


def make_processor(sampling: SamplingConfig, model: PreTrainedModel) -> Processor | None:
    """Return the processors that a configuration asks for, in transformers' order; None where there are none.

    A repetition penalty that is left open is the checkpoint's own. Of the checkpoint's other sampling settings none
    acts: greedy stays greedy.
    """
    penalty = sampling.repetition_penalty
    if penalty is None:
        penalty = getattr(model.generation_config, "repetition_penalty", None) or 1.0
    chosen = LogitsProcessorList()
    if penalty != 1:
        chosen.append(cast("LogitsProcessor", RepetitionPenalty(float(penalty))))
    if sampling.temperature > 0:
        if sampling.temperature != 1:
            chosen.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chosen.append(TopPLogitsWarper(float(sampling.top_p)))
        if sampling.min_p > 0:
            chosen.append(MinPLogitsWarper(float(sampling.min_p)))
    return cast("Processor", chosen) if chosen else None
