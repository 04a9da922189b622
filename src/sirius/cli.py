"""The command `sirius`: parse, call one function, print."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sirius import __version__
from sirius.errors import ConfigError, SiriusError

if TYPE_CHECKING:
    from sirius.engine import Completion, Engine, Prompt
    from sirius.jobs import BadLine, Job

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes cut the options' names at 80 columns
    help="Faster decoding of large language models: a sparse model drafts, the full model corrects.",
)
demo_app = typer.Typer(rich_markup_mode=None, help="See the method at work on the embedded model.")
app.add_typer(demo_app, name="demo")

out, err = Console(soft_wrap=True, emoji=False), Console(stderr=True, soft_wrap=True, emoji=False)

WRONG_INPUT, INTERRUPTED = 2, 130


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2, never a traceback."""
    try:
        app()
    except SiriusError as error:
        _complain(str(error))
        sys.exit(WRONG_INPUT)
    except SystemExit as end:
        if end.code == INTERRUPTED:  # typer's exit code of Ctrl-C
            _complain("interrupted; what was finished is saved, run the same command again to go on")
        raise


def _complain(message: str) -> None:
    err.print(f"[bold red]error:[/] {escape(message)}", highlight=False)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"sirius {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Faster decoding of large language models: a sparse model drafts, the full model corrects."""


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from; or give --input.")] = None,
    model: Annotated[str | None, typer.Option(help="A model folder or hub id; the embedded model if left out.")] = None,
    input: Annotated[Path | None, typer.Option(help="JSONL with prompt or prompt_ids (and id) on each line.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL to write; an unfinished one is gone on with.")] = None,
    sparsity: Annotated[str, typer.Option(help="coarse (griffin), fine (cats), none, or a plug-in's name.")] = "coarse",
    keep: Annotated[float, typer.Option(help="Fraction of the neurons kept, 0 < keep <= 1.")] = 0.5,
    sparsity_threshold: Annotated[
        float | None, typer.Option(help="For fine: keep |act(gate)| above this instead of a fraction.")
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct/--no-correct", help="Let the full model correct the draft.")
    ] = True,
    period: Annotated[int, typer.Option(help="Tokens that one check of the full model reads.")] = 16,
    accept: Annotated[str, typer.Option(help="threshold (the paper's, lossy) or argmax (lossless).")] = "threshold",
    threshold: Annotated[float, typer.Option(help="Least probability of an accepted token.")] = 0.1,
    accept_temperature: Annotated[float, typer.Option(help="Temperature of that probability.")] = 0.6,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Budget of new tokens. [default: 256 or the room left]")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be given again.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Put the prompt in the chat template. [default: embedded model only]"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16, float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, ...")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the checkpoint.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object for each completion.")] = False,
) -> None:
    """Decode one prompt, or every line of a file."""
    if (prompt is None) == (input is None):
        raise ConfigError("give one of a prompt and --input FILE.jsonl")
    if output is not None and input is None:
        raise ConfigError("--output goes with --input; print one completion with --json")
    from sirius.core import CorrectionConfig, SparsityConfig
    from sirius.sparsity import find

    find(sparsity)  # a wrong name is told before a large model is loaded
    corrected = CorrectionConfig(period, accept, threshold, accept_temperature)  # type: ignore[arg-type] - it checks
    options = {
        "max_new_tokens": max_new_tokens,
        "stop": tuple(stop or ()),
        "sparsity": SparsityConfig(sparsity, keep, sparsity_threshold),
        "correction": corrected if correct else None,
    }
    source = {"model": model or "embedded", "revision": revision, "dtype": dtype}
    settings = {**source, "chat": _chats(chat, model), **_flat(options)}

    @cache  # a file of which nothing is left to do loads no model
    def load() -> "Engine":
        return _load(model, dtype, device, revision, trust_remote_code)

    show = _print_json(settings) if json else _print_text
    if prompt is not None:
        show(load(), None, _asked(prompt, settings["chat"]), options)
    elif input is not None:
        _decode_file(load, _Files(input, output), settings, options, show)


def _chats(chat: bool | None, model: str | None) -> bool:
    return model is None if chat is None else chat


def _asked(prompt: "Prompt", chat: bool) -> "Prompt":
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) and prompt else prompt


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as JSON can hold them, so that a resumed file can be compared."""
    from dataclasses import asdict, is_dataclass

    plain = {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in options.items()}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def _load(model: str | None, dtype: str, device: str, revision: str | None, trust_remote_code: bool) -> "Engine":
    _quieten()
    from sirius.demo.embedded import FOLDER, check_embedded
    from sirius.engine import Engine

    if model is None:
        check_embedded()
    with err.status("loading the model"):
        return Engine.load(
            model or str(FOLDER), dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
        )


def _quieten() -> None:
    """Leave the terminal to us: no progress bars and notes of transformers and its hub."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


Show = Callable[["Engine", "Job | None", "Prompt", dict[str, Any]], "Completion"]


def _print_text(engine: "Engine", job: "Job | None", prompt: "Prompt", options: dict[str, Any]) -> "Completion":
    """Stream a completion's text to the terminal."""
    if job is not None:
        out.rule(escape(str(job.id)), align="left")
    last = None
    for last in engine.stream(prompt, **options):
        sys.stdout.write(last.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert last is not None and last.completion is not None
    if not last.completion.stats.lossless:
        err.print("lossy: --accept argmax gives the full model's own greedy text", style="dim", highlight=False)
    return last.completion


def _print_json(settings: dict[str, Any]) -> Show:
    def show(engine: "Engine", job: "Job | None", prompt: "Prompt", options: dict[str, Any]) -> "Completion":
        import json

        from sirius.jobs import to_record

        done = engine.generate(prompt, **options)
        record = to_record(job, done, settings)
        sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
        sys.stdout.flush()
        return done

    return show


@dataclass(frozen=True)
class _Files:
    """Where prompts come from and where completions go; no output prints them."""

    input: Path
    output: Path | None


def _decode_file(
    load: Callable[[], "Engine"], files: _Files, settings: dict[str, Any], options: dict[str, Any], show: Show
) -> None:
    """Decode every line; bad lines are named and passed over, and make the exit code 2."""
    from sirius.jobs import Output, read_jobs

    jobs = list(read_jobs(files.input))
    output = Output(files.output, settings) if files.output else None

    with closing(output) if output else nullcontext():

        def decode(job: "Job") -> None:
            prompt = _asked(job.prompt, settings["chat"])
            if output is None:
                show(load(), job, prompt, options)
            elif not output.has(job):
                output.write(job, load().generate(prompt, **options))

        bad = _each_line(files.input, jobs, decode, shown=output is not None)
    if output is not None:
        err.print(f"{len(output.done)} completions in {output.path}", highlight=False, markup=False)
    if bad:
        _complain(f"{bad} of {len(jobs)} lines of {files.input} could not be decoded")
        raise typer.Exit(WRONG_INPUT)


def _each_line(path: Path, jobs: "list[Job | BadLine]", decode: Callable[["Job"], None], shown: bool) -> int:
    """Call `decode` on every job, name the lines that cannot be decoded and return how many there were."""
    from sirius.errors import RequestError
    from sirius.jobs import BadLine

    bad = 0
    with _progress("decoding", len(jobs), shown) as advance:
        for job in jobs:
            try:
                if isinstance(job, BadLine):
                    raise RequestError(job.reason)
                decode(job)
            except RequestError as error:
                bad += 1
                _complain(f"{path} line {job.line}: {error}")
            advance()
    return bad


@contextmanager
def _progress(what: str, total: int, shown: bool = True) -> Iterator[Callable[..., None]]:
    """Show a progress bar on the terminal's error stream; yields what moves it on by one, or to a step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=not shown) as bar:
        task = bar.add_task(what, total=total)

        def advance(to: int | None = None, now: str = what) -> None:
            done = bar.tasks[task].completed + 1 if to is None else to
            bar.update(task, completed=done, description=now)

        yield advance


@demo_app.callback(invoke_without_command=True)
def demo(
    context: typer.Context,
    problems: Annotated[int, typer.Option(min=1, help="Problems of each task.")] = 40,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 0,
    keep: Annotated[float | None, typer.Option(help="Fraction of neurons that coarse keeps. [default: 0.4]")] = None,
    model: Annotated[Path | None, typer.Option(help="A folder that `sirius demo train` wrote.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, and no example.")] = False,
) -> None:
    """Compare full, sparse and corrected decoding on two tasks, then show one problem token by token."""
    if context.invoked_subcommand is not None:
        return
    from dataclasses import asdict

    import torch

    from sirius.demo import show, showcase
    from sirius.demo.problems import TASKS

    torch.set_num_threads(1)  # the model is too small to share out: a second thread only waits
    settings = showcase.make_settings() if keep is None else showcase.make_settings(keep)
    engine = _load(None if model is None else str(model), "auto", "cpu", None, False)
    with _progress("decoding", problems * len(TASKS) * len(settings)) as advance:
        rows = showcase.run(engine, settings, problems, seed, on_problem=advance)
    if json:
        import json as encoder

        sys.stdout.write(encoder.dumps([asdict(row) for row in rows], indent=2) + "\n")
        return
    out.print(show.table(rows))
    out.print(show.example(engine, settings, seed))


@demo_app.command()
def train(
    folder: Annotated[Path, typer.Argument(help="Where the model goes; an unfinished run there is gone on with.")],
) -> None:
    """Train the embedded model from nothing: about an hour on two cores."""
    _quieten()
    from sirius.demo.train import Recipe, train

    recipe = Recipe()
    with _progress("training", recipe.steps) as advance:
        train(folder, recipe, on_step=lambda p: advance(p.step, f"training, loss {p.loss:.3f}"))
    out.print(f"the model is in {folder}; try it: sirius demo --model {folder}", highlight=False)
