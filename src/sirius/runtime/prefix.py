"""Which blocks of a prompt an open row holds already, so that they are copied from it instead of read again.

A prompt is read block by block, one pass each. The last pass reads the rest, of REST to BLOCK + REST - 1 tokens:

    0 ........ 256 ........ 512 .............. 800
    |  block 0  |  block 1   |       rest       |

So the keys and values of a block depend on its tokens and on those before it alone, bit for bit.
"""

import logging
from array import array
from collections.abc import Sequence
from copy import deepcopy
from hashlib import blake2b
from typing import Any

from torch import Tensor

from sirius.shortage import ran_out
from sirius.sparsity.base import PromptSparsity

BLOCK = 256  # tokens
REST = 128  # tokens; a pass of fewer takes much longer per token, as each pass reads all weights
MOST_BYTES = 2**26  # of the copies of methods that a session keeps


def block_names(tokens: Sequence[int]) -> tuple[bytes, ...]:
    """Return a name for each block of a prompt: a digest of the block's tokens and of all tokens before them."""
    names, last = [], b""
    for begin in range(0, len(tokens) - BLOCK - REST + 1, BLOCK):
        last = blake2b(last + array("q", tokens[begin : begin + BLOCK]).tobytes(), digest_size=32).digest()
        names.append(last)
    return tuple(names)


class Prefixes:
    """The blocks of each open row's prompt, and copies of methods per prompt as they were after a block.

    A method must have seen its whole prompt. So it goes on from a copy of the method that saw the shared blocks.

    rows    names of each row's blocks
    states  by the name of a block, a method after that block and its size in bytes; the one used last stands last
    copies  whether copies are still made: not once the method could not be copied, or was larger than MOST_BYTES
    """

    def __init__(self, copies: bool = True) -> None:
        """Begin with no row; copies are of no use where two rows are never open side by side."""
        self.rows: list[tuple[bytes, ...]] = []
        self.states: dict[bytes, tuple[PromptSparsity, int]] = {}
        self.copies = copies

    def find(self, blocks: tuple[bytes, ...], observed: bool) -> tuple[int, int]:
        """Return how many first blocks need not be read, and a row that holds them (0 where there are none).

        observed  a method per prompt must have seen the blocks, so a copy of it after the last of them is needed
        """
        shared = [_count_common(blocks, row) for row in self.rows]
        count = max(shared, default=0)
        while observed and count and blocks[count - 1] not in self.states:
            count -= 1
        return count, next((row for row, common in enumerate(shared) if common >= count), 0)

    def recall(self, block: bytes) -> PromptSparsity:
        """Return a method that has seen a block and those before it."""
        self.states[block] = state = self.states.pop(block)
        return deepcopy(state[0])

    def remember(self, block: bytes, method: PromptSparsity) -> None:
        """Keep a copy of a method that has just seen a block; of all copies the ones used longest ago are dropped."""
        self.states.pop(block, None)
        if not self.copies:
            return
        made: dict[int, Any] = {}  # by deepcopy: every object that it copied
        try:
            copy = deepcopy(method, made)
        except Exception as error:  # a method may hold anything, such as an open file
            if not ran_out(error):
                self._stop(f"{type(method).__name__} cannot be copied ({error!r})")
            return
        size = sum(each.nbytes for each in made.values() if isinstance(each, Tensor))
        if size > MOST_BYTES:
            self._stop(f"the state of {type(method).__name__} has {size} bytes, and at most {MOST_BYTES} are kept")
            return
        self.states[block] = copy, size
        while sum(size for _, size in self.states.values()) > MOST_BYTES:
            self.states.pop(next(iter(self.states)))

    def close(self, row: int) -> None:
        """Drop a row, and the copies that belong to no other one; the last row takes its number."""
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        held = {name for names in self.rows for name in names}
        self.states = {name: state for name, state in self.states.items() if name in held}

    def _stop(self, reason: str) -> None:
        self.copies = False
        self.states.clear()
        logging.getLogger("sirius").info("%s, so what prompts have in common is read for each of them", reason)


def _count_common(one: tuple[bytes, ...], other: tuple[bytes, ...]) -> int:
    """Return how many first names are equal; equal names have equal ones before them."""
    return sum(a == b for a, b in zip(one, other, strict=False))
