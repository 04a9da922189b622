"""Faster decoding of large language models by contextual sparsity, with a full model that corrects the sparse one."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sirius.batch import Batch
    from sirius.core import CorrectionConfig, Round, SamplingConfig, SparsityConfig
    from sirius.engine import Engine
    from sirius.errors import (
        ConfigError,
        FileError,
        ModelError,
        OutOfMemoryError,
        RequestError,
        SiriusError,
        UnsupportedModelError,
    )
    from sirius.hf import SiriusOutput, decode, generate
    from sirius.model.prepare import prepare, restore
    from sirius.sparsity import PromptSparsity, TokenSparsity, register
    from sirius.stats import Stats, Touched
    from sirius.texts import Completion, Text, Update

__version__ = "0.1.0"

# Where each public name lives. Looked up at first use, so that `sirius --help` need not wait for torch.
_HOME = {
    "Batch": "batch",
    "Completion": "texts",
    "ConfigError": "errors",
    "CorrectionConfig": "core",
    "Engine": "engine",
    "FileError": "errors",
    "ModelError": "errors",
    "OutOfMemoryError": "errors",
    "PromptSparsity": "sparsity",
    "RequestError": "errors",
    "Round": "core",
    "SamplingConfig": "core",
    "SiriusError": "errors",
    "SiriusOutput": "hf",
    "SparsityConfig": "core",
    "Stats": "stats",
    "Text": "texts",
    "TokenSparsity": "sparsity",
    "Touched": "stats",
    "UnsupportedModelError": "errors",
    "Update": "texts",
    "decode": "hf",
    "generate": "hf",
    "prepare": "model.prepare",
    "register": "sparsity",
    "restore": "model.prepare",
}

__all__ = [
    "Batch",
    "Completion",
    "ConfigError",
    "CorrectionConfig",
    "Engine",
    "FileError",
    "ModelError",
    "OutOfMemoryError",
    "PromptSparsity",
    "RequestError",
    "Round",
    "SamplingConfig",
    "SiriusError",
    "SiriusOutput",
    "SparsityConfig",
    "Stats",
    "Text",
    "TokenSparsity",
    "Touched",
    "UnsupportedModelError",
    "Update",
    "__version__",
    "decode",
    "generate",
    "prepare",
    "register",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sirius' has no attribute {name!r}")
    return getattr(import_module(f"sirius.{_HOME[name]}"), name)
