"""`sirius demo`: the method at work on the embedded model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sirius.cli.terminal import load, out, progress

Threads = Annotated[int, typer.Option(min=1, max=1024, help="Threads of the CPU; the model is too small for two.")]

demo_app = typer.Typer(rich_markup_mode=None, help="See the method at work on the embedded model.")


@demo_app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    problems: Annotated[int, typer.Option(min=1, help="Problems of each task.")] = 40,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 0,
    keep: Annotated[float | None, typer.Option(help="Fraction of neurons that coarse keeps. [default: 0.4]")] = None,
    model: Annotated[Path | None, typer.Option(help="A folder that runs/train.py wrote.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; the model is too small to gain by a GPU.")] = "cpu",
    threads: Threads = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, and no example.")] = False,
) -> None:
    """Compare full, sparse and corrected decoding on two tasks, then show one problem token by token."""
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    from sirius.demo import show, showcase
    from sirius.demo.problems import TASKS

    settings = showcase.make_settings() if keep is None else showcase.make_settings(keep)
    engine = load(None if model is None else str(model), threads, device=device)
    with progress("decoding", problems * len(TASKS) * len(settings)) as advance:
        rows = showcase.run(engine, settings, problems, seed, on_problem=advance)
    if json:
        import json as encoder

        sys.stdout.write(encoder.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    out.print(show.table(rows))
    out.print(show.example(engine, settings, seed))


@demo_app.command()
def oracle(
    problems: Annotated[int, typer.Option(min=1, help="Reasoning problems at each threshold.")] = 40,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 0,
    sparsity: Annotated[str, typer.Option(help="coarse or fine.")] = "coarse",
    keep: Annotated[float, typer.Option(help="Fraction of the neurons kept.")] = 0.4,
    threads: Threads = 1,
    json: Annotated[bool, typer.Option("--json", help="Print the points as JSON.")] = False,
) -> None:
    """Step both models side by side and replace unlikely tokens: accuracy against the share replaced."""
    import json as encoder
    from dataclasses import asdict

    from sirius.core import SparsityConfig
    from sirius.demo import oracle as study
    from sirius.demo import show

    chosen = SparsityConfig(sparsity, keep)
    engine = load(None, threads, device="cpu")
    with progress("decoding", problems * len(study.THRESHOLDS)) as advance:
        points = study.run(engine, chosen, problems, seed, on_problem=advance)
    if json:
        sys.stdout.write(encoder.dumps([asdict(point) for point in points], indent=2) + "\n")
    else:
        out.print(show.curve(points))
