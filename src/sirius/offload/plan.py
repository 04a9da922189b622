"""Decide which weights stay in memory under a budget and which are streamed, and predict the time of a token.

What is streamed of a block comes in units: its attention, its MLP, and what a draft pass reads in place of one or of
both. Units come over the link in the order of a pass, through a few buffers, while earlier ones are computed. What
always stays is embedding, head, norms, biases, keys and values, and working memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import product
from math import isfinite
from typing import Any, Literal, NamedTuple

from sirius.errors import ConfigError
from sirius.offload.amounts import in_words
from sirius.offload.times import FEWEST, Step, pass_time

Draft = Literal["none", "rounded", "coarse"]
MARGIN = 1 << 18  # bytes of a buffer beyond its unit, as each tensor begins where a page does
BUFFERS = 3  # one is computed with, one is ready, one is being filled; or FEWEST, which leaves room for weights
MORE = 8  # blocks of which attention alone stays, in room that is too small for a whole one


@dataclass(frozen=True)
class Sizes:
    """The bytes of a model's parts; entry i of a tuple belongs to block i.

    fixed         what is always in memory: embedding, output head, norms, biases
    attention     linear layers outside the gated MLP
    mlp           gate, up and down
    rounded       all of the block's linear layers at the draft's bits; zeros without such a draft
    rounded_head  the output head at the draft's bits
    kept          a copy of the neurons that coarse keeps; zeros without such a draft
    cache         keys and values
    working       activations and scores
    head          the output head, a part of `fixed`: what a full pass reads of it, biases and norms left out
    process       on a CPU: what the process holds before loading, libraries among it, and a reserve
    """

    fixed: int
    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    rounded: tuple[int, ...]
    rounded_head: int
    kept: tuple[int, ...]
    cache: int
    working: int
    head: int = 0
    process: int = 0

    def __post_init__(self) -> None:
        if not len(self.attention) == len(self.mlp) == len(self.rounded) == len(self.kept) > 0:
            raise ValueError(f"each block, of at least one, has four sizes; got {self}")
        values = [getattr(self, field.name) for field in fields(self)]
        if min(min(value) if isinstance(value, tuple) else value for value in values) < 0:
            raise ValueError(f"sizes are at least 0; got {self}")

    @property
    def blocks(self) -> int:
        """The number of blocks L."""
        return len(self.mlp)

    def always(self, draft: Draft) -> int:
        """Return the bytes that are in memory under every plan of a draft, buffers left out."""
        head = self.rounded_head if draft == "rounded" else 0
        return self.fixed + self.cache + self.working + self.process + head


@dataclass(frozen=True)
class Link:
    """What brings streamed weights, from memory of the host or a disk: how many bytes come in a second."""

    bytes_per_second: float

    def __post_init__(self) -> None:
        _check_rate("the link's bandwidth", self.bytes_per_second)


class Residents(NamedTuple):
    """Which parts of which blocks stay in memory, one bool a block; see `Plan`."""

    attention: tuple[bool, ...]
    mlp: tuple[bool, ...]
    rounded: tuple[bool, ...]
    kept: tuple[bool, ...]


@dataclass(frozen=True)
class Setting:
    """What plans are made for.

    memory_bytes_per_second  bandwidth of the device's memory
    period                   K, the tokens that one full pass checks
    aal                      tokens that a round of K - 1 draft passes and a full pass brings on average, 1 to K
    """

    link: Link
    memory_bytes_per_second: float
    draft: Draft
    period: int
    aal: float


@dataclass(frozen=True)
class Plan:
    """What stays in memory, what is streamed, and how long that takes.

    attention       whether a block's linear layers outside the MLP stay
    mlp             whether its gate, up and down stay; a coarse draft then finds the kept neurons among them
    rounded         whether its weights at the draft's bits stay; without, a draft pass streams them
    kept            whether a copy of its kept neurons stays; without, a draft pass streams them unless `mlp` is True
    buffers         streaming buffers, each of `unit` bytes, the largest unit of any pass; 0 where nothing is streamed
    budget, used    bytes that may be used, and those that are: always, resident and buffers
    draft_streamed  bytes that a draft pass streams
    full_streamed   bytes that a full pass streams
    fetched_ahead   those of them that come during draft passes, which leave the link idle
    switch_seconds  of a round, spent on waiting where passes of both kinds stream; a part of the next two
    draft_seconds   of a draft pass, the mean of a round's; 0 without a draft
    full_seconds    of the full pass of a round
    plain_seconds   of a token of plain full decoding with the same weights in memory
    period, aal     K and the tokens of a round; 1 and 1 without a draft

    The model of time:

    - A pass takes the longer of two times: what it streams over the link's bandwidth, and what it reads over the
      memory's. It reads the weights of its kind, the output head, and all of `cache`. Arithmetic is not counted.
    - With two buffers that is so for each unit: it comes while the one before it is used, and all that stays between.
    - A pass finds its first units in the buffers where the pass before was of its kind, as units come in turn.
    - Where draft passes stream nothing, the link fills all buffers but one with units of the full pass meanwhile. The
      last one still holds the unit that was used last.
    - Where passes of both kinds stream, each change of kind waits for the first unit that passes of the other kind do
      not use: twice in a round.
    """

    draft: Draft
    attention: tuple[bool, ...]
    mlp: tuple[bool, ...]
    rounded: tuple[bool, ...]
    kept: tuple[bool, ...]
    buffers: int
    unit: int
    budget: int
    used: int
    draft_streamed: int
    full_streamed: int
    fetched_ahead: int
    switch_seconds: float
    draft_seconds: float
    full_seconds: float
    plain_seconds: float
    period: int
    aal: float

    @property
    def neurons(self) -> tuple[bool, ...]:
        """Whether a coarse draft finds a block's kept neurons in memory: as a copy, or among all of its neurons."""
        return tuple(mlp or kept for mlp, kept in zip(self.mlp, self.kept, strict=True))

    @property
    def seconds_per_token(self) -> float:
        """The time of a round over the tokens that it brings: ((K-1) draft + full) / AAL."""
        return ((self.period - 1) * self.draft_seconds + self.full_seconds) / self.aal

    @property
    def streamed_per_round(self) -> int:
        """The bytes that cross the link in a round."""
        return (self.period - 1) * self.draft_streamed + self.full_streamed


def make_plan(
    sizes: Sizes,
    budget: int,
    link: Link,
    memory_bytes_per_second: float,
    draft: Draft,
    period: int = 1,
    aal: float = 1.0,
) -> Plan:
    """Return the fastest plan whose memory is at most `budget` bytes.

    Parts become resident in the order of the crossings of the link that one of their bytes saves in a round:

    - "rounded": the rounded weights of all blocks (K - 1 crossings), then whole blocks (1);
    - "coarse": attention (K), then copies of the kept neurons (K - 1), then whole MLPs in the place of these copies.
      Where that is faster, as with small K or nearly all neurons kept, MLPs come without any copy before;
    - "none": whole blocks. `period` and `aal` do not count.

    Attention of a few other blocks fills the room that is too small for a whole one.

    The blocks of which a part stays are spread evenly over the depth, so that the link never waits for long. A larger
    budget never makes a plan slower. Raises ConfigError, with the smallest budget that works, where this one does not.
    """
    setting = _setting(sizes, link, memory_bytes_per_second, draft, period, aal)
    taken = [(_used(sizes, *candidate, draft), candidate) for candidate in _candidates(sizes.blocks, draft)]
    if budget < (least := min(used for used, _ in taken)):
        raise ConfigError(_too_small(sizes, budget, least, draft))
    plans = [_plan(sizes, *candidate, setting, budget) for used, candidate in taken if used <= budget]
    return min(plans, key=lambda plan: (plan.seconds_per_token, plan.streamed_per_round, -plan.buffers, plan.used))


def stream_everything(
    sizes: Sizes, link: Link, memory_bytes_per_second: float, draft: Draft, period: int = 1, aal: float = 1.0
) -> Plan:
    """Return the plan with two buffers and no block in memory, as in the paper's experiment (arXiv 2409.03856)."""
    setting = _setting(sizes, link, memory_bytes_per_second, draft, period, aal)
    residents = _none(sizes.blocks)
    return _plan(sizes, residents, FEWEST, setting, _used(sizes, residents, FEWEST, draft))


def smallest_budget(sizes: Sizes, draft: Draft) -> int:
    """Return the least bytes with which a model can be run: two buffers, or less where all blocks are smaller."""
    return min(_used(sizes, *candidate, draft) for candidate in _candidates(sizes.blocks, draft))


def acceptance(aal: float, period: int) -> float:
    """Return the chance a of a guess at which windows of K tokens bring `aal` tokens on average.

    They bring 1 + a + ... + a^(K-1). Raises ConfigError where no a fits.
    """
    if not 1 <= aal <= period:
        raise ConfigError(f"windows of {period} tokens bring from 1 to {period} on average; got {aal}")
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(period)) < aal else (low, middle)
    return low


def _setting(
    sizes: Sizes, link: Link, memory_bytes_per_second: float, draft: Draft, period: int, aal: float
) -> Setting:
    """Return what plans are made for, checked."""
    _check_rate("the memory's bandwidth", memory_bytes_per_second)
    if draft == "none":
        return Setting(link, memory_bytes_per_second, draft, 1, 1.0)
    if period < 2:
        raise ConfigError(f"a plan with a draft has a period of at least 2; got {period}")
    if not 1 <= aal <= period:
        raise ConfigError(f"a round of period {period} brings from 1 to {period} tokens on average; got {aal}")
    if not any(sizes.rounded if draft == "rounded" else sizes.kept):
        raise ValueError(f"these sizes are of no {draft} draft: {sizes}")
    return Setting(link, memory_bytes_per_second, draft, period, aal)


def _check_rate(what: str, rate: float) -> None:
    if not (isfinite(rate) and rate > 0):
        raise ConfigError(f"{what} is a finite number of bytes a second, above 0; got {rate}")


def _spread(count: int, blocks: int) -> tuple[bool, ...]:
    """Return `count` of so many blocks, evenly spread."""
    return tuple((i + 1) * count // blocks > i * count // blocks for i in range(blocks))


def _and_some(held: Sequence[bool], count: int) -> tuple[bool, ...]:
    """Return those that are held and `count` of the others, evenly spread."""
    others = iter(_spread(count, len(held) - sum(held)))
    return tuple(each or next(others) for each in held)


def _none(blocks: int) -> Residents:
    return Residents(*[_spread(0, blocks)] * 4)


def _candidates(blocks: int, draft: Draft) -> Iterator[tuple[Residents, int]]:
    """Yield what may stay in memory, and how many buffers there are then.

    The candidates do not depend on the budget. So the best one of those that fit never gets worse with more room.
    """
    yield from product(_residents(blocks, draft), (FEWEST, BUFFERS))


def _residents(blocks: int, draft: Draft) -> Iterator[Residents]:
    none, every = _spread(0, blocks), _spread(blocks, blocks)
    for count in range(blocks + 1):
        some, others = _spread(count, blocks), tuple(not stays for stays in _spread(count, blocks))
        more = [_and_some(some, each) for each in range(min(MORE, blocks - count) + 1)]
        if draft == "none":
            yield from (Residents(attention, some, none, none) for attention in more)
        elif draft == "rounded":
            yield Residents(none, none, some, none)
            yield from (Residents(attention, some, every, none) for attention in more)
        else:
            yield Residents(some, none, none, none)
            yield Residents(every, none, none, some)
            yield Residents(every, some, none, others)
            yield Residents(every, some, none, none)  # where nearly all neurons are kept, copies are not worth it


def _full_steps(sizes: Sizes, residents: Residents) -> list[Step]:
    """Return what a full pass reads."""
    steps = _in_turn((sizes.attention, residents.attention), (sizes.mlp, residents.mlp))
    return [*steps, Step(sizes.head + sizes.cache, 0)]


def _draft_steps(sizes: Sizes, residents: Residents, draft: Draft) -> list[Step]:
    """Return what a draft pass reads; [] where there is none."""
    if draft == "none":
        return []
    if draft == "rounded":
        return [*_in_turn((sizes.rounded, residents.rounded)), Step(sizes.rounded_head + sizes.cache, 0)]
    found = [mlp or kept for mlp, kept in zip(residents.mlp, residents.kept, strict=True)]
    steps = _in_turn((sizes.attention, residents.attention), (sizes.kept, found))
    return [*steps, Step(sizes.head + sizes.cache, 0)]


def _in_turn(*parts: tuple[Sequence[int], Sequence[bool]]) -> list[Step]:
    """Return the parts of blocks, given as sizes and whether they stay, block by block."""
    each = [[Step(size, 0 if stays else size) for size, stays in zip(*part, strict=True)] for part in parts]
    return [step for block in zip(*each, strict=True) for step in block]


def _unit(sizes: Sizes, residents: Residents, draft: Draft) -> int:
    steps = _full_steps(sizes, residents) + _draft_steps(sizes, residents, draft)
    return max(step.streamed for step in steps)


def _resident_bytes(sizes: Sizes, residents: Residents) -> int:
    """Return the bytes of the parts of blocks that stay in memory."""
    parts = zip(residents, (sizes.attention, sizes.mlp, sizes.rounded, sizes.kept), strict=True)
    return sum(size for held, part in parts for stays, size in zip(held, part, strict=True) if stays)


def _used(sizes: Sizes, residents: Residents, buffers: int, draft: Draft) -> int:
    """Return the bytes of memory that a candidate takes."""
    return sizes.always(draft) + _resident_bytes(sizes, residents) + buffers * _unit(sizes, residents, draft)


def _plan(sizes: Sizes, residents: Residents, buffers: int, setting: Setting, budget: int) -> Plan:
    """Return a candidate with its figures."""
    full, draft = _full_steps(sizes, residents), _draft_steps(sizes, residents, setting.draft)
    unit = _unit(sizes, residents, setting.draft)
    return Plan(
        draft=setting.draft,
        **residents._asdict(),
        buffers=buffers if unit else 0,
        unit=unit,
        budget=budget,
        used=_used(sizes, residents, buffers, setting.draft),
        draft_streamed=sum(step.streamed for step in draft),
        full_streamed=sum(step.streamed for step in full),
        period=setting.period,
        aal=setting.aal,
        **_times(full, draft, buffers, setting, setting.draft == "coarse" and not residents.attention[0]),
    )


def _times(full: list[Step], draft: list[Step], buffers: int, setting: Setting, shared: bool) -> dict[str, Any]:
    """Return the times of passes that take these steps; see `Plan` for the model.

    shared  passes of both kinds begin with the same unit
    """
    rate, drafts = setting.link.bytes_per_second, setting.period - 1
    own, guess = (pass_time(steps, buffers, rate, setting.memory_bytes_per_second) for steps in (full, draft))
    firsts = [each.units[min(shared, len(each.units) - 1)] for each in (own, guess) if each.units]
    full_wait, draft_wait = (firsts[0] / rate, firsts[1] / rate) if len(firsts) == 2 else (0.0, 0.0)
    ahead = 0 if guess.units else min(sum(own.units[: buffers - 1]), int(drafts * guess.seconds * rate))
    saved = max(0.0, ahead / rate - own.hidden)
    return {
        "fetched_ahead": ahead,
        "switch_seconds": full_wait + draft_wait,
        "draft_seconds": guess.seconds + (draft_wait / drafts if drafts else 0.0),
        "full_seconds": max(own.seconds - saved, own.reading) + full_wait,
        "plain_seconds": own.seconds,
    }


def _too_small(sizes: Sizes, budget: int, least: int, draft: Draft) -> str:
    parts = {
        "embedding, head, norms and biases": sizes.fixed,
        "the draft's head": sizes.rounded_head if draft == "rounded" else 0,
        "keys and values": sizes.cache,
        "working memory": sizes.working,
        "the process itself, with its libraries and a reserve,": sizes.process,
        "buffers for blocks": least - sizes.always(draft),
    }
    listed = ", ".join(f"{what} {in_words(size)}" for what, size in parts.items() if size)
    shorter = ", or shorten the context" if least - budget < sizes.cache else ""
    return (
        f"a memory budget of {budget} bytes ({in_words(budget)}) is too small: {listed} take {least} bytes; "
        f"give at least {least} bytes{shorter}"
    )
