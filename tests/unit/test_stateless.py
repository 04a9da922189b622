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

from sirius.decoding.stateless import Opaque, Watch, keeps_state, state_of
from sirius.errors import RequestError

VOCABULARY = 40
TOKENS = torch.tensor([[3, 1, 4, 1, 5]])


def found(processor):
    return keeps_state(processor, TOKENS, VOCABULARY)


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
    """Remembers its answers by the tokens, and gives the draft's to the full model."""

    def __init__(self) -> None:
        self.answers = {}

    def __call__(self, tokens, scores):
        return self.answers.setdefault(tuple(tokens[0].tolist()), scores + 1)


class Incremental:
    """A grammar that takes the tokens that are new to it."""

    def __init__(self) -> None:
        self.length, self.total = 0, 0

    def __call__(self, tokens, scores):
        self.total += int(tokens[0, self.length :].sum())
        self.length = tokens.shape[1]
        return scores + self.total


class Lazy:
    """Makes something at its first call that nobody can look into."""

    def __init__(self) -> None:
        self.matcher = None

    def __call__(self, tokens, scores):
        self.matcher = self.matcher or (number for number in range(9))
        return scores


class Deep:
    def __init__(self) -> None:
        self.tree = {}
        for _ in range(2000):
            self.tree = {"inside": self.tree}

    def __call__(self, tokens, scores):
        return scores


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
    "remembered answers": Cached,
    "new tokens alone": Incremental,
    "made at the first call, and opaque": Lazy,
    "many levels": Deep,
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
    "a function": lambda: lambda tokens, scores: scores * 2,
    "a failing one": lambda: lambda tokens, scores: 1 / 0,
}


@pytest.mark.parametrize("name", WITH_STATE)
def test_state_is_found_and_left_as_it_was(name):
    processor = WITH_STATE[name]()
    try:
        before = state_of(processor)
    except Opaque:
        before = None
    assert found(processor)
    assert before is None or state_of(processor) == before


@pytest.mark.parametrize("name", WITHOUT)
def test_what_keeps_no_state_is_not_suspected(name):
    assert found(WITHOUT[name]()) is None


def test_a_model_within_a_processor_is_not_copied():
    class Counts(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    processor = Guided()
    processor.model = Counts(VOCABULARY, VOCABULARY)
    assert found(processor) == "calls change what it holds"


calls = 0


def counting_globally(tokens, scores):
    global calls
    calls += 1
    return scores


class OnItsClass:
    calls = 0

    def __call__(self, tokens, scores):
        OnItsClass.calls += 1
        return scores


class AsModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, tokens, scores):
        self.calls += 1
        return scores


class WithBuffer(AsModule):
    def forward(self, tokens, scores):
        self.passes += 1
        return scores


class Copied(Budget):
    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("make", [Copied, lambda: counting_globally, OnItsClass, AsModule, WithBuffer])
def test_state_that_a_copy_shares_is_refused_with_a_way_out(make):
    with pytest.raises(RequestError, match="correction=1"):
        found(make())


def test_a_processor_that_writes_to_the_tokens_is_refused():
    def process(tokens, scores):
        tokens[:, -1] = 1
        return scores

    with pytest.raises(RequestError, match="writes to the tokens"):
        found(process)


def test_state_that_shows_late_fails_a_watch():
    processor = Budget()
    watch = Watch(processor)
    assert watch.failure() is None and watch.failure() is None
    processor.calls += 1
    assert "correction=1" in str(watch.failure())
