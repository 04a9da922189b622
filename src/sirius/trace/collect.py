"""Decode one prompt and collect what each token and each round did."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from sirius import __version__
from sirius.core import CorrectionConfig, FinishReason, Origin, Round, SamplingConfig
from sirius.engine import LOSSLESS, Correction, Engine, Prompt, Sampling, Sparsity, Stop
from sirius.forms import as_config, as_draft
from sirius.texts import Completion
from sirius.trace.pieces import Piece, piece_after, split

Faith = Literal["lossless", "rounding", "lossy"]
Writer = Origin | Literal["sparse"]

KIND = "sirius trace"  # the first value of a trace in JSON, by which such a file is known


@dataclass(frozen=True)
class TracedToken:
    """One new token.

    id       its number in the vocabulary
    name     how the vocabulary writes it
    text     its part of the text. Where tokens hold the bytes of one character, the first of them has all of their text
    unused   what it would show after the place where a stop string ended the text
    part, parts  its number among the tokens that share a character, from 1, and how many they are; else 1 and 1
    origin   where it comes from, see `Round`; "sparse" where the draft model decodes alone
    logprob  the natural log of the full model's probability of it, at temperature 1 before any processor; None of
             probability 0. Where the origin is "sparse", it is the draft model's
    round    the index of its round in `Trace.rounds`
    """

    id: int
    name: str
    text: str
    unused: str
    part: int
    parts: int
    origin: Writer
    logprob: float | None
    round: int


@dataclass(frozen=True)
class Guess:
    """One guess of the draft that was rolled back.

    text     what it shows after the token before it; "" where that is not a whole character
    logprob  the natural log of the full model's probability of it after the guesses before it, at temperature 1 before
             any processor; None of probability 0
    """

    id: int
    name: str
    text: str
    logprob: float | None


@dataclass(frozen=True)
class TracedRound:
    """One round; the first one is the prompt's pass, which drafts nothing.

    tokens       how many tokens it added to the text
    accepted     how many of these are guesses
    period       K
    steps        how many guesses deep the draft was
    rolled_back  the guesses that the check threw away, oldest first, of the branch that went furthest
    cut          whether the end of the text fell inside this round
    """

    tokens: int
    accepted: int
    period: int
    steps: int
    rolled_back: tuple[Guess, ...]
    cut: bool


@dataclass(frozen=True)
class Trace:
    """One generation. Every field is made of what JSON has, tuples being its lists.

    kind        "sirius trace"
    version     of sirius
    model       its name; `parameters` are counted as `Stats` counts them
    prompt      the text that the model read, special tokens written out; "" where there is no tokenizer
    text        the new text, without special tokens and stop strings
    faith       "lossless"; "lossy"; or "rounding": the rule is lossless, but rounding may differ with the number of
                tokens in a pass
    stats       the fields of `Stats`, with acceptance_rate and mean_acceptance_length
    sparsity    what the draft read; its draft_bits are those of `Stats`
    correction  the one that was in force: of period 1 where the sparsity keeps every neuron; None is the draft model
                alone
    kept        the share of its neurons that a draft token kept in each layer, over the whole text; none where no
                sparsity is at work
    gate        the share of the rows of the gate that a draft token read
    """

    kind: str
    version: str
    model: str
    dtype: str
    parameters: int
    prompt: str
    prompt_tokens: int
    text: str
    finish_reason: FinishReason
    faith: Faith
    tokens: tuple[TracedToken, ...]
    rounds: tuple[TracedRound, ...]
    stats: dict[str, Any]
    sparsity: dict[str, Any]
    correction: dict[str, Any] | None
    sampling: dict[str, Any]
    kept: tuple[float, ...]
    gate: float


def collect(
    engine: Engine,
    prompt: Prompt,
    *,
    max_new_tokens: int | None = None,
    stop: Stop = None,
    sampling: Sampling = None,
    sparsity: Sparsity | None = None,
    correction: Correction = LOSSLESS,
) -> Trace:
    """Decode a prompt as `Engine.generate` does, with the same arguments and errors, and return its trace."""
    updates = list(
        engine.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            sampling=sampling,
            sparsity=sparsity,
            correction=correction,
        )
    )
    done, read = updates[-1].completion, engine.encode(prompt)
    assert done is not None and done.setting is not None
    sampled = SamplingConfig() if sampling is None else as_config(SamplingConfig, sampling)
    rounds, basis = [update.round for update in updates], done.setting
    return Trace(
        kind=KIND,
        version=__version__,
        model=_name(engine),
        dtype=str(engine.model.dtype).removeprefix("torch."),
        parameters=basis.parameters.total,
        prompt=engine.decode(read) if engine.tokenizer else "",
        prompt_tokens=len(read),
        text=done.text,
        finish_reason=done.finish_reason,
        faith=_faith(done, basis.correction, sampled),
        tokens=tuple(_tokens(engine.tokenizer, done, rounds)),
        rounds=tuple(_rounds(engine.tokenizer, rounds)),
        stats=_stats(done),
        sparsity=asdict(replace(as_draft(sparsity, correction), draft_bits=done.stats.draft_bits)),
        correction=None if basis.correction is None else asdict(basis.correction),
        sampling=asdict(sampled),
        kept=basis.kept,
        gate=basis.touched.gate,
    )


def to_json(trace: Trace) -> str:
    """Return a trace as a JSON object on one line."""
    return json.dumps(asdict(trace), ensure_ascii=False, allow_nan=False)


def _name(engine: Engine) -> str:
    """Return a model's hub id, or the name of its file or folder."""
    name = str(getattr(engine.model.config, "name_or_path", "") or engine.model.config.model_type)
    return Path(name).name if Path(name).exists() else name


def _faith(done: Completion, correction: CorrectionConfig | None, sampled: SamplingConfig) -> Faith:
    if done.stats.lossless:
        return "lossless"
    by_rule = correction is not None and correction.lossless(sampled.temperature > 0)
    return "rounding" if by_rule else "lossy"


def _stats(done: Completion) -> dict[str, Any]:
    derived = {name: getattr(done.stats, name) for name in ("acceptance_rate", "mean_acceptance_length")}
    return {**asdict(done.stats), **derived}


def _tokens(tokenizer: PreTrainedTokenizerBase | None, done: Completion, rounds: Sequence[Round]) -> list[TracedToken]:
    alone = done.setting is not None and done.setting.correction is None
    pieces = split(tokenizer, done.token_ids, done.text) if tokenizer else [Piece("")] * len(done.token_ids)
    names = _names(tokenizer, done.token_ids)
    where = [index for index, each in enumerate(rounds) for _ in each.tokens]
    parts = zip(done.token_ids, names, pieces, done.origins, done.logprobs, where, strict=True)
    return [
        TracedToken(
            token,
            name,
            *(piece.text, piece.unused, piece.part, piece.parts),
            origin="sparse" if alone and index else origin,  # the prompt's pass is the full model's
            logprob=_finite(logprob),
            round=index,
        )
        for token, name, piece, origin, logprob, index in parts
    ]


def _rounds(tokenizer: PreTrainedTokenizerBase | None, rounds: Sequence[Round]) -> list[TracedRound]:
    traced, before = [], None
    for each in rounds:
        rejected = ()
        if each.origins[-1:] == ("correction",):
            kept = each.draft[each.accepted - 1] if each.accepted else before
            rejected = _guesses(tokenizer, kept, each.draft[each.accepted :], each.guessed[each.accepted :])
        traced.append(TracedRound(len(each.tokens), each.accepted, each.period, each.steps, tuple(rejected), each.cut))
        before = each.tokens[-1]
    return traced


def _guesses(
    tokenizer: PreTrainedTokenizerBase | None,
    before: int | None,
    guesses: Sequence[int],
    logprobs: Sequence[float],
) -> list[Guess]:
    """Return the guesses of a draft that follow a token."""
    found = []
    for token, name, logprob in zip(guesses, _names(tokenizer, guesses), logprobs, strict=True):
        text = piece_after(tokenizer, before, token) if tokenizer and before is not None else ""
        found.append(Guess(token, name, text, _finite(logprob)))
        before = token
    return found


def _names(tokenizer: PreTrainedTokenizerBase | None, tokens: Sequence[int]) -> list[str]:
    """Return how the vocabulary writes tokens, "" where it has no such token."""
    if tokenizer is None:
        return [""] * len(tokens)
    names = tokenizer.convert_ids_to_tokens(list(tokens))
    return [name if isinstance(name, str) else "" for name in names]


def _finite(logprob: float) -> float | None:
    return logprob if isfinite(logprob) else None
