"""Packages that only some measurements need."""

from importlib import import_module
from typing import Any

from sirius.errors import ConfigError


def need(module: str, extra: str, purpose: str) -> Any:
    """Return a module of an optional extra; raise ConfigError, telling how to install it, where it is not there."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(f"{purpose} needs {module} ({error}); pip install 'sirius-llm[{extra}]'") from error
