"""`sirius bench`: what decoding costs beside what reading the weights must cost."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sirius.cli.terminal import out, progress, quieten
from sirius.errors import ConfigError

bench_app = typer.Typer(rich_markup_mode=None, no_args_is_help=True, help="Measure speed beside the physical limit.")


@bench_app.callback()
def bench() -> None:
    """Measure speed beside the physical limit."""


@bench_app.command()
def decode(
    shape: Annotated[str, typer.Option(help="llama-3.2-1b, llama-3-8b, ..., or a config.json.")] = "llama-3.2-1b",
    layers: Annotated[int | None, typer.Option(min=1, help="Only so many of its layers.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. [default: torch's]")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in each turn.")] = 64,
    cycles: Annotated[int, typer.Option(min=1, help="Turns of each setting.")] = 3,
    keep: Annotated[float, typer.Option(help="Fraction of the neurons that coarse keeps.")] = 0.5,
    fine_keep: Annotated[
        list[float] | None, typer.Option(help="Of fine; may be given again. [default: 0.5 0.25]")
    ] = None,
    period: Annotated[int, typer.Option(min=2, help="K of the corrected settings.")] = 16,
    tree_width: Annotated[list[int] | None, typer.Option(help="Of those; may be given again. [default: 1 4]")] = None,
    aal: Annotated[
        float, typer.Option(help="Tokens per window played back, as if every guess stood alike often.")
    ] = 15.22,
    replay: Annotated[
        Path | None, typer.Option(help="Play back the acceptance_histogram of this JSON instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Time per token of one stream at full size: transformers, ours in full, sparse, and corrected, in turns."""
    quieten()
    import torch

    from sirius.benchmark import decode as measure
    from sirius.benchmark import show
    from sirius.benchmark.ceiling import measure_ceiling
    from sirius.benchmark.facts import facts
    from sirius.benchmark.models import make_config, make_model
    from sirius.benchmark.replay import geometric
    from sirius.model.loading import find_device, find_dtype

    if threads is not None:
        torch.set_num_threads(threads)
    known = facts(" ".join(["sirius", *sys.argv[1:]]), torch.get_num_threads())
    histogram = geometric(aal, period) if replay is None else _histogram(replay, period)
    where = str(find_device(device))
    settings = measure.make_settings(keep, fine_keep or [0.5, 0.25], period, tree_width or [1, 4])
    workload = measure.Workload(context, tokens, cycles, histogram, where)
    model = make_model(make_config(shape, layers), find_dtype(dtype), where, seed)
    ceiling = measure_ceiling(model.dtype, where)
    with progress("measuring", cycles * len(settings)) as advance:
        rows = measure.run(model, settings, workload, ceiling, on_turn=advance)
    if json:
        import json as encoder

        record = {**known, "ceiling": asdict(ceiling), "workload": asdict(workload), "rows": [asdict(r) for r in rows]}
        sys.stdout.write(encoder.dumps(record) + "\n")
    else:
        out.print(show.decoding(rows, ceiling))


@bench_app.command()
def kernels(
    neurons: Annotated[int, typer.Option(min=1, help="F of the MLP.")] = 8192,
    hidden: Annotated[int, typer.Option(min=1, help="H of the MLP.")] = 2048,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU. [default: torch's]")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Every operation over densities 0 to 1 and batches 1 to 16: kernel, plain reference and ceiling."""
    import torch

    from sirius.benchmark import kernels as measure
    from sirius.benchmark import show
    from sirius.benchmark.ceiling import measure_ceiling
    from sirius.benchmark.facts import facts
    from sirius.model.loading import find_device, find_dtype

    if threads is not None:
        torch.set_num_threads(threads)
    known = facts(" ".join(["sirius", *sys.argv[1:]]), torch.get_num_threads())
    size = measure.Size(neurons, hidden, find_dtype(dtype), str(find_device(device)))
    ceiling = measure_ceiling(size.dtype, size.device)
    with progress("measuring", len(measure.BATCHES) * (2 * len(measure.DENSITIES) + 1)) as advance:
        rows = measure.run(size, ceiling, on_row=advance)
    if json:
        import json as encoder

        record = {**known, "ceiling": asdict(ceiling), "rows": [asdict(row) for row in rows]}
        sys.stdout.write(encoder.dumps(record) + "\n")
    else:
        out.print(show.operations(rows, ceiling))


def _histogram(path: Path, period: int) -> tuple[float, ...]:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        weights = tuple(float(weight) for weight in found.get("stats", found)["acceptance_histogram"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--replay takes a JSON object with acceptance_histogram; {path}: {error}") from error
    if len(weights) != period or min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(
            f"the histogram of {path} has {len(weights)} weights; --period {period} needs as many, above 0"
        )
    return weights
