"""`sirius bench offload`: what a token takes of a model that is larger than its memory budget."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sirius.cli.bench import Device, Json, Layers, Seed, begin, device_name, played_back, print_record
from sirius.cli.terminal import Threads, progress
from sirius.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

GIGA = 1e9
TRACE = "argmax-int4"

Budget = Annotated[str, typer.Option(help="2GiB, 500MB, bytes, or a share of the device's memory: 10%.")]
Model = Annotated[Path | None, typer.Option(help="A folder with a model's safetensors files.")]
Shape = Annotated[str | None, typer.Option(help="In its place: a shape as in bench decode; the weights are random.")]
Folder = Annotated[
    Path | None, typer.Option(help="Where such a model is written, and stays. [default: a temporary folder]")
]
LinkSpeed = Annotated[
    float | None,
    typer.Option(help="Weights come from the host's memory, at most so many GB/s. [default: from the model's files]"),
]
DraftBits = Annotated[int, typer.Option(help="Bits of the rounded draft: 4 or 8.")]
Aal = Annotated[
    float | None,
    typer.Option(help="Tokens per window played back. [default: at period 16, 15.22 of coarse, 12.7 of 4 bits]"),
]
Replay = Annotated[
    str | None, typer.Option(help="Play back argmax-int4, or the acceptance_histogram of a JSON file, instead.")
]
Check = Annotated[
    bool | None,
    typer.Option("--check/--no-check", help="Compare the text with that in memory. [default: where memory is ample]"),
]
Dtype = Annotated[
    str, typer.Option(help="auto (the checkpoint's; bfloat16 of a shape), float32, float64, bfloat16 or float16.")
]


def offload(
    memory_budget: Budget,
    model: Model = None,
    shape: Shape = None,
    layers: Layers = None,
    folder: Folder = None,
    link_gbps: LinkSpeed = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Timed tokens of a turn without a draft.")] = 8,
    windows: Annotated[int, typer.Option(min=1, help="Timed windows of a turn with a draft.")] = 3,
    cycles: Annotated[int, typer.Option(min=1, help="Turns of each setting.")] = 1,
    period: Annotated[int, typer.Option(min=2, help="K of the corrected settings.")] = 16,
    keep: Annotated[float, typer.Option(help="Fraction of the neurons that coarse keeps.")] = 0.5,
    draft_bits: DraftBits = 4,
    aal: Aal = None,
    replay: Replay = None,
    check: Check = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Time per token under a memory budget: full, coarse and 4 bits corrected, and accelerate's own offload."""
    if (model is None) == (shape is None):
        raise ConfigError("--model and --shape each say which model is decoded; give one of them")
    if shape is None and (layers is not None or folder is not None):
        raise ConfigError("--layers and --folder belong to --shape; leave them out, or give a shape")
    if aal is not None and replay is not None:
        raise ConfigError("--aal and --replay each say what is played back; give one of them")
    if not draft_bits:
        raise ConfigError("--draft-bits is 4 or 8; got 0")
    known = begin(threads)
    from sirius.benchmark import offload as measure
    from sirius.benchmark.offload_table import show_offload

    played = [_played_back(aal, replay, period, rounded) for rounded in (False, True)]
    settings = measure.make_settings(keep, draft_bits, *(histogram for _, histogram in played))
    limits = _limits(memory_budget, link_gbps, where := device_name(device))
    sizes = {"context": context, "tokens": tokens, "windows": windows, "period": period}
    workload = measure.Workload(
        str(model or folder or "a temporary folder"), dtype, where, known["threads"], **limits, **sizes
    )
    measure.check_workload(workload, config := _config(model, shape, layers))
    bar = progress("measuring", cycles * len(settings), passing=True)
    with _checkpoint(model, config, dtype, seed, folder) as path, bar as advance:
        outcome = measure.run(replace(workload, folder=path), settings, cycles, check, on_turn=advance)
    sources = {setting.name: source for setting, (source, _) in zip(settings[1:3], played, strict=True)}
    asked = {"shape": shape, "layers": layers, "seed": seed, "cycles": cycles, "keep": keep, "draft_bits": draft_bits}
    parts = {**asked, "workload": asdict(workload), "acceptance": sources, **asdict(outcome)}
    print_record({**known, **parts}, lambda: show_offload(outcome, workload.budget, sources), json)


def _played_back(aal: float | None, replay: str | None, period: int, rounded: bool) -> tuple[str, tuple[float, ...]]:
    """Return where the acceptance of coarse, or of rounded weights, comes from, and its histogram."""
    if not rounded or aal is not None or replay is not None:
        return played_back(aal, replay, period)
    from sirius.benchmark.playback import NAMED, geometric, mean_advance
    from sirius.offload.plan import acceptance

    if period == len(NAMED[TRACE]):
        return played_back(None, TRACE, period)
    advance = mean_advance(NAMED[TRACE])
    chance = acceptance(advance, len(NAMED[TRACE]))
    return f"AAL {advance:.1f} of 16 of {TRACE}; each guess accepted with chance {chance:.3f}", geometric(
        chance, period
    )


def _limits(memory_budget: str, link_gbps: float | None, device: str) -> dict[str, Any]:
    """Return the bytes of the budget, and those that may cross the link in a second."""
    import torch

    from sirius.offload.amounts import memory_of, parse_budget

    if link_gbps is not None and not (isfinite(link_gbps) and link_gbps > 0):
        raise ConfigError(f"--link-gbps is a finite number of GB/s, above 0; got {link_gbps}")
    if link_gbps is not None and device != "cpu":
        raise ConfigError(f"--link-gbps stands for a link on a CPU; {device} has one of its own: leave it out")
    budget = parse_budget(memory_budget, memory_of(torch.device(device)))
    return {"budget": budget, "link": link_gbps and link_gbps * GIGA}


def _config(model: Path | None, shape: str | None, layers: int | None) -> "PreTrainedConfig":
    from sirius.benchmark.models import make_config
    from sirius.model.loading import Source, load_config

    if model is None:
        return make_config(str(shape), layers)
    if not model.is_dir():
        raise ConfigError(f"--model is a folder with a model's safetensors files; there is none at {model}")
    return load_config(Source(str(model)))


def _checkpoint(
    model: Path | None, config: "PreTrainedConfig", dtype: str, seed: int, folder: Path | None
) -> AbstractContextManager[str]:
    """Return a context that gives the model's folder: its own, or that of a shape with random weights."""
    from sirius.benchmark.checkpoint import open_checkpoint
    from sirius.model.loading import find_dtype

    if model is not None:
        return nullcontext(str(model))
    return open_checkpoint(config, find_dtype("bfloat16" if dtype == "auto" else dtype), seed, folder)
