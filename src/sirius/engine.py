"""The public way to decode: `Engine.load`, then `generate`, `stream`, or `generate_many`. Tokens become text here."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, repeat
from numbers import Integral
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sirius.batch import Batch
from sirius.core import CorrectionConfig, Request, SamplingConfig, SparsityConfig, check_together
from sirius.decoding.accept import Rule
from sirius.decoding.period import Period
from sirius.errors import ConfigError, RequestError, SiriusError
from sirius.forms import as_config, as_draft
from sirius.likelihood import Likelihood, score_tokens
from sirius.model.ends import end_tokens, stop_strings
from sirius.model.limits import check_context, check_length, context_limit, rescaling_length, sliding_window
from sirius.model.loading import Source, load_model, load_tokenizer
from sirius.model.prepare import prepare
from sirius.offload.budget import Budget, as_budget, load_within
from sirius.processors import make_processor
from sirius.runtime.workspace import check_compiles
from sirius.text import StopAt
from sirius.texts import Completion, Text, Update

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
Stop = str | Sequence[str] | None
Sampling = SamplingConfig | Mapping[str, Any] | float | None
Sparsity = SparsityConfig | Mapping[str, Any] | str
Correction = CorrectionConfig | Mapping[str, Any] | int | str | None

DEFAULT_NEW_TOKENS = 256
LOSSLESS = CorrectionConfig()


class TextOptions(TypedDict, total=False):
    """Options of one prompt of `Engine.generate_many`, as `Engine.text` has them."""

    max_new_tokens: int | None
    stop: Stop
    sampling: Sampling


class Engine:
    """A model made sparse, with its tokenizer, ready to decode. Threads may share it: their texts take turns."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        compile: bool = False,
        max_context: int | None = None,
    ) -> None:
        """Prepare a transformers model that is already loaded; its MLPs become ours (`sirius.restore` undoes it).

        compile  compile the passes of a GPU: minutes at the first text, then less time at each token
        max_context  the most tokens of prompt and text together, in place of the model's own limit; past that one the
                     model was not trained, and what it writes may be worthless

        Raises ConfigError where there is nothing to compile, UnsupportedModelError where the structure does not fit.
        """
        check_context(max_context)
        if compile:
            check_compiles(model)
        prepare(model)
        self.compile = compile
        self.limit = context_limit(model.config) if max_context is None else max_context
        self.model, self.tokenizer = model.eval(), tokenizer
        self.ends, self.stops = end_tokens(model), stop_strings(model)

    @classmethod
    def load(  # noqa: PLR0913 - a path, and options by their names
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
        compile: bool = False,
        max_context: int | None = None,
        memory_budget: int | str | Budget | None = None,
        draft: Sparsity | None = None,
    ) -> "Engine":
        """Load a model folder, a GGUF file or a hub id.

        dtype   "auto" (the checkpoint's, of GGUF bfloat16), "float32", "bfloat16", "float16", "float64", or torch's own
        device  "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        gguf_file  the file's name, where the folder or hub id holds GGUF files; its weights are dequantised
        compile, max_context  see `Engine`
        memory_budget  bytes, "8GiB", "50%" of the device's memory, or a `Budget`; other weights come when they are used
        draft   what the budget is planned for, as `sparsity` of `generate`; None: 4 bits, if that is faster

        Raises ModelError where it cannot be loaded, otherwise as `Engine` does.
        """
        source = Source(str(path), revision, trust_remote_code, gguf_file).found()
        if memory_budget is not None:
            budget = as_budget(memory_budget, draft, max_context)
            model, tokenizer, max_context = load_within(source, dtype, device, budget)
        elif draft is not None:
            raise ConfigError("draft says what memory is planned for; give memory_budget too, or leave it out")
        else:
            model, tokenizer = load_model(source, dtype, device), load_tokenizer(source)
        return cls(model, tokenizer, compile=compile, max_context=max_context)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop: Stop = None,
        sampling: Sampling = None,
        sparsity: Sparsity | None = None,
        correction: Correction = LOSSLESS,
    ) -> Completion:
        """Decode one prompt to its end.

        prompt          a text, token ids, or chat messages ({"role": ..., "content": ...})
        max_new_tokens  None: 256, or as many as the model's context has room for
        stop            strings that end the text; None: those of the checkpoint's generation config, () none
        sampling        a temperature, a SamplingConfig or a mapping of its fields; None is greedy
        sparsity        what the draft reads: a method's name at keep 0.5, a SparsityConfig, or a mapping of its fields.
                        None is every neuron, its weights at 4 bits (8 for a small model), or beside the correction
                        "paper" coarse, as in the paper; "none" drafts nothing
        correction      a CorrectionConfig, a mapping of its fields, a period, "auto", or "paper" (the paper's setting,
                        lossy). None decodes with the draft model alone (lossy). The default is lossless, and drafts
                        where that is faster

        Raises RequestError of a prompt that cannot be decoded, ConfigError of options that do not fit.
        """
        *_, last = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
            sparsity=sparsity,
            correction=correction,
        )
        assert last.completion is not None
        return last.completion

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop: Stop = None,
        sampling: Sampling = None,
        sparsity: Sparsity | None = None,
        correction: Correction = LOSSLESS,
    ) -> Iterator[Update]:
        """Decode one prompt round by round; closing the iterator frees what it holds at once.

        The arguments are those of `generate`. Raises as `generate` does, before the iterator is asked for anything.
        """
        batch = self.batch(rows=1, sparsity=sparsity, correction=correction)
        batch.add(self.text(prompt, max_new_tokens=max_new_tokens, stop=stop, sampling=sampling))
        return _steps(batch)

    def generate_many(  # noqa: PLR0913 - prompts, and options by their names
        self,
        prompts: Iterable[Prompt],
        *,
        batch_size: int = 8,
        each: Iterable[TextOptions] = (),
        max_new_tokens: int | None = None,
        stop: Stop = None,
        sampling: Sampling = None,
        sparsity: Sparsity | None = None,
        correction: Correction = LOSSLESS,
    ) -> Iterator[tuple[int, Completion | SiriusError]]:
        """Decode prompts side by side, `batch_size` at a time; yield each one's index and completion as it finishes.

        prompts  any number of them; they are taken a few ahead of those at work
        each     a mapping for each prompt, in their order, of max_new_tokens, stop or sampling in place of the common
                 ones below; where there are fewer mappings than prompts, the others have the common options

        The other arguments are those of `generate`. A prompt that cannot be decoded, or whose mapping in `each` does
        not fit, yields its error in place of a completion, and the others go on. The order is that in which texts end;
        closing the iterator drops those at work. Raises ConfigError of common options that do not fit, RequestError
        where `prompts` is a single one.
        """
        if isinstance(prompts, str | bytes) or (isinstance(prompts, Sequence) and prompts and is_chat(prompts)):
            raise RequestError("generate_many takes several prompts; give a single one to generate, or in a list")
        if _is_ids(prompts):
            raise RequestError("generate_many takes several prompts, and these are one's token ids: put them in a list")
        batch = self.batch(rows=batch_size, sparsity=sparsity, correction=correction)
        check_together(_request((0,), max_new_tokens, stop, sampling).sampling, batch.asked)
        common: TextOptions = {"max_new_tokens": max_new_tokens, "stop": stop, "sampling": sampling}
        asked = zip(prompts, chain(each, repeat(TextOptions())), strict=False)
        return self._many(enumerate(asked), batch, common)

    def _many(
        self, asked: Iterator[tuple[int, tuple[Prompt, TextOptions]]], batch: Batch, common: TextOptions
    ) -> Iterator[tuple[int, Completion | SiriusError]]:
        indices: dict[int, int] = {}
        while True:
            taken = list(islice(asked, batch.rows - len(batch.waiting)))
            if not taken and not batch.busy:
                return
            for index, (prompt, own) in taken:
                try:
                    _check_known(own, common)
                    indices[batch.add(self.text(prompt, **(common | own)))] = index
                except SiriusError as error:
                    yield index, error
            for update in batch.step():
                if done := update.completion or update.error:
                    yield indices.pop(update.ticket), done

    def score(self, texts: Sequence[tuple[Prompt, str | Sequence[int]]], *, batch_size: int = 8) -> list[Likelihood]:
        """Return how likely the full model finds each continuation after its prompt.

        texts  pairs of a prompt and what follows it, both texts or both token ids; two texts are tokenised together

        Raises RequestError of a pair that cannot be read, or is longer than the model's context, and ConfigError of a
        batch size below 1.
        """
        pairs = [self._pair(*each) for each in texts]
        found = dict(score_tokens(self.model, pairs, batch_size))
        return [found[index] for index in range(len(pairs))]

    def _pair(self, prompt: Prompt, following: str | Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        given = self.encode(prompt)
        if isinstance(following, str):
            if not isinstance(prompt, str):
                raise RequestError("a continuation is a text where its prompt is one, otherwise token ids")
            tokens = self.encode(prompt + following)[len(given) :]
        else:
            tokens = self._checked(following)
        if not tokens:
            raise RequestError("a continuation has no token of its own after its prompt; give it at least one")
        read = len(given) + len(tokens) - 1  # nothing is asked about what follows the last one
        if self.limit is not None and read > self.limit:
            total = f"prompt {len(given)} + continuation {len(tokens)} - 1 = {read} tokens"
            raise RequestError(f"{total} pass the model's context of {self.limit}; shorten them, or raise max_context")
        return given, tokens

    def batch(
        self,
        *,
        rows: int = 8,
        sparsity: Sparsity | None = None,
        correction: Correction = LOSSLESS,
        rule: Rule | None = None,
        period: Period | None = None,
    ) -> Batch:
        """Open a batch of up to `rows` texts at a time; fill it with `batch.add(engine.text(prompt))`.

        sparsity, correction  as in `generate`
        rule    tells which guesses are accepted, in place of the correction's rule; texts then count as lossy
        period  chooses K from round to round, in place of the correction's; never above the correction's longest

        Raises ConfigError of options that do not fit. So rule and period are refused with sparsity "none", where no
        model drafts; a rule is taken where the correction has a draft_ngram, and judges the guesses from the text.
        """
        asked = None if correction is None else as_config(CorrectionConfig, correction)
        return Batch(
            self.model,
            as_draft(sparsity, correction),
            asked,
            ends=self.ends,
            rows=rows,
            compiled=self.compile,
            rule=rule,
            period=period,
        )

    def text(
        self, prompt: Prompt, *, max_new_tokens: int | None = None, stop: Stop = None, sampling: Sampling = None
    ) -> Text:
        """Return a prompt with its options, checked and ready for a batch; arguments and errors as in `generate`."""
        tokens = self.encode(prompt)
        room = self._room(len(tokens))
        budget = min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens
        request = _request(tokens, budget, self.stops if stop is None else stop, sampling)
        if budget > room:
            check_length(self.model.config, len(tokens), budget)
            raise RequestError(
                f"prompt {len(tokens)} + max_new_tokens {budget} = {len(tokens) + budget} tokens pass the limit "
                f"of {len(tokens) + room}; set max_new_tokens to at most {room}, or raise max_context"
            )
        if request.stop and self.tokenizer is None:
            raise RequestError(
                f"stop strings need a tokenizer, and this model has none; set stop to () to do without "
                f"{', '.join(map(repr, request.stop))}"
            )
        make_ending = partial(StopAt, self.tokenizer, self.ends, request.stop)
        return Text(request, make_ending, make_processor(request.sampling, self.model))

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a prompt, chat messages by the model's template; raise RequestError of bad ones."""
        if isinstance(prompt, str):
            tokens = self._tokenized(prompt)
        elif isinstance(prompt, Sequence) and prompt and all(isinstance(each, Mapping) for each in prompt):
            tokens = self._templated(prompt)
        else:
            tokens = prompt
        checked = self._checked(tokens)
        if not checked:
            raise RequestError("the prompt is empty; give it at least one token")
        return checked

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens shown."""
        return str(self._needed_tokenizer().decode(list(tokens), clean_up_tokenization_spaces=False))

    def room(self, prompt: Prompt) -> int:
        """Return how many new tokens the model's context has room for after a prompt; raise RequestError of none."""
        return self._room(len(self.encode(prompt)))

    def _room(self, prompt: int) -> int:
        limit = self.limit
        check_length(self.model.config, prompt, 1)
        if limit is not None and prompt >= limit:
            raise RequestError(
                f"the prompt has {prompt} tokens and the model's context holds {limit}, at least one of them new; "
                f"shorten the prompt, or set max_context to {prompt + 1} or more"
            )
        sliding, rescaling = sliding_window(self.model.config), rescaling_length(self.model.config)
        limits = [each for each in (limit, sliding and sliding[1]) if each is not None]
        limits += [rescaling] if rescaling is not None and prompt <= rescaling else []
        return min(limits, default=sys.maxsize) - prompt

    def _checked(self, prompt: Any) -> tuple[int, ...]:
        """Return token ids, given as a list or tuple, a 1-D tensor or array."""
        ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if not isinstance(ids, Sequence) or isinstance(ids, bytes):
            raise RequestError(f"a prompt is a text, token ids or chat messages; got {prompt!r:.60}")
        vocabulary = self.model.config.get_text_config().vocab_size
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, Integral) or not 0 <= int(token) < vocabulary:
                raise RequestError(f"a prompt's token ids are whole numbers from 0 to {vocabulary - 1}; got {token!r}")
        return tuple(int(token) for token in ids)

    def _tokenized(self, text: str, special: bool = True) -> list[int]:
        try:
            return self._needed_tokenizer().encode(text, add_special_tokens=special)
        except (TypeError, UnicodeEncodeError) as error:  # half of a surrogate pair
            raise RequestError(f"the prompt is not text that can be encoded: {text!r:.60}") from error

    def _templated(self, messages: Any) -> list[int]:
        if not is_chat(messages):
            raise RequestError(f"a chat message has a role and a content, both texts; got {messages!r:.80}")
        tokenizer = self._needed_tokenizer()
        if not tokenizer.chat_template:
            raise RequestError("this model's tokenizer has no chat template; give the prompt as a text")
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program that came with the checkpoint: it may raise anything
            raise RequestError(f"the model's chat template refuses these messages: {error!r}") from error
        return self._tokenized(str(text), special=False)  # the template writes special tokens itself

    def _needed_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; give the prompt as token ids (in a file: prompt_ids)")
        return self.tokenizer


def is_chat(prompt: Any) -> bool:
    """Tell whether a prompt is a list of messages, each with a `role` and a `content` of text."""
    return isinstance(prompt, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )


def _is_ids(prompt: Any) -> bool:
    """Tell whether a prompt is token ids: a list of whole numbers, or a 1-D tensor or array of them."""
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    return isinstance(ids, Sequence) and len(ids) > 0 and all(isinstance(token, Integral) for token in ids)


def _request(prompt: tuple[int, ...], max_new_tokens: int | None, stop: Stop, sampling: Sampling) -> Request:
    """Return a prompt with its options, checked but for the model."""
    sampled = SamplingConfig() if sampling is None else as_config(SamplingConfig, sampling)
    budget = DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens
    stops = () if stop is None else (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    return Request(prompt, budget, stops, sampled)


def _check_known(own: TextOptions, known: TextOptions) -> None:
    if unknown := own.keys() - known.keys():
        raise ConfigError(f"each takes {', '.join(known)}; got {', '.join(sorted(map(str, unknown)))}")


def _steps(batch: Batch) -> Iterator[Update]:
    while batch.busy:
        for update in batch.step():
            if update.error is not None:
                raise update.error
            yield update
