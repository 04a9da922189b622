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
class DemoSetting:
    """A way to decode that the table compares."""

    name: str
    sparsity: SparsityConfig
    correction: CorrectionConfig | None


def make_settings(coarse_keep: float = 0.4, fine_keep: float = 0.01) -> tuple[DemoSetting, ...]:
    """Return the five settings of the table: the full model, each sparse one alone, and each corrected."""
    coarse, fine = SparsityConfig("coarse", coarse_keep), SparsityConfig("fine", fine_keep)
    return (
        DemoSetting("full", SparsityConfig("none"), None),
        DemoSetting("coarse", coarse, None),
        DemoSetting("fine", fine, None),
        DemoSetting("coarse + correction", coarse, CorrectionConfig.paper()),
        DemoSetting("fine + correction", fine, CorrectionConfig.paper()),
    )


@dataclass(frozen=True)
class DemoFigures:
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
    settings: Sequence[DemoSetting],
    problems: int,
    seed: int,
    *,
    on_problem: Callable[[], None] = lambda: None,
) -> list[DemoFigures]:
    """Decode `problems` test problems of each task in each setting; `on_problem` is called after each one.

    The settings take turns problem by problem, so that whatever else the machine does slows all of them alike.
    """
    return [row for task in TASKS for row in _compare(engine, settings, task, range(problems), seed, on_problem)]


def _compare(
    engine: Engine,
    settings: Sequence[DemoSetting],
    task: str,
    indices: range,
    seed: int,
    on_problem: Callable[[], None],
) -> list[DemoFigures]:
    right = [0 for _ in settings]
    stats: list[list[Stats]] = [[] for _ in settings]
    for index in indices:
        messages, problem = few_shot(task, "test", seed, index)
        budget = min(NEW_TOKENS, engine.room(messages))
        for index, setting in enumerate(settings):
            options = {"sparsity": setting.sparsity, "correction": setting.correction}
            done = engine.generate(messages, max_new_tokens=budget, **options)
            right[index] += final_answer(done.text) == problem.final
            stats[index].append(done.stats)
            on_problem()
    rows = zip(settings, right, stats, strict=True)
    return [_row(setting, task, hits / len(indices), len(indices), combine(each)) for setting, hits, each in rows]


def _row(setting: DemoSetting, task: str, accuracy: float, problems: int, whole: Stats) -> DemoFigures:
    return DemoFigures(
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
