"""`sirius trace`: one generation as a page."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sirius.cli import arguments, terminal
from sirius.cli.options import CommandLine, check_effect, make_options
from sirius.cli.terminal import Threads, err, remark, uncollected
from sirius.cli.texts import as_message, read_prompt
from sirius.errors import ConfigError

if TYPE_CHECKING:
    from sirius.trace.collect import Trace

OTHERS = {"input": None, "shared_set": False}  # options of `sirius generate` that a single prompt has no use for


def trace(
    context: typer.Context,
    prompt: Annotated[str, typer.Argument(help="The text to go on from, - for standard input.")],
    output: Annotated[Path | None, typer.Option(help="The file to write; an earlier trace is overwritten.")] = None,
    model: arguments.Model = None,
    sparsity: arguments.Sparsity = None,
    draft_bits: arguments.DraftBits = None,
    keep: arguments.Keep = 0.5,
    sparsity_threshold: arguments.SparsityThreshold = None,
    correct: arguments.Correct = True,
    preset: arguments.Preset = None,
    period: arguments.Period = "auto",
    accept: arguments.Accept = "lossless",
    threshold: arguments.Threshold = None,
    accept_temperature: arguments.AcceptTemperature = 0.6,
    tree_width: arguments.TreeWidth = 1,
    prune: arguments.Prune = 0.0,
    draft_confidence: arguments.DraftConfidence = 0.0,
    draft_ngram: arguments.DraftNgram = 0,
    per_branch: arguments.PerBranch = False,
    refresh: arguments.Refresh = 0.0,
    ablate: arguments.Ablate = None,
    temperature: arguments.Temperature = 0.0,
    top_p: arguments.TopP = 1.0,
    top_k: arguments.TopK = 0,
    min_p: arguments.MinP = 0.0,
    repetition_penalty: arguments.RepetitionPenalty = None,
    seed: arguments.Seed = None,
    max_new_tokens: arguments.MaxNewTokens = None,
    max_context: arguments.MaxContext = None,
    memory_budget: arguments.MemoryBudget = None,
    stop: arguments.Stop = None,
    chat: arguments.Chat = None,
    dtype: arguments.Dtype = "auto",
    device: arguments.Device = "auto",
    threads: Threads = None,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    json: Annotated[bool, typer.Option("--json", help="Write JSON in place of the page, or print it.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Let --output overwrite a file that is no trace.")] = False,
) -> None:
    """Decode one prompt and write a page of HTML that shows where each token comes from."""
    command = CommandLine.of(context, **OTHERS)
    check_effect(command)
    with uncollected():
        options = make_options(command)
        from sirius.trace.collect import collect

    _check_output(output, json, force)
    text = as_message(read_prompt(prompt), model is None if chat is None else chat)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    budget = terminal.budget_of(command, options)
    engine = terminal.load(model, threads, dtype=dtype, device=device, max_context=max_context, **hub, **budget)
    terminal.round_weights(engine, options)
    with err.status("decoding"):
        found = collect(engine, text, **options)
    _write(found if model else replace(found, model="embedded"), output, json)
    asked = options["sparsity"].method != "none" or options["sparsity"].draft_bits
    if output is not None and asked and found.correction and not found.stats["drafted"]:
        remark("nothing was drafted; give --period 16 to see drafts on the page")


def _check_output(output: Path | None, json: bool, force: bool) -> None:
    from sirius.trace.files import check_target

    if output is None:
        if not json:
            raise ConfigError("--output is missing; give --output PAGE.html, or --json to print the trace's data")
    elif output == Path("-"):
        raise ConfigError("--output is a file; leave it out and give --json to print the trace's data")
    else:
        check_target(output, force)


def _write(found: "Trace", output: Path | None, json: bool) -> None:
    from sirius.trace.collect import to_json
    from sirius.trace.files import write
    from sirius.trace.page import to_html

    text = to_json(found) + "\n" if json else to_html(found)
    if output is None:
        sys.stdout.write(text)
        sys.stdout.flush()
        return
    write(output, text)
    tokens, size = len(found.tokens), len(text.encode()) / 1000
    err.print(f"{tokens} tokens in {output} ({size:.0f} kB)", highlight=False, markup=False)
