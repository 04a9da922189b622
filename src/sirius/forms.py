"""The short forms of configurations: a method's name, a period, a temperature, a mapping of fields."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

from sirius.core import AUTO, DRAFT, PAPER, CorrectionConfig, SamplingConfig, SparsityConfig
from sirius.errors import ConfigError

Config = TypeVar("Config", SparsityConfig, CorrectionConfig, SamplingConfig)

FORMS: dict[type, tuple[Any, str]] = {  # what stands for a configuration by itself, and how to say it
    SparsityConfig: (str, "sparsity is a method's name, SparsityConfig(method='coarse', keep=0.3), or {'keep': 0.3}"),
    CorrectionConfig: (int | str, "correction is a period, 'auto', 'paper', CorrectionConfig(period=16), or None"),
    SamplingConfig: (float | int, "sampling is a temperature, SamplingConfig(temperature=0.7) or {'temperature': 0.7}"),
}


def as_config(kind: type[Config], value: Any) -> Config:
    """Return a configuration given as itself, as a mapping of its fields, or as its first field.

    So `{"method": "fine", "keep": 0.3}` and "fine" are sparsities, and "paper" is the paper's correction; raises
    ConfigError of anything else.
    """
    if isinstance(value, kind):
        return value
    if hasattr(value, "item") and not isinstance(value, Mapping):
        value = value.item()  # a number of NumPy's
    short, forms = FORMS[kind]
    if isinstance(value, bool) or not isinstance(value, Mapping | short):
        raise ConfigError(f"{forms}; got {value!r}")
    if kind is CorrectionConfig and isinstance(value, str):
        return cast("Config", _correction(value))
    if kind is SparsityConfig and isinstance(value, Mapping) and value.keys() == {"draft_bits"}:
        value = {"method": DRAFT.method, **value}
    try:
        return kind(**value) if isinstance(value, Mapping) else kind(value)
    except TypeError as error:
        known = ", ".join(field.name for field in fields(kind))
        raise ConfigError(f"{kind.__name__} takes {known}; got {value!r}") from error


def _correction(word: str) -> CorrectionConfig:
    if word not in (AUTO, PAPER):
        raise ConfigError(f"a correction by one word is {AUTO!r} or {PAPER!r}; got {word!r}")
    return CorrectionConfig.paper() if word == PAPER else CorrectionConfig()


def as_draft(sparsity: Any, correction: Any) -> SparsityConfig:
    """Return the draft that is asked for; None is the default one, beside the correction "paper" the paper's coarse."""
    if sparsity is not None:
        return as_config(SparsityConfig, sparsity)
    return SparsityConfig("coarse") if isinstance(correction, str) and correction == PAPER else DRAFT
