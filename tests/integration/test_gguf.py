"""GGUF files: dequantised, they decode as transformers has it; what cannot be loaded is told in a line."""

import logging
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import greedy, tiny_model
from sirius import cli
from sirius.benchmark.convert import write_gguf
from sirius.engine import Engine
from sirius.errors import ConfigError, ModelError, RequestError, UnsupportedModelError
from sirius.model import gguf
from sirius.model.loading import Source, load_model, load_tokenizer

pytest.importorskip("accelerate")
GGUF = pytest.importorskip("gguf")
pytestmark = pytest.mark.integration

CONTROL = ["<|unknown|>", "<|begin|>", "<|end|>", "<|turn|>"]
MERGED = ["he", "ll", "hell", "hello"]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *MERGED]
MERGES = ["h e", "l l", "he ll", "hell o"]
TEMPLATE = "{% for m in messages %}<|begin|>{{ m['content'] }}<|turn|>{% endfor %}"
ARGMAX = {"period": 4, "accept": "argmax"}


def add_tokenizer(writer) -> None:
    """Give a file a tokenizer of bytes and a few words."""
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in CONTROL else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_chat_template(TEMPLATE)


def write(path: Path, extra=lambda writer: None, model=None) -> Path:
    def add(writer) -> None:
        add_tokenizer(writer)
        extra(writer)

    write_gguf(model or tiny_model(vocab_size=len(TOKENS)), path, add)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def file(saved, tmp_path) -> Path:
    """A copy of a sound file, to be damaged."""
    return Path(shutil.copy(saved, tmp_path / "tiny.gguf"))


def refused(path: object, error: type[Exception] = ModelError, **options: str) -> str:
    """Return the one line that loading is refused with."""
    with pytest.raises(error) as caught:
        Engine.load(str(path), **options)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is loaded


@pytest.mark.parametrize("prompt", ["hello world", "A\n é"])
@pytest.mark.parametrize("sparsity", ["coarse", "fine"])
def test_a_text_is_what_transformers_makes_of_the_same_file(saved, prompt, sparsity):
    theirs = AutoModelForCausalLM.from_pretrained(saved.parent, gguf_file=str(saved), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(saved.parent, gguf_file=str(saved))
    engine = Engine.load(saved, dtype="float32")
    want = greedy(theirs, tokenizer.encode(prompt), 24, eos_token_id=[2, 3])
    done = engine.generate(prompt, max_new_tokens=24, sparsity=sparsity, correction=ARGMAX)
    assert list(done.token_ids) == want
    assert done.text == tokenizer.decode(want, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_weights_are_those_that_were_written(saved):
    want = tiny_model(vocab_size=len(TOKENS)).state_dict()
    model = load_model(Source(str(saved)), "float32")
    assert all(torch.equal(weight, want[name]) for name, weight in model.state_dict().items())


def test_quantised_weights_are_dequantised(tmp_path, caplog):
    """A model of which every weight is a multiple of the same step loses nothing by eight bits."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}
    model = tiny_model(vocab_size=len(TOKENS), num_key_value_heads=2, **sizes)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_((weight * 64).round().clamp(-126, 126) / 64)
                weight[:, ::32] = 127 / 64  # of each block of 32: its scale
    plain, packed = write(tmp_path / "plain.gguf", model=model), tmp_path / "packed.gguf"
    repack(plain, packed)
    assert packed.stat().st_size < plain.stat().st_size / 2
    loaded = load_model(Source(str(packed)), "float32").state_dict()
    assert "weights of Q8_0, F32 are dequantised to float32" in caplog.text
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(loaded[name], weight, rtol=1e-3, atol=0)


def repack(source: Path, target: Path) -> None:
    """Copy a GGUF file with its matrices in Q8_0."""
    reader, writer = GGUF.GGUFReader(source), GGUF.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            listed = field.types[1] if field.types[0] == GGUF.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], listed)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            kind = GGUF.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor.name, GGUF.quants.quantize(tensor.data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_auto_is_bfloat16_and_another_dtype_is_as_asked(saved):
    assert load_model(Source(str(saved))).dtype == torch.bfloat16
    assert load_model(Source(str(saved)), "float16").dtype == torch.float16


def test_loading_says_in_one_line_what_weights_become_and_shows_no_bars(saved, caplog, capfd):
    with caplog.at_level(logging.INFO, "sirius"):
        Engine.load(saved)
    [line] = [record.getMessage() for record in caplog.records if record.name == "sirius"]
    assert line == "tiny.gguf: weights of F32 are loaded as bfloat16, 0.0 GB in memory"
    assert "Converting" not in capfd.readouterr().err


def test_a_file_is_named_by_itself_or_in_its_folder(saved, monkeypatch):
    want = load_model(Source(str(saved)), "float32").state_dict()["lm_head.weight"]
    assert torch.equal(Engine.load(saved.parent, gguf_file="tiny.gguf", dtype="float32").model.lm_head.weight, want)
    monkeypatch.chdir(saved.parent)
    assert torch.equal(Engine.load("tiny.gguf", dtype="float32").model.lm_head.weight, want)


def test_a_file_of_the_same_name_in_the_working_directory_is_not_taken(saved, tmp_path, monkeypatch):
    write(tmp_path / "tiny.gguf", model=tiny_model(vocab_size=len(TOKENS), seed=1))
    monkeypatch.chdir(tmp_path)
    weight = Engine.load(saved.parent, gguf_file="tiny.gguf", dtype="float32").model.lm_head.weight
    assert torch.equal(weight, tiny_model(vocab_size=len(TOKENS)).lm_head.weight)


def test_the_end_of_a_turn_ends_a_text_as_the_end_of_a_text_does(saved):
    assert Engine.load(saved).ends == {2, 3}


def test_chat_messages_take_the_files_template(saved):
    engine = Engine.load(saved)
    assert engine.decode(engine.encode([{"role": "user", "content": "hello"}])) == "<|begin|>hello<|turn|>"
    assert engine.encode("hello") == (TOKENS.index("hello"),)


def test_a_file_without_a_tokenizer_takes_token_ids_only(tmp_path):
    write_gguf(tiny_model(), tmp_path / "bare.gguf")
    assert load_tokenizer(Source(str(tmp_path / "bare.gguf"))) is None
    engine = Engine.load(tmp_path / "bare.gguf", dtype="float32")
    done = engine.generate([5, 6], max_new_tokens=6, correction=ARGMAX)
    assert list(done.token_ids) == greedy(tiny_model(), [5, 6], 6)
    with pytest.raises(RequestError, match="no tokenizer; give the prompt as token ids"):
        engine.generate("text")


def test_a_loaded_file_is_saved_as_an_ordinary_checkpoint(saved, tmp_path):
    engine = Engine.load(saved, dtype="float32")
    want = engine.generate("hello", max_new_tokens=8, correction=ARGMAX).token_ids
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    again = Engine.load(tmp_path)
    assert again.generate("hello", max_new_tokens=8, correction=ARGMAX).token_ids == want
    assert again.ends == engine.ends


def test_the_command_line_takes_a_file(saved, monkeypatch, capfd):
    command = f"sirius generate hello --model {saved} --dtype float32 --max-new-tokens 9 --accept argmax --period 4"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        cli.main()
    printed = capfd.readouterr()
    engine = Engine.load(saved, dtype="float32")
    assert printed.out == engine.generate("hello", max_new_tokens=9, correction=ARGMAX).text + "\n"
    assert "%|" not in printed.err


# --- what is refused


@pytest.mark.parametrize(
    ("missing", "named"),
    [(["gguf"], "gguf"), (["accelerate"], "accelerate"), (["gguf", "accelerate"], "gguf and accelerate")],
)
def test_a_missing_package_is_named_with_the_command_that_brings_it(saved, monkeypatch, missing, named):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None if name in missing else object())
    assert refused(saved) == f"{saved} needs {named}; pip install 'sirius-llm[gguf]'"


def test_a_file_that_is_not_there_is_named(tmp_path):
    assert refused(tmp_path / "no.gguf") == f"there is no file {tmp_path / 'no.gguf'}"
    assert refused(tmp_path, gguf_file="no.gguf") == f"{tmp_path} holds no file no.gguf"


def test_a_file_in_a_file_is_refused(saved):
    assert "give one" in refused(saved, ConfigError, gguf_file="other.gguf")


def test_samples_of_two_files_of_a_folder_are_kept_apart(tmp_path):
    """A run with another file of the same folder is to decode its own texts, not take up those of the first."""
    pytest.importorskip("lm_eval")
    from sirius.evaluation.grid import setting_for
    from sirius.evaluation.lm import SiriusLM

    for seed, name in enumerate(("one.gguf", "two.gguf")):
        write(tmp_path / name, model=tiny_model(vocab_size=len(TOKENS), seed=seed))
    asked = [("hello", {"until": [], "max_gen_toks": 8})]
    texts, keys = [], []
    for name in ("one.gguf", "two.gguf", "one.gguf"):
        lm = SiriusLM(str(tmp_path), gguf_file=name, device="cpu", completions=tmp_path / "samples", quiet=True)
        setting = setting_for("a task", {"sparsity": "none"})
        texts += [each["text"] for each in lm.samples(asked, setting)]
        keys += lm.keys(asked, setting)
    assert texts[0] == texts[2] != texts[1]
    assert len((tmp_path / "samples" / "rank0.jsonl").read_text().splitlines()) == 2  # the first was not decoded again
    assert keys[0] == keys[2] != keys[1]


def test_a_folder_of_gguf_files_names_one(saved):
    assert refused(saved.parent).endswith(f"to load its GGUF file, name {saved}")


@pytest.mark.parametrize("content", [b"", b"GG", b"no weights, just words"])
def test_what_is_no_gguf_file_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    assert refused(tmp_path / "x.gguf").endswith(f"x.gguf is no GGUF file: it begins with {content[:4]!r}")


def test_another_version_is_refused(file):
    file.write_bytes(b"GGUF" + struct.pack("<I", 1) + file.read_bytes()[8:])
    assert "is GGUF of version 1; versions 2 and 3 can be read" in refused(file)


@pytest.mark.parametrize("left", [4, 20, 24, 100, 2000])
def test_a_file_cut_off_in_its_head_is_refused(file, left):
    file.write_bytes(file.read_bytes()[:left])
    assert f"the head of {file} is broken or cut off" in refused(file)


def test_a_head_of_garbage_is_refused(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:24] + b"\xff" * 64 + whole[88:])
    assert f"the head of {file} is broken or cut off" in refused(file)


@pytest.mark.parametrize("alignment", [0, -32, "wide"])
def test_a_head_whose_alignment_is_no_number_of_bytes_is_refused(file, alignment, monkeypatch):
    monkeypatch.setattr("sirius.model.gguf._Reader.text", lambda self: "general.alignment")
    monkeypatch.setattr("sirius.model.gguf._Reader.value", lambda self: alignment)
    monkeypatch.setattr("sirius.model.gguf._Reader.tensor", lambda self: ())
    assert f"the head of {file} is broken or cut off" in refused(file)


def test_a_file_cut_off_in_its_weights_is_refused_with_both_sizes(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    assert f"{file} is cut off: {len(whole) - 100} of " in refused(file)


def test_an_architecture_that_transformers_does_not_know_is_refused(file):
    file.write_bytes(file.read_bytes().replace(b"llama", b"lemur"))
    message = refused(file)
    assert f"cannot load the config.json of {file}" in message
    assert "architecture lemur is not supported" in message


def test_one_part_of_a_file_is_refused(tmp_path):
    file = write(tmp_path / "part.gguf", lambda writer: writer.add_uint16("split.count", 3))
    assert "is one of 3 parts; join them" in refused(file)


def test_scaled_positions_are_refused_because_they_would_be_left_out(tmp_path):
    def scale(writer) -> None:
        writer.add_rope_scaling_type(GGUF.RopeScalingType.YARN)

    file = write(tmp_path / "scaled.gguf", scale)
    assert "scales its positions (yarn), which transformers leaves out" in refused(file, UnsupportedModelError)


def test_weights_that_do_not_fit_are_refused(file):
    file.write_bytes(file.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_no"))
    assert f"the weights of {file} do not fit its config.json: 1 missing keys" in refused(file)
