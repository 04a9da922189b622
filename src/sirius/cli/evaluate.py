"""`sirius eval`: lm-eval's own command on a model of ours, with local data where it is given."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sirius.cli.options import Asked, check_effect
from sirius.cli.sweep import Data, check_lm_eval
from sirius.cli.terminal import Threads, quieten, uncollected, use_threads
from sirius.errors import ConfigError

OURS = ("--model_args", "-a", "--include_path", "--config", "-C")  # what this command gives lm-eval itself
UNSAFE = "--confirm_run_unsafe_code"


def evaluate(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="Task names of lm-eval with commas; the paper's are gsm8k, csqa_cot, ...")],
    model: Annotated[
        str | None, typer.Option(help="A folder, GGUF file or hub id; the embedded model if left out.")
    ] = None,
    data: Data = None,
    sparsity: Annotated[str, typer.Option(help="coarse (griffin), fine (cats), none, or a plug-in's name.")] = "coarse",
    keep: Annotated[float, typer.Option(help="Fraction of the neurons kept, 0 < keep <= 1.")] = 0.5,
    sparsity_threshold: Annotated[
        float | None, typer.Option(help="For fine: keep |act(gate)| above this instead of a fraction.")
    ] = None,
    correct: Annotated[
        bool, typer.Option("--correct/--no-correct", help="Let the full model correct the draft.")
    ] = True,
    preset: Annotated[
        str | None, typer.Option(help="paper: keep, period, threshold and width of each task as published (lossy).")
    ] = None,
    period: Annotated[str, typer.Option(help="Tokens of a branch that one check reads, or auto.")] = "auto",
    accept: Annotated[
        str, typer.Option(help="lossless (or argmax, sampling); threshold (the paper's), relative, typical are lossy.")
    ] = "lossless",
    threshold: Annotated[float | None, typer.Option(help="Least probability of an accepted token.")] = None,
    accept_temperature: Annotated[float, typer.Option(help="Temperature of that probability.")] = 0.6,
    tree_width: Annotated[int, typer.Option(help="Branches drafted side by side.")] = 1,
    prune: Annotated[float, typer.Option(help="Drop branches under this share of the best one's probability.")] = 0.0,
    per_branch: Annotated[bool, typer.Option("--per-branch", help="For fine: a set of neurons per branch.")] = False,
    refresh: Annotated[float, typer.Option(help="For coarse: share of a checked window in its statistic.")] = 0.0,
    ablate: Annotated[
        list[str] | None, typer.Option(help="For studies, lossy: leave out rewrite, interleave or rollback.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts decoded side by side.")] = 8,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float32, bfloat16, float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda, ...")] = "auto",
    threads: Threads = None,
    max_context: Annotated[int | None, typer.Option(help="Most tokens of a prompt and its text.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
    completions: Annotated[
        Path | None, typer.Option(help="A folder that keeps every finished sample; an interrupted run goes on there.")
    ] = None,
) -> None:
    """Evaluate a model on tasks of lm-eval; every other option is lm-eval's own: --limit, --log_samples, ...

    The texts are decoded our way. Log-probabilities, which multiple choice goes by, are the full model's.
    """
    if own := sorted({each.split("=")[0] for each in context.args} & {*OURS}):
        raise ConfigError(f"{', '.join(own)} would undo what sirius eval gives lm-eval; use lm_eval --model sirius")
    asked = Asked.of(context, input="", temperature=0.0, json=True, output=Path(), logprobs=False, force=False)
    check_effect(asked)
    check_lm_eval()
    from sirius.settings import NAMES

    setting = {name: asked[name] for name in NAMES if name in asked.given}
    if "ablate" in setting:
        setting["ablate"] = "+".join(setting["ablate"])
    load = {"dtype": dtype, "revision": revision, "max_context": max_context, "trust_remote_code": trust_remote_code}
    load["completions"] = None if completions is None else str(completions)
    given = {name: value for name, value in load.items() if value not in (None, False)}
    names = [each.strip() for each in tasks.split(",") if each.strip()]
    own = ["--device", device, "--batch_size", str(batch_size), *context.args]
    use_threads(threads)
    run(names, data, {"pretrained": model or "embedded", **given, **setting}, own)


def run(tasks: Sequence[str], data: Path | None, model_args: dict[str, Any], options: Sequence[str]) -> None:
    """Run lm-eval's command on the model sirius.

    model_args  the arguments of `SiriusLM`
    options     further ones of lm-eval's command line

    Raises ConfigError of options that lm-eval refuses, of tasks that are none and of data that is missing, before a
    model is loaded.
    """
    with uncollected():
        quieten()
        from lm_eval._cli.harness import HarnessCLI
        from lm_eval.config.evaluate_config import EvaluatorConfig

        from sirius.evaluation import lm
        from sirius.evaluation.suite import check_tasks, load_tasks, suite_folder, task_manager

    with suite_folder(data) as folder:
        manager = task_manager(folder, tasks)
        check_tasks(tasks, data, manager)
        unsafe = [name for name, task in load_tasks(tasks, manager).items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe and UNSAFE not in options:
            raise ConfigError(f"{', '.join(unsafe)} runs code that the model writes; give {UNSAFE} to allow it")
        lm.check_setting(model_args)
        asked = ["--model", "sirius", "--model_args", json.dumps(model_args), "--tasks", ",".join(tasks)]
        before, sys.argv = sys.argv, ["lm_eval", "run", *asked, "--include_path", str(folder), *options]
        try:
            harness = HarnessCLI()
            parsed = harness.parse_args()
            try:
                EvaluatorConfig.from_cli(parsed)
            except ValueError as error:
                raise ConfigError(f"lm-eval refuses the options: {error}") from error
            harness.execute(parsed)
        finally:
            sys.argv = before
