"""Passes that are captured on the CPU: their scores, the memory that they keep, and changes that they must see."""

import gc
import weakref

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from conftest import FAMILIES, greedy, tiny_model
from sirius import Batch, CorrectionConfig, Engine, SparsityConfig
from sirius.core import Mode, Window
from sirius.kernels import cpu
from sirius.kernels.tape import Tape
from sirius.runtime import workspace
from sirius.runtime.capture import PATIENCE, CapturedPasses
from sirius.runtime.session import Session, ordinary
from sirius.runtime.workspace import drop_idle

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels"),
]
X = torch.zeros(1)
PROMPT = [5, 17, 3, 42, 8, 11, 29]


@pytest.mark.parametrize("large", [False, True])
def test_a_sessions_memory_stays_for_the_next_one_unless_it_is_much(monkeypatch, large):
    monkeypatch.setattr(workspace, "IDLE_BYTES", 0 if large else workspace.IDLE_BYTES)
    earlier = weakref.WeakSet(each for each in gc.get_objects() if type(each) is Tape)
    model = tiny_model(eos_token_id=None)
    batch = Engine(model).batch(rows=1, sparsity="none")
    with ordinary():
        batch.session.open(torch.tensor(PROMPT), 60)
        for _ in range(3):
            one_token(batch.session)
    space = weakref.ref(batch.session.space)
    gc.collect()
    tapes = weakref.WeakSet(each for each in gc.get_objects() if type(each) is Tape and each not in earlier)
    assert tapes
    gc.disable()  # megabytes do not wait for a collection
    try:
        del batch
        assert (space() is None) == large and bool(tapes) != large
        drop_idle(model)
        assert space() is None and not tapes
    finally:
        gc.enable()


CAPTURED = ["none", "coarse", "fine"]


def steps(session: Session, rows: int, count: int = 6) -> list[torch.Tensor]:
    """Return the scores of some draft steps and checks over rows."""
    g, found = torch.Generator().manual_seed(rows), []
    for step in range(count):
        tokens = torch.randint(5, 100, (rows, 3), generator=g)
        for mode, few in (Mode.SPARSE, tokens[:, :1]), (Mode.DENSE, tokens):
            n = few.shape[1]
            seen = torch.ones(n, n, dtype=torch.bool).tril().expand(rows, n, n)
            window = Window(0, torch.arange(n).expand(rows, n), seen, torch.ones(rows, n))
            found.append(session.read(few, mode, window).clone().flatten())
        session.keep(torch.arange(2).expand(rows, 2), torch.full((rows,), 1 + step % 2))
    return found


@ordinary()
def read_all(model, sparsity, capturing: bool, rows: int = 1, comings: bool = False) -> tuple[torch.Tensor, int]:
    """Return all scores of `steps`, of rows that come and go if asked for, and how many passes are captured."""
    drop_idle(model)
    session = Engine(model).batch(rows=rows, sparsity=sparsity).session
    if not capturing:
        session.space.passes.capture = None
    session.reserve(rows, 80)
    found = []
    for row in range(rows):
        session.open(torch.tensor(PROMPT[row:]), 80)
        found += steps(session, row + 1) if comings else []
    found += steps(session, rows)
    for row in range(rows - 1 if comings else 0):
        session.close(0)
        found += steps(session, rows - 1 - row)
    return torch.cat(found), len(session.space.passes.captured)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CAPTURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_pass_gives_the_scores_of_the_pass_itself_bit_for_bit(family, method, dtype):
    model, sparsity = tiny_model(family, dtype), SparsityConfig(method, 0.4) if method != "none" else "none"
    want, none = read_all(model, sparsity, capturing=False)
    got, count = read_all(model, sparsity, capturing=True)
    assert none == 0 and count == 2
    assert torch.equal(got, want)


@pytest.mark.parametrize("sparsity", [SparsityConfig("fine", threshold=0.3), SparsityConfig("coarse", 0.4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_several_sets_give_theirs(sparsity, dtype):
    model = tiny_model("llama", dtype)
    want, _ = read_all(model, sparsity, capturing=False, rows=3)
    got, count = read_all(model, sparsity, capturing=True, rows=3)
    assert torch.equal(got, want)
    assert count == (1 if sparsity.method == "fine" else 2)  # a mask has a shape that depends on the token


@pytest.mark.parametrize("shared_set", [False, True])
def test_captures_follow_rows_that_come_and_go(shared_set):
    model, sparsity = tiny_model(), SparsityConfig("coarse", 0.4, shared_set=shared_set)
    want, _ = read_all(model, sparsity, capturing=False, rows=3, comings=True)
    got, count = read_all(model, sparsity, capturing=True, rows=3, comings=True)
    assert count == 2 * 3 and torch.equal(got, want)  # a draft step and a check of one, two and three rows


def test_passes_run_through_python_but_a_few_times():
    model, calls = tiny_model(eos_token_id=None), []
    engine, forward = Engine(model), model.forward
    model.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    stats = engine.generate(PROMPT, max_new_tokens=100, correction=CorrectionConfig(5, "argmax")).stats
    assert len(calls) <= 15 < stats.drafted  # the prompt, and the first passes of each size


@pytest.mark.parametrize("sparsity", [None, "none", "coarse", "fine"])
def test_texts_one_after_the_other_use_the_same_captured_passes(sparsity, monkeypatch):
    model, entered, enter = tiny_model(eos_token_id=None), [], Tape.__enter__
    monkeypatch.setattr(Tape, "__enter__", lambda tape: entered.append(tape) or enter(tape))
    engine, counts = Engine(model), []
    for prompt in (PROMPT, PROMPT[::-1], PROMPT[1:]):
        done = engine.generate(prompt, max_new_tokens=40, sparsity=sparsity, correction=CorrectionConfig(5, "argmax"))
        assert list(done.token_ids) == greedy(model, prompt, 40)
        counts.append(len(entered))
    assert counts[0] > 0 and counts[1] == counts[2]


def flatten_scores(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.1


def widen_norms(model: PreTrainedModel) -> None:
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5


def turn_further(model: PreTrainedModel) -> None:
    model.model.rotary_emb.attention_scaling = 1.7


@pytest.mark.parametrize("alter", [flatten_scores, widen_norms, turn_further])
@pytest.mark.parametrize("sparsity", ["none", "fine"])
def test_numbers_that_were_altered_between_texts_are_those_of_the_next_text(alter, sparsity):
    model = tiny_model(eos_token_id=None)
    engine = Engine(model)
    texts = []
    for change in (lambda model: None, alter):
        change(model)
        done = engine.generate(PROMPT, max_new_tokens=40, sparsity=sparsity, correction=CorrectionConfig(5, "argmax"))
        texts.append(list(done.token_ids))
        assert texts[-1] == greedy(model, PROMPT, 40)
    assert texts[0] != texts[1], "the change does not show"


def test_hooks_see_every_pass():
    model, seen = tiny_model(eos_token_id=None), []
    engine = Engine(model)
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    stats = engine.generate(PROMPT, max_new_tokens=40, correction=CorrectionConfig(5, "argmax")).stats
    assert len(seen) == 1 + stats.drafted + stats.rounds


@ordinary()
def one_token(session: Session) -> torch.Tensor:
    """Return the scores after a token that is not kept."""
    one = torch.ones(1, 1, dtype=torch.int64)
    return session.read(one, Mode.DENSE, Window(0, one - 1, one[None] > 0, torch.ones(1, 1))).clone()


@ordinary()
def captured(model: PreTrainedModel) -> Session:
    """Return a session whose pass of one token is captured."""
    session = Engine(model).batch(rows=2, sparsity="none").session
    session.open(torch.tensor(PROMPT), 60)
    for _ in range(3):
        one_token(session)
    assert session.space.passes.captured
    return session


@pytest.fixture
def session() -> Session:
    return captured(tiny_model(eos_token_id=None))


CHANGES = {
    "a hook": lambda model: model.model.layers[0].register_forward_hook(lambda layer, given, result: 2 * result),
    "a layer": lambda model: setattr(model.model.layers[0].self_attn, "q_proj", nn.Linear(36, 36, bias=False)),
    "the head": lambda model: setattr(model, "lm_head", nn.Linear(36, len(model.lm_head.weight), bias=False)),
    "a weight": lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data.flip(0)),
    "an activation": lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.Tanh()),
    "a buffer": lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq * 3),
    "blocks": lambda model: setattr(model.model, "layers", model.model.layers[::-1]),
    "a module that had nothing": lambda model: model.model.norm[1].add_module("late", nn.Tanh()),
}


class Open(nn.Module):
    """Calls whatever modules it has, which may be none yet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for module in self.children():
            x = module(x)
        return x


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_altered_between_two_texts_of_a_batch_writes_what_it_then_would(change):
    """With captured passes there already, which know the model as it was."""

    def altered(first_text: bool) -> tuple[list[int], list[int]]:
        torch.manual_seed(0)
        model = tiny_model(eos_token_id=None)
        model.model.norm = nn.Sequential(model.model.norm, Open())
        engine = Engine(model)
        batch, before = engine.batch(rows=1, sparsity="none"), []
        if first_text:
            before = decoded(engine, batch)
            assert batch.session.space.passes.captured
        with torch.no_grad():
            CHANGES[change](model)
        return before, decoded(engine, batch)

    before, got = altered(True)
    _, want = altered(False)
    assert got == want != before


def decoded(engine: Engine, batch: Batch) -> list[int]:
    batch.add(engine.text(PROMPT, max_new_tokens=12))
    while batch.busy:
        [update] = batch.step()
    assert update.completion is not None
    return list(update.completion.token_ids)


def test_a_cache_that_grew_is_read_where_it_is(session):
    want = one_token(session)
    session.reserve(2, 3000)
    assert not session.space.passes.captured
    for _ in range(4):
        assert torch.equal(one_token(session), want)
    session.release()
    assert not session.space.passes.captured and torch.equal(one_token(session), want)


def test_another_number_of_threads_has_a_capture_of_its_own(session, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    for _ in range(3):
        one_token(session)
    assert len(session.space.passes.captured) == 2


def test_more_shapes_than_captures_are_not_captured_over_and_over():
    made, passes = [], CapturedPasses(most=3)
    passes.capture = lambda call, buffers: (made.append(1) or call(), call)
    for _ in range(100):
        for key in range(5):
            passes.run(key, (lambda: X, lambda: X), {})
    assert len(made) == 3
    for _ in range(2 * PATIENCE):
        passes.run("another", (lambda: X, lambda: X), {})
    assert "another" in passes.captured and len(made) == 4 and len(passes.captured) == 3


def test_a_step_that_cannot_be_captured_counts_once():
    def density() -> float:
        options = {"sparsity": SparsityConfig("fine", threshold=0.3), "correction": CorrectionConfig(5, "argmax")}
        return (
            Engine(tiny_model(eos_token_id=None)).generate(PROMPT, max_new_tokens=40, **options).stats.density_streamed
        )

    want = density()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "capture_of", lambda model: None)
        assert density() == want


def test_a_change_of_weights_is_seen_in_the_next_pass(session):
    want = one_token(session)
    with torch.no_grad():
        session.model.lm_head.weight.mul_(2)
    torch.testing.assert_close(one_token(session), 2 * want)
