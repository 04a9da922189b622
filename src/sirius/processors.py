"""What changes scores before a token is chosen: transformers' own processors, made from a `SamplingConfig`."""

from typing import cast

from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sirius.core import SamplingConfig
from sirius.scoring import Processor


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
        chosen.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
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
