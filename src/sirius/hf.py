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
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from sirius.batch import Batch, Completion, Text
from sirius.core import CorrectionConfig, Processor, Request, Round, SamplingConfig, SparsityConfig, as_config
from sirius.errors import ConfigError, RequestError
from sirius.model.prepare import check_length
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
    correction: CorrectionConfig | Mapping[str, Any] | int | str | None = CorrectionConfig(),  # noqa: B008 - frozen
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop: str | Sequence[str] | None = None,
    **model_kwargs: Any,
) -> Tensor | SiriusOutput:
    """Decode a batch for transformers' `generate`; every row advances on its own, and the rows share each pass.

    input_ids   [B, P] int64, left-padded; `attention_mask` says which tokens count
    sparsity    a method's name at keep 0.5, a SparsityConfig or a mapping of its fields; a keyword of `generate`
    correction  a CorrectionConfig, a mapping of its fields, a period, "auto" or "paper"; None to decode with the sparse
                model alone; likewise
    do_sample   samples as the processors and warpers of `generate` say, seeded by torch's generator
    streamer, tokenizer, stop   bind these with functools.partial, or use `sirius.generate`

    Stopping criteria get scores None, as in assisted decoding. `use_cache` and `cache_implementation` change nothing:
    the cache is ours. A text that passes the model's context is warned of and no more, as in transformers.

    Returns [B, P + new] int64 padded on the right, or a `SiriusOutput` where `return_dict_in_generate` is set. The
    model is left prepared (it computes what it did before); `sirius.restore(model)` undoes it. Raises ConfigError of
    beams and outputs that a draft cannot give, RequestError of a cache or embeddings as the prompt.
    """
    _check(generation_config, model_kwargs)
    if streamer is not None and len(input_ids) > 1:
        raise ConfigError(f"a streamer takes one prompt at a time; got {len(input_ids)}")
    criteria = StoppingCriteriaList(stopping_criteria)
    if stop:
        if tokenizer is None:
            raise ConfigError(
                "stop strings need the tokenizer: sirius.generate(model, ..., stop_strings=..., tokenizer=...)"
            )
        criteria.append(StopStringCriteria(tokenizer, stop_strings=[stop] if isinstance(stop, str) else list(stop)))
    chosen = as_config(SparsityConfig, sparsity)
    corrected = None if correction is None else as_config(CorrectionConfig, correction)
    job = _Job(model, generation_config, LogitsProcessorList(logits_processor or ()), criteria)
    batch = Batch(model, chosen, corrected, ends=frozenset(job.ends), rows=len(input_ids))
    mask = model_kwargs.get("attention_mask")
    texts = [job.text(input_ids, row, mask) for row in range(len(input_ids))]
    tickets = {batch.add(text): row for row, text in enumerate(texts)}
    if streamer is not None:
        streamer.put(input_ids.cpu())
    rows = [_Row() for _ in texts]
    while batch.busy:
        for update in batch.step():
            if update.error is not None:
                raise update.error
            if streamer is not None:
                streamer.put(torch.tensor(update.round.tokens))
            rows[tickets[update.ticket]].add(update.round, update.completion)
    if streamer is not None:
        streamer.end()
    return job.packed(input_ids, rows)


class _Row:
    """A row's rounds, and in the end its completion."""

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self.completion: Completion | None = None

    def add(self, done: Round, completion: Completion | None) -> None:
        self.rounds.append(done)
        self.completion = completion

    @property
    def tokens(self) -> list[int]:
        return [token for done in self.rounds for token in done.tokens]

    def lines(self, name: str) -> list[Tensor]:
        """Return the scores or logits of each token, [V]."""
        return [line for done in self.rounds for line in getattr(done, name)]


class _Criteria:
    """The stopping criteria of one row, asked after every token."""

    def __init__(self, criteria: StoppingCriteriaList, ids: Tensor) -> None:
        """Take the row's ids [1, P] int64, padding included, as transformers shows them."""
        self.ask, self.ids = cast("Callable[[Tensor, None], Tensor]", criteria), ids
        self.text, self.stopped = "", False

    def push(self, tokens: Sequence[int]) -> int:
        """Take tokens until one ends the text; return how many were taken."""
        for count, token in enumerate(tokens, start=1):
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
            if bool(self.ask(self.ids, None).all()):  # no scores, as in assisted decoding
                self.stopped = True
                return count
        return len(tokens)

    def finish(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True)
class _Job:
    """What the rows of one call share."""

    model: PreTrainedModel
    generation: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList

    @property
    def ends(self) -> list[int]:
        ids = self.generation.eos_token_id
        return [ids] if isinstance(ids, int) else list(ids or ())

    @property
    def wants_scores(self) -> bool:
        asked = self.generation.output_scores or self.generation.output_logits
        return bool(self.generation.return_dict_in_generate and asked)

    def text(self, input_ids: Tensor, index: int, mask: Tensor | None) -> Text:
        """Return one row of input_ids [B, P] int64 as a text; mask [B, P] marks the tokens that are no padding."""
        row = input_ids[index]
        real = row if mask is None else row[mask[index].bool()]
        if len(real) == 0:
            raise RequestError("a prompt of the batch is all padding; give it at least one token")
        if not torch.equal(real, row[len(row) - len(real) :]) or (mask is not None and not mask[index, -1]):
            raise RequestError(f"row {index} is padded on the right or within; set the tokenizer's padding_side='left'")
        budget = self.generation.max_length - len(row)
        check_length(self.model.config, len(real), budget)
        sampling = SamplingConfig(temperature=1.0 if self.generation.do_sample else 0.0)  # warpers are processors here
        process = self._row_processor(input_ids, index, len(row) - len(real)) if self.processors else None
        request = Request(tuple(real.tolist()), budget, (), sampling)
        return Text(request, partial(_Criteria, self.criteria, row[None]), process, keep_scores=self.wants_scores)

    def packed(self, input_ids: Tensor, rows: list[_Row]) -> Tensor | SiriusOutput:
        """Return the rows in transformers' form, the shorter ones padded on the right."""
        pad = self.generation.pad_token_id
        pad = next(iter(self.ends), 0) if pad is None else pad
        longest = max(len(row.tokens) for row in rows)
        new = [row.tokens + [pad] * (longest - len(row.tokens)) for row in rows]
        sequences = torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)
        if not self.generation.return_dict_in_generate:
            return sequences
        return SiriusOutput(
            sequences=cast("torch.LongTensor", sequences),
            scores=self._stacked(rows, "scores", longest) if self.generation.output_scores else None,
            logits=self._stacked(rows, "logits", longest) if self.generation.output_logits else None,
            stats=tuple(row.completion.stats for row in rows if row.completion),
        )

    def _row_processor(self, input_ids: Tensor, index: int, padding: int) -> Processor:
        """Show the processors what transformers shows them: the padded row, in a batch of as many rows.

        A processor may hold something for every row of the batch, so the row stands for its neighbours too.
        """
        processors, pads = cast("Processor", self.processors), input_ids[index : index + 1, :padding]

        def process(tokens: Tensor, scores: Tensor) -> Tensor:
            padded = torch.cat([pads.to(tokens).expand(len(tokens), -1), tokens], dim=1)
            lines = zip(padded, scores, strict=True)  # the nodes of a tree, one after the other
            batches = (processors(ids.repeat(len(input_ids), 1), row.repeat(len(input_ids), 1)) for ids, row in lines)
            return torch.stack([batch[index] for batch in batches])

        return process

    def _stacked(self, rows: list[_Row], name: str, longest: int) -> Any:
        """Return one [B, V] tensor a step; a row that has ended shows zeros."""
        lines = [row.lines(name) for row in rows]
        filled = [each + [torch.zeros_like(each[0])] * (longest - len(each)) for each in lines]
        return tuple(torch.stack(step) for step in zip(*filled, strict=True))


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
    if model_kwargs.get("inputs_embeds") is not None:
        raise RequestError("sirius reads token ids, not inputs_embeds")
    for name in ("cache", "past_key_values"):  # since transformers 5.24, and before
        cache = model_kwargs.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise RequestError(f"sirius fills a cache of its own; give the whole prompt as input_ids and no {name}")
