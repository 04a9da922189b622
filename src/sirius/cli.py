"""The command `sirius`: parse, call one function, print."""

import sys
from collections.abc import Callable, Iterable, Iterator
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
    from sirius.jobs import Job

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
    period: Annotated[str, typer.Option(help="Tokens of a branch that one check reads, or auto.")] = "16",
    accept: Annotated[
        str, typer.Option(help="threshold (the paper's), relative, typical: lossy; argmax, sampling: lossless.")
    ] = "threshold",
    threshold: Annotated[float, typer.Option(help="Least probability of an accepted token.")] = 0.1,
    accept_temperature: Annotated[float, typer.Option(help="Temperature of that probability.")] = 0.6,
    tree_width: Annotated[int, typer.Option(help="Branches drafted side by side.")] = 1,
    prune: Annotated[float, typer.Option(help="Drop branches under this share of the best one's probability.")] = 0.0,
    per_branch: Annotated[bool, typer.Option(help="For fine: a set of neurons for each branch of a tree.")] = False,
    per_row: Annotated[bool, typer.Option(help="For coarse: a set of neurons for each prompt of a batch.")] = False,
    refresh: Annotated[float, typer.Option(help="For coarse: share of a checked window in its statistic.")] = 0.0,
    ablate: Annotated[
        list[str] | None, typer.Option(help="For studies, lossy: leave out rewrite, interleave or rollback.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens of this probability in all.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many likeliest tokens; 0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens under this share of the likeliest one's.")] = 0.0,
    repetition_penalty: Annotated[float | None, typer.Option(help="[default: the checkpoint's]")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed samples the same text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of --input decoded side by side.")] = 8,
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
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="In JSON: each token's origin and the full model's log-probability.")
    ] = False,
) -> None:
    """Decode one prompt, or every line of a file."""
    if (prompt is None) == (input is None):
        raise ConfigError("give one of a prompt and --input FILE.jsonl")
    if output is not None and input is None:
        raise ConfigError("--output goes with --input; print one completion with --json")
    from sirius.core import CorrectionConfig, SamplingConfig, SparsityConfig, check_together
    from sirius.sparsity import find

    find(sparsity)  # a wrong name is told before a large model is loaded
    rules = (_period(period), accept, threshold, accept_temperature, tree_width, prune, tuple(ablate or ()))
    corrected = CorrectionConfig(*rules) if correct else None  # type: ignore[arg-type] - it checks
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    check_together(sampling, corrected)
    options = {
        "max_new_tokens": max_new_tokens,
        "stop": tuple(stop or ()),
        "sparsity": SparsityConfig(sparsity, keep, sparsity_threshold, per_branch, per_row, refresh),
        "correction": corrected,
        "sampling": sampling,
    }
    source = {"model": model or "embedded", "revision": revision, "dtype": dtype}
    settings = {**source, "chat": _chats(chat, model), **_flat(options)}

    @cache  # a file of which nothing is left to do loads no model
    def load() -> "Engine":
        return _load(model, dtype, device, revision, trust_remote_code)

    form = _Form(settings, json, logprobs)
    if input is not None:
        _decode_file(load, _Files(input, output), form, options, batch_size)
    elif prompt is not None and json:
        form.show(None, load().generate(_asked(prompt, settings["chat"]), **options))
    elif prompt is not None:
        _stream(load(), _asked(prompt, settings["chat"]), options)


def _period(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise ConfigError(f"--period is a whole number or auto; got {text!r}") from error


def _chats(chat: bool | None, model: str | None) -> bool:
    return model is None if chat is None else chat


def _asked(prompt: "Prompt", chat: bool) -> "Prompt":
    return [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) and prompt else prompt


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as JSON holds them, so that a resumed file can be compared."""
    import json
    from dataclasses import asdict

    return json.loads(json.dumps(options, default=asdict))


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


def _stream(engine: "Engine", prompt: "Prompt", options: dict[str, Any]) -> None:
    """Write a completion's text to the terminal as it becomes certain."""
    for update in engine.stream(prompt, **options):
        sys.stdout.write(update.text)
        sys.stdout.flush()
        if update.completion is not None:
            sys.stdout.write("\n")
            _tell_lossy(update.completion)


def _tell_lossy(done: "Completion") -> None:
    if not done.stats.lossless:
        err.print(
            "lossy: --accept argmax gives the full model's own greedy text, --accept sampling its own samples",
            style="dim",
            highlight=False,
        )


@dataclass(frozen=True)
class _Form:
    """How completions are written: the settings that each line names, as JSON or text, with every token's details."""

    settings: dict[str, Any]
    json: bool
    details: bool

    def show(self, job: "Job | None", done: "Completion") -> None:
        """Write a whole completion to the terminal."""
        if not self.json:
            out.rule(escape("" if job is None else str(job.id)), align="left")
            sys.stdout.write(f"{done.text}\n")
            _tell_lossy(done)
        else:
            import json

            from sirius.jobs import to_record

            record = to_record(job, done, self.settings, self.details)
            sys.stdout.write(json.dumps(record, ensure_ascii=False) + "\n")
        sys.stdout.flush()


@dataclass(frozen=True)
class _Files:
    """Where prompts come from and where completions go; no output prints them."""

    input: Path
    output: Path | None


def _decode_file(
    load: Callable[[], "Engine"], files: _Files, form: _Form, options: dict[str, Any], batch_size: int
) -> None:
    """Decode every line, several side by side; bad lines are named and passed over, and make the exit code 2."""
    from sirius.jobs import BadLine, Output, read_jobs

    lines = list(read_jobs(files.input))
    output = Output(files.output, form.settings, form.details) if files.output else None
    with closing(output) if output else nullcontext(), _progress("decoding", len(lines), output is not None) as advance:
        bad = [line for line in lines if isinstance(line, BadLine)]
        jobs = [line for line in lines if not isinstance(line, BadLine) and not (output and output.has(line))]
        for line in bad:
            _complain(f"{files.input} line {line.line}: {line.reason}")
        advance(to=len(lines) - len(jobs))
        prompts = [_asked(job.prompt, form.settings["chat"]) for job in jobs]
        done = load().generate_many(prompts, batch_size=batch_size, **options) if jobs else ()
        failed = _take(files, jobs, done, output.write if output else form.show, advance)
    if output is not None:
        err.print(f"{len(output.done)} completions in {output.path}", highlight=False, markup=False)
    if bad or failed:
        _complain(f"{len(bad) + failed} of {len(lines)} lines of {files.input} could not be decoded")
        raise typer.Exit(WRONG_INPUT)


def _take(
    files: _Files,
    jobs: "list[Job]",
    results: "Iterable[tuple[int, Completion | SiriusError]]",
    write: Callable[["Job", "Completion"], None],
    advance: Callable[[], None],
) -> int:
    """Write completions as they come, name the lines that failed and return how many there were."""
    from sirius.errors import SiriusError

    failed = 0
    for index, done in results:
        if isinstance(done, SiriusError):
            failed += 1
            _complain(f"{files.input} line {jobs[index].line}: {done}")
        else:
            write(jobs[index], done)
        advance()
    return failed


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
def oracle(
    problems: Annotated[int, typer.Option(min=1, help="Reasoning problems at each bar.")] = 40,
    seed: Annotated[int, typer.Option(help="Which problems.")] = 0,
    sparsity: Annotated[str, typer.Option(help="coarse or fine.")] = "coarse",
    keep: Annotated[float, typer.Option(help="Fraction of the neurons kept.")] = 0.4,
    json: Annotated[bool, typer.Option("--json", help="Print the points as JSON.")] = False,
) -> None:
    """Step both models side by side and replace unlikely tokens: accuracy against the share replaced."""
    import json as encoder
    from dataclasses import asdict

    import torch

    from sirius.core import SparsityConfig
    from sirius.demo import oracle as study
    from sirius.demo import show

    chosen = SparsityConfig(sparsity, keep)
    torch.set_num_threads(1)
    engine = _load(None, "auto", "cpu", None, False)
    with _progress("decoding", problems * len(study.BARS)) as advance:
        points = study.run(engine, chosen, problems, seed, on_problem=advance)
    if json:
        sys.stdout.write(encoder.dumps([asdict(point) for point in points], indent=2) + "\n")
    else:
        out.print(show.curve(points))


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
