"""llama.cpp beside us: the file it reads holds our weights, and it is timed only where it computes what we do."""

import json

import pytest
import torch

from conftest import tiny_config, tiny_model
from sirius.benchmark import convert, extras, peer
from sirius.benchmark.models import make_model
from sirius.engine import Engine
from sirius.errors import ConfigError, ModelError

pytestmark = pytest.mark.integration

SMALL = ("--dtype", "float32", "--context", 8, "--tokens", 30, "--cycles", 2, "--period", 4, "--aal", 3, "--json")
LLAMA_CPP = ("--peer", "llama.cpp", "--device", "cpu")


def read(path) -> dict[str, torch.Tensor]:
    """Return the tensors of a GGUF file."""
    from gguf import GGUFReader

    tensors = {}
    for each in GGUFReader(path).tensors:
        data = torch.from_numpy(each.data.copy())
        tensors[each.name] = data.view(torch.bfloat16) if each.tensor_type.name == "BF16" else data
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_file_holds_the_weights_in_the_models_dtype(tmp_path, dtype, prepared):
    pytest.importorskip("gguf")
    model = tiny_model("llama", dtype)
    if prepared:
        Engine(model)
    convert.write_gguf(model, tmp_path / "model.gguf")
    tensors, weights = read(tmp_path / "model.gguf"), model.state_dict()
    assert len(tensors) == len(weights)
    for ours, theirs in [
        ("model.embed_tokens", "token_embd"),
        ("model.layers.1.mlp.down_proj", "blk.1.ffn_down"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
        ("lm_head", "output"),
    ]:
        assert torch.equal(tensors[f"{theirs}.weight"], weights[f"{ours}.weight"])
    assert torch.equal(
        tensors["blk.0.ffn_norm.weight"], weights["model.layers.0.post_attention_layernorm.weight"].float()
    )


def test_heads_are_turned_by_neighbouring_rows(tmp_path):
    """transformers turns row i of a head with row i + half of it, llama.cpp rows 2i and 2i + 1."""
    pytest.importorskip("gguf")
    model = tiny_model("llama")
    convert.write_gguf(model, tmp_path / "model.gguf")
    ours = model.state_dict()["model.layers.0.self_attn.k_proj.weight"]
    theirs = read(tmp_path / "model.gguf")["blk.0.attn_k.weight"]
    assert torch.equal(theirs[:6], ours[[0, 3, 1, 4, 2, 5]])
    assert torch.equal(theirs[6:], ours[[6, 9, 7, 10, 8, 11]])


def test_tied_weights_are_written_once(tmp_path):
    pytest.importorskip("gguf")
    convert.write_gguf(tiny_model("llama", tie_word_embeddings=True), tmp_path / "model.gguf")
    assert "output.weight" not in read(tmp_path / "model.gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_llama_cpp_agrees_and_is_timed(dtype):
    pytest.importorskip("llama_cpp")
    model = make_model(tiny_config("llama"), dtype, "cpu")
    with peer.open_peer(model, slots=40, threads=1) as other:
        turn = other.turn([1, 2, 3], 5)
        assert len(turn.seconds) == 5 and min(turn.seconds) > 0
        assert turn.tokens[:3] == [1, 2, 3] and len(turn.tokens) == 8
        assert other.turn([1, 2, 3], 5).tokens == turn.tokens


def test_a_model_that_llama_cpp_computes_otherwise_is_refused(monkeypatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.setattr(convert, "_interleaved", lambda name, weight, config: weight)
    with pytest.raises(ModelError, match="scores differ"), peer.open_peer(tiny_model("llama"), 40, 1):
        pass


def test_a_record_with_llama_cpp_has_its_row_and_version(bench, shape):
    pytest.importorskip("llama_cpp")
    code, out, _ = bench("decode", "--shape", shape, *SMALL, *LLAMA_CPP)
    assert code == 0
    record = json.loads(out)
    row = record["rows"][-1]
    full = record["rows"][1]["ms_per_token"]
    assert row["name"] == "llama.cpp" and row["peak_bytes"] is None and row["aal"] == 1
    assert row["ratio_to_full"] == pytest.approx(row["ms_per_token"] / full, abs=0.001)
    assert record["peer"].keys() == {"llama-cpp-python", "features", "difference"}
    assert 0 < record["peer"]["difference"] < peer.TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: tiny_model("qwen2"), "models of type llama .* this one is qwen2"),
        (lambda: tiny_model("llama", attention_bias=True), "biases"),
        (lambda: tiny_model("llama", torch.float64), "got --dtype float64"),
        (lambda: tiny_model("llama").to("meta"), "set --device cpu"),
    ],
    ids=["family", "biases", "dtype", "device"],
)
def test_a_model_that_llama_cpp_does_not_get_is_refused(model, says):
    with pytest.raises(ConfigError, match=says), peer.open_peer(model(), 40, 1):
        pass


def test_without_the_package_the_way_to_install_it_is_told(bench, shape, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(extras, "import_module", missing)
    code, out, err = bench("decode", "--shape", shape, *SMALL, *LLAMA_CPP)
    assert code == 2 and out == "" and "pip install 'sirius-llm[peer]'" in err


def test_another_peer_is_refused(bench, shape):
    code, _, err = bench("decode", "--shape", shape, *SMALL, "--peer", "vllm")
    assert code == 2 and "--peer is llama.cpp" in err
