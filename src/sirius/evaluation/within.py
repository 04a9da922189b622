"""A memory budget for an evaluation: which draft it is planned for, and how many texts are decoded side by side."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from sirius.core import AUTO, DRAFT, SparsityConfig
from sirius.errors import ConfigError
from sirius.evaluation.catalogue import TASKS, setting_for
from sirius.offload.budget import Budget, window_of
from sirius.settings import NONE, Setting

ASKED = {"sparsity", "draft_bits", "preset"}  # options that name a draft


def budget_for_tasks(size: int | str, values: Mapping[str, Any], rows: int) -> Budget:
    """Return a budget for a setting's values, whatever the task; with preset "paper" each task keeps its own share.

    Where no value names a draft, the budget names none either. Raises ConfigError of values that are no setting.
    """
    settings = [setting_for("", values)]
    for task in TASKS:
        with suppress(ConfigError):  # values may not fit a task that is not asked for
            settings.append(setting_for(task, values))
    return Budget(size, _one_draft(settings) if ASKED & values.keys() else None, rows=rows, window=_window(settings))


def budget_for_settings(size: int | str, settings: Iterable[Setting], rows: int) -> Budget:
    """Return a budget for all settings of a sweep, which one loaded model decodes.

    Raises ConfigError, with the settings' names, where they need different drafts.
    """
    wanted = list(settings)
    drafting = [each for each in wanted if each.sparsity.method != NONE or each.sparsity.draft_bits]
    default = all(each.sparsity == DRAFT and _is_automatic(each) for each in drafting)
    draft = None if drafting and default else _one_draft(wanted)
    return Budget(size, draft, rows=rows, window=_window(wanted))


def _one_draft(settings: Iterable[Setting]) -> SparsityConfig:
    """Return the draft that reads all that the drafts of some settings read; raise ConfigError where none does."""
    found: dict[object, Setting] = {}
    for each in settings:
        chosen = each.sparsity
        if chosen.method == NONE and not chosen.draft_bits:
            continue  # which every plan has room for
        kind = chosen.draft_bits or (chosen.method, chosen.shared_set)
        widest = found.setdefault(kind, each)
        if chosen.keep > widest.sparsity.keep:
            found[kind] = each
    if len(found) > 1:
        first, second = [each.label() for each in found.values()][:2]
        raise ConfigError(
            f"a memory budget is planned for one draft, and these settings need {len(found)} different ones ({first}; "
            f"{second}); run them as grids of their own, each with its own command"
        )
    return next((each.sparsity for each in found.values()), SparsityConfig(NONE))


def _is_automatic(setting: Setting) -> bool:
    return setting.correction is not None and setting.correction.period == AUTO


def _window(settings: Iterable[Setting]) -> int:
    return max(window_of(each.correction) for each in settings)
