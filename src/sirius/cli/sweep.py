"""`sirius sweep`: a grid of settings over tasks, saved after every sample."""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sirius.cli import arguments, terminal
from sirius.cli.terminal import Threads, out, saved_as_it_goes, uncollected
from sirius.errors import ConfigError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from sirius.evaluation.grid import Grid
    from sirius.offload.budget import Budget


def sweep(
    grid: Annotated[str, typer.Argument(help="A YAML file, or a study: table1, table2, threshold, period, width, ...")],
    output: Annotated[
        Path, typer.Option(help="The folder of samples and results; an unfinished sweep there is continued.")
    ],
    model: arguments.Model = None,
    tasks: Annotated[str | None, typer.Option(help="Task names with commas, in place of the grid's.")] = None,
    data: arguments.Data = None,
    limit: Annotated[int | None, typer.Option(help="Problems of each task as a whole, in place of the grid's.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Prompts by the chat template.")] = None,
    batch_size: arguments.BatchSize = 8,
    dtype: arguments.Dtype = "auto",
    device: arguments.Device = "auto",
    threads: Threads = None,
    max_context: arguments.MaxContext = None,
    memory_budget: arguments.MemoryBudget = None,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    confirm_run_unsafe_code: Annotated[
        bool,
        typer.Option(
            "--confirm-run-unsafe-code",
            "--confirm_run_unsafe_code",
            help="Run code that the model writes, in a sandbox.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the settings of each task and stop.")] = False,
) -> None:
    """Decode tasks under every setting of a grid, then grade them; run it again to go on after an interruption.

    Several processes share the work: torchrun --nproc-per-node 2 -m sirius sweep ..., or the same with accelerate
    launch.
    """
    check_lm_eval()
    with uncollected():
        from sirius.evaluation.completions import make_folder
        from sirius.evaluation.grid import read_grid
        from sirius.evaluation.suite import check_tasks, suite_folder, task_manager

    named = None if tasks is None else [each.strip() for each in tasks.split(",") if each.strip()]
    wanted = read_grid(grid, {"tasks": named, "limit": limit, "chat": chat})
    budget = {} if memory_budget is None else {"memory_budget": _budget(memory_budget, wanted, batch_size)}
    with suite_folder(data) as folder:
        manager = task_manager(folder, wanted.tasks)
        check_tasks(wanted.tasks, data, manager)
        if dry_run:
            list_settings(wanted)
            return
        make_folder(output)  # before minutes of loading
        load = {"dtype": dtype, "device": device, "max_context": max_context, "revision": revision}
        _run(
            wanted,
            manager,
            output,
            model,
            threads,
            batch_size,
            confirm_run_unsafe_code,
            {**load, **budget, "trust_remote_code": trust_remote_code},
        )


def _budget(size: str, grid: "Grid", rows: int) -> "Budget":
    """Return a budget for a grid; raise ConfigError where its settings need different drafts."""
    from sirius.evaluation.within import budget_for_settings

    return budget_for_settings(size, grid.settings(), rows)


def _run(
    grid: "Grid",
    manager: "TaskManager",
    output: Path,
    model: str | None,
    threads: int | None,
    batch_size: int,
    allowed: bool,
    load: dict[str, Any],
) -> None:
    from sirius.evaluation.ranks import Ranks
    from sirius.evaluation.sweep import Sweep, load_parts

    ranks = Ranks.here()
    parts = load_parts(grid, manager, allowed)
    engine = terminal.load(model, threads, **{**load, "device": ranks.device(load["device"])})
    command = shlex.join(["sirius", *sys.argv[1:]])
    options: dict[str, Any] = {"batch_size": batch_size, "allowed": allowed, "command": command, "ranks": ranks}
    work = Sweep(grid, engine, parts, output, model or "embedded", load["revision"], **options)
    if ranks.rank == 0:
        terminal.remark(work.plan())
    left = -(-work.missing() // ranks.size)  # this process's share
    bar = terminal.progress("decoding", left, shown=ranks.rank == 0)
    with saved_as_it_goes(), terminal.facts_shown(), bar as advance:
        work.on_sample = advance
        found = work.run()
    if ranks.rank == 0:
        out.print(
            f"{len(found)} results in {output / 'cells'}; show them with: sirius report {output}", highlight=False
        )


def list_settings(grid: "Grid") -> None:
    """Print the settings of each task of a grid."""
    for task in grid.tasks:
        out.print(task, style="bold", highlight=False)
        for setting in grid.fixed(task):
            out.print(f"  {setting.label()}", highlight=False)
        for name, options in grid.choices(task):
            out.print(f"  {name}, of: {'; '.join(each.label() for each in options)}", highlight=False)


def check_lm_eval() -> None:
    """Raise ConfigError without lm-eval; otherwise leave the terminal to us, without its progress bars and notes."""
    import logging
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ConfigError("evaluation needs lm-eval; install it with: pip install 'sirius-llm[eval]'")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
