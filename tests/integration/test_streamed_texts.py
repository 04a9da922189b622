"""Models of which a part stays in memory: their texts are the model's own."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from streaming import (  # noqa: F401 - fixtures
    COARSE,
    EIGHT,
    FOUR,
    NEW,
    PLAIN,
    PROMPT,
    PROMPTS,
    chain,
    compiled,
    folder,
    llama,
    save,
    streamed,
    want,
    write,
    write_all,
)
from test_exactness import assert_fresh

from conftest import FAMILIES, greedy, slow, tiny_model
from sirius.core import CorrectionConfig, SamplingConfig, SparsityConfig
from sirius.engine import Engine

pytestmark = pytest.mark.integration


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
