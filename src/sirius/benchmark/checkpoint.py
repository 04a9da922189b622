"""Checkpoints of a known shape with random weights, for what reads a model from its files."""

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from sirius.benchmark.models import make_model
from sirius.errors import ConfigError, FileError
from sirius.model.loading import quiet
from sirius.offload.amounts import in_words
from sirius.offload.sizes import skeleton

SHARD = "1GB"  # the most bytes of a file
FREE = ("architectures", "dtype", "transformers_version", "_name_or_path")  # may differ between like configurations


def open_checkpoint(
    config: PreTrainedConfig, dtype: torch.dtype, seed: int, folder: Path | None
) -> AbstractContextManager[str]:
    """Return a context that gives the folder of a checkpoint; a temporary one is gone when the context ends.

    folder  where it is written, or was written before; None: a temporary folder

    Raises FileError where there is no room for it, and ConfigError where the folder holds another model.
    """
    if folder is None:
        temporary = TemporaryDirectory(prefix="sirius-")
        write_checkpoint(config, dtype, seed, Path(temporary.name))
        return temporary
    if not (folder / "config.json").exists():
        write_checkpoint(config, dtype, seed, folder)
    else:
        _check_same(config, dtype, folder)
    return nullcontext(str(folder))


def write_checkpoint(config: PreTrainedConfig, dtype: torch.dtype, seed: int, folder: Path) -> None:
    """Write a model of a configuration, its weights random by a seed, to safetensors files of at most 1 GB.

    It is made in memory. Raises FileError where there is no room for it on the disk.
    """
    size = sum(each.nbytes for each in skeleton(config, dtype).parameters())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (free := disk_usage(folder).free) <= size:
            raise FileError(f"{folder} has room for {in_words(free)}, and the model takes {in_words(size)}")
        with quiet():
            make_model(config, dtype, "cpu", seed).save_pretrained(folder, max_shard_size=SHARD)
    except OSError as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"cannot write a model to {folder}: {error}") from error
    os.sync()  # else the disk is still writing when its speed is measured


def _check_same(config: PreTrainedConfig, dtype: torch.dtype, folder: Path) -> None:
    with quiet():
        there = AutoConfig.from_pretrained(folder)
    fields, wanted = _fields(there), _fields(config)
    other = sorted(name for name in {*fields, *wanted} if fields.get(name) != wanted.get(name))
    if there.dtype != dtype:
        other.append("dtype")
    if other:
        raise ConfigError(f"{folder} holds another model: {', '.join(other)} differ; name another --folder")


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: value for name, value in config.to_dict().items() if name not in FREE}
