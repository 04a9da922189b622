"""Sparsity methods: which neurons a draft token keeps. They know activations, not tokens.

Importing a method's module registers it; methods of other packages are found through the entry-point group
`sirius.sparsity`, or register themselves with the decorator.
"""

from sirius.sparsity import coarse, fine
from sirius.sparsity.base import (
    PromptSparsity,
    Sparsity,
    TokenSparsity,
    canonical,
    check_options,
    create,
    find,
    known,
    register,
)

__all__ = [
    "PromptSparsity",
    "Sparsity",
    "TokenSparsity",
    "canonical",
    "check_options",
    "coarse",
    "create",
    "find",
    "fine",
    "known",
    "register",
]
