"""What is loaded and what is refused: the message names the thing that does not fit, and the model stays as it was."""

import json
import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import are_progress_bars_disabled
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    T5Config,
    ViTConfig,
)
from transformers.utils import logging as transformers_logging

from conftest import tiny_config, tiny_model
from sirius.engine import Engine
from sirius.errors import ConfigError, ModelError, RequestError, UnsupportedModelError
from sirius.model.loading import Source, load_config, load_empty, load_model, load_tokenizer, quiet
from sirius.model.prepare import prepare

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("offline")]

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"
SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture
def offline(monkeypatch):
    """Say so as a user would, and also to the library that read the variable when it was imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of a sound checkpoint, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refused(path: object, error: type[Exception] = ModelError, **options: str) -> str:
    """Return the one line that loading is refused with."""
    with pytest.raises(error) as caught:
        Engine.load(str(path), **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def set_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def set_weights(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    weights = {**load_file(folder / WEIGHTS), **changes}
    kept = {name: w for name, w in weights.items() if w is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


# --- what is loaded


def test_a_folder_is_loaded_with_the_weights_that_were_saved(saved):
    model = Engine.load(str(saved)).model
    want = tiny_model().state_dict()
    assert not model.training
    assert all(torch.equal(weight, want[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_a_dtype_is_loaded_as_asked_and_auto_is_the_checkpoints(saved, tmp_path, dtype):
    assert load_model(Source(str(saved)), dtype).dtype == getattr(torch, dtype)
    tiny_model(dtype=getattr(torch, dtype)).save_pretrained(tmp_path)
    assert load_model(Source(str(tmp_path))).dtype == getattr(torch, dtype)


def test_a_folder_without_a_tokenizer_takes_token_ids_only(saved):
    assert load_tokenizer(Source(str(saved))) is None
    engine = Engine.load(str(saved))
    assert len(engine.generate([5, 6], max_new_tokens=3).token_ids) == 3
    with pytest.raises(RequestError, match="no tokenizer; give the prompt as token ids"):
        engine.generate("text")
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        engine.generate([5, 6], stop="x")


# --- folders and files


def test_a_folder_that_is_not_there_is_named(tmp_path):
    assert refused(tmp_path / "nowhere") == f"there is no model folder {tmp_path / 'nowhere'}"


def test_a_file_is_refused_and_the_folder_asked_for(saved):
    assert "is a file; name the model's folder" in refused(saved / "config.json")


def test_a_folder_without_a_config_is_refused(folder):
    (folder / "config.json").unlink()
    assert refused(folder) == f"{folder} holds no config.json; name a folder that save_pretrained wrote"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type":', "not a valid JSON file"),
        ("\x00", "not a valid JSON file"),
        ("[]", ""),  # transformers words it by version
        ('{"model_type": "pigeon"}', "`pigeon`"),
    ],
)
def test_a_broken_config_is_refused(folder, text, words):
    (folder / "config.json").write_text(text)
    message = refused(folder)
    assert f"cannot load the config.json of {folder}" in message
    assert words in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str (value: 'wide')"),
        ({"hidden_size": 37}, "hidden size (37) is not a multiple of the number of attention heads (6)"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_act": "swoosh"}, "KeyError 'swoosh'"),
    ],
)
def test_a_config_with_an_impossible_value_is_refused(folder, change, words):
    set_config(folder, **change)
    assert words in refused(folder)


def test_a_folder_without_weights_is_refused(folder):
    (folder / WEIGHTS).unlink()
    assert refused(folder) == f"{folder} holds no *.safetensors weights"


def test_pickled_weights_are_refused_unread(folder):
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never unpickled")
    message = refused(folder)
    assert "only pickled weights (pytorch_model.bin), which can run code when loaded" in message
    assert "save_pretrained" in message


def test_pickled_weights_beside_other_tensors_are_refused_unread(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).rename(folder / "adapter.safetensors")
    assert "no file named model.safetensors" in refused(folder)


@pytest.mark.parametrize("left", [0, 5, 0.5, 0.999])
def test_weights_that_were_cut_off_are_refused(folder, left):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: left if isinstance(left, int) else int(left * len(whole))])
    message = refused(folder)
    assert f"cannot load the weights of {folder}: Error while deserializing header" in message


def test_weights_of_garbage_are_refused(folder):
    (folder / WEIGHTS).write_bytes(b"no tensors here, just words " * 40)
    assert "Error while deserializing header" in refused(folder)


def test_a_missing_shard_is_named(folder):
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")
    names = load_file(folder / "model-00001-of-00002.safetensors")
    shards = {name: f"model-0000{1 + (name == UP)}-of-00002.safetensors" for name in names}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert "model-00002-of-00002.safetensors" in refused(folder)


def test_a_missing_weight_is_refused_and_not_made_up(folder):
    set_weights(folder, {UP: None})
    assert refused(folder) == f"the weights of {folder} do not fit its config.json: 1 missing keys, first {UP}"


def test_more_layers_than_weights_are_refused(folder):
    set_config(folder, num_hidden_layers=3)
    assert "9 missing keys, first model.layers.2" in refused(folder)


def test_a_weight_of_another_shape_is_refused_with_both_shapes(folder):
    set_weights(folder, {UP: torch.zeros(3, 5)})
    message = refused(folder)
    assert f"1 mismatched keys, first {UP} ((3, 5) stored, (45, 36) wanted)" in message


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "mod')
    assert f"cannot load the tokenizer of {folder}" in refused(folder)


def test_a_hub_id_is_refused_when_offline_and_nothing_is_connected_to(monkeypatch):
    connected = []
    monkeypatch.setattr("socket.socket.connect", lambda _, address: connected.append(address))
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: connected.append(address))
    message = refused("somebody/some-model")
    assert "cannot load the config.json of somebody/some-model" in message
    assert "couldn't connect" in message
    assert message.endswith(
        "HF_HUB_OFFLINE is set, so nothing is fetched: unset it, or name a local folder that holds the model"
    )
    assert connected == []


@pytest.mark.parametrize(("token", "said"), [(None, "HF_TOKEN is not set"), ("x", "the one in HF_TOKEN has no access")])
def test_a_gated_model_is_refused_with_the_token_that_it_needs(monkeypatch, token, said):
    def gated(*_, **__):
        cause = GatedRepoError("401", response=MagicMock())
        raise OSError("You are trying to access a gated repo.\nMake sure.") from cause

    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("sirius.model.loading.AutoConfig.from_pretrained", gated)
    message = refused("somebody/some-model")
    assert "You are trying to access a gated repo; a gated or private model needs the token" in message
    assert f"({said}); or name a local folder" in message


def test_a_hub_that_cannot_be_reached_leaves_a_local_folder(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files.\nCheck.")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("sirius.model.loading.AutoConfig.from_pretrained", unreachable)
    assert refused("somebody/some-model").endswith("to load the files; name a local folder that holds the model")


# --- what is said


@pytest.fixture
def loud():
    """Let transformers and its hub say what they say by themselves; other tests may have quietened them."""
    before = verbosity()
    transformers_logging.set_verbosity_warning()
    hub_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    yield
    transformers_logging.set_verbosity(before[0])
    hub_logging.set_verbosity(before[1])
    if not before[2]:
        transformers_logging.disable_progress_bar()


def verbosity() -> tuple[int, int, bool, bool]:
    return (
        transformers_logging.get_verbosity(),
        hub_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        are_progress_bars_disabled(),
    )


def test_loading_prints_nothing_and_leaves_what_others_print_as_it_was(saved, loud, capfd, monkeypatch):
    seen, load = [], AutoModelForCausalLM.from_pretrained

    def watched(*place, **options):
        seen.append(verbosity())
        return load(*place, **options)

    monkeypatch.setattr("sirius.model.loading.AutoModelForCausalLM.from_pretrained", watched)
    Engine.load(str(saved))
    assert seen == [(logging.ERROR, logging.ERROR, False, True)]
    assert verbosity() == (logging.WARNING, logging.WARNING, True, False)
    assert capfd.readouterr() == ("", "")


def test_notes_that_were_asked_for_are_shown(loud):
    transformers_logging.set_verbosity_info()
    with quiet():
        assert transformers_logging.get_verbosity() == logging.INFO
    assert transformers_logging.get_verbosity() == logging.INFO


def test_weights_that_the_model_has_no_place_for_are_told_in_one_line(folder, caplog):
    Engine.load(str(folder))
    set_weights(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3)})
    Engine.load(str(folder))
    assert not caplog.records
    set_weights(folder, {"value_head.weight": torch.zeros(3), "value_head.bias": torch.zeros(3)})
    Engine.load(str(folder))
    assert caplog.messages == [
        f"{folder}: the model has no place for 2 of the checkpoint's weights, which are left out; first value_head.bias"
    ]


# --- models that do not fit


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantised_checkpoint_is_refused(folder, method):
    set_config(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    assert "llama checkpoint is quantised" in refused(folder, UnsupportedModelError)


def test_an_encoder_decoder_is_refused(folder):
    T5Config(d_model=16).save_pretrained(folder)
    assert "t5 is an encoder-decoder" in refused(folder, UnsupportedModelError)


def test_a_model_of_images_is_refused(folder):
    ViTConfig(hidden_size=16).save_pretrained(folder)
    assert refused(folder, UnsupportedModelError) == f"{folder} is a vit model, not a causal language model"


def test_a_model_whose_state_cannot_be_rolled_back_is_refused(folder):
    MambaConfig(hidden_size=16, num_hidden_layers=2).save_pretrained(folder)
    message = refused(folder, UnsupportedModelError)
    assert "mamba has layers of kind linear_attention, whose state cannot be rolled back" in message


@pytest.mark.parametrize(
    ("config", "block", "holds"),
    [
        (GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2), "transformer.h.0", "mlp.c_fc"),
        (
            OPTConfig(
                vocab_size=50, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                word_embed_proj_dim=16, max_position_embeddings=64,
            ),
            "model.decoder.layers.0",
            "fc1",
        ),
    ],
    ids=["gpt2", "opt"],
)  # fmt: skip
def test_an_mlp_without_a_gate_is_refused(tmp_path, config, block, holds):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = refused(tmp_path, UnsupportedModelError)
    assert message.startswith(f"{block} has no gated MLP (gate, up and down layers)")
    assert holds in message


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SMALL, num_local_experts=4),
        Qwen2MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8),
        Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, moe_intermediate_size=8),
    ],
    ids=["mixtral", "qwen2_moe", "qwen3_moe"],
)
def test_a_mixture_of_experts_is_refused(tmp_path, config):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    message = refused(tmp_path, UnsupportedModelError)
    assert message.startswith("model.layers.0.mlp.experts.gate_up_proj holds many experts")


def test_experts_in_some_layers_only_are_refused_too():
    config = Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, moe_intermediate_size=8, mlp_only_layers=[0])
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\.mlp\.experts"):
        prepare(AutoModelForCausalLM.from_config(config))


def test_unknown_dtypes_and_devices_are_refused_with_a_way_out(saved):
    assert refused(saved, ConfigError, dtype="int3").startswith("dtype is auto, float32, float64, bfloat16, float16")
    for device in ("abacus", "cuda:99", ""):
        message = refused(saved, ConfigError, device=device)
        assert message.startswith(f"device {device!r} cannot be used here: ")
        assert message.endswith("'cpu' always can") and len(message) < 140
    assert "it is none of auto, cpu, cuda, cuda:1, ..." in refused(saved, ConfigError, device="abacus")


def test_a_tokenizer_that_its_library_cannot_build_is_told_in_one_line(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise Exception("Error while initializing BPE: Token `!#` out of vocabulary")  # as the library does

    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("sirius.model.loading.AutoTokenizer.from_pretrained", broken)
    with pytest.raises(ModelError, match=r"cannot load the tokenizer of .*Token `!#` out of vocabulary"):
        Engine.load(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifiers_folder_is_refused_by_its_name(tied, tmp_path):
    config = tiny_config("llama", tie_word_embeddings=tied)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="is a LlamaForSequenceClassification, not a causal language model"):
        Engine.load(tmp_path)


def test_a_model_without_weights_leaves_modules_of_other_threads_alone(tmp_path, monkeypatch):
    tiny_model().save_pretrained(tmp_path)
    source, register = Source(str(tmp_path)), nn.Module.register_parameter
    others, made = ThreadPoolExecutor(1), []

    def from_config(*arguments, **options):
        made.append(others.submit(nn.Linear, 2, 2).result())
        return model_of(*arguments, **options)

    model_of = AutoModelForCausalLM.from_config
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", from_config)
    with ThreadPoolExecutor(4) as threads:
        models = [threads.submit(load_empty, source, load_config(source), torch.float32) for _ in range(4)]
    assert all(weight.is_meta for model in models for weight in model.result().parameters())
    assert not any(weight.is_meta for layer in made for weight in layer.parameters())
    assert nn.Module.register_parameter is register
