"""What tests of drafts share: prompts, the corrections of chains and trees, and drafts of fewer bits."""

from conftest import VOCABULARY
from sirius.core import CorrectionConfig, SparsityConfig

PROMPT = [5, 17, 93, 41, 8, 60, 22]
FOLLOWED = [each for token in range(VOCABULARY) for each in (41, token)] + [41]  # any next token completes a match
NEW = 24


def chain(period: int, width: int = 1, **options) -> CorrectionConfig:
    return CorrectionConfig(period=period, accept="argmax", tree_width=width, **options)


def rounded(bits: int, method: str = "none") -> SparsityConfig:
    return SparsityConfig(method, draft_bits=bits)
