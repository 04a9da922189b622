"""`sirius generate`: one prompt, or every line of a file."""

import sys
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from sirius.cli import terminal
from sirius.cli.terminal import WRONG_INPUT, complain, err, out, progress, saved_as_it_goes, uncollected
from sirius.errors import ConfigError, SiriusError

if TYPE_CHECKING:
    from sirius.core import CorrectionConfig
    from sirius.engine import Completion, Engine, Prompt
    from sirius.jobs import Job

CORRECTING = ("period", "accept", "threshold", "accept_temperature", "tree_width", "prune", "ablate")
SAMPLING = ("top_p", "top_k", "min_p")
PRESETS = ("paper",)


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from; or give --input.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A folder, GGUF file or hub id; the embedded model if left out.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(help="JSONL with prompt or prompt_ids on each line; id and a text's options may stand beside."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL to write; an unfinished one is gone on with.")] = None,
    sparsity: Annotated[str, typer.Option(help="coarse (griffin), fine (cats), none, or a plug-in's name.")] = "coarse",
    keep: Annotated[float, typer.Option(help="Fraction of the neurons kept, 0 < keep <= 1.")] = 0.5,
    sparsity_threshold: Annotated[
        float | None, typer.Option(help="For fine: keep |act(gate)| above this instead of a fraction.")
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct/--no-correct", help="Let the full model correct the draft.")
    ] = True,
    preset: Annotated[
        str | None,
        typer.Option(help="paper: period 16, accept threshold, threshold 0.1 (lossy). Options given beside it win."),
    ] = None,
    period: Annotated[
        str, typer.Option(help="Tokens of a branch that one check reads; auto drafts where that is faster.")
    ] = "auto",
    accept: Annotated[
        str, typer.Option(help="lossless (or argmax, sampling); threshold (the paper's), relative, typical are lossy.")
    ] = "lossless",
    threshold: Annotated[
        float | None, typer.Option(help="Least probability of an accepted token, for a lossy rule. [default: 0.1]")
    ] = None,
    accept_temperature: Annotated[float, typer.Option(help="Temperature of that probability.")] = 0.6,
    tree_width: Annotated[int, typer.Option(help="Branches drafted side by side.")] = 1,
    prune: Annotated[float, typer.Option(help="Drop branches under this share of the best one's probability.")] = 0.0,
    per_branch: Annotated[bool, typer.Option(help="For fine: a set of neurons for each branch of a tree.")] = False,
    shared_set: Annotated[
        bool, typer.Option("--shared-set", help="For coarse: one set of neurons for all prompts of a batch.")
    ] = False,
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
    max_context: Annotated[
        int | None,
        typer.Option(help="Most tokens of a prompt and its text, past the model's own limit too. [default: that]"),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="A string that ends the text; may be given again. [default: the checkpoint's]"),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Put the prompt in the chat template. [default: embedded model only]"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16, float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, ...")] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile a GPU's passes: minutes at first, then less time a token.")
    ] = False,
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
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, at in sources.items() if at and at.name == "COMMANDLINE"}
    _check_preset(preset)
    _check_effect(given, correct, greedy=temperature == 0 and input is None)  # a file's lines may have temperatures
    with uncollected():
        from sirius.core import CorrectionConfig, SamplingConfig, SparsityConfig, check_together
        from sirius.sparsity import find

    find(sparsity)  # a wrong name is told before a large model is loaded
    rules = (_period(period), accept, threshold, accept_temperature, tree_width, prune, tuple(ablate or ()))
    asked: dict[str, Any] = dict(zip(CORRECTING, rules, strict=True))
    if preset is not None:
        asked = {name: value for name, value in asked.items() if name in given}
    make = CorrectionConfig if preset is None else CorrectionConfig.paper
    corrected = make(**asked) if correct else None
    sampling = SamplingConfig(temperature, top_p, top_k, min_p, repetition_penalty, seed)
    check_together(sampling, corrected)
    options = {
        "max_new_tokens": max_new_tokens,
        "stop": tuple(stop) if stop else None,
        "sparsity": SparsityConfig(sparsity, keep, sparsity_threshold, per_branch, shared_set, refresh),
        "correction": corrected,
        "sampling": sampling,
    }
    source = {"model": model or "embedded", "revision": revision, "dtype": dtype}
    if max_context is not None:
        source["max_context"] = max_context
    lossless = corrected is not None and corrected.lossless(temperature > 0)
    shared = batch_size if shared_set and not lossless else None  # the company that a text may depend on
    settings = {**source, "chat": _chats(chat, model), **_flat(options), "batch_size": shared, "logprobs": logprobs}

    @cache  # a file of which nothing is left to do loads no model
    def load() -> "Engine":
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        return terminal.load(model, dtype=dtype, device=device, compile=compile, max_context=max_context, **hub)

    form = _Form(settings, json, logprobs, corrected)
    if input is not None:
        _decode_file(load, _Files(input, output), form, options, batch_size)
    elif prompt is not None and json:
        form.show(None, load().generate(_asked(prompt, settings["chat"]), **options))
    elif prompt is not None:
        _stream(load(), _asked(prompt, settings["chat"]), options)


def _check_effect(given: set[str], correct: bool, greedy: bool) -> None:
    """Refuse options that were given and would change nothing."""
    for idle, names, way in (
        (not correct, ("preset", *CORRECTING), "without correction; leave out --no-correct"),
        (greedy, SAMPLING, "at temperature 0, which is greedy; give --temperature"),
    ):
        if idle and (found := [f"--{name.replace('_', '-')}" for name in names if name in given]):
            raise ConfigError(f"{', '.join(found)} would change nothing {way}")


def _check_preset(preset: str | None) -> None:
    if preset is not None and preset not in PRESETS:
        raise ConfigError(f"--preset is {', '.join(PRESETS)}; got {preset!r}")


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


def _stream(engine: "Engine", prompt: "Prompt", options: dict[str, Any]) -> None:
    """Write a completion's text to the terminal as it becomes certain."""
    for update in engine.stream(prompt, **options):
        sys.stdout.write(update.text)
        sys.stdout.flush()
        if update.completion is not None:
            sys.stdout.write("\n")
            _tell_lossy(update.completion, options["correction"])


def _tell_lossy(done: "Completion", correction: "CorrectionConfig | None") -> None:
    """Say that a text need not be the full model's, where that is so, and what to do about it."""
    if done.stats.lossless:
        return
    if correction is not None and correction.lossless(sampled=False):
        said = "not certain to be the full model's text, as rounding here differs with the number of tokens in a pass; "
        said += "--period 1 of a single prompt is certain, and so is --device cpu --dtype float32"
    else:
        said = "lossy: this need not be the full model's text; the defaults (without --no-correct, --preset, --ablate, "
        said += "another --accept) give that"
    err.print(said, style="dim", highlight=False)


@dataclass(frozen=True)
class _Form:
    """How completions are written: the settings that each line names, as JSON or text, with every token's details."""

    settings: dict[str, Any]
    json: bool
    details: bool
    correction: "CorrectionConfig | None"

    def show(self, job: "Job | None", done: "Completion") -> None:
        """Write a whole completion to the terminal."""
        if not self.json:
            out.rule(escape("" if job is None else str(job.id)), align="left")
            sys.stdout.write(f"{done.text}\n")
            _tell_lossy(done, self.correction)
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
    with (
        closing(output) if output else nullcontext(),
        saved_as_it_goes() if output else nullcontext(),
        progress("decoding", len(lines), output is not None) as advance,
    ):
        bad = [line for line in lines if isinstance(line, BadLine)]
        jobs = [line for line in lines if not isinstance(line, BadLine) and not (output and output.has(line))]
        for line in bad:
            complain(f"{files.input} line {line.line}: {line.reason}")
        advance(to=len(lines) - len(jobs))
        prompts = [_asked(job.prompt, form.settings["chat"]) for job in jobs]
        each = [job.over(options) for job in jobs]
        done = load().generate_many(prompts, batch_size=batch_size, each=each, **options) if jobs else ()
        failed = _take(files, jobs, done, output.write if output else form.show, advance)
    if output is not None:
        err.print(f"{len(output.done)} completions in {output.path}", highlight=False, markup=False)
    if bad or failed:
        complain(f"{len(bad) + failed} of {len(lines)} lines of {files.input} could not be decoded")
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
            complain(f"{files.input} line {jobs[index].line}: {done}")
        else:
            write(jobs[index], done)
        advance()
    return failed
