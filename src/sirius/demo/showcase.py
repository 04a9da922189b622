"""The method's whole claim on one screen: a full model, a sparse one, and a sparse one that is corrected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

from sirius.core import CorrectionConfig, SparsityConfig
from sirius.demo.problems import TASKS, few_shot, final_answer
from sirius.engine import Engine
from sirius.stats import Stats, combine

NEW_TOKENS = 160  # the longest worked answer has about 130


@dataclass(frozen=True)
class Setting:
    """A way to decode that the table compares."""

    name: str
    sparsity: SparsityConfig
    correction: CorrectionConfig | None


def make_settings(coarse_keep: float = 0.4, fine_keep: float = 0.01) -> tuple[Setting, ...]:
    """Return the five settings of the table: the full model, each sparse one alone, and each corrected."""
    coarse, fine = SparsityConfig("coarse", coarse_keep), SparsityConfig("fine", fine_keep)
    return (
        Setting("full", SparsityConfig("none"), None),
        Setting("coarse", coarse, None),
        Setting("fine", fine, None),
        Setting("coarse + correction", coarse, CorrectionConfig()),
        Setting("fine + correction", fine, CorrectionConfig()),
    )


@dataclass(frozen=True)
class Row:
    """One setting on one task; `accuracy` is 0 to 1 and `stderr` its standard error."""

    setting: str
    keep: float | None
    task: str
    problems: int
    accuracy: float
    stderr: float
    aal: float | None
    density: float
    effective_density: float
    tokens_per_second: float
    lossless: bool


def run(
    engine: Engine,
    settings: Sequence[Setting],
    problems: int,
    seed: int,
    *,
    on_problem: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Decode `problems` test problems of each task in each setting; `on_problem` is called after each one."""
    return [_measure(engine, setting, task, problems, seed, on_problem) for task in TASKS for setting in settings]


def _measure(
    engine: Engine, setting: Setting, task: str, problems: int, seed: int, on_problem: Callable[[], None]
) -> Row:
    right, stats = 0, list[Stats]()
    for index in range(problems):
        messages, problem = few_shot(task, "test", seed, index)
        budget = min(NEW_TOKENS, engine.room(messages))
        done = engine.generate(
            messages, max_new_tokens=budget, sparsity=setting.sparsity, correction=setting.correction
        )
        right += final_answer(done.text) == problem.final
        stats.append(done.stats)
        on_problem()
    whole, accuracy = combine(stats), right / problems
    return Row(
        setting=setting.name,
        keep=None if setting.sparsity.method == "none" else setting.sparsity.keep,
        task=task,
        problems=problems,
        accuracy=accuracy,
        stderr=sqrt(accuracy * (1 - accuracy) / problems),
        aal=whole.aal,
        density=whole.density,
        effective_density=whole.effective_density,
        tokens_per_second=whole.tokens_per_second,
        lossless=whole.lossless,
    )
