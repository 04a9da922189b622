"""`sirius generate`: one prompt, or every line of a file."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sirius.cli import terminal
from sirius.cli.options import Asked, check_effect, make_options
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
    model: Annotated[
        str | None, typer.Option(help="A folder, GGUF file or hub id; the embedded model if left out.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="JSONL, - for standard input: prompt, messages or prompt_ids on each line; id and a text's options "
            "may stand beside."
        ),
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
    per_branch: Annotated[
        bool, typer.Option("--per-branch", help="For fine: a set of neurons for each branch of a tree.")
    ] = False,
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
    dtype: Annotated[
        str, typer.Option(help="auto (the checkpoint's; bfloat16 of a GGUF file), float32, bfloat16, float16, float64.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")] = "auto",
    threads: Threads = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile a GPU's passes: minutes at first, then less time a token.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
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
    sources = {name: context.get_parameter_source(name) for name in context.params}
    asked = Asked(context.params, frozenset(name for name, at in sources.items() if at and at.name == "COMMANDLINE"))
    check_effect(asked)
    with uncollected():
        options = make_options(asked)
    corrected = options["correction"]
    source = {"model": model or "embedded", "revision": revision, "dtype": dtype}
    if max_context is not None:
        source["max_context"] = max_context
    lossless = corrected is not None and corrected.lossless(temperature > 0)
    shared = batch_size if shared_set and not lossless else None  # the company that a text may depend on
    chats = model is None if chat is None else chat
    settings = {**source, "chat": chats, **_flat(options), "batch_size": shared, "logprobs": logprobs}

    @cache  # a file of which nothing is left to do loads no model
    def load() -> "Engine":
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        return terminal.load(
            model, threads, dtype=dtype, device=device, compile=compile, max_context=max_context, **hub
        )

    form = Form(load, settings, options, json)
    if input is not None:
        decode_file(form, asked, batch_size)
    elif prompt is not None:
        stream(form, prompt)


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options as JSON holds them, so that a resumed file can be compared."""
    import json
    from dataclasses import asdict

    return json.loads(json.dumps(options, default=asdict))
