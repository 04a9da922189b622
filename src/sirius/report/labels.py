"""Settings, tasks and figures in words."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from sirius.report.cells import EVERY, GUESSING, Cell, Variant
from sirius.report.document import MISSING
from sirius.report.estimate import Estimate

FULL, ALONE = "full", "alone"
SHORT = {"period": "K", "tree_width": "w"}
NAMES = {  # of options, in headings and on axes
    "threshold": "Threshold",
    "period": "Period K",
    "tree_width": "Tree width w",
    "keep": "Fraction of neurons kept",
    "sparsity_threshold": "Threshold of the sparsity method",
    "accept_temperature": "Temperature of acceptance",
    "prune": "Pruning of branches",
    "refresh": "Refresh of the set of neurons",
    "accept": "Accept rule",
    "draft_bits": "Bits of the draft's weights",
    "draft_ngram": "Longest match of prompt lookup",
    "draft_confidence": "Least probability of a guess in the draft",
}
METHODS = {EVERY: "every neuron"}  # names of sparsity methods, where others than their own are used
SELDOM = ("accept_temperature", "prune", "refresh", "per_branch", "shared_set")  # named where they differ


def option_name(name: str) -> str:
    """Return the name of an option for a heading."""
    return NAMES.get(name, name.replace("_", " ").capitalize())


def value_shown(value: Any) -> str:
    """Return the value of an option."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return f"{value:g}"
    return MISSING if value is None else str(value)


def pieces(setting: Mapping[str, Any], leave_out: Iterable[str] = (), seldom: Iterable[str] = ()) -> list[str]:
    """Return a setting in words, a piece for each option that matters.

    leave_out  options that are named elsewhere
    seldom     those of `SELDOM` to name
    """
    hidden = set(leave_out)
    if setting["sparsity"] == EVERY and not any(setting.get(name) for name in GUESSING):
        return [FULL]
    found = [_neurons(setting, hidden)]
    if (bits := setting.get("draft_bits")) and "draft_bits" not in hidden:
        found.append(f"bits {bits}" if isinstance(bits, str) else f"{bits} bits")
    if not setting.get("correct"):
        found.append(ALONE)
    else:
        found += _rule(setting, hidden)
        found += [f"{short} {setting.get(name)}" for name, short in SHORT.items() if name not in hidden]
    for name in ("draft_ngram", "draft_confidence"):
        if setting.get(name) and name not in hidden:
            found.append(f"{name.removeprefix('draft_')} {value_shown(setting[name])}")
    for name in seldom:
        if name in setting and name not in hidden:
            found.append(f"{name.replace('_', ' ')} {value_shown(setting[name])}")
    return found + [f"no {part}" for part in setting.get("ablate") or () if "ablate" not in hidden]


def _neurons(setting: Mapping[str, Any], hidden: set[str]) -> str:
    method, bar = str(setting["sparsity"]), setting.get("sparsity_threshold")
    if method == EVERY:
        return METHODS[EVERY] if setting.get("draft_bits") else "no draft model"
    if bar is None:
        return method if "keep" in hidden else f"{method} {value_shown(setting.get('keep'))}"
    return method if "sparsity_threshold" in hidden else f"{method} |a|>{bar:g}"


def _rule(setting: Mapping[str, Any], hidden: set[str]) -> list[str]:
    if "accept" in hidden:
        return []
    rule, bar = str(setting.get("accept")), setting.get("threshold")
    if "threshold" in hidden:
        return [f"{rule} rule"]
    if bar is None and rule != "threshold":
        return [rule]
    return [f"{rule} {value_shown(bar)}"]


def differing(cells: Sequence[Cell]) -> list[str]:
    """Return those of the options that are seldom named which differ among cells."""
    return [
        name for name in SELDOM if len({json.dumps(cell.setting[name]) for cell in cells if name in cell.setting}) > 1
    ]


def told_apart(settings: Sequence[Sequence[str]]) -> tuple[list[str], str]:
    """Return a short label of each setting, of the pieces that not all have, and the pieces that all have."""
    common = [piece for piece in settings[0] if all(piece in each for each in settings)] if settings else []
    if len(settings) == 1:
        return [settings[0][0]], ", ".join(settings[0][1:])
    labels = [", ".join(piece for piece in each if piece not in common) or each[0] for each in settings]
    return labels, ", ".join(common)


def variant_labels(variants: Sequence[Variant]) -> dict[Variant, str]:
    """Return the name of each task, with what tells it apart from others of that name."""
    found: dict[Variant, str] = {}
    for each in variants:
        others = [other for other in variants if other.task == each.task and other is not each]
        parts = [each.task]
        if any(len(other.items) != len(each.items) for other in others):
            parts.append(f"{len(each.items)} items")
        if any(other.shots != each.shots for other in others):
            parts.append(f"{each.shots} examples")
        if any(other.chat != each.chat for other in others):
            parts.append("chat template" if each.chat else "no chat template")
        if any(other.metric != each.metric for other in others):
            parts.append(each.metric)
        name = ", ".join(parts)
        same = sum(known.split(" #")[0] == name for known in found.values())
        found[each] = f"{name} #{same + 1}" if same else name
    return found


def model_name(model: Mapping[str, Any]) -> str:
    """Return the name of a model, of a folder its last two parts."""
    name = str(model.get("model") or model.get("name") or "a model without a name")
    return "/".join(PurePath(name).parts[-2:])


def dtype_name(model: Mapping[str, Any]) -> str:
    """Return the dtype of a model without the name of its library."""
    return str(model.get("dtype", MISSING)).removeprefix("torch.")


def promise(cell: Cell) -> str:
    """Return whether a setting is lossless."""
    if not cell.lossless:
        return "lossy"
    return "lossless" if cell.stats.lossless else "lossless up to rounding"


def score(value: Estimate | None) -> str:
    """Return a score with its error."""
    return MISSING if value is None else value.shown()


def gain(value: Estimate | None) -> str:
    """Return a difference with its sign and its error."""
    return MISSING if value is None else value.shown("+.3f")


def number(value: float | None, form: str = ".3f") -> str:
    """Return a number, or the sign of a missing one."""
    return MISSING if value is None else f"{value:{form}}"


def amount(size: float) -> str:
    """Return a number of bytes in the unit that suits it."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def advance(cell: Cell) -> str:
    """Return the AAL with its error, over K."""
    aal = cell.stats.advance
    return MISSING if aal is None else f"{aal.shown('.2f')} / {cell.stats.period}"
