"""The head of a GGUF file: what it holds, and what keeps it from being loaded, told before transformers tries."""

import importlib
import logging
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers

from sirius.errors import ModelError, UnsupportedModelError

MAGIC, VERSIONS = b"GGUF", (2, 3)
PACKAGES = ("gguf", "accelerate")
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # by kind
UNSCALED = (None, "none")
LOADER = "transformers.modeling_gguf_pytorch_utils"


@dataclass(frozen=True)
class Head:
    """What a GGUF file says of itself before its weights.

    fields   single values by name; of a list its length
    tensors  (kind, elements, offset) by name; offsets count from `start`
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, tuple[int, int, int]]
    start: int

    @property
    def architecture(self) -> str:
        """Llama.cpp's name of the kind of model."""
        return str(self.fields.get("general.architecture"))

    @property
    def has_tokenizer(self) -> bool:
        """Whether text can be made tokens with what the file holds."""
        return bool(self.fields.get("tokenizer.ggml.tokens"))

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text or a turn."""
        named = (self.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
        return list(dict.fromkeys(token for token in named if token is not None))


class _Reader:
    """Reads values of a mapped file one behind the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, len(MAGIC)

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def skip_text(self) -> None:
        length = self.number("Q")
        self.at += length

    def text(self) -> str:
        length = self.number("Q")
        if self.at + length > len(self.data):
            raise ValueError(f"a text of {length} bytes goes past the end")
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        return self._list() if kind == ARRAY else self.number(SCALARS[kind])

    def _list(self) -> int:
        """Pass over a list and return its length."""
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            for _ in range(count):
                self.skip_text()
        else:
            self.at += count * struct.calcsize(f"<{SCALARS[kind]}")
        return count

    def tensor(self) -> tuple[int, int, int]:
        sizes = [self.number("Q") for _ in range(self.number("I"))]
        return self.number("I"), prod(sizes), self.number("Q")


def read_head(path: Path) -> Head:
    """Return the head of a GGUF file; raise ModelError where the file is none, broken or cut off."""
    try:
        with path.open("rb") as file:
            if (magic := file.read(len(MAGIC))) != MAGIC:
                raise ModelError(f"{path} is no GGUF file: it begins with {magic!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _read(path, _Reader(data))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (struct.error, KeyError, ValueError, OverflowError) as error:
        raise ModelError(f"the head of {path} is broken or cut off; get the file again ({error!r})") from error


def _read(path: Path, reader: _Reader) -> Head:
    if (version := reader.number("I")) not in VERSIONS:
        raise ModelError(f"{path} is GGUF of version {version}; versions {VERSIONS[0]} and {VERSIONS[1]} can be read")
    tensors, fields = reader.number("Q"), reader.number("Q")
    known = {reader.text(): reader.value() for _ in range(fields)}
    named = {reader.text(): reader.tensor() for _ in range(tensors)}
    grid, parts = (known.get(name, usual) for name, usual in (("general.alignment", 32), ("split.count", 1)))
    if not (isinstance(grid, int) and grid > 0 and isinstance(parts, int)):
        raise ValueError(f"an alignment of {grid!r}, {parts!r} parts")
    return Head(path, known, named, -(-reader.at // grid) * grid)


def check_gguf(head: Head) -> None:
    """Raise ModelError where a file is cut off or the packages that read it are missing.

    Raises UnsupportedModelError of positions that are scaled: transformers reads past the scale, so that the text would
    be another than the model's.
    """
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ModelError(f"{head.path} needs {' and '.join(missing)}; pip install 'sirius-llm[gguf]'")
    names, end = _kinds(head), _end(head)
    if (size := head.path.stat().st_size) < end:
        raise ModelError(f"{head.path} is cut off: {size} of {end} bytes are there; get the file again")
    if not names:
        raise ModelError(f"{head.path} holds no weights")
    if (parts := head.fields.get("split.count", 1)) > 1:
        raise ModelError(f"{head.path} is one of {parts} parts; join them with llama.cpp's llama-gguf-split --merge")
    scale = head.fields.get(f"{head.architecture}.rope.scaling.type")
    scaled = [name for name in head.tensors if name.startswith(("rope_freqs", "rope_factors"))]
    if scaled or (scale not in UNSCALED and head.architecture != "gpt-oss"):
        raise UnsupportedModelError(
            f"{head.path} scales its positions ({scaled[0] if scaled else scale}), which transformers leaves out when "
            "it reads GGUF; load the model's safetensors"
        )


def _end(head: Head) -> int:
    """Return how long the file must be."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    ends = [head.start]
    for kind, elements, offset in head.tensors.values():
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        ends.append(head.start + offset + elements // block * size)
    return max(ends)


def _kinds(head: Head) -> list[str]:
    """Return the names of the weights' formats, the one of most weights first; raise ModelError of unknown ones."""
    from gguf import GGMLQuantizationType

    elements: dict[int, int] = {}
    for kind, count, _ in head.tensors.values():
        elements[kind] = elements.get(kind, 0) + count
    try:
        return [GGMLQuantizationType(kind).name for kind in sorted(elements, key=elements.__getitem__, reverse=True)]
    except ValueError as error:
        raise ModelError(f"{head.path} holds weights in a format unknown here ({error}); update gguf") from error


def tell(head: Head, dtype: torch.dtype) -> None:
    """Say in one line of the log in what dtype the weights are held, which is wider than quantised ones are."""
    kinds = _kinds(head)
    size = sum(count for _, count, _ in head.tensors.values()) * dtype.itemsize
    logging.getLogger("sirius").warning(
        "%s: weights of %s are %s %s, %.1f GB in memory",
        head.path.name,
        ", ".join(kinds),
        "loaded as" if {*kinds} <= {"F32", "F16", "BF16"} else "dequantised to",
        str(dtype).removeprefix("torch."),
        size / 1e9,
    )


def options() -> dict[str, Any]:
    """Return what makes transformers dequantise all weights, where it would otherwise keep some as they are."""
    config = getattr(transformers, "GgufConfig", None)  # not in its older versions, which always dequantise
    return {"quantization_config": config(dequantize=True)} if config else {}


@contextmanager
def quiet() -> Iterator[None]:
    """Keep off the terminal the progress bar of transformers that follows no setting."""
    loader: Any = importlib.import_module(LOADER)
    bar = loader.tqdm
    loader.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        loader.tqdm = bar
