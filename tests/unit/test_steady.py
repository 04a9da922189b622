"""A processor that keeps state is found out by a copy of it, and is itself not asked."""

import threading
from collections import Counter, deque
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TopPLogitsWarper,
    WatermarkLogitsProcessor,
)

from sirius.decoding.steady import keeps_state
from sirius.errors import RequestError

VOCABULARY = 40
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def ask(processor):
    scores = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    return processor(TOKENS, scores)


class Budget:
    """Counts its calls, and says something else from the tenth on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokens, scores):
        self.calls += 1
        return scores + self.calls // 10


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0

    __call__ = Budget.__call__


class Once:
    """Makes what it needs at its first call."""

    def __init__(self) -> None:
        self.mask = None

    def __call__(self, tokens, scores):
        if self.mask is None:
            self.mask = torch.arange(VOCABULARY) % 2 == 0
        return scores.masked_fill(self.mask, -1.0)


class Cached:
    """Remembers its answers by the tokens, which changes none."""

    def __init__(self) -> None:
        self.answers = {}

    def __call__(self, tokens, scores):
        return self.answers.setdefault(tuple(tokens[0].tolist()), scores + 1)


class Fed:
    """Holds a queue of what it is to do next."""

    def __init__(self, queue) -> None:
        self.queue = queue

    def __call__(self, tokens, scores):
        return scores + self.queue.pop()


class Random:
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, tokens, scores):
        return scores + torch.rand(scores.shape, generator=self.generator)


class Guided:
    """Has a model of its own, and keeps how far that has come."""

    def __init__(self) -> None:
        self.model, self.context = nn.Linear(VOCABULARY, VOCABULARY), {"length": 0}

    def __call__(self, tokens, scores):
        self.context["length"] += tokens.shape[1]
        return scores + self.model(scores)


class Locked:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, tokens, scores):
        return scores


class Accepts:
    """A grammar: takes the newest token once, and not again."""

    def __init__(self) -> None:
        self.taken = set()

    def __call__(self, tokens, scores):
        assert len(self.taken) != tokens.shape[1]
        self.taken |= {(place, token) for place, token in enumerate(tokens[0].tolist())}
        return scores


def closure():
    calls = 0

    def process(tokens, scores):
        nonlocal calls
        calls += 1
        return scores + calls // 10

    return process


def default_value(tokens, scores, seen=[]):  # noqa: B006 - that is the state
    seen.append(1)
    return scores


def method():
    return Budget().__call__


WITH_STATE = {
    "a budget": Budget,
    "slots": Slotted,
    "a closure": closure,
    "a default value": lambda: default_value,
    "a bound method": method,
    "a partial": lambda: partial(lambda counts, tokens, scores: (counts.update("a"), scores)[1], Counter()),
    "a queue": lambda: Fed(deque(range(9))),
    "a generator": Random,
    "a model's context": Guided,
    "a lock": Locked,
    "a grammar": Accepts,
    "inside a list": lambda: LogitsProcessorList([TopPLogitsWarper(0.9), Budget()]),
    "synthid": lambda: SynthIDTextWatermarkLogitsProcessor(3, [1, 2, 3], 8, 8, 16, torch.device("cpu")),
}
WITHOUT = {
    "a penalty": lambda: RepetitionPenaltyLogitsProcessor(1.2),
    "a list": lambda: LogitsProcessorList([TopPLogitsWarper(0.9), RepetitionPenaltyLogitsProcessor(1.2)]),
    "bad words": lambda: NoBadWordsLogitsProcessor([[7], [8, 9]], eos_token_id=2),
    "a bias": lambda: SequenceBiasLogitsProcessor([[[3, 1], 2.0]]),
    "a watermark": lambda: WatermarkLogitsProcessor(VOCABULARY, "cpu"),
    "made at the first call": Once,
    "remembered answers": Cached,
    "a function": lambda: lambda tokens, scores: scores * 2,
    "a failing one": lambda: lambda tokens, scores: 1 / 0,
}


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_is_found_and_left_as_it_was(name):
    processor = WITH_STATE[name]()
    length = getattr(getattr(processor, "queue", None), "__len__", lambda: None)()
    assert keeps_state(processor, ask)
    assert getattr(processor, "calls", 0) == 0 and getattr(processor, "taken", set()) == set()
    assert getattr(getattr(processor, "queue", None), "__len__", lambda: None)() == length
    assert default_value.__defaults__ == ([],)


@pytest.mark.parametrize("name", WITHOUT)
def test_what_keeps_no_state_is_not_suspected(name):
    assert keeps_state(WITHOUT[name](), ask) is None


def test_a_model_within_a_processor_is_not_copied():
    class Counts(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    processor = Guided()
    processor.model = Counts(VOCABULARY, VOCABULARY)
    assert keeps_state(processor, ask) == "each call changes what it holds"


def test_state_that_a_copy_shares_is_refused_with_a_way_out():
    class Shares(Budget):
        def __deepcopy__(self, memo):
            return self

    with pytest.raises(RequestError, match="correction=1"):
        keeps_state(Shares(), ask)
