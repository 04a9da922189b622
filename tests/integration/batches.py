"""What tests of batches share: prompts, options, and ways to run a batch."""

from sirius.batch import Batch
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.engine import Engine
from sirius.texts import Completion, Update

PROMPTS = [[5, 17, 93], [9], [70, 3, 12, 88, 41, 6, 19], [33, 20], [101, 55, 20, 33, 8]]
NEW = 24
RULE = CorrectionConfig(period=5, accept="argmax", tree_width=2)
SPARSITY = SparsityConfig("coarse", 0.3)


def open_batch(engine: Engine, rows: int = 8, **options) -> Batch:
    return engine.batch(rows=rows, **{"sparsity": SPARSITY, "correction": RULE, **options})


def drain(batch: Batch) -> dict[int, Completion | Exception | None]:
    """Run a batch to its end; return what became of each ticket that still had something to come."""
    updates: list[Update] = []
    while batch.busy:
        updates += batch.step()
    return {update.ticket: update.completion or update.error for update in updates if update.last}
