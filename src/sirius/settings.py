"""Settings as flat names and values, as a command line, a grid and a file of results say them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from sirius.core import AUTO, DRAFT, OWN, PAPER, CorrectionConfig, SparsityConfig
from sirius.errors import ConfigError

NONE = "none"  # the sparsity method that keeps every neuron: the full model
RENAMED = {"sparsity": "method", "sparsity_threshold": "threshold"}  # fields of SparsityConfig by another name here
SPARSE = ("sparsity", "keep", "sparsity_threshold", "per_branch", "shared_set", "refresh", "draft_bits")
OFF = {"draft_bits": 0, "draft_ngram": 0, "draft_confidence": 0.0}  # named only where they are on
CORRECTING = tuple(each.name for each in fields(CorrectionConfig))
_OF_SPARSITY = {each.name: each.default for each in fields(SparsityConfig)}
DEFAULTS = {
    **{name: _OF_SPARSITY[RENAMED.get(name, name)] for name in SPARSE},
    **{each.name: each.default for each in fields(CorrectionConfig)},
}
NAMES = (*SPARSE, "correct", "preset", *CORRECTING)


@dataclass(frozen=True)
class Setting:
    """A way to decode: which neurons the draft keeps, and how the full model checks it.

    correction  None: the draft model decodes alone, or with sparsity "none" the full model
    """

    sparsity: SparsityConfig
    correction: CorrectionConfig | None

    @property
    def full(self) -> bool:
        """Whether the full model alone writes the text."""
        guessed = self.sparsity.draft_bits or (self.correction is not None and self.correction.draft_ngram)
        return self.sparsity.method == NONE and not guessed

    @property
    def lossless(self) -> bool:
        """Whether by its rule alone the greedy text is the full model's."""
        return self.full or (self.correction is not None and self.correction.lossless(sampled=False))

    def flat(self) -> dict[str, Any]:
        """Return every option by its name, as JSON holds it; those of a correction only where there is one."""
        chosen = asdict(self.sparsity)
        flat = {name: chosen[RENAMED.get(name, name)] for name in SPARSE}
        if self.full:
            return {"sparsity": NONE, "correct": False}
        if self.sparsity.method == NONE:
            flat = {"sparsity": NONE, "draft_bits": self.sparsity.draft_bits}
        if self.correction is None:
            return _without_off({**flat, "correct": False})
        own = asdict(self.correction)
        own["ablate"] = list(self.correction.ablate)
        own["threshold"] = None if self.correction.accept in OWN else self.correction.least
        return _without_off({**flat, "correct": True, **own})

    def label(self) -> str:
        """Return the setting in a few words, for tables."""
        if self.full:
            return "full"
        bar = self.sparsity.threshold
        kept = f"{self.sparsity.keep:g}" if bar is None else f"|a|>{bar:g}"
        own = self.sparsity
        extras = [f"refresh {own.refresh:g}"] * bool(own.refresh) + ["a set per branch"] * own.per_branch
        method = [f"{own.method} {kept}"] * (own.method != NONE)
        bits = ["bits auto" if own.draft_bits == AUTO else f"{own.draft_bits} bits"] * bool(own.draft_bits)
        name = ", ".join([*method, *bits, *extras])
        if self.correction is None:
            return name
        rule = self.correction
        passing = rule.accept if rule.accept in OWN else f"{rule.accept} {rule.least:g}"
        parts = [name, passing, f"K {rule.period}", f"w {rule.tree_width}"]
        parts += [f"prune {rule.prune:g}"] * bool(rule.prune)
        parts += [f"confidence {rule.draft_confidence:g}"] * bool(rule.draft_confidence)
        parts += [f"ngram {rule.draft_ngram}"] * bool(rule.draft_ngram)
        parts += [f"at temperature {rule.accept_temperature:g}"] * (rule.accept_temperature != 0.6)
        return ", ".join([*filter(None, parts), *(f"no {part}" for part in rule.ablate)])


def _without_off(flat: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flat.items() if name not in OFF or value != OFF[name]}


def make_setting(values: Mapping[str, Any]) -> Setting:
    """Return the setting that some of `NAMES` say; the others are as `sirius generate` has them.

    Raises ConfigError of a name that is none, and of values that are out of range, contradict or change nothing.
    """
    if unknown := sorted(values.keys() - set(NAMES)):
        raise ConfigError(f"a setting has no {', '.join(unknown)}; it has {', '.join(NAMES)}")
    given = {name for name, value in values.items() if value not in (None, [], DEFAULTS.get(name))}
    sparse = make_sparsity(values)
    if sparse.method == NONE:
        if idle := sorted(given & set(SPARSE) - {"sparsity", "draft_bits"}):
            raise ConfigError(f"{', '.join(idle)} would change nothing with sparsity none, which keeps every neuron")
        if not sparse.draft_bits:
            return _undrafted(sparse, values, given)
    correct = values.get("correct", True)
    if not isinstance(correct, bool):
        raise ConfigError(f"correct is true or false; got {correct!r}")
    if not correct and (idle := sorted(given & {"preset", "refresh", *CORRECTING})):
        raise ConfigError(f"{', '.join(idle)} would change nothing without correction; leave out correct: false")
    return Setting(sparse, make_correction(values) if correct else None)


def _undrafted(sparse: SparsityConfig, values: Mapping[str, Any], given: set[str]) -> Setting:
    """Return a setting without a draft model: the full model, or with prompt lookup."""
    looks_up = bool(values.get("draft_ngram"))
    useful = {"sparsity", "draft_bits", "correct", *(("draft_ngram", "period", "accept") if looks_up else ())}
    idle = sorted(given - useful) + ["correct"] * (bool(values.get("correct")) and not looks_up)
    if idle:
        raise ConfigError(f"{', '.join(idle)} would change nothing with sparsity none, which drafts nothing")
    return Setting(sparse, make_correction(values) if looks_up else None)


def make_sparsity(values: Mapping[str, Any]) -> SparsityConfig:
    """Return the draft of a setting's names and values; raise ConfigError of values that are out of range.

    Without a sparsity it is the default draft, or beside the paper's preset, coarse sparsity.
    """
    given = {RENAMED.get(name, name): values[name] for name in SPARSE if values.get(name) is not None}
    if "method" not in given:
        own = values.get("preset") is not None and not given.get("draft_bits")
        given = {"method": "coarse", **given} if own else {**asdict(DRAFT), **given}
    return SparsityConfig(**given)


def make_correction(values: Mapping[str, Any]) -> CorrectionConfig:
    """Return the correction of a setting's names and values; raise ConfigError of values that are out of range."""
    preset = values.get("preset")
    if preset not in (None, PAPER):
        raise ConfigError(f"preset is {PAPER!r}; got {preset!r}")
    rules = {name: values[name] for name in CORRECTING if name in values}
    ablate = rules.get("ablate", ())
    rules["ablate"] = tuple(filter(None, ablate.split("+"))) if isinstance(ablate, str) else ablate
    return (CorrectionConfig if preset is None else CorrectionConfig.paper)(**rules)
