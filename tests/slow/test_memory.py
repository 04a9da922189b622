"""Nothing grows over a long generation."""

import resource
from pathlib import Path

import pytest

from conftest import tiny_model
from sirius.batch import GROWTH
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine

pytestmark = pytest.mark.slow

TOKENS, PERIOD, WIDTH = 10_000, 16, 8
ALLOWED = 16 * 2**20  # bytes; the text's own tokens and rounds are about 4 MB


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_ten_thousand_tokens_of_a_wide_tree_take_their_slots_and_no_memory_besides():
    engine = Engine(tiny_model(eos_token_id=None, max_position_embeddings=16_384))
    wide = CorrectionConfig(PERIOD, accept="argmax", tree_width=WIDTH)
    batch = engine.batch(rows=1, sparsity=SparsityConfig("fine", 0.98), correction=wide)  # few rounds, or it takes long
    batch.add(engine.text([5, 17, 93], max_new_tokens=TOKENS))
    batch.step()
    cache = batch.session.cache
    window = (PERIOD - 1) * WIDTH
    first, most = 3 + GROWTH + window, 3 + TOKENS + window
    count, early, sizes = 1, None, {cache.table.slots: None}
    while batch.busy:
        count += sum(len(update.round.tokens) for update in batch.step())
        sizes[cache.table.slots] = None
        if early is None and count > 0.2 * TOKENS:
            early = resident()
    assert count == TOKENS and early is not None
    assert list(sizes) == [min(first * 2**n, most) for n in range(5)]
    assert batch.session.cache is cache
    assert resident() - early < ALLOWED, f"{(resident() - early) / 2**20:.0f} MB more"
