"""`Engine.load` under a memory budget: budgets, lengths and dtypes, and checkpoints that do not fit."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from streaming import (  # noqa: F401 - fixtures
    COARSE,
    FOUR,
    PLAIN,
    PROMPT,
    folder,
    known_speed,
    llama,
    save,
    shards,
    streamed,
    want,
    write,
)

from sirius.engine import Engine
from sirius.errors import ConfigError, ModelError, RequestError, UnsupportedModelError
from sirius.model.prepared import prepared_of

pytestmark = pytest.mark.integration


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
