"""Faster decoding of large language models by contextual sparsity, with a full model that corrects the sparse one."""

from sirius.core import CorrectionConfig, Round, SparsityConfig
from sirius.engine import Completion, Engine, Update
from sirius.errors import ConfigError, FileError, ModelError, RequestError, SiriusError, UnsupportedModelError
from sirius.hf import SiriusOutput, decode, generate
from sirius.model.prepare import prepare, restore
from sirius.sparsity import PromptSparsity, TokenSparsity, register
from sirius.stats import Stats, Touched

__version__ = "0.1.0"

__all__ = [
    "Completion",
    "ConfigError",
    "CorrectionConfig",
    "Engine",
    "FileError",
    "ModelError",
    "PromptSparsity",
    "RequestError",
    "Round",
    "SiriusError",
    "SiriusOutput",
    "SparsityConfig",
    "Stats",
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
