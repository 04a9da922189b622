"""Models of which a part stays in memory: texts are the model's own, and a fault of a disk costs what it must."""

import errno
import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import COARSE, EIGHT, FOUR, PLAIN, plan_of, save, shards, streamed
from test_exactness import assert_fresh

from conftest import FAMILIES, greedy, slow, tiny_model
from sirius import restore
from sirius.core import CorrectionConfig, SamplingConfig, SparsityConfig
from sirius.engine import Engine
from sirius.errors import ConfigError, FileError, ModelError, OutOfMemoryError, RequestError, UnsupportedModelError
from sirius.kernels import cpu
from sirius.model.prepared import prepared_of
from sirius.offload.checkpoint import PAGE
from sirius.offload.ring import ThreadMover

pytestmark = pytest.mark.integration

PROMPT = [5, 17, 93, 41, 8, 60, 22]
PROMPTS = [PROMPT, [9, 9], [70, 3, 12, 88, 41, 6, 19, 101, 55, 20, 33]]
NEW = 10
compiled = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")


def chain(period: int | str = 4, width: int = 1) -> CorrectionConfig:
    return CorrectionConfig(period=period, tree_width=width)


def llama(dtype: torch.dtype = torch.float32, **changes: object):
    return tiny_model(dtype=dtype, eos_token_id=None, num_hidden_layers=3, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved Llama of three blocks."""
    return save(llama(), tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def want() -> list[list[int]]:
    """What transformers writes after each prompt."""
    model = llama()
    return [greedy(model, prompt, NEW) for prompt in PROMPTS]


def write(engine: Engine, draft: SparsityConfig = PLAIN, **options) -> list[int]:
    options = {"correction": chain(), "max_new_tokens": NEW} | options
    return list(engine.generate(options.pop("prompt", PROMPT), sparsity=draft, **options).token_ids)


def write_all(engine: Engine, draft: SparsityConfig, rows: int = 3, **options) -> list[list[int]]:
    options = {"correction": chain(), "max_new_tokens": NEW} | options
    done = dict(engine.generate_many(PROMPTS, batch_size=rows, sparsity=draft, **options))
    return [list(done[index].token_ids) for index in range(len(PROMPTS))]


# --- texts


CHANGED = {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "tied gemma": ("gemma", {"tie_word_embeddings": True}),
    "biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.mark.parametrize("family", [*FAMILIES, *CHANGED])
def test_a_model_that_is_brought_block_by_block_writes_its_greedy_text(family, tmp_path):
    name, changes = CHANGED.get(family, (family, {}))
    model = tiny_model(name, eos_token_id=None, **changes)
    if family == "biased":
        draw = torch.Generator().manual_seed(0)
        [weight.data.normal_(generator=draw) for key, weight in model.named_parameters() if key.endswith("bias")]
    text = greedy(model, PROMPT, NEW)
    save(model, tmp_path)
    assert write(streamed(tmp_path, "10 00 01", FOUR), FOUR) == text
    assert write(streamed(tmp_path, "10 01", COARSE, buffers=2), COARSE) == text


STAYS = {
    "nothing": "000 000",
    "attention": "111 000",
    "some blocks": "010 010",
    "some parts": "100 001",
    "rounded weights": "000 000 111",
    "some rounded weights": "100 100 010",
    "kept neurons": "111 000 000 111",
    "some kept neurons": "111 100 000 010",
    "everything": "111 111 111 111",
}


DRAFTS = {"plain": PLAIN, "4 bits": FOUR, "8 bits": EIGHT, "coarse": COARSE}
TELLING = {  # cases that differ in more than what was tried already
    "plain": ("nothing", "some parts", "everything"),
    "4 bits": ("some blocks", "rounded weights", "some rounded weights", "everything"),
    "8 bits": ("nothing", "rounded weights"),
    "coarse": ("attention", "some parts", "kept neurons", "some kept neurons", "everything"),
}


@pytest.mark.parametrize(
    ("stays", "draft"),
    [(stays, draft) if stays in TELLING[draft] else slow(stays, draft) for draft in DRAFTS for stays in STAYS],
)
def test_whatever_stays_in_memory_the_text_is_the_models_own(folder, want, stays, draft):
    engine = streamed(folder, STAYS[stays], DRAFTS[draft], held=stays == "some parts")
    for _ in range(2):  # the second text finds weights in the buffers, and the first one's neurons
        got = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=DRAFTS[draft], correction=chain())
        assert list(got.token_ids) == want[0] and got.stats.lossless
        assert bool(got.stats.drafted) == (draft != "plain")


@pytest.mark.parametrize("correction", [chain(4, 3), chain("auto"), chain(1)], ids=["tree", "auto", "plain"])
@pytest.mark.parametrize(("draft", "stays"), [(FOUR, "010 010 001"), (COARSE, "110 010 000 001")], ids=["4", "coarse"])
def test_so_it_is_by_trees_and_periods_in_batches(folder, want, draft, stays, correction):
    engine = streamed(folder, stays, draft)
    assert write_all(engine, draft, correction=correction) == want


@pytest.mark.parametrize("draft", [PLAIN, FOUR, COARSE], ids=["plain", "4 bits", "coarse"])
def test_a_sampled_text_is_that_of_its_seed(folder, draft):
    engine, options = streamed(folder, "010 010", draft), {"sampling": SamplingConfig(temperature=1.0, seed=7)}
    assert write(engine, draft, **options) == write(Engine(llama()), **options)


def test_a_lossy_text_is_that_of_the_model_in_memory(folder):
    for draft, correction in ((COARSE, None), (COARSE, CorrectionConfig(4, "threshold", 0.05)), (FOUR, None)):
        engine, inside = streamed(folder, "010 010", draft), Engine(llama())
        assert write(engine, draft, correction=correction) == write(inside, draft, correction=correction)


def test_one_set_of_neurons_for_a_whole_batch_is_brought_once_for_all(folder, want):
    shared = SparsityConfig("coarse", shared_set=True)
    engine = streamed(folder, "111 010", shared)
    assert engine.batch(rows=3, sparsity=shared).rows == 3
    assert write_all(engine, shared) == want


@compiled
@pytest.mark.parametrize(
    ("draft", "stored"),
    [
        (PLAIN, torch.float32),
        (FOUR, torch.bfloat16),
        (COARSE, torch.bfloat16),
        slow(PLAIN, torch.bfloat16),
        slow(FOUR, torch.float32),
        slow(COARSE, torch.float32),
    ],
    ids=["plain-32", "4-16", "coarse-16", "plain-16", "4-32", "coarse-32"],
)
def test_in_16_bits_a_text_after_up_to_256_tokens_is_that_of_the_model_in_memory(tmp_path, draft, stored):
    save(llama(stored), tmp_path)
    prompts = [list(range(3, 103)) * 2 + list(range(20, 76)), PROMPT]
    inside = Engine.load(tmp_path, dtype="bfloat16")
    engine = streamed(tmp_path, "010 001", draft, dtype=torch.bfloat16)
    options = {"max_new_tokens": NEW, "correction": chain()}
    wanted = dict(inside.generate_many(prompts, sparsity="none", **options))
    got = dict(engine.generate_many(prompts, sparsity=draft, **options))
    for index in range(2):
        assert got[index].token_ids == wanted[index].token_ids and got[index].stats.lossless


@pytest.mark.parametrize(("draft", "stays"), [(FOUR, "010 000 001"), (COARSE, "110 010")], ids=["4 bits", "coarse"])
def test_after_every_round_the_cache_equals_a_fresh_prefill(tmp_path, draft, stays):
    save(llama(torch.float64), tmp_path)
    engine = streamed(tmp_path, stays, draft, dtype=torch.float64)
    batch, rejected = engine.batch(rows=2, sparsity=draft, correction=chain(4, 2)), 0
    for prompt in PROMPTS[:2]:
        batch.add(engine.text(prompt, max_new_tokens=NEW))
    while batch.busy:
        rejected += sum(len(update.round.draft) - update.round.accepted for update in batch.step())
        for index, entry in enumerate(batch.active):
            assert_fresh(batch.session, index, entry.row.tokens[:-1])
    assert rejected, "no draft was ever rejected, so this run shows nothing"


def test_a_long_prompt_is_read_in_several_passes(tmp_path, monkeypatch):
    model = llama()
    save(model, tmp_path)
    monkeypatch.setattr("sirius.runtime.session.MOST_READ", 50)
    prompt = (list(range(3, 120)) * 2)[:180]
    engine = streamed(tmp_path, "010 000", COARSE)
    assert write(engine, COARSE, prompt=prompt) == greedy(model, prompt, NEW)


def test_likelihoods_and_direct_calls_are_those_of_the_model_in_memory(folder, want):
    engine, inside = streamed(folder, "100 010"), Engine(llama())
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        torch.testing.assert_close(engine.model(ids).logits, inside.model(ids).logits)
    assert greedy(engine.model, PROMPT, NEW) == want[0]
    asked = [(PROMPT, [3, 4]), ([9], [8, 7, 6])]
    for got, wanted in zip(engine.score(asked), inside.score(asked), strict=True):
        assert got.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


def test_no_gradient_is_taken_of_weights_that_are_gone_by_then(folder):
    engine = streamed(folder, "000 000")
    loss = engine.model(torch.tensor([PROMPT])).logits.sum()
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


# --- bytes and memory


def moved(engine: Engine, **options) -> int:
    """Return the bytes that cross the link while a text is written."""
    placed = prepared_of(engine.model).placed
    before = placed.moved
    write(engine, **options)
    return placed.moved - before


def test_each_pass_moves_the_bytes_of_its_plan(folder):
    plan = plan_of(folder, "010 010", PLAIN, torch.float32, 600, 3)
    engine = streamed(folder, "010 010")
    write(engine)  # the next text finds the first units in the buffers
    few, many = (moved(engine, max_new_tokens=count, correction=chain(1)) for count in (3, 9))
    assert many - few == 6 * plan.full_streamed
    plan = plan_of(folder, "000 000 111", FOUR, torch.float32, 600, 3)
    engine = streamed(folder, "000 000 111", FOUR)
    write(engine, FOUR)
    done = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=FOUR, correction=chain())
    passes = moved(engine, draft=FOUR) / plan.full_streamed
    assert done.stats.rounds - 1 <= passes <= done.stats.rounds + 1, "drafts move nothing"


@pytest.mark.parametrize("stays", ["000 000", "010 001", "100 010 000 001"])
def test_a_draft_pass_of_coarse_moves_attention_and_kept_neurons_alone(folder, stays):
    plan = plan_of(folder, stays, COARSE, torch.float32, 600, 3)
    engine = streamed(folder, stays, COARSE)
    batch = engine.batch(rows=1, sparsity=COARSE, correction=chain(8))
    batch.add(engine.text(PROMPT, max_new_tokens=99))
    [batch.step() for _ in range(3)]  # the prompt, and rounds after which the next one finds the buffers filled
    before, rounds = prepared_of(engine.model).placed.moved, 4
    guesses = sum(len(update.round.draft) for _ in range(rounds) for update in batch.step())
    found = prepared_of(engine.model).placed.moved - before
    pages = 3 * PAGE - 3 * 22 * 36 * 4  # gate, up and down of 22 neurons take a page each
    expected = rounds * plan.full_streamed + guesses * (plan.draft_streamed + plan.neurons.count(False) * pages)
    assert guesses and expected <= found <= expected + rounds * 4 * plan.unit, "a pass of another kind is a surprise"


def test_a_batch_is_opened_without_bringing_what_its_drafts_read(folder):
    engine = streamed(folder, "000 000 000", FOUR)
    want = engine.generate(PROMPT, max_new_tokens=NEW, sparsity=FOUR, correction=chain()).stats.density
    placed = prepared_of(engine.model).placed
    before = placed.moved
    engine.batch(rows=1, sparsity=FOUR, correction=chain())
    assert placed.moved == before
    inside = Engine(llama()).generate(PROMPT, max_new_tokens=NEW, sparsity=FOUR, correction=chain())
    assert inside.stats.density == want


def test_an_engine_that_is_deleted_frees_its_buffers_threads_and_files(folder):
    def opened() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    threads, files = set(threading.enumerate()), opened()
    engine = streamed(folder, "010 000", COARSE)
    write(engine, COARSE)
    ring = weakref.ref(prepared_of(engine.model).placed.ring)
    assert opened() > files and set(threading.enumerate()) - threads
    del engine
    gc.collect()
    assert ring() is None and opened() == files
    for thread in set(threading.enumerate()) - threads:
        thread.join(10)
        assert not thread.is_alive()


def test_texts_wait_their_turn_where_memory_was_planned_for_fewer(folder, want):
    engine, most = streamed(folder, "010 010", FOUR, slots=60), []
    batch = engine.batch(rows=3, sparsity=FOUR, correction=chain())
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step() if update.last}
        most.append((len(batch.active), batch.session.cache.table.rows * batch.session.slots))
    assert [list(done[ticket].token_ids) for ticket in tickets] == want
    assert max(rows for rows, _ in most) == 2 and max(slots for _, slots in most) <= 60


def test_neurons_of_each_prompt_are_kept_for_one_text_at_a_time(folder, want):
    engine, most = streamed(folder, "111 010", COARSE), 0
    batch = engine.batch(rows=3, sparsity=COARSE, correction=chain())
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step() if update.last}
        most = max(most, len(batch.active))
    assert [list(done[ticket].token_ids) for ticket in tickets] == want and most == 1
    assert engine.batch(rows=3, sparsity="none").rows == 3


def test_a_text_longer_than_was_planned_for_is_refused(folder, want):
    engine = streamed(folder, "000 000", slots=40)
    with pytest.raises(OutOfMemoryError, match=r"107 slots of keys and values are needed .* planned for 40;"):
        engine.generate(PROMPT, max_new_tokens=100, correction=chain(1))
    assert write(engine, correction=chain(1)) == want[0]


# --- what memory was planned for


def test_a_draft_that_memory_was_not_planned_for_is_refused_by_name(folder):
    four, coarse, plain = (
        streamed(folder, "010 010", FOUR),
        streamed(folder, "010 010", COARSE),
        streamed(folder, "000 000"),
    )
    for engine, draft, words in (
        (four, "fine", "planned for every neuron at 4 bits, and fine 0.5 may read more"),
        (four, "coarse", "planned for every neuron at 4 bits, and coarse 0.5 may read more"),
        (four, EIGHT, "planned for weights of 4 bits, and draft_bits is 8"),
        (coarse, SparsityConfig("coarse", 0.6), "planned for coarse 0.5, and coarse 0.6 may read more"),
        (coarse, "fine", "planned for coarse 0.5, and fine"),
        (coarse, FOUR, "planned for no weights of fewer bits, and draft_bits is 4"),
        (plain, "coarse", "planned for no draft, and coarse 0.5 may read more"),
        (plain, FOUR, "planned for no weights of fewer bits"),
    ):
        with pytest.raises(ConfigError, match=words):
            engine.generate(PROMPT, sparsity=draft, correction=chain())


def test_neurons_of_each_text_are_kept_for_one_text_where_one_set_was_planned_for_all(folder, want):
    engine = streamed(folder, "111 010", SparsityConfig("coarse", shared_set=True))
    assert engine.batch(rows=3, sparsity=COARSE).rows == 1
    assert write_all(engine, COARSE) == want


def test_neurons_in_full_width_are_refused_where_rounded_ones_were_planned(folder):
    engine = streamed(folder, "111 010", SparsityConfig("coarse", draft_bits=4))
    with pytest.raises(ConfigError, match=r"planned for coarse 0.5 at 4 bits, and coarse 0.5 may read more"):
        engine.generate(PROMPT, sparsity="coarse", correction=chain())


def test_a_draft_that_reads_less_than_memory_was_planned_for_is_taken(folder, want):
    coarse = streamed(folder, "110 010", COARSE)
    for draft in (SparsityConfig("coarse", 0.3), PLAIN):
        assert write(coarse, draft) == want[0]
    four = streamed(folder, "110 010", FOUR)
    for draft in (SparsityConfig("coarse", draft_bits=4), SparsityConfig("fine", draft_bits=4), PLAIN):
        assert write(four, draft) == want[0]
    for engine in (coarse, four):
        assert list(engine.generate(PROMPT, max_new_tokens=NEW).token_ids) == want[0], "the default"


def test_a_streamed_model_is_neither_restored_nor_compiled(folder):
    engine = streamed(folder, "000 000")
    with pytest.raises(UnsupportedModelError, match="not in memory, as it was loaded with a memory budget"):
        restore(engine.model)
    with pytest.raises(ConfigError, match="leave compile out"):
        Engine(engine.model, compile=True)


# --- Engine.load


@pytest.fixture
def known_speed(monkeypatch):
    """Nothing is measured, and the process itself takes no memory."""
    for name, value in {"held_now": 0, "transfer_speed": 1e8, "memory_speed": 1e10}.items():
        monkeypatch.setattr(f"sirius.offload.budget.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("sirius.offload.budget.SLACK", 0)


def refused(path: object, error: type[Exception] = ModelError, **options: object) -> str:
    """Return the one line that loading is refused with."""
    with pytest.raises(error) as caught:
        Engine.load(str(path), **{"memory_budget": 10**9, **options})
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def smallest(folder: Path, **options: object) -> int:
    return int(re.search(r"give at least (\d+) bytes", refused(folder, ConfigError, memory_budget=1, **options))[1])


@pytest.mark.usefixtures("known_speed")
@pytest.mark.parametrize("draft", [None, PLAIN, FOUR, COARSE], ids=["unsaid", "plain", "4 bits", "coarse"])
def test_the_smallest_budget_works_and_one_byte_less_names_it(folder, want, draft):
    least = smallest(folder, draft=draft)
    message = refused(folder, ConfigError, memory_budget=least - 1, draft=draft)
    assert f"a memory budget of {least - 1} bytes" in message and f"give at least {least} bytes, or shorten" in message
    engine = Engine.load(str(folder), memory_budget=least, draft=draft)
    assert prepared_of(engine.model).placed.ring.count == 2
    assert write(engine, draft or PLAIN) == want[0]


@pytest.mark.usefixtures("known_speed")
def test_what_is_in_memory_is_no_more_than_the_plan_says(folder):
    least = smallest(folder, draft=PLAIN)
    for budget in (least, least + 10_000, least + 20_000):
        engine = Engine.load(str(folder), memory_budget=budget, draft=PLAIN)
        held = sum(each.nbytes for each in engine.model.parameters() if not each.is_meta)
        placed = prepared_of(engine.model).placed
        buffers = placed.ring.count * placed.ring.size
        assert held + buffers <= placed.planned.plan.used <= budget


@pytest.mark.usefixtures("known_speed")
def test_a_share_of_memory_and_an_amount_in_words_are_budgets(folder, want, monkeypatch):
    least = smallest(folder, draft=PLAIN)
    monkeypatch.setattr("sirius.offload.budget.memory_of", lambda device: 2 * least)
    for budget in ("50%", f"{least}b", f"{least / 1000:.3f} kB", least):
        assert write(Engine.load(str(folder), memory_budget=budget, draft=PLAIN)) == want[0]
    assert "too small" in refused(folder, ConfigError, memory_budget="49%")
    for budget in ("lots", "-3", "0", "101%", "", "8 GiBs", True, "1e9"):
        assert "a memory budget is a number of bytes above 0, such as 8GiB" in refused(
            folder, ConfigError, memory_budget=budget
        )


@pytest.mark.usefixtures("known_speed")
def test_the_length_that_memory_is_planned_for_is_the_limit_of_texts(folder):
    engine = Engine.load(str(folder), memory_budget=10**9, max_context=40)
    assert engine.limit == 40
    assert len(engine.generate(PROMPT, max_new_tokens=33).token_ids) == 33
    with pytest.raises(RequestError, match="pass the limit of 40"):
        engine.generate(PROMPT, max_new_tokens=34)
    assert smallest(folder, max_context=40) < smallest(folder, max_context=80) < smallest(folder)
    for wrong in (0, 1, -5, "9", 4.0, True):
        assert "max_context counts tokens" in refused(folder, ConfigError, max_context=wrong)


@pytest.mark.usefixtures("known_speed")
def test_another_dtype_than_the_checkpoints_is_loaded_as_asked(tmp_path):
    save(llama(torch.bfloat16), tmp_path)
    least = smallest(tmp_path, dtype="float32", draft=PLAIN)
    engine = Engine.load(str(tmp_path), memory_budget=least, dtype="float32", draft=PLAIN)
    assert engine.model.dtype == torch.float32
    assert write(engine) == write(Engine(llama(torch.bfloat16).float()))
    assert Engine.load(str(tmp_path), memory_budget=10**9).model.dtype == torch.bfloat16


@pytest.mark.usefixtures("known_speed")
def test_what_cannot_be_loaded_without_a_budget_is_refused_with_one_alike(folder, tmp_path):
    assert refused(tmp_path / "nowhere") == f"there is no model folder {tmp_path / 'nowhere'}"
    assert "is a file; name the model's folder" in refused(folder / "config.json")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert refused(tmp_path) == f"{tmp_path} holds no *.safetensors weights"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "is a GGUF file, whose weights cannot be read in part" in refused(
        tmp_path / "model.gguf", UnsupportedModelError
    )
    assert "cannot be drafted with fine" in refused(folder, ConfigError, draft="fine")
    with pytest.raises(ConfigError, match="give memory_budget too"):
        Engine.load(str(folder), draft="coarse")


@pytest.fixture
def damaged(folder, tmp_path) -> Path:
    """A copy of the checkpoint in one file, to be damaged."""
    weights = {name: weight for shard in shards(folder) for name, weight in load_file(shard).items()}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


def set_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    weights = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: w for name, w in weights.items() if w is not None}, folder / "model.safetensors")


UP, NORM, HEAD = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight", "lm_head.weight"


@pytest.mark.usefixtures("known_speed")
def test_weights_that_do_not_fit_the_configuration_are_refused_by_name(damaged):
    whole = load_file(damaged / "model.safetensors")
    for changes, words in (
        ({UP: None}, f"1 missing keys, first {UP}"),
        ({UP: None, "model.layers.1.mlp.up.weight": whole[UP].clone()}, f"1 missing keys, first {UP}"),
        ({UP: whole[UP][:-1].clone()}, f"1 mismatched keys, first {UP}"),
        (
            {"model.layers.3.mlp.up_proj.weight": whole[UP].clone()},
            "no place for 1 of its weights, first model.layers.3",
        ),
        ({UP: whole[UP].to(torch.float8_e4m3fn)}, f"{UP} is stored as torch.float8_e4m3fn; a memory budget needs"),
        ({NORM: whole[NORM].long()}, f"{NORM} is stored as torch.int64"),
    ):
        set_weights(damaged, whole | changes)
        assert words in refused(damaged)
        (damaged / "model.safetensors").unlink()
        save_file(whole, damaged / "model.safetensors")


@pytest.mark.usefixtures("known_speed")
def test_tied_weights_that_are_stored_twice_and_differ_are_refused(tmp_path):
    model = llama(tie_word_embeddings=True)
    save(model, tmp_path)
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    [shard.unlink() for shard in shards(tmp_path)]
    save_file(weights, tmp_path / "model.safetensors")
    least = smallest(tmp_path, draft=PLAIN)
    assert write(Engine.load(str(tmp_path), memory_budget=least, draft=PLAIN)) == write(Engine(model))
    set_weights(tmp_path, {HEAD: weights[HEAD] + 1})
    assert "weights differ; set tie_word_embeddings to false" in refused(tmp_path)


@pytest.mark.usefixtures("known_speed")
@pytest.mark.parametrize("name", [UP, NORM, HEAD])
def test_weights_that_are_no_numbers_are_refused_by_name(damaged, name):
    """Those that stay when they are loaded, the others when they are first brought."""
    weight = load_file(damaged / "model.safetensors")[name]
    weight.view(-1)[5] = float("nan")
    set_weights(damaged, {name: weight})
    words = rf"{re.escape(name)}, rows .* not finite"
    if name != UP:
        assert re.search(words, refused(damaged, draft=PLAIN))
        return
    engine = streamed(damaged, "000 000")
    for _ in range(2):
        with pytest.raises(ModelError, match=words):
            engine.generate(PROMPT)


# --- faults while a text is written


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


def overwritten(folder: Path, size: int) -> dict[Path, bytes]:
    """Cut off every file of weights, and return what they held."""
    held = {path: path.read_bytes() for path in shards(folder)}
    [os.truncate(path, size) for path in held]
    return held


@pytest.fixture
def own(folder, tmp_path) -> Path:
    """A copy of the checkpoint."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("draft", [PLAIN, FOUR, COARSE], ids=["plain", "4 bits", "coarse"])
def test_a_file_that_is_cut_off_in_the_midst_of_a_text_costs_what_follows_and_nothing_else(own, want, draft):
    engine = streamed(own, "010 000", draft)
    updates, given = engine.stream(PROMPT, max_new_tokens=NEW, sparsity=draft, correction=chain(2)), []
    for _ in range(3):
        given += next(updates).round.tokens
    held = overwritten(own, 2000)
    with pytest.raises(FileError, match=r"safetensors ends at byte \d+, and \d+ are needed; it was cut off: fetch"):
        for update in updates:
            given += update.round.tokens
    assert 3 <= len(given) < NEW and given == want[0][: len(given)]
    with pytest.raises(FileError):
        write(engine, draft)
    [path.write_bytes(content) for path, content in held.items()]
    assert write(engine, draft) == want[0]


def test_a_file_that_is_replaced_under_its_name_is_read_on_as_it_was(own, want):
    engine = streamed(own, "000 000")
    updates = engine.stream(PROMPT, max_new_tokens=NEW, sparsity=PLAIN)
    given = list(next(updates).round.tokens)
    for path in shards(own):
        (own / "new").write_bytes(b"other")
        (own / "new").rename(path)
    assert given + [token for update in updates for token in update.round.tokens] == want[0]


def test_a_read_error_ends_the_texts_at_work_and_the_others_go_on(folder, want, monkeypatch):
    engine = streamed(folder, "010 010", FOUR)
    batch = engine.batch(rows=2, sparsity=FOUR, correction=chain(2))
    tickets = [batch.add(engine.text(prompt, max_new_tokens=NEW)) for prompt in PROMPTS]
    batch.step()
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", failing(errno.EIO))
        updates = [update for _ in range(9) if len(batch.active) == 2 for update in batch.step()]
    failed = [update for update in updates if update.error]
    assert [update.ticket for update in failed] == tickets[:2]
    assert all(type(each.error) is FileError and "Input/output error" in str(each.error) for each in failed)
    done = {update.ticket: update for _ in range(99) if batch.busy for update in batch.step()}
    assert list(done) == tickets[2:] and list(done[tickets[2]].completion.token_ids) == want[2]


def test_a_read_error_at_a_prompt_is_that_texts_own_and_leaves_no_row_behind(folder, want, monkeypatch):
    engine = streamed(folder, "010 010", FOUR)
    batch = engine.batch(rows=3, sparsity=FOUR, correction=chain(2))
    first = batch.add(engine.text(PROMPTS[0], max_new_tokens=NEW))
    batch.step()
    with monkeypatch.context() as broken:
        broken.setattr(os, "preadv", failing(errno.EIO))
        batch.add(engine.text(PROMPTS[1], max_new_tokens=NEW))
        [update] = batch.step()
    assert type(update.error) is FileError
    last = batch.add(engine.text(PROMPTS[2], max_new_tokens=NEW))
    done = {update.ticket: update for _ in range(99) if batch.busy for update in batch.step()}
    assert [list(done[ticket].completion.token_ids) for ticket in (first, last)] == [want[0], want[2]]


def test_a_read_error_leaves_the_model_to_other_threads(folder, want, monkeypatch):
    engine = streamed(folder, "000 000")
    preadv, fails = os.preadv, threading.Event()
    monkeypatch.setattr(os, "preadv", lambda *args: failing(errno.EIO)() if fails.is_set() else preadv(*args))
    updates = engine.stream(PROMPT, max_new_tokens=NEW, sparsity=PLAIN)
    next(updates)
    fails.set()
    with pytest.raises(FileError, match="Input/output error"):
        list(updates)
    fails.clear()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(write, engine).result(60) == want[0]


@pytest.mark.parametrize(("draft", "call"), [(FOUR, "pwrite"), (COARSE, "pwrite"), (COARSE, "fdatasync")], ids=str)
def test_a_full_disk_for_what_drafts_read_is_named_and_the_next_text_is_whole(folder, want, monkeypatch, draft, call):
    engine = streamed(folder, "110 010", draft)
    with monkeypatch.context() as full:
        full.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(FileError, match="No space left on device; set TMPDIR to a folder with more room"):
            write(engine, draft)
        assert write(engine, PLAIN) == want[0]
    assert write(engine, draft) == want[0]


@pytest.mark.parametrize("calls", [1, 9, 20, *map(slow, (2, 3, 4, 14, 27, 33))])
def test_a_text_after_one_that_was_interrupted_is_whole(folder, want, monkeypatch, calls):
    engine, left, wait = streamed(folder, "100 010", COARSE, buffers=2), [calls], ThreadMover.wait

    def interrupted(self, arrival):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        wait(self, arrival)

    monkeypatch.setattr(ThreadMover, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(engine, COARSE)
    assert write(engine, COARSE) == want[0]


# --- the command line


@pytest.fixture
def spoken(folder, tmp_path, tokenizer) -> Path:
    """A copy of the checkpoint with a tokenizer."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


ASKED = ("--max-new-tokens", NEW, "--period", 4, "abc")


@pytest.fixture
def budgeted(sirius_command, spoken, known_speed):
    """Run `sirius generate` on the tiny model; gives the exit code and what was printed, out and err."""

    def run(*arguments: object, budget: object = "6MB") -> tuple[int, str, str]:
        return sirius_command("generate", "--model", spoken, "--memory-budget", budget, *arguments)

    return run


def one_line(printed: tuple[int, str, str]) -> str:
    code, _, err = printed
    lines = [line for line in err.splitlines() if "; in memory of 3 blocks: " not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("draft", ["unsaid", "coarse"])
def test_the_command_writes_what_it_writes_without_a_budget(budgeted, spoken, sirius_command, draft):
    asked = (*(("--sparsity", draft, "--period", 4) if draft == "coarse" else ()), "--max-new-tokens", NEW, "abc")
    code, text, _ = sirius_command("generate", "--model", spoken, *asked)
    assert code == 0 and budgeted(*asked)[:2] == (0, text)
    least = re.search(r"give at least (\d+) bytes", one_line(budgeted(*asked, budget=1000)))[1]
    assert budgeted(*asked, budget=least)[:2] == (0, text)


def test_the_command_names_a_truncated_and_a_missing_file(budgeted, spoken):
    last = shards(spoken)[-1]
    os.truncate(last, last.stat().st_size - 7)
    assert f"{last} is cut off: it has" in one_line(budgeted(*ASKED))
    last.unlink()
    assert f"lacks 1 of {len(shards(spoken)) + 1} files of weights, first {last.name}" in one_line(budgeted(*ASKED))


def test_the_command_plans_a_draft_of_the_period_that_it_is_given(budgeted):
    least = one_line(budgeted("--period", 4, "--max-new-tokens", NEW, "abc", budget=1000))
    budget = re.search(r"give at least (\d+) bytes", least)[1]
    code, text, err = budgeted("--period", 4, "--max-new-tokens", NEW, "abc", budget=budget)
    assert code == 0 and text and "(a window of 4 taken to bring " in err


def test_the_command_plans_the_default_draft_where_it_decodes_alone(budgeted, spoken, sirius_command):
    asked = ("--no-correct", "--max-new-tokens", NEW, "abc")
    least = re.search(r"give at least (\d+) bytes", one_line(budgeted(*asked, budget=1000)))[1]
    inside = sirius_command("generate", "--model", spoken, *asked, "--draft-bits", 4)  # the bits that are planned for
    assert inside[0] == 0 and budgeted(*asked, budget=least)[:2] == inside[:2]


TIGHT = ("--sparsity", "none", "--max-new-tokens", NEW)


@pytest.fixture
def least(budgeted) -> str:
    """The smallest budget of plain decoding, with which every pass reads files."""
    return re.search(r"give at least (\d+) bytes", one_line(budgeted(*TIGHT, "abc", budget=9)))[1]


@pytest.fixture
def late(monkeypatch):
    """Let a call of the system fail in one round of decoding."""

    def arrange(number: int, call: tuple[object, str], error: BaseException) -> None:
        from sirius import batch

        done, rounds = batch.next_round, [0]

        def fail(*_):
            raise error

        def counted(*arguments):
            rounds[0] += 1
            with pytest.MonkeyPatch.context() as broken:
                if rounds[0] == number:
                    broken.setattr(*call, fail)
                return done(*arguments)

        monkeypatch.setattr(batch, "next_round", counted)

    return arrange


READING, BROKEN = (os, "preadv"), OSError(errno.EIO, "Input/output error")


def test_the_command_has_printed_what_was_written_before_a_read_error(budgeted, least, late):
    whole = budgeted(*TIGHT, "abc", budget=least)[1].strip("\n")
    late(5, READING, BROKEN)
    printed = budgeted(*TIGHT, "abc", budget=least)
    assert re.search(r"cannot read .*safetensors at byte \d+: Input/output error", one_line(printed))
    assert printed[1].endswith("\n"), "the error has a line of its own"
    text = printed[1].strip("\n")
    assert whole.startswith(text) and 4 <= len(text) < len(whole)


def test_the_command_goes_on_with_other_lines_and_takes_up_those_that_failed(budgeted, least, late, tmp_path):
    jobs, output = tmp_path / "jobs.jsonl", tmp_path / "done.jsonl"
    jobs.write_text("".join(f'{{"id": "{name}", "prompt": "{name}"}}\n' for name in ("ab", "cd", "ef")))
    asked = ("--input", jobs, "--output", output, "--batch-size", 1, *TIGHT)

    def told(printed: tuple[int, str, str]) -> list[str]:
        return [line for line in printed[2].splitlines() if line.startswith("error: ")]

    late(14, READING, BROKEN)  # of the second line
    code, _, _ = printed = budgeted(*asked, budget=least)
    failed, count = told(printed)
    assert code == 2 and failed.startswith(f"error: {jobs} line 2: cannot read ")
    assert count == f"error: 1 of 3 lines of {jobs} could not be decoded"
    assert [line.split('"')[3] for line in output.read_text().splitlines()] == ["ab", "ef"]
    assert budgeted(*asked, budget=least)[0] == 0
    assert [line.split('"')[3] for line in output.read_text().splitlines()] == ["ab", "ef", "cd"]


def test_the_command_ends_at_ctrl_c(budgeted, least, late):
    late(4, (ThreadMover, "wait"), KeyboardInterrupt())
    code, text, err = budgeted(*TIGHT, "abc", budget=least)
    assert code == 130 and len(text) >= 3 and "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize("draft", [("--draft-bits", 4), ("--sparsity", "coarse")], ids=["4 bits", "coarse"])
def test_the_command_names_the_folder_of_a_full_disk(budgeted, draft, monkeypatch):
    asked = (*draft, *ASKED)
    least = int(re.search(r"give at least (\d+) bytes", one_line(budgeted(*asked, budget=9)))[1])
    monkeypatch.setattr(os, "pwrite", failing(errno.ENOSPC))
    assert "No space left on device; set TMPDIR to a folder with more room" in one_line(budgeted(*asked, budget=least))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory-budget", "lots", "abc"), "a memory budget is a number of bytes above 0, such as 8GiB"),
        (("--sparsity", "fine", "abc"), "a model that is streamed cannot be drafted with fine"),
        (("--max-context", 0, "abc"), "max_context counts tokens"),
        (("--compile", "abc"), "leave compile out"),
    ],
    ids=["lots", "fine", "context", "compile"],
)
def test_the_command_refuses_in_one_line(budgeted, arguments, words):
    assert words in one_line(budgeted(*arguments))


# --- threads and processes


def test_texts_of_threads_are_what_they_are_alone(folder, want):
    engine = streamed(folder, "110 010", COARSE)

    def decode(number: int) -> list[int]:
        return write(engine, (COARSE, PLAIN)[number % 2], prompt=PROMPTS[number % 3])

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(decode, range(9))) == [want[number % 3] for number in range(9)]


def test_a_model_may_be_called_by_one_thread_while_another_decodes_with_it(folder, want):
    engine, ids = streamed(folder, "000 000"), torch.tensor([PROMPTS[1]])
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        logits = engine.model(ids).logits
        texts = [pool.submit(write, engine) for _ in range(6)]
        calls = 0
        while not all(each.done() for each in texts):
            torch.testing.assert_close(engine.model(ids).logits, logits)
            calls += 1
    assert calls > 1 and all(each.result() == want[0] for each in texts)


PROGRAM = """
import os, sys, time
from pathlib import Path
from streaming import PLAIN, streamed

engine = streamed(Path(sys.argv[1]), "000 000", throttle=float(sys.argv[2]))
options = {"max_new_tokens": 3, "sparsity": PLAIN}
text = engine.generate([5, 17, 93], **options).token_ids
if not (child := os.fork()):
    os._exit(engine.generate([5, 17, 93], **options).token_ids != text)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(*text, flush=True)
"""


@pytest.mark.slow
def test_a_forked_process_decodes_too(folder):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder), "1e5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(map(int, done.stdout.split())) == greedy(llama(), [5, 17, 93], 3)
