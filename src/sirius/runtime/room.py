"""The slots of keys and values where memory was planned for so many: rows of all open texts share them."""

from collections.abc import Sequence

from sirius.errors import OutOfMemoryError
from sirius.runtime.workspace import Workspace


def make_room(space: Workspace, planned: int, rows: int, slots: int) -> None:
    """See that a cache may have so many rows and slots, and that all caches of its model keep to the planned slots.

    Caches that hold no text are given back. This one is cut to the asked size where it would get too large otherwise.
    Raises OutOfMemoryError where there is no room beside other texts.
    """
    others = [each for each in space.prepared.spaces if each is not space]
    for each in others:
        if not each.cache.lengths.any():
            each.release()
    taken = sum(_size(each) for each in others)
    if rows * slots + taken > planned:
        beside = f", of which other texts take {taken}" if taken else ""
        raise OutOfMemoryError(
            f"{rows} x {slots} slots of keys and values are needed (texts side by side x tokens of the longest), and "
            f"the memory budget was planned for {planned}{beside}; lower max_new_tokens or the batch size, or load "
            "the model with a larger max_context"
        )
    table, slots = space.cache.table, max([slots, *space.cache.lengths.tolist()])
    if max(rows, table.rows) * max(slots, table.slots) + taken > planned:
        space.passes.forget()
        space.cache.shrink(rows, slots)


def fitting(room: int, active: Sequence[int], waiting: Sequence[int]) -> int:
    """Return how many waiting texts can join those at work, in their order; at least one where none is at work.

    room     slots of keys and values, of all rows together; each row has as many as the longest text needs
    active   the slots that each text at work needs
    waiting  those that each waiting text needs
    """
    for count in range(len(waiting), 0, -1):
        rows = [*active, *waiting[:count]]
        if len(rows) * max(rows) <= room:
            return count
    return 0 if active else min(1, len(waiting))


def _size(space: Workspace) -> int:
    table = space.cache.table
    return table.rows * table.slots
