"""How long a pass takes of whose weights some come over a link, by calculation; `Plan` describes the model."""

from collections.abc import Sequence
from typing import NamedTuple

FEWEST = 2  # buffers: one is computed with, one is being filled


class Step(NamedTuple):
    """The bytes that a pass reads at once, and those of them that come over the link."""

    read: int
    streamed: int


class PassTime(NamedTuple):
    """What a pass that follows others of its kind takes.

    units    bytes of each unit that it streams, in their order
    reading  seconds in which it reads memory
    seconds  of the whole pass
    hidden   seconds of computing at its end, in which the next pass's first unit comes; with more than two buffers 0
    """

    units: list[int]
    reading: float
    seconds: float
    hidden: float


def pass_time(steps: Sequence[Step], buffers: int, link: float, memory: float) -> PassTime:
    """Return the time of a pass.

    link, memory  their bandwidths, in bytes per second
    """
    units = [step.streamed for step in steps if step.streamed]
    reading = sum(step.read for step in steps) / memory
    if buffers > FEWEST or not units:
        return PassTime(units, reading, max(sum(units) / link, reading), 0.0)
    first = next(place for place, step in enumerate(steps) if step.streamed)
    between: list[int] = []  # bytes read from a unit on, until the next one is needed
    for step in (*steps[first:], *steps[:first]):
        between += [0] if step.streamed else []
        between[-1] += step.read
    coming = [size / link for size in (*units[1:], units[0])]
    used = [read / memory for read in between]
    return PassTime(units, reading, max(reading, sum(map(max, coming, used))), used[-1])
