"""The method on one screen: start, then rounds of draft, verify, accept, keep.

Between rounds the cache holds every token but the newest, all of it written by the full model:

    slots   [0 ........ n)            n = number of tokens - 1
    draft   [0 ........ n)[n .. n+K-1)      provisional, written by the sparse model
    verify  [0 ........ n)[n ... n+K)       the same slots again, written by the full model
    keep    [0 .............. n+kept+1)     what was accepted; the rest is free
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sirius.core import LanguageModel, Mode, Processor, Round, Verdict
from sirius.decoding.accept import Rule, accept_argmax
from sirius.errors import ModelError


@dataclass(frozen=True)
class Plan:
    """How a text is decoded.

    period  K; 1 drafts nothing, so every round is one pass of the judge
    judge   the mode of the pass that ends a round: DENSE, or SPARSE to decode with the sparse model alone
    ends    token ids that end a text: a draft that reaches one goes no further
    """

    max_new_tokens: int
    period: int = 1
    rule: Rule = accept_argmax
    judge: Mode = Mode.DENSE
    ends: frozenset[int] = frozenset()
    process: Processor | None = None
    keep_scores: bool = False


@dataclass
class State:
    """All tokens so far [1, n+1] int64, and how many new ones the budget still allows."""

    tokens: Tensor
    room: int


def decode(model: LanguageModel, prompt: Tensor, plan: Plan) -> Iterator[Round]:
    """Yield the rounds that decode a prompt [1, P] int64 until `max_new_tokens` are out; a caller may stop earlier."""
    state = State(prompt, plan.max_new_tokens)
    yield start(model, state, plan)
    while state.room:
        yield next_round(model, state, plan)


def next_round(model: LanguageModel, state: State, plan: Plan) -> Round:
    """Run one round: guess, check, keep what passed and add one token of the judge."""
    guesses = draft(model, state, plan)
    scores = verify(model, state, guesses, plan)
    verdict = accept(guesses, scores, plan)
    return keep(model, state, guesses, verdict, scores if plan.keep_scores else None)


def start(model: LanguageModel, state: State, plan: Plan) -> Round:
    """Read the prompt with the full model, let the sparse one choose its neurons, and give the first token."""
    scores = model.read(state.tokens, Mode.OBSERVE, last=1)[0]
    if bool(scores.isnan().any()):
        raise ModelError("the model's scores are not numbers; its weights are damaged, or dtype is too narrow for it")
    model.select()
    scores = _processed(plan, state.tokens, scores)
    first = Verdict(0, next=int(scores[0].argmax()))
    _advance(state, (first.next,))
    return Round((first.next,), scores=scores if plan.keep_scores else None)


def draft(model: LanguageModel, state: State, plan: Plan) -> tuple[int, ...]:
    """Guess up to K-1 tokens with the sparse model, one pass each, as far as the budget and an end of text allow."""
    guesses: list[int] = []
    tokens = state.tokens
    while len(guesses) < min(plan.period, state.room) - 1:
        scores = model.read(tokens[:, -1:], Mode.SPARSE)[0]
        guesses.append(int(_processed(plan, tokens, scores).argmax()))
        tokens = _extended(tokens, guesses[-1:])
        if guesses[-1] in plan.ends:
            break
    return tuple(guesses)


def verify(model: LanguageModel, state: State, guesses: tuple[int, ...], plan: Plan) -> Tensor:
    """Read the newest token and every guess in one pass at the draft's own slots; return scores [guesses + 1, V]."""
    model.truncate(_filled(state))
    read = _extended(state.tokens, guesses)
    scores = model.read(read[:, state.tokens.shape[1] - 1 :], plan.judge)[0]
    return _processed(plan, read, scores)


def accept(guesses: tuple[int, ...], scores: Tensor, plan: Plan) -> Verdict:
    """Judge the guesses by the plan's rule."""
    return plan.rule(torch.tensor(guesses, dtype=torch.int64, device=scores.device), scores)


def keep(
    model: LanguageModel, state: State, guesses: tuple[int, ...], verdict: Verdict, scores: Tensor | None
) -> Round:
    """Cut the cache back to what was accepted and add the tokens to the text."""
    tokens = (*guesses[: verdict.kept], verdict.next)
    _advance(state, tokens)
    model.truncate(_filled(state))
    return Round(tokens, guesses, verdict.kept, scores=None if scores is None else scores[: len(tokens)])


def _advance(state: State, tokens: tuple[int, ...]) -> None:
    state.tokens = _extended(state.tokens, tokens)
    state.room -= len(tokens)


def _filled(state: State) -> Tensor:
    """The invariant between rounds: every token but the newest stands in the cache."""
    return torch.tensor([state.tokens.shape[1] - 1])


def _extended(tokens: Tensor, new: tuple[int, ...] | list[int]) -> Tensor:
    return torch.cat([tokens, torch.tensor([new], dtype=torch.int64, device=tokens.device)], dim=1)


def _processed(plan: Plan, tokens: Tensor, scores: Tensor) -> Tensor:
    """Apply the plan's processor to scores [t, V] of the tokens that follow the last t prefixes of `tokens`."""
    if plan.process is None:
        return scores
    ends = range(tokens.shape[1] - len(scores) + 1, tokens.shape[1] + 1)
    return torch.cat([plan.process(tokens[:, :end], row[None]) for end, row in zip(ends, scores, strict=True)])
