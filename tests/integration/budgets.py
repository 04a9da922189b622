"""Tiny models in folders, loaded under the smallest memory budget that works, so that most blocks do not stay."""

import re
from pathlib import Path

import pytest

from conftest import tiny_model
from sirius.engine import Engine
from sirius.errors import ConfigError
from sirius.offload import budget as budgets
from sirius.offload.budget import Budget

LAYERS = 4  # with two buffers, two blocks have to come each time


def saved(folder: Path, family: str = "llama", **changes: object) -> Path:
    """Save a random model whose texts do not end by themselves; return its folder."""
    tiny_model(family, num_hidden_layers=LAYERS, eos_token_id=None, **changes).save_pretrained(folder)  # type: ignore[arg-type]
    return folder


def smallest(folder: Path, **options: object) -> int:
    """Return the bytes of the smallest budget with which a folder's model can be loaded with options of `Budget`."""
    with pytest.raises(ConfigError, match="is too small") as error:
        Engine.load(folder, memory_budget=Budget(1, **options))  # type: ignore[arg-type]
    found = re.search(r"give at least (\d+) bytes", str(error.value))
    assert found is not None
    return int(found[1])


def streamed(folder: Path, more: int = 0, **options: object) -> Engine:
    """Load a folder's model under the smallest budget, and so many bytes more."""
    return Engine.load(folder, memory_budget=Budget(smallest(folder, **options) + more, **options))  # type: ignore[arg-type]


def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans be the same whatever ran before and beside: nothing is held, a disk and memory of given speeds."""
    monkeypatch.setattr(budgets, "held_now", lambda: 0)
    monkeypatch.setattr(budgets, "link_speed", lambda units, mover: 1e9)
    monkeypatch.setattr(budgets, "memory_speed", lambda dtype, device: 2e10)
