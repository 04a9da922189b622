"""The public names: one line for each, which type checkers read and `__init__.py` loads at first use."""

from .batch import Batch as Batch
from .core import CorrectionConfig as CorrectionConfig
from .core import Round as Round
from .core import SamplingConfig as SamplingConfig
from .core import SparsityConfig as SparsityConfig
from .engine import Engine as Engine
from .errors import ConfigError as ConfigError
from .errors import FileError as FileError
from .errors import ModelError as ModelError
from .errors import OutOfMemoryError as OutOfMemoryError
from .errors import RequestError as RequestError
from .errors import SiriusError as SiriusError
from .errors import UnsupportedModelError as UnsupportedModelError
from .hf import SiriusOutput as SiriusOutput
from .hf import decode as decode
from .hf import generate as generate
from .model.prepare import prepare as prepare
from .model.prepare import restore as restore
from .offload.budget import Budget as Budget
from .sparsity import PromptSparsity as PromptSparsity
from .sparsity import TokenSparsity as TokenSparsity
from .sparsity import register as register
from .stats import Stats as Stats
from .stats import Touched as Touched
from .texts import Completion as Completion
from .texts import Text as Text
from .texts import Update as Update

__version__: str
