"""How `sirius generate` takes prompts and gives texts: one as it becomes certain, or those of a file."""

import sys
from collections.abc import Callable, Iterable
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.cells import cell_len
from rich.markup import escape

from sirius.cli.options import CommandLine, check_hot
from sirius.cli.summary import tell
from sirius.cli.terminal import WRONG_INPUT, complain, err, out, progress, saved_as_it_goes
from sirius.errors import SiriusError

if TYPE_CHECKING:
    from sirius.engine import Completion, Engine, Prompt
    from sirius.jobs import Job


@dataclass(frozen=True)
class Form:
    """What a command's texts have in common.

    settings  what each line of JSON names, to know the command again
    options   those of `Engine.generate`
    json      whether texts are printed as JSON
    """

    load: Callable[[], "Engine"]
    settings: dict[str, Any]
    options: dict[str, Any]
    json: bool

    @property
    def details(self) -> bool:
        """Whether JSON has each token's origin and log-probability."""
        return self.settings["logprobs"]

    def as_message(self, prompt: "Prompt") -> "Prompt":
        """Return a prompt, as a message of the user where the chat template is wanted."""
        return as_message(prompt, self.settings["chat"])

    def length(self, prompt: "Prompt") -> int:
        """Return how many tokens a prompt has."""
        return len(self.load().encode(self.as_message(prompt)))

    def show(self, job: "Job", done: "Completion", prompt_tokens: int) -> None:
        """Print the completion of a file's line."""
        if self.json:
            self.show_json(job, done, prompt_tokens)
            return
        name = str(job.id)
        if cell_len(name) + 4 > out.width:  # a rule would cut it
            out.print(name, highlight=False, markup=False)
        else:
            out.rule(escape(name), align="left")
        sys.stdout.write(f"{done.text}\n")
        sys.stdout.flush()
        tell(done, {**self.options, **job.over(self.options)})

    def show_json(self, job: "Job | None", done: "Completion", prompt_tokens: int) -> None:
        """Print a completion as a line of JSON."""
        from sirius.jobs import to_line, to_record

        record = to_record(job, done, self.settings, self.details, prompt_tokens)
        sys.stdout.write(to_line(record, sys.stdout.encoding))
        sys.stdout.flush()


def as_message(prompt: "Prompt", chat: bool) -> "Prompt":
    """Return a text as a message of the user where `chat` says so, and any other prompt unchanged."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt and chat else prompt


def read_prompt(given: str) -> str:
    """Return the prompt that a command was given; "-" is what standard input holds."""
    if given != "-":
        return given
    from sirius.jobs import STDIN, read_text

    return read_text(STDIN).removesuffix("\n")  # which `echo` adds


def stream(form: Form, given: str) -> None:
    """Decode one prompt, and print its text as it becomes certain, or its JSON; "-" is what standard input holds."""
    prompt = read_prompt(given)
    engine, message = form.load(), form.as_message(prompt)
    if form.json:
        form.show_json(None, engine.generate(message, **form.options), form.length(prompt))
        return
    begun = False  # a line that is not ended
    try:
        for update in engine.stream(message, **form.options):
            begun = update.completion is None
            sys.stdout.write(update.text if begun else f"{update.text}\n")
            sys.stdout.flush()
            if update.completion is not None:
                tell(update.completion, form.options)
    except BaseException:
        if begun:  # an error has a line of its own
            with suppress(OSError):
                sys.stdout.write("\n")
                sys.stdout.flush()
        raise


def decode_file(form: Form, command: CommandLine, batch_size: int) -> None:
    """Decode every line of --input; bad lines are named and passed over, and make the exit code 2."""
    from sirius.jobs import BadLine, Output, name_of, read_jobs

    path: Path = command["input"]
    name, target = name_of(path), command["output"]
    lines = list(read_jobs(path, command["temperature"]))
    check_hot(command, any(line.options.get("temperature") for line in lines if not isinstance(line, BadLine)))
    output = Output(target, form.settings, form.details) if target else None
    with (
        closing(output) if output else nullcontext(),
        saved_as_it_goes() if output else nullcontext(),
        progress("decoding", len(lines), output is not None) as advance,
    ):
        bad = [line for line in lines if isinstance(line, BadLine)]
        jobs = [line for line in lines if not isinstance(line, BadLine) and not (output and output.has(line))]
        for line in bad:
            complain(f"{name} line {line.line}: {line.reason}")
        advance(to=len(lines) - len(jobs))
        done = _decoded(form, jobs, batch_size) if jobs else ()
        failed = _take(form, jobs, done, output.write if output else form.show, name, advance)
    if output is not None:
        err.print(f"{len(output.done)} completions in {output.path}", highlight=False, markup=False)
    if bad or failed:
        complain(f"{len(bad) + failed} of {len(lines)} lines of {name} could not be decoded")
        raise typer.Exit(WRONG_INPUT)


def _decoded(form: Form, jobs: "list[Job]", batch_size: int) -> "Iterable[tuple[int, Completion | SiriusError]]":
    prompts = [form.as_message(job.prompt) for job in jobs]
    each = [job.over(form.options) for job in jobs]
    return form.load().generate_many(prompts, batch_size=batch_size, each=each, **form.options)


def _take(
    form: Form,
    jobs: "list[Job]",
    results: "Iterable[tuple[int, Completion | SiriusError]]",
    write: Callable[["Job", "Completion", int], None],
    name: str,
    advance: Callable[[], None],
) -> int:
    """Write completions as they come, name the lines that failed and return how many there were."""
    failed = 0
    for index, done in results:
        if isinstance(done, SiriusError):
            failed += 1
            complain(f"{name} line {jobs[index].line}: {done}")
        else:
            write(jobs[index], done, form.length(jobs[index].prompt))
        advance()
    return failed
