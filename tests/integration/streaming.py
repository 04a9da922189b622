"""What tests of offloading share: checkpoints in several files, engines of which chosen parts stay, and their texts."""

import os
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from conftest import greedy, tiny_model
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.kernels import cpu
from sirius.model.limits import MOST_READ
from sirius.model.loading import Source, load_config, load_empty, load_tokenizer
from sirius.model.prepared import prepared_of
from sirius.offload import plan as plans
from sirius.offload.load import Transfer, fill, find_weights, match
from sirius.offload.plan import Link, Plan, Residents, Setting
from sirius.offload.sizes import draft_of, sizes_of
from sirius.offload.stream import Planned

PLAIN, COARSE = SparsityConfig("none"), SparsityConfig("coarse")
FOUR, EIGHT = (SparsityConfig("none", draft_bits=bits) for bits in (4, 8))
PROMPT = [5, 17, 93, 41, 8, 60, 22]
PROMPTS = [PROMPT, [9, 9], [70, 3, 12, 88, 41, 6, 19, 101, 55, 20, 33]]
NEW = 10
compiled = pytest.mark.skipif(cpu.library() is None, reason="no compiled CPU kernels")


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Save a tiny model in several files, and return the folder."""
    model.save_pretrained(folder, max_shard_size="40KB")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    assert len(shards(folder)) > 1
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def residents(stays: str, blocks: int) -> Residents:
    """Return what stays in memory: "attention mlp rounded kept", each a digit for each block, as in "01 00 11 00"."""
    parts = stays.split() + ["0" * blocks] * 4
    assert all(len(part) == blocks for part in parts)
    return Residents(*(tuple(digit == "1" for digit in part) for part in parts[:4]))


def plan_of(folder: Path, stays: str, draft: SparsityConfig, dtype: torch.dtype, slots: int, buffers: int) -> Plan:
    config = load_config(Source(str(folder)))
    sizes, kind = sizes_of(config, dtype, draft, slots, MOST_READ), draft_of(draft)
    period, aal = (1, 1.0) if kind == "none" else (8, 5.0)
    setting = Setting(Link(1e8), 1e10, kind, period, aal)
    return plans._plan(sizes, residents(stays, config.num_hidden_layers), buffers, setting, 2**40)


def streamed(  # noqa: PLR0913 - a folder, and options by their names
    folder: Path,
    stays: str,
    draft: SparsityConfig = PLAIN,
    *,
    dtype: torch.dtype = torch.float32,
    held: bool = False,
    slots: int = 600,
    buffers: int = 3,
    throttle: float | None = None,
) -> Engine:
    """Return an engine of a saved model, of which only what `stays` names is in memory between passes.

    held  the rest is in the host's memory, and not in the files
    """
    source, plan = Source(str(folder)), plan_of(folder, stays, draft, dtype, slots, buffers)
    stored = find_weights(source)
    model = load_empty(source, load_config(source), dtype)
    where = match(source, model, stored)
    planned = Planned(plan, draft, slots, most=8)
    fill(model, where, planned, Transfer(torch.device("cpu"), held, throttle))
    prepared_of(model).slots = planned.slots
    return Engine(model, load_tokenizer(source))


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


@pytest.fixture
def known_speed(monkeypatch):
    """Nothing is measured, and the process itself takes no memory."""
    for name, value in {"held_now": 0, "transfer_speed": 1e8, "memory_speed": 1e10}.items():
        monkeypatch.setattr(f"sirius.offload.budget.{name}", lambda *_, value=value: value)
    monkeypatch.setattr("sirius.offload.budget.SLACK", 0)


def failing(number: int):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail
