"""`sirius bench`: what decoding costs beside what reading the weights must cost."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sirius.cli.terminal import Threads, out, progress, quieten, saved_as_it_goes, use_threads
from sirius.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedModel

    from sirius.benchmark.growth import Point, Workload

T = TypeVar("T", int, float)

bench_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Measure speed beside the physical limit.")

Shape = Annotated[str, typer.Option(help="llama-3.2-1b, llama-3-8b, ..., a config.json or its folder.")]
Layers = Annotated[int | None, typer.Option(min=1, help="Only so many of its layers.")]
Dtype = Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16.")]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile our passes on a GPU: minutes at first.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the weights.")]
FIRST = "The first is the base point's. [default:"
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON.")]


@bench_app.callback()
def bench() -> None:
    """Measure speed beside the physical limit."""


@bench_app.command()
def decode(
    shape: Shape = "llama-3.2-1b",
    layers: Layers = None,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Threads = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in each turn.")] = 160,
    cycles: Annotated[int, typer.Option(min=1, help="Turns of each setting.")] = 3,
    keep: Annotated[float, typer.Option(help="Fraction of the neurons that coarse keeps.")] = 0.5,
    fine_keep: Annotated[
        list[float] | None, typer.Option(help="Of fine; may be given again. [default: 0.5 0.25]")
    ] = None,
    draft_bits: Annotated[
        list[int] | None, typer.Option(help="Of drafts with every neuron; may be given again. [default: 4]")
    ] = None,
    period: Annotated[int, typer.Option(min=2, help="K of the corrected settings.")] = 16,
    tree_width: Annotated[list[int] | None, typer.Option(help="Of those; may be given again. [default: 1 4]")] = None,
    aal: Annotated[
        float | None,
        typer.Option(
            help="Tokens per window played back, each guess accepted equally often. [default: 15.22 at period 16]"
        ),
    ] = None,
    replay: Annotated[
        str | None, typer.Option(help="Play back argmax-int4, or the acceptance_histogram of a JSON file, instead.")
    ] = None,
    peer: Annotated[str | None, typer.Option(help="llama.cpp, to time it beside ours on the same weights.")] = None,
    compile: Compile = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Time per token of one stream at full size: transformers, ours in full, sparse, and corrected, in turns."""
    if peer not in (None, "llama.cpp"):
        raise ConfigError(f"--peer is llama.cpp, which is all that there is; got {peer!r}")
    if aal is not None and replay is not None:
        raise ConfigError("--aal and --replay each say what is played back; give one of them")
    known = begin(threads)
    from sirius.benchmark import decode as measure
    from sirius.benchmark import show
    from sirius.benchmark.ceiling import measure_ceiling
    from sirius.benchmark.models import make_config
    from sirius.benchmark.peer import open_peer
    from sirius.engine import Engine

    played, histogram = played_back(aal, replay, period)
    where = device_name(device)
    fines, bits, widths = _each(fine_keep, 0.5, 0.25), _each(draft_bits, 4), _each(tree_width, 1, 4)
    settings = measure.make_settings(keep, fines, bits, period, widths, where)
    workload = measure.Workload(context, tokens, cycles, histogram, where, compile, played)
    measure.check_context(workload, make_config(shape, layers))
    model = _model(shape, layers, dtype, where, seed)
    Engine(model, compile=compile)  # refuses what it cannot run before anything is timed
    with open_peer(model, context + tokens, known["threads"]) if peer else nullcontext() as other:
        ceiling = measure_ceiling(model.dtype, where)
        with progress("measuring", cycles * (len(settings) + bool(other))) as advance:
            rows = measure.run(model, settings, workload, ceiling, other, on_turn=advance)
        besides = {"peer": other.facts} if other else {}
    parts = {"ceiling": asdict(ceiling), "workload": asdict(workload), "rows": [asdict(row) for row in rows]}
    print_record({**known, **besides, **parts}, lambda: show.decoding(rows, ceiling, played), json)


@bench_app.command()
def growth(
    axis: Annotated[
        list[str] | None, typer.Option(help="context, batch, ...; may be given again. [default: all five]")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Tokens held. {FIRST} 256 1024 2048 4096 8192]")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help=f"Rows side by side. {FIRST} 1 2 4 8 16]")] = None,
    period: Annotated[list[int] | None, typer.Option(min=2, help=f"K. {FIRST} 16 4 8 32]")] = None,
    tree_width: Annotated[list[int] | None, typer.Option(min=1, help=f"Branches. {FIRST} 1 2 4 8]")] = None,
    keep: Annotated[list[float] | None, typer.Option(help=f"Of the neurons. {FIRST} 0.5 0.25 0.75]")] = None,
    sparsity: Annotated[str, typer.Option(help="coarse, fine, or a plug-in's name.")] = "coarse",
    shape: Shape = "llama-3.2-1b",
    layers: Layers = None,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Threads = None,
    cycles: Annotated[int, typer.Option(min=1, help="Turns of each setting at each point.")] = 5,
    compile: Compile = False,
    seed: Seed = 0,
    output: Annotated[Path | None, typer.Option(help="Save the record as it grows, or go on with it.")] = None,
    source: Annotated[Path | None, typer.Option("--from", help="Show this record again; nothing is measured.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw break-even lines: a .svg or .png file.")] = None,
    json: Json = False,
) -> None:
    """How cost grows along five axes, one at a time, and from which advance on correction pays."""
    from sirius.benchmark import growth as measure
    from sirius.benchmark import plot as paper
    from sirius.benchmark import record, show

    if plot is not None:
        paper.check_plot(plot)
    if source is None:
        given = {"context": context, "batch": batch, "period": period, "tree_width": tree_width, "keep": keep}
        points = measure.make_points({name: given[name] or measure.VALUES[name] for name in given}, axis or given)
        known = {**begin(threads), "shape": shape, "layers": layers, "dtype": dtype, "seed": seed}
        found = _grow(
            points, measure.Workload(points[0], sparsity, cycles, device_name(device), compile), known, output
        )
    else:
        found = record.read_record(source)
    workload, rows = measure.read_rows(found)
    ceiling = measure.read_ceiling(found)
    if plot is not None:
        paper.draw(workload, rows, plot)
    print_record(found, lambda: show.growing(workload, rows, ceiling), json)


@bench_app.command()
def kernels(
    neurons: Annotated[int, typer.Option(min=1, help="F of the MLP.")] = 8192,
    hidden: Annotated[int, typer.Option(min=1, help="H of the MLP.")] = 2048,
    dtype: Dtype = "bfloat16",
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Every operation over densities 0 to 1 and batches 1 to 16: kernel, plain reference and ceiling."""
    known = begin(threads)
    from sirius.benchmark import kernels as measure
    from sirius.benchmark import show
    from sirius.benchmark.ceiling import measure_ceiling
    from sirius.model.loading import find_dtype

    size = measure.Size(neurons, hidden, find_dtype(dtype), device_name(device))
    ceiling = measure_ceiling(size.dtype, size.device)
    with progress("measuring", measure.count(size)) as advance:
        rows = measure.run(size, ceiling, on_row=advance)
    parts = {"ceiling": asdict(ceiling), "rows": [asdict(row) for row in rows]}
    print_record({**known, **parts}, lambda: show.operations(rows, ceiling), json)


def begin(threads: int | None) -> dict[str, Any]:
    """Set the threads, and return the facts of what follows."""
    quieten()
    import torch

    from sirius.benchmark.facts import facts

    use_threads(threads)
    return facts(" ".join(["sirius", *sys.argv[1:]]), torch.get_num_threads())


def device_name(device: str) -> str:
    """Return the device that an option means, "auto" being a GPU if there is one."""
    from sirius.model.loading import find_device

    return str(find_device(device))


def _model(shape: str, layers: int | None, dtype: str, device: str, seed: int) -> "PreTrainedModel":
    from sirius.benchmark.models import make_config, make_model
    from sirius.model.loading import find_dtype

    return make_model(make_config(shape, layers), find_dtype(dtype), device, seed)


def _grow(
    points: "Sequence[Point]", workload: "Workload", known: Mapping[str, Any], output: Path | None
) -> dict[str, Any]:
    """Measure the points that the record of `output` does not hold yet, and return the whole record."""
    from sirius.benchmark import growth as measure
    from sirius.benchmark import record
    from sirius.benchmark.ceiling import measure_ceiling
    from sirius.benchmark.models import make_config

    measure.check_points(points, workload, make_config(known["shape"], known["layers"]))
    found = {**known, "workload": asdict(workload), "ceiling": None, "rows": []}
    if output is not None:
        found = record.begun(output, found)
        record.save(output, found)  # now, if it cannot be
    model = _model(known["shape"], known["layers"], known["dtype"], workload.device, known["seed"])
    found["ceiling"] = found["ceiling"] or asdict(measure_ceiling(model.dtype, workload.device))
    _, done = measure.read_rows(found)
    saving = nullcontext() if output is None else saved_as_it_goes()
    with saving, progress("measuring", len(points)) as advance:

        def keep(rows: list[measure.GrowthFigures]) -> None:
            found["rows"] = [asdict(row) for row in rows]
            if output is not None:
                record.save(output, found)
            advance(len(rows))

        keep(done)
        measure.run(model, points, workload, done, on_row=keep)
    return found


def print_record(record: Mapping[str, Any], table: "Callable[[], RenderableType]", json: bool) -> None:
    """Show a record: itself as JSON, or its table."""
    from sirius.benchmark.record import to_line

    if json:
        sys.stdout.write(to_line(record))
    else:
        out.print(table())


def _each(given: list[T] | None, *default: T) -> list[T]:
    """Return values of an option that may be given again, each once."""
    return list(dict.fromkeys(given or default))


def played_back(aal: float | None, replay: str | None, period: int) -> tuple[str, tuple[float, ...]]:
    """Return where the acceptance that is played back comes from, and its histogram."""
    from sirius.benchmark.playback import NAMED, PUBLISHED_AAL, PUBLISHED_PERIOD, geometric
    from sirius.offload.plan import acceptance

    if replay is None:
        chance = acceptance(PUBLISHED_AAL, PUBLISHED_PERIOD) if aal is None else acceptance(aal, period)
        source = f"AAL {PUBLISHED_AAL} at threshold 0.1 (lossy), published" if aal is None else f"AAL {aal:g}, given"
        return f"{source}; each guess accepted with chance {chance:.3f}", geometric(chance, period)
    if replay not in NAMED:
        return f"the histogram of {Path(replay).name}", _histogram(Path(replay), period)
    if len(NAMED[replay]) != period:
        raise ConfigError(f"--replay {replay} is of period {len(NAMED[replay])}; got --period {period}")
    return f"{replay}: a published trace of a 4-bit draft under the argmax rule", NAMED[replay]


def _histogram(path: Path, period: int) -> tuple[float, ...]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        weights = tuple(float(weight) for weight in found.get("stats", found)["acceptance_histogram"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--replay takes a JSON object with acceptance_histogram; {path}: {error}") from error
    if len(weights) != period or not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ConfigError(
            f"--period {period} needs as many weights, finite, at least 0 and not all of them 0; the histogram of "
            f"{path} is {weights!r:.80}"
        )
    return weights
