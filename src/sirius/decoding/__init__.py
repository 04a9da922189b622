"""Pure control: rounds of draft and check over any `LanguageModel`; nothing here imports a model."""

from sirius.decoding import studies
from sirius.decoding.accept import check_rule, known, register

__all__ = ["check_rule", "known", "register", "studies"]
