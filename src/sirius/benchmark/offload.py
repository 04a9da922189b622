"""Time per token of a model under a memory budget, by settings that take turns, each in a process of its own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from sirius.benchmark.apart import run_apart
from sirius.benchmark.offload_figures import ACCELERATE, FULL, OffloadFigures, make_rows
from sirius.benchmark.offload_turn import OffloadSetting, Turn, Workload, decode_in_memory, run_turn
from sirius.core import SparsityConfig
from sirius.errors import ConfigError, ModelError
from sirius.model.limits import context_limit
from sirius.offload.amounts import memory_of
from sirius.offload.checkpoint import read_checkpoint
from sirius.runtime.prefix import BLOCK

SMALL = 0.5  # of the device's memory: larger weights are not loaded into it only to compare texts
THROTTLED = "its copies cannot be throttled to --link-gbps"
ABSENT = "the package accelerate is not installed; pip install accelerate"


@dataclass(frozen=True)
class Outcome:
    """What came of a benchmark.

    left_out   settings that were not measured, with the reason of each
    same_text  whether the tokens of `full` are those of the model in memory; None: not compared
    """

    rows: list[OffloadFigures]
    left_out: dict[str, str]
    same_text: bool | None


def make_settings(
    keep: float, bits: int, coarse: tuple[float, ...], rounded: tuple[float, ...]
) -> list[OffloadSetting]:
    """Return the settings: full, coarse corrected, rounded weights corrected, accelerate.

    coarse, rounded  histograms of accepted guesses that are played back
    """
    return [
        OffloadSetting(FULL, SparsityConfig("none")),
        OffloadSetting(f"coarse {keep:g} corrected", SparsityConfig("coarse", keep), coarse),
        OffloadSetting(f"{bits} bits corrected", SparsityConfig("none", draft_bits=bits), rounded),
        OffloadSetting(ACCELERATE, None),
    ]


def check_workload(workload: Workload, config: PreTrainedConfig) -> None:
    """Raise ConfigError where a turn passes what the model was made for, before anything takes its time."""
    limit, text = context_limit(config), workload.longest - workload.context
    if limit is not None and workload.longest > limit:
        raise ConfigError(
            f"--context {workload.context} and texts of {text} tokens pass the model's limit of {limit}; lower "
            "--context, --tokens, --windows or --period"
        )


def run(
    workload: Workload,
    settings: Sequence[OffloadSetting],
    cycles: int,
    check: bool | None = None,
    on_turn: Callable[[], None] = lambda: None,
) -> Outcome:
    """Measure all settings in turns.

    check    compare the text of full decoding with that of the model in memory; None: where its weights take at most
             half of the memory
    on_turn  is called after each turn

    A setting for which the budget is too small is left out; full decoding raises ConfigError of it. Raises ModelError
    where the texts differ, otherwise as `run_turn`.
    """
    left_out, turns = _unmeasurable(workload), dict[str, list[Turn]]()
    for _ in range(cycles):
        for setting in settings:
            try:
                if setting.name not in left_out:
                    turns.setdefault(setting.name, []).append(run_apart(run_turn, workload, setting))
            except ConfigError as error:
                if setting.name == FULL:
                    raise
                left_out[setting.name] = str(error)
            on_turn()
    same = _has_same_text(workload, turns[FULL][0].text) if (_is_small(workload) if check is None else check) else None
    return Outcome(make_rows(settings, turns, workload.budget), left_out, same)


def _unmeasurable(workload: Workload) -> dict[str, str]:
    """Return settings that cannot be measured here, with the reasons."""
    if find_spec("accelerate") is None:
        return {ACCELERATE: ABSENT}
    return {} if workload.link is None else {ACCELERATE: THROTTLED}


def _is_small(workload: Workload) -> bool:
    """Tell whether a model's weights take so little of the memory that they can be loaded as a whole."""
    weights = sum(each.nbytes for each in read_checkpoint(Path(workload.folder)).values())
    return weights <= SMALL * memory_of(torch.device(workload.device))


def _has_same_text(workload: Workload, text: tuple[int, ...]) -> bool:
    """Tell whether the model in memory says the same tokens.

    Raises ModelError where it does not, although the passes over the prompt had the same size.
    """
    wanted = run_apart(decode_in_memory, workload)
    same = text == wanted
    if not same and workload.context <= BLOCK:
        at = next(i for i, (token, other) in enumerate(zip(text, wanted, strict=True)) if token != other)
        raise ModelError(
            f"under the budget the full model says token {text[at]} at place {at} of its text, and {wanted[at]} in "
            "memory; no time of a wrong text is shown (--no-check shows it)"
        )
    return same
