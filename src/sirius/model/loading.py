"""Load a causal language model and its tokenizer from a folder, GGUF file or hub; refuse what cannot be used."""

import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, cast

import huggingface_hub.constants
import torch
from huggingface_hub.errors import RepositoryNotFoundError, StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from sirius.errors import ConfigError, ModelError, UnsupportedModelError
from sirius.model import gguf
from sirius.model.prepare import check_config

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGUF = ".gguf"
_MAKING = Lock()  # held while models without weights are made
HEADS = re.compile("For(Sequence|Token)Classification|ForQuestionAnswering|ForMaskedLM|RewardModel")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
HARMLESS = re.compile(r"(^|\.)(inv_freq|position_ids|masked_bias|attn\.bias)$")  # older versions saved these too
BROKEN = (  # what transformers raises of a broken checkpoint
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    MemoryError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Source:
    """Where a model comes from: a folder or a hub id, at a revision, with its own code only if trusted.

    gguf_file  a GGUF file of it, which holds everything; `path` alone may also name one (*.gguf)
    """

    path: str
    revision: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None

    @property
    def location(self) -> str:
        """The folder with a leading ~ resolved, or the hub id."""
        return str(Path(self.path).expanduser()) if self.path.startswith("~") else self.path

    @property
    def options(self) -> dict[str, Any]:
        """The arguments that all of transformers' loaders take."""
        hub = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return {**hub, "gguf_file": self.gguf_file} if self.gguf_file else hub

    def found(self) -> "Source":
        """Return the source with its GGUF file, if it is one, as a whole path; a hub's is fetched.

        transformers would take a file of that name from the working directory before one of the folder.
        """
        path = Path(self.location)
        if path.suffix.lower() == GGUF and not path.is_dir():
            if self.gguf_file:
                raise ConfigError(f"{self.path} is a file itself, and gguf_file {self.gguf_file} another; give one")
            if not path.is_file():
                raise ModelError(f"there is no file {path}")
            return replace(self, path=str(path.parent), gguf_file=str(path.absolute()))
        if not self.gguf_file:
            return self
        if not path.is_dir():
            check_folder(self.location)  # raises of what is no hub id either
            fetch = partial(cached_file, filename=self.gguf_file, revision=self.revision)
            file = Path(attempt(replace(self, gguf_file=None), self.gguf_file, fetch))
            return replace(self, path=str(file.parent), gguf_file=str(file))
        if not (file := path / self.gguf_file).is_file():
            raise ModelError(f"{self.path} holds no file {self.gguf_file}")
        return replace(self, path=str(path), gguf_file=str(file.absolute()))

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.gguf_file or self.path


def load_model(source: Source, dtype: str | torch.dtype = "auto", device: str = "auto") -> PreTrainedModel:
    """Load a causal model from safetensors or GGUF; "auto" is the checkpoint's dtype, and a GPU if there is one.

    A GGUF file's weights are dequantised, by "auto" to bfloat16. Raises ModelError where the checkpoint is missing,
    broken, incomplete or pickled, UnsupportedModelError where it is no causal language model that can be rolled back.
    """
    wanted = dtype if dtype == "auto" else find_dtype(dtype, auto=True)
    target = find_device(device)
    source = source.found()
    if source.gguf_file:
        return _moved(_load_gguf(source, torch.bfloat16 if isinstance(wanted, str) else wanted), target).eval()
    check_folder(source.location)
    return _moved(_load(source, wanted, use_safetensors=True), target).eval()


def _load_gguf(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    head = gguf.read_head(Path(str(source.gguf_file)))
    gguf.check_gguf(head)
    with gguf.quiet():
        model = _load(source, dtype, **gguf.options())
    gguf.tell(head, dtype)
    if getattr(model.config, "quantization_config", None) is not None:
        del cast("Any", model.config).quantization_config  # no weight is quantised any more
    if model.generation_config is not None and head.ends:
        model.generation_config.eos_token_id = head.ends
    return model


def _load(source: Source, dtype: str | torch.dtype, **options: Any) -> PreTrainedModel:
    """Load what transformers can load, and check that it is whole."""
    config = load_config(source)
    model, report = attempt(
        source,
        "weights",
        AutoModelForCausalLM.from_pretrained,
        config=config,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # `check_complete` refuses them by name
        output_loading_info=True,
        **options,
        **source.options,
    )
    check_complete(source, report)
    return model


def load_config(source: Source) -> PreTrainedConfig:
    """Load a model's configuration; raise ModelError and UnsupportedModelError as `load_model` does."""
    config = attempt(source, "config.json", AutoConfig.from_pretrained, **source.options)
    check_config(config)
    remote = source.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not remote:
        raise UnsupportedModelError(f"{source.name} is a {config.model_type} model, not a causal language model")
    if heads := [name for name in getattr(config, "architectures", None) or () if HEADS.search(name)]:
        raise UnsupportedModelError(f"{source.name} is a {heads[0]}, not a causal language model")
    return config


def load_empty(source: Source, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model without weights: its parameters are on meta, its buffers in memory.

    Raises ModelError where transformers cannot make one.
    """
    with _MAKING, _parameters_on_meta():
        options = {"dtype": dtype, "trust_remote_code": source.trust_remote_code}
        model = attempt(source, "config.json", lambda _: AutoModelForCausalLM.from_config(config, **options))
    with suppress(OSError):  # a model need not have one
        model.generation_config = GenerationConfig.from_pretrained(
            source.location, **{k: v for k, v in source.options.items() if k == "revision"}
        )
    model.name_or_path = source.location
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let modules that this thread makes within have their parameters on meta; unwritten memory costs nothing.

    One thread at a time, as it changes a method of PyTorch's: two would restore each other's.
    """
    register, here = nn.Module.register_parameter, get_ident()

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and get_ident() == here:
            param = nn.Parameter(param.detach().to("meta"), param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer, or return None of a folder or file that has none: such a model takes token ids."""
    source = source.found()
    folder = Path(source.location)
    if source.gguf_file:
        if not gguf.read_head(Path(source.gguf_file)).has_tokenizer:
            return None
    elif folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("vocab*")):
        return None
    with gguf.quiet() if source.gguf_file else nullcontext():
        return attempt(source, "tokenizer", AutoTokenizer.from_pretrained, **source.options)


def find_dtype(name: str | torch.dtype, auto: bool = False) -> torch.dtype:
    """Return the dtype of a name, or raise ConfigError with the known ones, auto among them if that is one."""
    if name in DTYPES.values():
        return name  # type: ignore[return-value] - torch's own
    if name not in DTYPES:
        raise ConfigError(f"dtype is {', '.join([*(['auto'] if auto else []), *DTYPES])}; got {name!r}")
    return DTYPES[str(name)]


def find_device(name: str) -> torch.device:
    """Return the device of a name, "auto" being a GPU if there is one, or raise ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:  # it lists some twenty kinds, most of which no one has
        why = "it is none of auto, cpu, cuda, cuda:1, ..."
        raise ConfigError(f"device {name!r} cannot be used here: {why}; 'cpu' always can") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = _first_line(error).split(". ")[0].split(" with arguments")[0]  # a list of all devices may follow
        raise ConfigError(f"device {name!r} cannot be used here: {why}; 'cpu' always can") from error
    return device


def _moved(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    try:
        return cast("Any", model).to(device)
    except RuntimeError as error:  # out of memory among them
        raise ModelError(
            f"the model's {size / 2**30:.1f} GiB of weights do not go to {device}: {_first_line(error)}; "
            "choose a narrower dtype or another device"
        ) from error


def check_folder(path: str) -> None:
    """Raise ModelError where a path is no folder that holds a model's weights, and cannot be a hub id."""
    folder = Path(path)
    if not folder.exists():
        if path.count("/") > 1 or path.startswith((".", "/")):
            raise ModelError(f"there is no model folder {path}")
        return  # a hub id
    if not folder.is_dir():
        raise ModelError(f"{path} is a file; name the model's folder (config.json, *.safetensors) or a *.gguf file")
    if not (folder / "config.json").exists():
        if files := sorted(folder.glob(f"*{GGUF}")):
            raise ModelError(f"{path} holds no config.json; to load its GGUF file, name {files[0]}")
        raise ModelError(f"{path} holds no config.json; name a folder that save_pretrained wrote")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        raise ModelError(
            f"{path} holds only pickled weights ({', '.join(pickles)}), which can run code when loaded; convert them "
            "with model.save_pretrained(...) in transformers"
            if pickles
            else f"{path} holds no *.safetensors weights"
        )


def attempt(source: Source, what: str, load: Any, **options: Any) -> Any:
    """Call one of transformers' loaders with a source's location, quietly.

    Raises ModelError, a line that names `what`, of what a bad checkpoint makes it raise.
    """
    try:
        with quiet():
            return load(source.location, **options)
    except Exception as error:
        if not isinstance(error, BROKEN) and type(error) is not Exception:  # so the tokenizers' library raises
            raise
        said = f"cannot load the {what} of {source.name}: {_first_line(error)}"
        way = "" if source.gguf_file else _way_out(error)
        if Path(source.location).exists():
            way = "fetch the checkpoint anew" if what == "weights" and not source.gguf_file else ""
        raise ModelError(said.rstrip(".") + "; " + way if way else said) from error


def _way_out(error: BaseException) -> str:
    """Return what a user can do about a hub id that was not loaded."""
    folder = "name a local folder that holds the model"
    causes = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):  # as the hub calls what it does not show
        token = "the one in HF_TOKEN has no access" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
        return f"a gated or private model needs the token of an account with access ({token}); or {folder}"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE is set, so nothing is fetched: unset it, or {folder}"
    return folder


@contextmanager
def quiet() -> Iterator[None]:
    """Keep notes and progress bars of transformers and its hub off a user's terminal; what was set comes back.

    Who asks for more than warnings, or with HF_HUB_DISABLE_PROGRESS_BARS=0 for bars, has them.
    """
    loggers = [each for each in (transformers_logging, hub_logging) if each.get_verbosity() == logging.WARNING]
    asked = huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS is False
    bars, hidden = transformers_logging.is_progress_bar_enabled() and not asked, are_progress_bars_disabled()
    for each in loggers:
        each.set_verbosity_error()
    if bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        for each in loggers:
            each.set_verbosity_warning()
        if bars:
            transformers_logging.enable_progress_bar()
        if bars and hidden:
            disable_progress_bars()


def check_complete(source: Source, report: Mapping[str, Any]) -> None:
    """Raise ModelError where a checkpoint lacks weights of the model, or has whole blocks that the model lacks.

    report  transformers' account of loading: missing_keys, mismatched_keys, unexpected_keys, error_msgs
    """
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(_named(key) for key in report.get(problem) or ()):
            raise ModelError(
                f"the weights of {source.name} do not fit its config.json: {len(found)} {problem.replace('_', ' ')}, "
                f"first {found[0]}"
            )
    if left := sorted(key for key in report.get("unexpected_keys") or () if ".layers." in key):
        raise ModelError(f"config.json of {source.name} has no place for {len(left)} of its weights, first {left[0]}")
    _tell_left_out(source, report)


def _tell_left_out(source: Source, report: Mapping[str, Any]) -> None:
    """Say in one line of the log which weights of a checkpoint the model has no place for."""
    if left := sorted(key for key in report.get("unexpected_keys") or () if not HARMLESS.search(key)):
        logging.getLogger("sirius").warning(
            "%s: the model has no place for %d of the checkpoint's weights, which are left out; first %s",
            source.name,
            len(left),
            left[0],
        )


def _named(key: Any) -> str:
    """Return the name of a weight; one of a wrong shape comes as (name, shape in the file, shape in the model)."""
    if isinstance(key, str):
        return key
    name, stored, wanted = key
    return f"{name} ({tuple(stored)} stored, {tuple(wanted)} wanted)"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError | ArithmeticError) or not lines:
        return f"{type(error).__name__} {' '.join(lines)}".strip()
    return f"{lines[0]} {lines[1].strip()}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]
