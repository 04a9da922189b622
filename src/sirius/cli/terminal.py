"""What all commands share: the terminal, a model's loading, and what is said when something is wrong."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from sirius.cli.options import CommandLine
    from sirius.engine import Engine

out, err = Console(soft_wrap=True, emoji=False), Console(stderr=True, soft_wrap=True, emoji=False)

WRONG_INPUT, INTERRUPTED, UNREAD = 2, 130, 141  # the last two as a shell names an end by Ctrl-C or SIGPIPE
NARROW = 60  # columns under which a progress bar has no room beside its figures

Threads = Annotated[int | None, typer.Option(min=1, max=1024, help="Threads of the CPU to use. [default: torch's]")]


def complain(message: str) -> None:
    """Name a mistake in one line."""
    with suppress(OSError):  # there is nowhere left to tell of it
        err.print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def remark(message: str) -> None:
    """Say something about the output beside it, in one dim line."""
    with suppress(OSError):  # the output itself is there
        err.print(message, style="dim", highlight=False, markup=False)


@contextmanager
def uncollected() -> Iterator[None]:
    """Turn the garbage collector off while modules are imported, which is faster: all of their objects stay in use."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextmanager
def saved_as_it_goes() -> Iterator[None]:
    """Tell a user who interrupts what follows that nothing finished is lost."""
    try:
        yield
    except KeyboardInterrupt:
        complain("what was finished is saved; run the same command again to go on")
        raise


def load(model: str | None, threads: int | None = None, **options: Any) -> "Engine":
    """Return the engine of a model folder or hub id, of the embedded model where there is none.

    threads  of the CPU; None leaves torch's
    options  those of `Engine.load`
    """
    with uncollected():
        quieten()
        use_threads(threads)
        from sirius.demo.embedded import FOLDER, check_embedded
        from sirius.engine import Engine

    if model is None:
        check_embedded()
    with err.status("loading the model"):
        engine = Engine.load(model or str(FOLDER), **options)
    if options.get("memory_budget") is not None:
        from sirius.model.prepared import prepared_of

        remark(str(prepared_of(engine.model).plan))
    return engine


@contextmanager
def facts_shown(*names: str) -> Iterator[None]:
    """Show what loggers tell of loaded models: of a memory budget's plan, and of a draft's weights.

    names  of the loggers; none: "sirius.drafts"
    """
    handler = logging.Handler()
    handler.emit = lambda record: remark(record.getMessage())
    logs = [logging.getLogger(name) for name in names or ("sirius.drafts",)]
    before = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)
            log.removeHandler(handler)


def budget_of(command: "CommandLine", options: Mapping[str, Any], rows: int = 1) -> dict[str, Any]:
    """Return the options of `Engine.load` for a memory budget, which is planned for the draft that was asked for.

    options  those of `Engine.generate`
    rows     texts that are decoded side by side
    """
    if command["memory_budget"] is None:
        return {}
    from sirius.offload.budget import Budget, window_of

    asked = options["correction"]
    fixed = asked is not None and isinstance(asked.period, int) and asked.period > 1
    period: dict[str, Any] = {"period": options["correction"].period} if fixed else {}
    needed = asked is None or fixed  # without "auto" the draft is read in any case
    draft = options["sparsity"] if needed or {"sparsity", "draft_bits", "preset"} & command.given else None
    return {"memory_budget": Budget(command["memory_budget"], draft, rows=rows, window=window_of(asked), **period)}


def round_weights(engine: "Engine", options: Mapping[str, Any]) -> None:
    """Round the weights that a draft reads, and say how much memory they take; options of `Engine.generate`."""
    from sirius.model.quantized import make_twin

    asked = engine.model, options["sparsity"], options["correction"]
    with facts_shown(), progress("rounding weights for drafts", 100, passing=True) as advance:
        make_twin(*asked, advance=lambda done: advance(to=round(100 * done)))


def use_threads(count: int | None) -> None:
    """Let torch, and our kernels, run on so many threads of the CPU; None leaves it as it is."""
    if count is not None:
        import torch

        torch.set_num_threads(count)


def quieten() -> None:
    """Leave the terminal to us: no progress bars and notes of transformers and its hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def progress(what: str, total: int, shown: bool = True, passing: bool = False) -> Iterator[Callable[..., None]]:
    """Show a progress bar on the terminal's error stream; yields what moves it on by one, or to a step.

    passing  it goes away in the end, and is shown on a terminal alone
    """
    hidden = not shown or (passing and not err.is_terminal)
    figures = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    columns = figures[::2] if err.width < NARROW else (BarColumn(), *figures)
    with Progress(TextColumn("{task.description}"), *columns, console=err, disable=hidden, transient=passing) as bar:
        task = bar.add_task(what, total=total)

        def advance(to: int | None = None, now: str = what) -> None:
            done = bar.tasks[task].completed + 1 if to is None else to
            bar.update(task, completed=done, description=now)

        yield advance
