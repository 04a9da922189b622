"""Models that accelerate has placed, or that processes share: refused by name, left as they were, with a way out."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from sirius.engine import Engine
from sirius.errors import UnsupportedModelError
from sirius.model.prepare import prepare

accelerate = pytest.importorskip("accelerate")

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore:.*:FutureWarning")]

PROMPT = [5, 6, 7]
CPU = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"), "cpu")
DISK = {**CPU, "model.layers.1": "disk"}
Place = Callable[[Path, Path], torch.nn.Module]  # a model's folder, and another one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("model")
    tiny_model(eos_token_id=None).save_pretrained(found)
    return found


def written(model) -> list[int]:
    """Return what transformers writes after the prompt, wherever the weights are."""
    return model.generate(torch.tensor([PROMPT]), max_new_tokens=6, do_sample=False)[0, len(PROMPT) :].tolist()


def mapped(folder, beside):
    return AutoModelForCausalLM.from_pretrained(folder, device_map=DISK, offload_folder=beside)


def dispatched(folder, beside):
    return accelerate.dispatch_model(whole(folder, beside), DISK, main_device="cpu", offload_dir=beside)


def hooked(folder, beside):
    return accelerate.dispatch_model(whole(folder, beside), {**CPU, "model.layers.1": "cpu"}, force_hooks=True)


def offloaded(folder, beside):
    return accelerate.cpu_offload(whole(folder, beside), execution_device=torch.device("cpu"))


def on_disk(folder, beside):
    return accelerate.disk_offload(whole(folder, beside), beside, execution_device=torch.device("cpu"))


def whole(folder, beside):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    ("place", "named"),
    [
        (mapped, r"model\.layers\.1 on disk; model\.\w+, [\w.]+ and 3 more modules on cpu"),
        (dispatched, r"model\.layers\.1 on disk; model\.\w+, [\w.]+ and 3 more modules on cpu"),
        (hooked, r"model\.\w+, [\w.]+ and 4 more modules on cpu"),
        (offloaded, r"model\.embed_tokens, model\.layers\.0\.self_attn\.q_proj and \d+ more modules"),
        (on_disk, r"model\.embed_tokens, model\.layers\.0\.self_attn\.q_proj and \d+ more modules"),
    ],
)
@pytest.mark.parametrize("used", [Engine, prepare])
def test_a_model_that_accelerate_brings_part_by_part_is_refused_by_its_placement(
    folder, tmp_path, place: Place, named, used
):
    model = place(folder, tmp_path)
    before = [type(each) for each in model.modules()], written(model)
    with pytest.raises(UnsupportedModelError, match=rf"^accelerate has placed this model \({named}\)") as error:
        used(model)
    assert f"load it with Engine.load('{folder}', memory_budget=...)" in str(error.value)
    assert "\n" not in str(error.value)
    assert ([type(each) for each in model.modules()], written(model)) == before


def test_gpus_of_a_device_map_are_named(folder, tmp_path):
    model = mapped(folder, tmp_path)
    model.hf_device_map = {"model": 0, "lm_head": 1}
    with pytest.raises(UnsupportedModelError, match=r"\(model on GPU 0; lm_head on GPU 1\)"):
        prepare(model)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {**CPU, "model.layers.1": "cpu"}])
def test_a_model_that_a_device_map_puts_whole_on_one_device_is_taken(folder, device_map):
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    got = Engine(model).generate(PROMPT, max_new_tokens=6)
    assert list(got.token_ids) == written(whole(folder, None))


def test_a_placed_model_whose_hooks_are_taken_off_is_told_to_be_loaded_within_a_budget(folder, tmp_path):
    model = mapped(folder, tmp_path)
    accelerate.hooks.remove_hook_from_submodules(model)
    with pytest.raises(UnsupportedModelError, match=r"spread over cpu, meta; load it whole.*memory_budget"):
        prepare(model)


SPLIT = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
import sirius
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_size=2)).eval()
ids = torch.tensor([[5, 6, 7]])
def write(**options):
    return model.generate(ids, max_new_tokens=6, do_sample=False, **options)[0, 3:].tolist()
said, before = [], write()
for ask in (sirius.prepare, sirius.Engine, lambda model: write(custom_generate=sirius.decode)):
    try:
        said.append(repr(ask(model)))
    except sirius.UnsupportedModelError as error:
        said.append(str(error))
print(json.dumps([before, write(), said]))
torch.distributed.destroy_process_group()
"""


def test_a_model_that_two_processes_share_is_refused_in_each_and_still_runs(folder):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    names = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", SPLIT, str(folder)],
            env={**os.environ, **names, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    found = [json.loads(each.communicate(timeout=180)[0].splitlines()[-1]) for each in both]
    assert found[0] == found[1]
    before, after, said = found[0]
    assert before == after == written(whole(folder, None))
    assert len(said) == 3 and len(set(said)) == 1
    assert said[0].startswith("this model is split over 2 processes (tensor parallelism or FSDP)")
    assert f"Engine.load('{folder}', memory_budget=...)" in said[0] and "torchrun" in said[0]
