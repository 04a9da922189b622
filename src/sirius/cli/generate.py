"""`sirius generate`: one prompt, or every line of a file."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sirius.cli import arguments, terminal
from sirius.cli.options import CommandLine, check_effect, make_options
from sirius.cli.terminal import Threads, uncollected
from sirius.cli.texts import Form, decode_file, stream
from sirius.errors import ConfigError

if TYPE_CHECKING:
    from sirius.engine import Engine


def generate(
    context: typer.Context,
    prompt: Annotated[
        str | None, typer.Argument(help="The text to go on from, - for standard input; or give --input.")
    ] = None,
    model: arguments.Model = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="JSONL, - for standard input: prompt, messages or prompt_ids on each line; id and a text's options "
            "may stand beside."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL to write; an unfinished one is gone on with.")] = None,
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
    shared_set: Annotated[
        bool, typer.Option("--shared-set", help="For coarse: one set of neurons for all prompts of a batch.")
    ] = False,
    refresh: arguments.Refresh = 0.0,
    ablate: arguments.Ablate = None,
    temperature: arguments.Temperature = 0.0,
    top_p: arguments.TopP = 1.0,
    top_k: arguments.TopK = 0,
    min_p: arguments.MinP = 0.0,
    repetition_penalty: arguments.RepetitionPenalty = None,
    seed: arguments.Seed = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts of --input decoded side by side.")] = 8,
    max_new_tokens: arguments.MaxNewTokens = None,
    max_context: arguments.MaxContext = None,
    memory_budget: arguments.MemoryBudget = None,
    stop: arguments.Stop = None,
    chat: arguments.Chat = None,
    dtype: arguments.Dtype = "auto",
    device: arguments.Device = "auto",
    threads: Threads = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile a GPU's passes: minutes at first, then less time a token.")
    ] = False,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
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
    if output == Path("-"):
        raise ConfigError("--output is a file; leave it out and give --json, which prints the same lines")
    command = CommandLine.of(context)
    check_effect(command)
    with uncollected():
        options = make_options(command)
    corrected = options["correction"]
    source = {"model": model or "embedded", "revision": revision, "dtype": dtype}
    source |= {} if max_context is None else {"max_context": max_context}
    lossless = corrected is not None and corrected.lossless(temperature > 0)
    shared = batch_size if shared_set and not lossless else None  # the company that a text may depend on
    chats = model is None if chat is None else chat
    settings = {**source, "chat": chats, **_flat(options), "batch_size": shared, "logprobs": logprobs}

    @cache  # a file of which nothing is left to do loads no model
    def load() -> "Engine":
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        kind = {"dtype": dtype, "device": device, "compile": compile, "max_context": max_context}
        budget = terminal.budget_of(command, options, 1 if input is None else batch_size)
        engine = terminal.load(model, threads, **kind, **hub, **budget)
        terminal.round_weights(engine, options)
        return engine

    form = Form(load, settings, options, json)
    if prompt is not None:
        return stream(form, prompt)
    decode_file(form, command, batch_size)


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as JSON holds them, so that a resumed file can be compared."""
    import json
    from dataclasses import asdict

    return json.loads(json.dumps(options, default=asdict))
