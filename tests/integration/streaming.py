"""What tests of offloading share: checkpoints in several files, and engines of which chosen parts stay in memory."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sirius.core import SparsityConfig
from sirius.engine import Engine
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
