"""The public way to decode: `Engine.load`, then `generate` or `stream`. Stop rules, counting and text live here."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, RepetitionPenaltyLogitsProcessor

from sirius import sparsity
from sirius.core import CorrectionConfig, FinishReason, Mode, Processor, Request, Round, SparsityConfig, as_config
from sirius.decoding.accept import make_rule
from sirius.decoding.loop import Plan, decode
from sirius.errors import RequestError
from sirius.model.loading import Source, load_model, load_tokenizer
from sirius.model.prepare import check_sliding, context_limit, count_parameters, prepare, sliding_window
from sirius.model.session import Session
from sirius.stats import DENSE, Setting, Stats, summarise
from sirius.text import Ending

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

DEFAULT_NEW_TOKENS = 256
PLAIN = CorrectionConfig(period=1, accept="argmax")  # every round is one dense pass


@dataclass(frozen=True)
class Completion:
    """A finished text.

    text           without special tokens and stop strings; "" where the model has no tokenizer
    token_ids      the new tokens, an end-of-text token or the tokens of a stop string included
    finish_reason  "stop" (end of text or stop string) or "length" (the budget is used up)
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats


@dataclass(frozen=True)
class Update:
    """One step of a stream: the round, the text it made certain, and with the last one the completion."""

    text: str
    round: Round
    completion: Completion | None = None


class Generation:
    """A request at work on a prepared model: the session, the plan and, after the rounds, the figures."""

    def __init__(self, model: PreTrainedModel, request: Request, plan: Plan) -> None:
        """Set a request up; `plan` brings what the request does not say (ends, processor, scores)."""
        mlps = prepare(model)
        self.model = model
        self.request = request
        self.method = sparsity.create(request.sparsity, tuple(mlp.size for mlp in mlps))
        self.session = Session(model, mlps, self.method, slots=len(request.prompt) + request.max_new_tokens)
        self.correction = PLAIN if self.method is None else request.correction
        self.plan = _planned(plan, self.correction)
        self.seconds = 0.0

    def rounds(self) -> Iterator[Round]:
        """Yield the rounds until the budget is used up; what the caller does between them is not timed."""
        rounds = decode(self.session, torch.tensor([self.request.prompt], device=self.model.device), self.plan)
        while True:
            began = perf_counter()
            step = self._next(rounds)
            self.seconds += perf_counter() - began
            if step is None:
                return
            yield step

    def _next(self, rounds: Iterator[Round]) -> Round | None:
        try:
            return next(rounds, None)
        except torch.OutOfMemoryError as error:
            raise RequestError(
                f"out of memory with a cache of {self.session.cache.table.slots} slots; lower max_new_tokens, shorten "
                "the prompt, or load the model in a narrower dtype"
            ) from error

    def stats(self, rounds: Sequence[Round]) -> Stats:
        """Work out the figures of the rounds that were used."""
        touched = self.method.touched() if self.method else DENSE
        setting = Setting(count_parameters(self.model), touched, self.correction, self._lossless())
        return summarise(rounds, setting, self.seconds)

    def _lossless(self) -> bool:
        chosen = self.request.sparsity
        whole = chosen.keep == 1 and chosen.threshold is None
        return self.method is None or whole or (self.correction is not None and self.correction.lossless)


def _planned(plan: Plan, correction: CorrectionConfig | None) -> Plan:
    if correction is None:
        return replace(plan, period=1, judge=Mode.SPARSE)
    return replace(plan, period=correction.period, rule=make_rule(correction))


class Engine:
    """A model made sparse, with its tokenizer, ready to decode; greedy, one prompt at a time, not thread-safe."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Prepare a transformers model that is already loaded; its MLPs are replaced (`sirius.restore` undoes it)."""
        prepare(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.ends, self.process = end_tokens(model), repetition_penalty(model)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> "Engine":
        """Load a model folder or a hub id.

        dtype   "auto" (the checkpoint's), "float32", "bfloat16", "float16" or "float64", or torch's own
        device  "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...

        Raises ModelError where it cannot be loaded, UnsupportedModelError where its structure does not fit.
        """
        source = Source(str(path), revision, trust_remote_code)
        return cls(load_model(source, dtype, device), load_tokenizer(source))

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        sparsity: SparsityConfig | str = "coarse",
        correction: CorrectionConfig | None = CorrectionConfig(),  # noqa: B008 - frozen
    ) -> Completion:
        """Decode one prompt to its end; the arguments are those of `stream`."""
        options = {"max_new_tokens": max_new_tokens, "stop": stop, "sparsity": sparsity, "correction": correction}
        *_, last = self.stream(prompt, **options)
        assert last.completion is not None
        return last.completion

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        sparsity: SparsityConfig | str = "coarse",
        correction: CorrectionConfig | None = CorrectionConfig(),  # noqa: B008 - frozen
    ) -> Iterator[Update]:
        """Decode one prompt round by round.

        prompt          a text, token ids, or chat messages ({"role": ..., "content": ...})
        max_new_tokens  None: 256, or as many as the model's context has room for
        stop            strings that end the text
        sparsity        a method's name at keep 0.5, a SparsityConfig, or a mapping of its fields
        correction      a CorrectionConfig or a mapping of its fields; None decodes with the sparse model alone (lossy)

        Raises RequestError of a prompt that cannot be decoded, ConfigError of options that do not fit.
        """
        tokens = self.encode(prompt)
        room = self._room(len(tokens))
        budget = min(DEFAULT_NEW_TOKENS, room) if max_new_tokens is None else max_new_tokens
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        chosen = as_config(SparsityConfig, sparsity)
        corrected = None if correction is None else as_config(CorrectionConfig, correction)
        request = Request(tokens, budget, stops, chosen, corrected)
        if budget > room:
            check_sliding(self.model.config, len(tokens), budget)
            raise RequestError(
                f"prompt {len(tokens)} + max_new_tokens {budget} = {len(tokens) + budget} tokens pass the limit "
                f"of {len(tokens) + room}; set max_new_tokens to at most {room}"
            )
        if request.stop and self.tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model has none; stop at token ids instead")
        return self._run(Generation(self.model, request, Plan(budget, ends=self.ends, process=self.process)))

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Return the token ids of a prompt, chat messages by the model's template; raise RequestError of bad ones."""
        if not isinstance(prompt, Sequence) or len(prompt) == 0:
            raise RequestError(f"the prompt is empty, or neither text, token ids nor messages: {prompt!r:.60}")
        if isinstance(prompt, str):
            tokens = self._tokenized(prompt)
        elif is_chat(prompt):
            tokens = self._templated(prompt)
        else:
            tokens = prompt
        vocabulary = self.model.config.get_text_config().vocab_size
        for token in tokens:
            if type(token) is not int or not 0 <= token < vocabulary:
                raise RequestError(f"a prompt's token ids are whole numbers from 0 to {vocabulary - 1}; got {token!r}")
        if not tokens:
            raise RequestError("the prompt holds no token; give it at least one")
        return tuple(token for token in tokens if isinstance(token, int))

    def _run(self, generation: Generation) -> Iterator[Update]:
        ending = Ending(self.tokenizer, generation.plan.ends, generation.request.stop)
        rounds: list[Round] = []
        left = generation.request.max_new_tokens
        for step in generation.rounds():
            shown = len(ending.text)
            used = step.until(ending.push(step.tokens))
            rounds.append(used)
            left -= len(used.tokens)
            if not ending.stopped and left:
                yield Update(ending.text[shown:], used)
                continue
            ending.finish()
            stats = generation.stats(rounds)
            tokens = tuple(token for r in rounds for token in r.tokens)
            reason: FinishReason = "stop" if ending.stopped else "length"
            yield Update(ending.text[shown:], used, Completion(ending.text, tokens, reason, stats))
            return

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids, special tokens shown."""
        return str(self._needed_tokenizer().decode(list(tokens), clean_up_tokenization_spaces=False))

    def room(self, prompt: Prompt) -> int:
        """Return how many new tokens the model's context has room for after a prompt; raise RequestError of none."""
        return self._room(len(self.encode(prompt)))

    def _room(self, prompt: int) -> int:
        limit = context_limit(self.model.config)
        check_sliding(self.model.config, prompt, 1)
        if limit is not None and prompt >= limit:
            raise RequestError(
                f"the prompt has {prompt} tokens and the model's context holds {limit}, at least one of them new; "
                "shorten the prompt"
            )
        sliding = sliding_window(self.model.config)
        limits = [each for each in (limit, sliding and sliding[1]) if each is not None]
        return min(limits, default=sys.maxsize) - prompt

    def _tokenized(self, text: str) -> list[int]:
        try:
            return self._needed_tokenizer().encode(text)
        except (TypeError, UnicodeEncodeError) as error:  # half of a surrogate pair
            raise RequestError(f"the prompt is not text that can be encoded: {text!r:.60}") from error

    def _templated(self, messages: Any) -> list[int]:
        tokenizer = self._needed_tokenizer()
        if not tokenizer.chat_template:
            raise RequestError("this model's tokenizer has no chat template; give the prompt as a text")
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, TypeError, AttributeError, ValueError) as error:  # what templates raise of odd messages
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return tokenizer.encode(str(text), add_special_tokens=False)  # the template writes them itself

    def _needed_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; give the prompt as token ids")
        return self.tokenizer


def is_chat(prompt: Any) -> bool:
    """Tell whether a prompt is a list of messages, each with a `role` and a `content` of text."""
    return isinstance(prompt, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    )


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return the token ids that end a text, from the model's generation config."""
    ids = model.generation_config.eos_token_id if model.generation_config else None
    ids = model.config.get_text_config().eos_token_id if ids is None else ids
    return frozenset([ids] if isinstance(ids, int) else ids or ())


def repetition_penalty(model: PreTrainedModel) -> Processor | None:
    """Return the penalty that a checkpoint's generation config asks for, as transformers' own `generate` applies it."""
    penalty = getattr(model.generation_config, "repetition_penalty", None)
    return None if penalty in (None, 1.0) else cast("Processor", RepetitionPenaltyLogitsProcessor(penalty))
