"""Decoding as on a GPU, against transformers: attention over slots, captured passes, and the GPU's kernels themselves.

Where the tests may take no GPU the kernels are run by Triton's interpreter, and captured passes by calling them again.
"""

import gc
from functools import partial

import pytest
import torch

from conftest import FAMILIES, greedy, slow, tiny_model
from sirius import CorrectionConfig, Engine, SparsityConfig, restore
from sirius.errors import ConfigError
from sirius.kernels import cpu, gpu
from sirius.model.prepared import prepared_of
from sirius.runtime import capture as passes
from sirius.runtime import workspace
from sirius.runtime.cache import SlotLayer
from sirius.runtime.workspace import IDLE

PROMPT, OTHER = [5, 9, 2, 77, 31], [8, 8, 100]
METHODS = {
    "coarse": SparsityConfig("coarse", 0.4, shared_set=True),
    "coarse per row": SparsityConfig("coarse", 0.4),
    "coarse refreshed": SparsityConfig("coarse", 0.4, refresh=0.2),
    "fine": SparsityConfig("fine", 0.4),
    "fine with a threshold": SparsityConfig("fine", threshold=0.3),
    "fine per branch": SparsityConfig("fine", 0.4, per_branch=True),
    "none": SparsityConfig("none"),
    "4 bits": SparsityConfig("none", draft_bits=4),
}


def argmax(period: int, width: int = 1) -> CorrectionConfig:
    return CorrectionConfig(period, "argmax", tree_width=width)


def capture_by_calling(call, buffers):
    return call(**buffers), lambda: call(**buffers)


@pytest.fixture
def captured(monkeypatch) -> list[int]:
    """Let sessions capture passes as on a GPU; return the addresses of what each capture reads."""
    captures: list[int] = []

    def capture(call, buffers):
        captures.append(buffers["input_ids"].data_ptr())
        return capture_by_calling(call, buffers)

    monkeypatch.setattr(workspace, "attends", lambda device, dtype: True)
    monkeypatch.setattr(workspace, "capture_of", lambda model: capture)
    return captures


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *((name, 3) for name in METHODS),
        *((name, 1) if name in ("coarse", "fine") else slow(name, 1) for name in METHODS),
    ],
)
def test_captured_passes_write_the_full_models_text_in_every_row(captured, name, width):
    model = tiny_model(eos_token_id=None)
    done = Engine(model).generate_many(
        [PROMPT, OTHER, PROMPT[:2]],
        batch_size=2,
        max_new_tokens=24,
        sparsity=METHODS[name],
        correction=argmax(4, width),
    )
    texts = {index: list(completion.token_ids) for index, completion in done}
    assert texts == {i: greedy(model, prompt, 24) for i, prompt in enumerate([PROMPT, OTHER, PROMPT[:2]])}
    assert bool(captured) == ("refresh" not in name)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_over_slots_is_every_familys_attention(captured, family):
    model = tiny_model(family, eos_token_id=None)
    got = Engine(model).generate(PROMPT, max_new_tokens=14, sparsity="fine", correction=argmax(4, 2))
    assert list(got.token_ids) == greedy(model, PROMPT, 14)
    assert model.config._attn_implementation in ("sdpa", "eager")


@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_a_second_prompt_captures_nothing_anew(captured, name):
    engine = Engine(tiny_model(eos_token_id=None))

    def generate(prompt: list[int]) -> list[int]:
        options = {"sparsity": METHODS[name], "correction": argmax(5)}
        return list(engine.generate(prompt, max_new_tokens=60, **options).token_ids)

    want = [greedy(tiny_model(eos_token_id=None), prompt, 60) for prompt in (PROMPT, OTHER)]
    assert generate(PROMPT) == want[0]
    first = len(captured)
    assert first > 0
    gc.collect()
    assert generate(OTHER) == want[1]
    assert generate(PROMPT) == want[0]
    assert len(captured) == first


def captures_after(engine: Engine, captured: list[int]) -> int:
    """Return how many captures there are after a further text."""
    engine.generate(PROMPT, max_new_tokens=30, correction=argmax(4))
    gc.collect()
    return len(captured)


@pytest.mark.parametrize("part", ["activation", "forward", "buffer", "layer"])
def test_what_takes_a_parts_place_between_calls_has_a_workspace_of_its_own(captured, part):
    model = tiny_model(eos_token_id=None)
    generate = partial(captures_after, Engine(model), captured)
    first, attention = generate(), model.model.layers[0].self_attn
    if part == "activation":
        model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    elif part == "forward":
        attention.forward = attention.forward
    elif part == "buffer":
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq * 3
    else:
        attention.q_proj = torch.nn.Linear(36, 36, bias=False)
    assert 0 < first < generate()


def test_a_model_with_hooks_has_a_workspace_of_its_own(captured):
    model = tiny_model(eos_token_id=None)
    generate = partial(captures_after, Engine(model), captured)
    first = generate()
    assert 0 < first == generate()
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *given: None)
    second = generate()
    assert first < second
    hook.remove()
    assert second < generate()


def test_no_graph_is_made_of_a_model_with_hooks():
    class OnAGpu(torch.nn.Module):
        device = torch.device("cuda")

    model = OnAGpu()
    model.register_forward_hook(lambda *given: None)
    assert passes.capture_of(model) is None


def test_two_sessions_at_a_time_have_workspaces_of_their_own(captured):
    engine = Engine(tiny_model(eos_token_id=None))
    streams = [engine.stream(prompt, max_new_tokens=30, correction=argmax(4)) for prompt in (PROMPT, OTHER)]
    tokens: list[list[int]] = [[], []]
    for _ in range(30):
        for each, stream in zip(tokens, streams, strict=True):
            each.extend(token for update in [next(stream, None)] if update for token in update.round.tokens)
    assert tokens == [greedy(tiny_model(eos_token_id=None), prompt, 30) for prompt in (PROMPT, OTHER)]


def test_a_text_that_was_dropped_leaves_nothing_behind(captured):
    engine = Engine(tiny_model(eos_token_id=None))
    stream = engine.stream(PROMPT * 5, max_new_tokens=50, correction=argmax(4))
    next(stream), next(stream)
    stream.close()
    gc.collect()
    got = engine.generate(OTHER, max_new_tokens=30, correction=argmax(4))
    assert list(got.token_ids) == greedy(tiny_model(eos_token_id=None), OTHER, 30)


def test_a_model_keeps_few_idle_workspaces_and_takes_them_along_when_it_goes(captured, monkeypatch):
    monkeypatch.setattr(workspace, "capture_of", lambda model: None)  # a pass that is called again knows its model
    model = tiny_model()
    engine = Engine(model)
    for keep in range(1, IDLE + 4):
        engine.generate(PROMPT, max_new_tokens=4, sparsity=SparsityConfig("coarse", keep / 10))
    gc.collect()
    idle = prepared_of(model).idle
    assert len(idle) == IDLE
    del model, engine
    gc.collect()
    assert not idle


def test_what_cannot_be_captured_runs_as_before_and_is_told_once(captured, monkeypatch, caplog):
    def refuse(call, buffers):
        raise passes.NotCaptured("operation not permitted when stream is capturing")

    model = tiny_model(eos_token_id=None)
    batch = Engine(model).batch(rows=1, correction=argmax(4))
    batch.session.space.passes.capture = refuse
    batch.add(Engine(model).text(PROMPT, max_new_tokens=40))
    while batch.busy:
        done = batch.step()
    assert list(done[-1].completion.token_ids) == greedy(model, PROMPT, 40)
    assert [record.message for record in caplog.records].count(caplog.records[0].message) == 1
    assert "cannot be captured and run slower: operation not permitted" in caplog.records[0].message


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_each_capture_is_compiled_once_and_writes_the_same_text(captured, monkeypatch, name):
    monkeypatch.setattr("sirius.engine.check_compiles", lambda model: None)
    torch.compiler.reset()  # another test's graphs would serve this one's model too
    monkeypatch.setattr(passes, "COMPILER", "aot_eager")
    model = tiny_model(eos_token_id=None)
    want = [greedy(model, prompt, 40) for prompt in (PROMPT, OTHER)]
    engine = Engine(model, compile=True)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for prompt, text in zip((PROMPT, OTHER), want, strict=True):
        got = engine.generate(prompt, max_new_tokens=40, sparsity=METHODS[name], correction=argmax(5))
        assert list(got.token_ids) == text
        gc.collect()
    assert counters["stats"]["unique_graphs"] == len(captured) > 0
    assert not counters["graph_break"]


def test_there_is_nothing_to_compile_on_the_cpu():
    with pytest.raises(ConfigError, match=r"compiled on a GPU.* is torch.float32 on cpu: leave compile out"):
        Engine(tiny_model(), compile=True)


def test_weights_that_have_moved_are_not_read_where_they_were(captured):
    model = tiny_model(eos_token_id=None)
    want, spaces = greedy(model, PROMPT, 40), []

    def generate() -> None:
        done = Engine(model).generate(PROMPT, max_new_tokens=40, sparsity="fine", correction=argmax(4))
        assert list(done.token_ids) == want
        gc.collect()
        spaces.extend(prepared_of(model).idle.values())

    generate()
    generate()
    assert spaces[1] is spaces[0]
    restore(model)
    assert not prepared_of(model).idle
    generate()
    assert spaces[2] is not spaces[0]
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    generate()
    assert spaces[3] not in spaces[:3]


def test_inference_mode_may_end_between_two_texts(captured):
    engine = Engine(tiny_model(eos_token_id=None))
    options = {"sparsity": "coarse", "correction": argmax(4), "max_new_tokens": 40}
    with torch.inference_mode():
        first = engine.generate(PROMPT, **options)
    gc.collect()
    assert engine.generate(PROMPT, **options).token_ids == first.token_ids


def test_a_cache_that_grows_drops_captures_and_changes_no_text(captured, monkeypatch):
    monkeypatch.setattr("sirius.batch.GROWTH", 8)
    monkeypatch.setattr(workspace, "step_on", lambda device: 16)
    engine, sizes = Engine(tiny_model(eos_token_id=None)), []
    batch = engine.batch(rows=2, correction=argmax(4))
    wanted = {batch.add(engine.text(prompt, max_new_tokens=70)): prompt for prompt in (PROMPT, OTHER)}
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step() if update.completion}
        sizes.append(batch.session.slots)
    assert captured and len(set(sizes)) > 2 and all(size % 16 == 0 for size in sizes)
    for ticket, prompt in wanted.items():
        assert list(done[ticket].token_ids) == greedy(engine.model, prompt, 70)


def test_memory_that_runs_out_leaves_no_capture_of_what_has_moved(captured, monkeypatch):
    engine = Engine(tiny_model(eos_token_id=None))
    batch = engine.batch(rows=2, correction=argmax(4))
    batch.add(engine.text(PROMPT, max_new_tokens=60))
    for _ in range(8):
        batch.step()
    passes = batch.session.space.passes
    assert passes.captured
    batch.add(engine.text(OTHER, max_new_tokens=300))
    grow, grown = SlotLayer.grow, []

    def grow_once(layer, rows, slots):
        if grown:
            raise torch.OutOfMemoryError("no more")
        grown.append(layer)
        grow(layer, rows, slots)

    monkeypatch.setattr(SlotLayer, "grow", grow_once)
    updates = batch.step()
    monkeypatch.undo()
    assert "out of memory" in str(updates[0].error)
    assert not passes.captured
    while batch.busy:
        updates = batch.step()
    assert list(updates[-1].completion.token_ids) == greedy(engine.model, PROMPT, 60)


def test_a_step_that_was_captured_counts_once(captured):
    model = tiny_model(eos_token_id=None)
    options = {"sparsity": METHODS["fine with a threshold"], "correction": argmax(5), "max_new_tokens": 40}
    density = Engine(model).generate(PROMPT, **options).stats.density_streamed
    assert captured
    workspace.drop_idle(model)
    captured.clear()
    batch = Engine(model).batch(rows=1, **{name: options[name] for name in ("sparsity", "correction")})
    batch.session.space.passes.capture = None
    batch.add(Engine(model).text(PROMPT, max_new_tokens=40))
    while batch.busy:
        [update] = batch.step()
    assert update.completion.stats.density_streamed == density


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fine", "coarse"])
def test_a_compiler_takes_the_gpus_kernels_as_they_are(gpu_device, monkeypatch, name):
    """Without a graph break: a compiled pass is one piece."""
    monkeypatch.setattr("sirius.engine.check_compiles", lambda model: None)
    monkeypatch.setattr(passes, "COMPILER", "aot_eager")
    monkeypatch.setattr(passes, "WARM", 0)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny_model(eos_token_id=None).to(gpu_device)
    engine = Engine(model, compile=True)
    batch = engine.batch(rows=1, sparsity=METHODS[name], correction=argmax(2))
    if gpu_device.type == "cpu":
        batch.session.space.passes.capture = capture_by_calling
    batch.add(engine.text(PROMPT, max_new_tokens=3))
    while batch.busy:
        [update] = batch.step()
    assert list(update.completion.token_ids) == greedy(model, PROMPT, 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(batch.session.space.passes.captured) >= 2
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_graphs_write_the_full_models_text_for_one_prompt_after_another(gpu_device, name, compiled):
    model = tiny_model(eos_token_id=None).to(gpu_device)
    engine = Engine(model, compile=compiled)
    for prompt in (PROMPT, OTHER, PROMPT):
        want = greedy(model, prompt, 60)
        got = engine.generate(prompt, max_new_tokens=60, sparsity=METHODS[name], correction=argmax(5))
        assert list(got.token_ids) == want
        gc.collect()
    [space] = prepared_of(model).idle.values()
    assert space.passes.capture is not None
    assert bool(space.passes.captured) == ("refresh" not in name)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gemma2", "coarse"),
        ("llama", "fine"),
        ("llama", "fine with a threshold"),
        slow("llama", "coarse"),
        slow("gemma2", "fine"),
        slow("gemma2", "fine with a threshold"),
    ],
)
def test_the_gpus_kernels_write_the_full_models_text(gpu_device, monkeypatch, family, name):
    launched = set()
    for operation in ("glu", "gate", "up_rows", "project", "largest"):
        kernel = getattr(gpu, operation)
        monkeypatch.setattr(gpu, operation, lambda *a, o=operation, k=kernel: launched.add(o) or k(*a))
    model = tiny_model(family, eos_token_id=None, num_hidden_layers=1).to(gpu_device)
    want = greedy(model, PROMPT, 4)
    got = Engine(model).generate(PROMPT, max_new_tokens=4, sparsity=METHODS[name], correction=argmax(3, 2))
    assert list(got.token_ids) == want
    assert (
        launched
        == {
            "coarse": {"largest", "glu", "project"},
            "fine": {"gate", "largest", "up_rows", "project"},
            "fine with a threshold": {"gate", "up_rows", "project"},
        }[name]
    )


@pytest.mark.parametrize("method", ["none", slow("coarse"), slow("fine")])
def test_a_draft_of_fewer_bits_writes_the_full_models_text_where_no_kernel_multiplies_it(
    gpu_device, monkeypatch, method
):
    monkeypatch.setattr(cpu, "library", lambda: None)  # on a GPU there are none
    model = tiny_model(eos_token_id=None, num_hidden_layers=1).to(gpu_device)
    want = greedy(model, PROMPT, 6)
    sparsity = SparsityConfig(method, draft_bits=4)
    got = Engine(model).generate(PROMPT, max_new_tokens=6, sparsity=sparsity, correction=argmax(3))
    assert list(got.token_ids) == want
    assert got.stats.draft_bits == 4 and got.stats.drafted
