"""What decoding asks of a GPU, and whether all that it uses is there; `standin` is the GPU."""

import pytest
from standin import StandIn, move, standing_in

from conftest import greedy, slow, tiny_model
from sirius import CorrectionConfig, Engine, SamplingConfig, SparsityConfig

pytestmark = pytest.mark.integration

PROMPT, OTHER = [5, 9, 2], [8, 8, 100, 3]
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=3)
METHODS = {
    "coarse per row": SparsityConfig("coarse", 0.4),
    "coarse refreshed": SparsityConfig("coarse", 0.4, refresh=0.2),
    "fine with a threshold": SparsityConfig("fine", threshold=0.3),
    "fine per branch": SparsityConfig("fine", 0.4, per_branch=True),
}


@pytest.fixture
def standin(monkeypatch) -> StandIn:
    with standing_in(monkeypatch) as standin:
        yield standin


@pytest.mark.parametrize(
    ("method", "width"),
    [("coarse", 1), ("fine", 3), ("none", 1), slow("coarse", 3), slow("fine", 1), slow("none", 3)],
)
def test_a_round_asks_its_device_once_and_all_that_it_uses_is_there(standin, method, width):
    model, correction = tiny_model(eos_token_id=7), CorrectionConfig(5, "argmax", tree_width=width)
    move(model)
    engine = Engine(model)
    batch = engine.batch(rows=1, sparsity=SparsityConfig(method), correction=correction)
    batch.add(engine.text(PROMPT, max_new_tokens=18))
    asked = []
    while batch.busy:
        standin.answers.clear()
        [update] = batch.step()
        asked.append(list(standin.answers))
    checked = ["_local_scalar_dense"] * (method == "coarse")  # whether all layers' sets are sets, with the first round
    assert asked[1] == [*checked, "fetched"]
    ended = ["fetched"] * (method == "fine")  # what the steps of a text have read
    assert all(each == ["fetched"] for each in asked[2:-1]) and asked[-1] == ["fetched", *ended], asked
    assert standin.captures > 0
    assert list(update.completion.token_ids) == greedy(tiny_model(eos_token_id=7), PROMPT, 18)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *(("coarse per row", "threshold"), ("coarse refreshed", "threshold"), ("fine with a threshold", "argmax")),
        *(("fine per branch", "sampling"), slow("coarse per row", "sampling"), slow("coarse refreshed", "argmax")),
        *(slow("fine with a threshold", "sampling"), slow("fine per branch", "argmax")),
    ],
)
def test_a_batch_there_writes_what_it_does_here(monkeypatch, name, rule):
    options = {
        "batch_size": 2,
        "max_new_tokens": 14,
        "sparsity": METHODS[name],
        "correction": CorrectionConfig(4, rule, tree_width=2),
        "sampling": SAMPLED if rule == "sampling" else SamplingConfig(),
    }
    prompts, models = [PROMPT, OTHER, OTHER[:2]], [tiny_model("gemma2", eos_token_id=None) for _ in range(2)]
    here = dict(Engine(models[0]).generate_many(prompts, **options))
    with standing_in(monkeypatch) as standin:
        move(models[1])
        there = dict(Engine(models[1]).generate_many(prompts, **options))
    assert {n: text.token_ids for n, text in there.items()} == {n: text.token_ids for n, text in here.items()}
    assert bool(standin.captures) == ("refreshed" not in name)
    assert standin.kernels >= {"project", "attend"}
