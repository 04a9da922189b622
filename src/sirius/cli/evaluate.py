"""`sirius eval`: lm-eval's own command on a model of ours, with local data where it is given."""

import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from sirius.cli import arguments
from sirius.cli.options import CommandLine, check_effect, setting_of
from sirius.cli.sweep import check_lm_eval
from sirius.cli.terminal import Threads, facts_shown, quieten, remark, uncollected, use_threads
from sirius.errors import ConfigError

OURS = (
    "--model_args",
    "-a",
    "--include_path",
    "--config",
    "-C",
    "--tasks",
    "-t",
    "--model",
    "-M",
)  # lm-eval gets its own
OTHERS = {"input": "", "temperature": 0.0, "json": True, "output": Path(), "logprobs": False, "force": False}
UNSAFE = "--confirm_run_unsafe_code"


def evaluate(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="Task names of lm-eval with commas; the paper's are gsm8k, csqa_cot, ...")],
    model: arguments.Model = None,
    data: arguments.Data = None,
    sparsity: arguments.Sparsity = None,
    draft_bits: arguments.DraftBits = None,
    keep: arguments.Keep = 0.5,
    sparsity_threshold: arguments.SparsityThreshold = None,
    correct: arguments.Correct = True,
    preset: Annotated[
        str | None, typer.Option(help="paper: keep, period, threshold and width of each task as published (lossy).")
    ] = None,
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
    batch_size: arguments.BatchSize = 8,
    dtype: arguments.Dtype = "auto",
    device: arguments.Device = "auto",
    threads: Threads = None,
    max_context: arguments.MaxContext = None,
    memory_budget: arguments.MemoryBudget = None,
    revision: arguments.Revision = None,
    trust_remote_code: arguments.TrustRemoteCode = False,
    completions: Annotated[
        Path | None, typer.Option(help="A folder that keeps every finished sample; an interrupted run goes on there.")
    ] = None,
) -> None:
    """Evaluate a model on tasks of lm-eval; every other option is lm-eval's own: --limit, --log_samples, ...

    --limit N takes N problems of each task; a group such as mmlu_flan_cot_fewshot takes N of each of its subtasks.
    The texts are decoded our way. Log-probabilities, which multiple choice goes by, are the full model's.
    """
    options = [UNSAFE if each == UNSAFE.replace("_", "-") else each for each in context.args]
    _check_theirs(options)
    command = CommandLine.of(context, **OTHERS)
    check_effect(command)
    check_lm_eval()
    from sirius.model.loading import find_device

    load = {"dtype": dtype, "revision": revision, "max_context": max_context, "trust_remote_code": trust_remote_code}
    load |= {"memory_budget": memory_budget, "completions": completions and str(completions)}
    given = {name: value for name, value in load.items() if value not in (None, False)}
    given |= {"pretrained": model or "embedded", **setting_of(command)}
    if completions is not None:
        from sirius.evaluation.completions import make_folder

        make_folder(completions)  # before minutes of loading
    names = [each.strip() for each in tasks.split(",") if each.strip()]
    use_threads(threads)
    find_device(device)  # lm-eval's own default, cuda:0, means any device there
    run(names, data, given, ["--device", device, "--batch_size", str(batch_size), *options])


def _check_theirs(options: Sequence[str]) -> None:
    """Raise ConfigError of options of lm-eval that the command sets itself."""
    names = {each.split("=")[0] for each in options if each.startswith("-")}
    if own := sorted(name for name in names if any(each.startswith(name) for each in OURS)):
        raise ConfigError(f"{', '.join(own)} would undo what sirius eval gives lm-eval; use lm_eval --model sirius")


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

        import_module("sirius.evaluation.lm")  # which registers the model with lm-eval
        from sirius.evaluation import suite
        from sirius.evaluation.catalogue import needs_chat, setting_for
        from sirius.settings import NAMES

    with suite.suite_folder(data) as folder:
        manager = suite.task_manager(folder, tasks)
        suite.check_tasks(tasks, None, manager)
        tasks = [name for each in tasks for name in manager.match_tasks([each])]  # patterns, such as mmlu_*
        suite.check_tasks(tasks, data, manager)
        groups = {name: suite.load_tasks([name], manager) for name in tasks}
        loaded = {name: task for group in groups.values() for name, task in group.items()}
        unsafe = [name for name, task in loaded.items() if getattr(task, "UNSAFE_CODE", False)]
        if unsafe and UNSAFE not in options:
            raise ConfigError(f"{', '.join(unsafe)} runs code that the model writes; give {UNSAFE} to allow it")
        setting = {name: value for name, value in model_args.items() if name in NAMES}
        for name in tasks:
            setting_for(name, setting)
        asked = ["--model", "sirius", "--model_args", json.dumps(model_args), "--tasks", ",".join(tasks)]
        before, sys.argv = sys.argv, ["lm_eval", "run", *asked, "--include_path", str(folder), *options]
        try:
            harness = HarnessCLI()
            parsed = harness.parse_args()
            try:
                config = EvaluatorConfig.from_cli(parsed)
            except ValueError as error:
                raise ConfigError(f"lm-eval refuses the options: {error}") from error
            if not config.apply_chat_template and (chats := [name for name in tasks if needs_chat(name)]):
                raise ConfigError(f"{', '.join(chats)}: a conversation needs --apply_chat_template")
            if config.num_fewshot is not None:
                for name, task in loaded.items():
                    suite.check_shots(name, task, config.num_fewshot)
            for name, group in groups.items():
                if (said := suite.tell_limit(name, group, config.limit)) is not None:
                    remark(said)
            with suite.lm_eval_reads(folder, tasks), facts_shown("sirius.offload", "sirius.drafts"):
                harness.execute(parsed)
        finally:
            sys.argv = before
