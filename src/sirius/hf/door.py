"""`decode` in the form of a `custom_generate` of transformers.

transformers hands `streamer`, `tokenizer` and `stop_strings` not on to a custom function, so bind those first
(`functools.partial(sirius.decode, streamer=...)`), or call `sirius.generate`, which does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from sirius.batch import Batch
from sirius.core import (
    CorrectionConfig,
    Request,
    Round,
    SamplingConfig,
    SparsityConfig,
    check_together,
)
from sirius.errors import ConfigError, RequestError
from sirius.forms import as_config, as_draft
from sirius.hf.criteria import BatchCriteria, RowEnding, ends_rows, parted
from sirius.hf.processors import BatchProcessors
from sirius.model.inputs import check_inputs
from sirius.model.limits import check_length
from sirius.scoring import SharedProcessor
from sirius.stats import Stats, summarise
from sirius.texts import Completion, Text


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
    """Call `model.generate(..., custom_generate=sirius.decode)` with streamer and stop strings handed on.

    stop_strings  those of the generation config, given or the model's, if left out
    """
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    bound = bind(model, config, streamer=streamer, tokenizer=tokenizer, stop_strings=stop_strings)
    return model.generate(*args, custom_generate=bound, stop_strings=None, **kwargs)


def bind(
    model: Any,
    config: GenerationConfig | None,
    *,
    streamer: BaseStreamer | None,
    tokenizer: PreTrainedTokenizerBase | None,
    stop_strings: str | Sequence[str] | None,
) -> Callable[..., Any]:
    """Return `decode` with what transformers does not hand on; arguments as in `generate`, `config` as given there."""
    for each in (config, getattr(model, "generation_config", None)):
        stop_strings = getattr(each, "stop_strings", None) if stop_strings is None else stop_strings
    return partial(decode, streamer=streamer, tokenizer=tokenizer, stop=stop_strings)


@torch.no_grad()
def decode(  # noqa: PLR0913 - transformers' own arguments, and ours
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList | None,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    sparsity: SparsityConfig | Mapping[str, Any] | str | None = None,
    correction: CorrectionConfig | Mapping[str, Any] | int | str | None = CorrectionConfig(),  # noqa: B008 - frozen
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop: str | Sequence[str] | None = None,
    **model_kwargs: Any,
) -> Tensor | SiriusOutput:
    """Decode a batch for transformers' `generate`; every row advances on its own, and the rows share each pass.

    input_ids   [B, P] int64, left-padded; `attention_mask` says which tokens count
    sparsity    a method's name at keep 0.5, a SparsityConfig or a mapping of its fields; a keyword of `generate`.
                None is every neuron, its weights at 4 bits (8 for a small model); beside the correction "paper" it is
                coarse
    correction  a CorrectionConfig, a mapping of its fields, a period, "auto" or "paper"; None to decode with the sparse
                model alone; likewise
    do_sample   samples as the processors and warpers of `generate` say, seeded by torch's generator
    streamer, tokenizer, stop   bind these with functools.partial, or use `sirius.generate`

    Stopping criteria get scores None, as in assisted decoding. `use_cache` and `cache_implementation` change nothing:
    the cache is ours. A text that passes the model's context is warned of and no more, as in transformers.

    Processors are tried first: of those that keep state from call to call nothing is drafted, and a warning says so.
    Processors and criteria may hold something for every row: they are shown the batch as transformers shows it.

    Returns [B, P + new] int64 padded on the right, or a `SiriusOutput` where `return_dict_in_generate` is set. The
    model is left prepared (it computes what it did before); `sirius.restore(model)` undoes it. Raises ConfigError of
    beams and of outputs that a draft cannot give. Raises RequestError of inputs that a session does not give to a
    model: a filled cache, embeddings, images, other positions than those of the tokens.
    """
    _check(generation_config, model_kwargs)
    mask = model_kwargs.pop("attention_mask", None)
    check_inputs(input_ids, mask, model_kwargs)
    if streamer is not None and len(input_ids) > 1:
        raise ConfigError(f"a streamer takes one prompt at a time; got {len(input_ids)}")
    chosen = as_draft(sparsity, correction)
    corrected = None if correction is None else as_config(CorrectionConfig, correction)
    check_together(SamplingConfig(float(generation_config.do_sample or 0)), corrected)
    criteria = [*stopping_criteria, *_stop_criteria(stop, tokenizer)]
    own, joint = parted(criteria, len(input_ids))
    rows = [_Row() for _ in input_ids]
    job = _Job(model, generation_config, LogitsProcessorList(logits_processor or ()), own, rows)
    batch = Batch(model, chosen, corrected, ends=frozenset(job.ends), rows=len(input_ids))
    for row, text in zip(rows, job.texts(input_ids, mask, batch.drafts), strict=True):
        row.ticket = batch.add(text)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    whole = BatchCriteria(joint, input_ids, job.pad, together=not ends_rows(criteria)) if joint else None
    _run(batch, rows, whole, streamer)
    if streamer is not None:
        streamer.end()
    return job.packed(input_ids)


def _run(batch: Batch, rows: "list[_Row]", joint: BatchCriteria | None, streamer: BaseStreamer | None) -> None:
    """Bring rows to their ends."""
    of = {row.ticket: row for row in rows}
    while batch.busy:
        for update in batch.step():
            if update.error is not None:
                raise update.error
            if streamer is not None:
                streamer.put(torch.tensor(update.round.tokens))
            row = of[update.ticket]
            row.rounds.append(update.round)
            row.completion = update.completion
        if joint is not None:
            over = [row.completion is not None for row in rows]
            for index, count in list(joint.catch_up([row.tokens for row in rows], over)):
                rows[index].end(batch, count)


class _Row:
    """A row's rounds, and in the end its completion."""

    def __init__(self) -> None:
        self.ticket = 0
        self.rounds: list[Round] = []
        self.completion: Completion | None = None

    def end(self, batch: Batch, count: int) -> None:
        """End the row after `count` of its tokens, be it at work or over."""
        done = self.completion or batch.end(self.ticket)
        left, kept = count, []
        for each in self.rounds:
            if left > 0:
                kept.append(each.until(min(left, len(each.tokens))))
            left -= len(each.tokens)
        assert done.setting is not None, "a batch gives it"
        self.rounds, self.completion = kept, replace(done, stats=summarise(kept, done.setting, done.stats.seconds))

    @property
    def tokens(self) -> list[int]:
        return [token for done in self.rounds for token in done.tokens]

    def lines(self, name: str) -> list[Tensor]:
        """Return the scores or logits of each token, [V]."""
        return [line for done in self.rounds for line in getattr(done, name)]


@dataclass(frozen=True)
class _Job:
    """What the rows of one call share."""

    model: PreTrainedModel
    generation: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    rows: list[_Row]

    @property
    def pad(self) -> int:
        pad = self.generation.pad_token_id
        return next(iter(self.ends), 0) if pad is None else pad

    @property
    def ends(self) -> list[int]:
        ids = self.generation.eos_token_id
        return [ids] if isinstance(ids, int) else list(ids or ())

    @property
    def wants_scores(self) -> bool:
        asked = self.generation.output_scores or self.generation.output_logits
        return bool(self.generation.return_dict_in_generate and asked)

    def texts(self, input_ids: Tensor, mask: Tensor | None, drafts: bool) -> list[Text]:
        """Return the rows of input_ids [B, P] int64 as texts; mask [B, P] marks the tokens that are no padding."""
        prompts = [_without_padding(row, mask, index) for index, row in enumerate(input_ids)]
        pads = [input_ids.shape[1] - len(prompt) for prompt in prompts]
        ids = input_ids.to(self.model.device)
        shared = BatchProcessors(self.processors, ids, pads, self.pad, lambda row: self.rows[row].tokens)
        stateless = not (drafts and self.processors) or shared.are_stateless(
            self.model.config.get_text_config().vocab_size
        )
        return [
            Text(
                self._request(prompt, input_ids.shape[1]),
                partial(RowEnding, self.criteria, input_ids[index, None]),
                SharedProcessor(shared, index) if self.processors else None,
                keep_scores=self.wants_scores,
                stateless=stateless,
                watched=None if shared.by_line else self.processors,
            )
            for index, prompt in enumerate(prompts)
        ]

    def _request(self, prompt: Tensor, padded: int) -> Request:
        budget = self.generation.max_length - padded
        check_length(self.model.config, len(prompt), budget)
        sampling = SamplingConfig(temperature=1.0 if self.generation.do_sample else 0.0)  # warpers are processors here
        return Request(tuple(prompt.tolist()), budget, (), sampling)

    def packed(self, input_ids: Tensor) -> Tensor | SiriusOutput:
        """Return the rows in transformers' form, the shorter ones padded on the right."""
        rows, pad = self.rows, self.pad
        longest = max(len(row.tokens) for row in rows)
        new = [row.tokens + [pad] * (longest - len(row.tokens)) for row in rows]
        sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
        if not self.generation.return_dict_in_generate:
            return sequences
        return SiriusOutput(
            sequences=cast("torch.LongTensor", sequences),
            scores=self._stacked(rows, "scores", longest) if self.generation.output_scores else None,
            logits=self._stacked(rows, "logits", longest) if self.generation.output_logits else None,
            stats=tuple(row.completion.stats for row in rows if row.completion is not None),
        )

    def _stacked(self, rows: list[_Row], name: str, longest: int) -> Any:
        """Return one [B, V] tensor a step; a row that has ended shows zeros."""
        lines = [row.lines(name) for row in rows]
        filled = [each + [torch.zeros_like(each[0])] * (longest - len(each)) for each in lines]
        return tuple(torch.stack(step) for step in zip(*filled, strict=True))


def _stop_criteria(
    stop: str | Sequence[str] | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[StopStringCriteria]:
    if stop is None or (isinstance(stop, Sequence) and not stop):
        return []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, Sequence) or not all(isinstance(each, str) and each for each in stops):
        raise ConfigError(f"stop strings are texts, none of them empty; got {stop!r}")
    if tokenizer is None:
        raise ConfigError(
            "stop strings need the tokenizer: sirius.generate(model, ..., stop_strings=..., tokenizer=...)"
        )
    return [StopStringCriteria(tokenizer, stop_strings=list(stops))]


def _without_padding(row: Tensor, mask: Tensor | None, index: int) -> Tensor:
    """Return the tokens of a row [P] that count."""
    real = row if mask is None else row[mask[index].bool()]
    if len(real) == 0:
        raise RequestError("a prompt of the batch is all padding; give it at least one token")
    if mask is not None and not bool(mask[index, len(row) - len(real) :].all()):
        raise RequestError(
            f"row {index} is padded on the right or within: set the tokenizer's padding_side='left', or give an "
            "attention_mask where a prompt's own token was taken for padding"
        )
    return real


def _check(generation: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    mode = generation.get_generation_mode(model_kwargs.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ConfigError(
            f"sirius decodes greedily or samples, and these options ask for {mode.value.replace('_', ' ')}; leave out "
            "num_beams, penalty_alpha, dola_layers, prompt_lookup_num_tokens and assistant_model"
        )
    if generation.guidance_scale not in (None, 1):
        raise ConfigError(
            "classifier-free guidance keeps a cache that a rejected draft would spoil; set guidance_scale=1"
        )
    for name in ("output_attentions", "output_hidden_states"):
        if generation.return_dict_in_generate and getattr(generation, name):
            raise ConfigError(f"{name} would be the draft's as often as the full model's; leave it out")
