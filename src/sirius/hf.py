"""The door of transformers: `model.generate(**inputs, custom_generate=sirius.decode)` decodes our way.

transformers does not hand `streamer`, `tokenizer` and `stop_strings` on to a custom function, so bind those first
(`functools.partial(sirius.decode, streamer=...)`), or call `sirius.generate`, which does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from sirius.core import CorrectionConfig, Processor, Request, Round, SparsityConfig, as_config
from sirius.decoding.loop import Plan
from sirius.engine import Generation
from sirius.errors import ConfigError, RequestError
from sirius.model.prepare import check_sliding
from sirius.stats import Stats


@dataclass
class SiriusOutput(GenerateDecoderOnlyOutput):
    """transformers' output of a decoder-only model, and our figures of each row."""

    stats: tuple[Stats, ...] | None = None


def generate(
    model: Any,
    *args: Any,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Call `model.generate(..., custom_generate=sirius.decode)` with streamer and stop strings handed on."""
    bound = partial(decode, streamer=streamer, tokenizer=tokenizer, stop=stop_strings)
    return model.generate(*args, custom_generate=bound, **kwargs)


@torch.no_grad()
def decode(  # noqa: PLR0913 - transformers' own arguments, and ours
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    sparsity: SparsityConfig | Mapping[str, Any] | str = "coarse",
    correction: CorrectionConfig | Mapping[str, Any] | None = CorrectionConfig(),  # noqa: B008 - frozen
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop: str | Sequence[str] | None = None,
    **model_kwargs: Any,
) -> Tensor | SiriusOutput:
    """Decode a batch for transformers' `generate`; row by row, since rows advance on their own.

    input_ids   [B, P] int64, left-padded; `attention_mask` says which tokens count
    sparsity    a method's name at keep 0.5, a SparsityConfig or a mapping of its fields; a keyword of `generate`
    correction  a CorrectionConfig or a mapping of its fields, None to decode with the sparse model alone; likewise
    streamer, tokenizer, stop   bind these with functools.partial, or use `sirius.generate`

    Returns [B, P + new] int64 padded on the right, or a `SiriusOutput` where `return_dict_in_generate` is set. The
    model is left prepared (it computes what it did before); `sirius.restore(model)` undoes it. Raises ConfigError of
    sampling, beams and outputs that a draft cannot give, RequestError of a cache or embeddings as the prompt.
    """
    _check(generation_config, model_kwargs, bool(logits_processor))
    if streamer is not None and len(input_ids) > 1:
        raise ConfigError(f"a streamer takes one prompt at a time; got {len(input_ids)}")
    criteria = StoppingCriteriaList(stopping_criteria)
    if stop:
        if tokenizer is None:
            raise ConfigError(
                "stop strings need the tokenizer: sirius.generate(model, ..., stop_strings=..., tokenizer=...)"
            )
        criteria.append(StopStringCriteria(tokenizer, stop_strings=[stop] if isinstance(stop, str) else list(stop)))
    mask = model_kwargs.get("attention_mask")
    job = _Job(
        model,
        (as_config(SparsityConfig, sparsity), None if correction is None else as_config(CorrectionConfig, correction)),
        generation_config,
        LogitsProcessorList(logits_processor or ()),
        criteria,
        streamer,
    )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    rows = [job.run(input_ids, row, mask) for row in range(len(input_ids))]
    if streamer is not None:
        streamer.end()
    return job.packed(input_ids, rows)


@dataclass(frozen=True)
class _Row:
    """A decoded row: its new tokens, their scores where asked for, and its figures."""

    tokens: list[int]
    scores: list[Tensor]
    stats: Stats


@dataclass(frozen=True)
class _Job:
    """What the rows of one call share."""

    model: PreTrainedModel
    configs: tuple[SparsityConfig, CorrectionConfig | None]
    generation: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None

    @property
    def wants_scores(self) -> bool:
        asked = self.generation.output_scores or self.generation.output_logits
        return bool(self.generation.return_dict_in_generate and asked)

    def run(self, input_ids: Tensor, index: int, mask: Tensor | None) -> _Row:
        """Decode one row of input_ids [B, P] int64, in which mask [B, P] marks the tokens that are no padding."""
        row = input_ids[index]
        real = row if mask is None else row[mask[index].bool()]
        if len(real) == 0:
            raise RequestError("a prompt of the batch is all padding; give it at least one token")
        if not torch.equal(real, row[len(row) - len(real) :]) or (mask is not None and not mask[index, -1]):
            raise RequestError(f"row {index} is padded on the right or within; set the tokenizer's padding_side='left'")
        budget = self.generation.max_length - len(row)
        check_sliding(self.model.config, len(real), budget)
        request = Request(tuple(real.tolist()), budget, (), *self.configs)
        process = self._row_processor(input_ids, index, len(row) - len(real)) if self.processors else None
        plan = Plan(budget, ends=frozenset(self._ends()), process=process, keep_scores=self.wants_scores)
        return self._collect(Generation(self.model, request, plan), row)

    def packed(self, input_ids: Tensor, rows: list[_Row]) -> Tensor | SiriusOutput:
        """Return the rows in transformers' form, the shorter ones padded on the right."""
        pad = self.generation.pad_token_id
        pad = next(iter(self._ends()), 0) if pad is None else pad
        longest = max(len(row.tokens) for row in rows)
        new = [row.tokens + [pad] * (longest - len(row.tokens)) for row in rows]
        sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
        if not self.generation.return_dict_in_generate:
            return sequences
        scores = self._stacked(rows, longest) if self.wants_scores else None
        return SiriusOutput(
            sequences=cast("torch.LongTensor", sequences),
            scores=scores if self.generation.output_scores else None,
            logits=scores if self.generation.output_logits else None,
            stats=tuple(row.stats for row in rows),
        )

    def _collect(self, generation: Generation, row: Tensor) -> _Row:
        """Run the rounds, asking the stopping criteria after every token."""
        used: list[Round] = []
        ids, ask = row[None], cast("Callable[[Tensor, None], Tensor]", self.criteria)
        for step in generation.rounds():
            stopped = False
            for count, token in enumerate(step.tokens, start=1):
                ids = torch.cat([ids, ids.new_tensor([[token]])], dim=1)
                if stopped := bool(ask(ids, None).all()):  # no scores, as in assisted decoding
                    step = step.until(count)
                    break
            used.append(step)
            if self.streamer is not None:
                self.streamer.put(torch.tensor(step.tokens))
            if stopped:
                break
        scores = [line for step in used if step.scores is not None for line in step.scores]
        return _Row(ids[0, len(row) :].tolist(), scores, generation.stats(used))

    def _row_processor(self, input_ids: Tensor, index: int, padding: int) -> Processor:
        """Show the processors what transformers shows them: the padded row, in a batch of as many rows.

        A processor may hold something for every row of the batch, so the row stands for its neighbours too.
        """
        processors, pads = cast("Processor", self.processors), input_ids[index : index + 1, :padding]

        def process(tokens: Tensor, scores: Tensor) -> Tensor:
            padded = torch.cat([pads.to(tokens), tokens], dim=1).repeat(len(input_ids), 1)
            return processors(padded, scores.repeat(len(input_ids), 1))[index : index + 1]

        return process

    def _stacked(self, rows: list[_Row], longest: int) -> Any:
        """Return one [B, V] tensor a step; a row that has ended shows zeros."""
        filled = [row.scores + [torch.zeros_like(row.scores[0])] * (longest - len(row.scores)) for row in rows]
        return tuple(torch.stack(step) for step in zip(*filled, strict=True))

    def _ends(self) -> list[int]:
        ids = self.generation.eos_token_id
        return [ids] if isinstance(ids, int) else list(ids or ())


def _check(generation: GenerationConfig, model_kwargs: Mapping[str, Any], processors: bool) -> None:
    if generation.do_sample or generation.num_beams not in (None, 1):
        raise ConfigError("sirius decodes greedily; set do_sample=False and num_beams=1")
    if generation.guidance_scale not in (None, 1):
        raise ConfigError(
            "classifier-free guidance keeps a cache that a rejected draft would spoil; set guidance_scale=1"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if generation.return_dict_in_generate and getattr(generation, name):
            raise ConfigError(f"{name} would be the draft's as often as the full model's; leave it out")
    if model_kwargs.get("inputs_embeds") is not None:
        raise RequestError("sirius reads token ids, not inputs_embeds")
    if generation.return_dict_in_generate and generation.output_logits and processors:
        raise ConfigError("with logits processors only the processed scores are kept; ask for output_scores")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise RequestError("sirius fills a cache of its own; give the whole prompt as input_ids and no past_key_values")
