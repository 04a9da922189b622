"""Folders with a `custom_generate` of ours, as transformers and lm-eval load them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sirius import FileError, SiriusOutput
from sirius.demo.embedded import FOLDER
from sirius.hf.export import export
from sirius.settings import make_setting

LOSSLESS = make_setting({"sparsity": "coarse", "period": 4, "accept": "argmax"})


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Keep transformers' copies of a folder's code out of the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with the embedded model and our `custom_generate`."""
    folder = tmp_path / "checkpoint"
    AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").save_pretrained(folder)
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(folder)
    export(folder, LOSSLESS)
    return folder


def ids() -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    return torch.tensor([tokenizer.encode("Tina has 30 coins. She sells 8 coins.")])


def test_a_folder_makes_generate_decode_our_way(tmp_path):
    export(tmp_path, LOSSLESS)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").eval()
    want = model.generate(ids(), max_new_tokens=24, do_sample=False)
    options = {"custom_generate": str(tmp_path), "trust_remote_code": True, "do_sample": False, "max_new_tokens": 24}
    assert torch.equal(model.generate(ids(), **options), want)
    found = model.generate(ids(), return_dict_in_generate=True, **options)
    assert isinstance(found, SiriusOutput)
    assert found.stats[0].period == 4
    other = model.generate(ids(), return_dict_in_generate=True, period=7, **options)  # a knob of the call
    assert other.stats[0].period == 7


def test_a_checkpoint_with_it_always_decodes_our_way(checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32").eval()
    ours = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
    want = plain.generate(ids(), max_new_tokens=24, do_sample=False)
    found = ours.generate(ids(), max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    assert isinstance(found, SiriusOutput)
    assert torch.equal(found.sequences, want)


def test_a_pipeline_takes_such_a_checkpoint(checkpoint):
    options = {"do_sample": False, "max_new_tokens": 12, "return_full_text": False}
    ours = pipeline("text-generation", str(checkpoint), trust_remote_code=True)
    plain = pipeline("text-generation", str(FOLDER), dtype=torch.float32)
    assert ours("Adam has 4 bags.", **options) == plain("Adam has 4 bags.", **options)


def test_lm_evals_own_model_takes_such_a_folder(checkpoint, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def texts(model: HFLM, **options) -> list[str]:
        given = {"until": ["."], "do_sample": False, "max_gen_toks": 16, **options}
        asked = [Instance("generate_until", {}, (prompt, given), 0) for prompt in ("Adam has 4 bags.", "Tina has 3")]
        return model.generate_until(asked, disable_tqdm=True)

    want = texts(HFLM(str(FOLDER), device="cpu", dtype="float32", batch_size=2))
    assert texts(HFLM(str(checkpoint), device="cpu", batch_size=2, trust_remote_code=True)) == want
    by_folder = {"custom_generate": str(checkpoint), "trust_remote_code": True, "sparsity": "fine"}
    assert texts(HFLM(str(FOLDER), device="cpu", dtype="float32", batch_size=2), **by_folder) == want


def test_a_file_of_somebody_else_is_not_written_over(tmp_path):
    export(tmp_path, LOSSLESS)
    export(tmp_path, LOSSLESS)
    path = tmp_path / "custom_generate" / "generate.py"
    path.write_text("def generate(model, **kwargs): ...\n")
    with pytest.raises(FileError, match="was not written by sirius"):
        export(tmp_path, LOSSLESS)
