"""Load a model under a memory budget: measure the link, plan what stays, and bring that."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sirius.core import AUTO, LONGEST, CorrectionConfig, SparsityConfig
from sirius.errors import ConfigError, ModelError
from sirius.forms import as_config
from sirius.kernels import ops
from sirius.model.limits import MOST_READ, check_context, context_limit
from sirius.model.loading import Source, find_device, find_dtype, load_config, load_empty, load_tokenizer
from sirius.model.prepared import prepared_of
from sirius.offload.amounts import free_memory, in_words, memory_of, parse_budget
from sirius.offload.checkpoint import NUMBERS, Stored
from sirius.offload.load import Transfer, all_parts, check_source, fill, find_weights, match, unit_of
from sirius.offload.measure import held_now, link_speed, memory_speed
from sirius.offload.plan import Draft, Link, Sizes, acceptance, make_plan
from sirius.offload.sizes import draft_of, score_bytes, sizes_of
from sirius.offload.stream import Planned
from sirius.shortage import SHORTAGE, ran_out

CONTEXT = 4096  # tokens that memory is planned for where nothing is said
# Bytes of a process for what comes and goes and no plan knows: a layer while it is rounded, neurons while they are
# copied, modules that are imported later, what the allocator keeps. With 96 MiB a 1.5B model took 11 to 260 MB more
# than its budget (records/offload.jsonl).
SLACK = 352 << 20
ROUNDED_TO = 16 << 20  # bytes; what a process holds differs a little from run to run
PERIOD = 16  # of rounds in predictions, where no other is given
ADVANCE: dict[Draft, float] = {"none": 1.0, "rounded": 12.7, "coarse": 6.0}  # their tokens under a lossless rule, of 16
UNDRAFTED = SparsityConfig("none")
ROUNDED = SparsityConfig("none", draft_bits=4)


@dataclass(frozen=True)
class Budget:
    """What a model may take of a device's memory, and what it is planned for.

    size     bytes, or as a user writes it: "8GiB", "50%". On a CPU all that the process holds counts
    draft    what drafts read, also by its short form; None: every neuron at 4 bits where that is expected to be
             faster, else nothing
    context  most tokens of a prompt and its text; None: 4096, or the model's limit where that is less
    host     keep what does not stay in the host's memory, not in its files; None: on a GPU
    link     the most bytes per second that cross the link, on a CPU; None: all that it has
    rows     texts that are decoded side by side. Fewer are planned for where that brings more tokens per second. With a
             `context` each has as many tokens; without one they share 4096
    window   most guesses of a check; more than 32 are those of trees
    period   K of the rounds that are planned for
    aal      tokens that such a round is expected to bring, 1 to K; None: as published for the kind of draft
    """

    size: int | str
    draft: SparsityConfig | None = None
    context: int | None = None
    host: bool | None = None
    link: float | None = None
    rows: int = 1
    window: int = LONGEST
    period: int = PERIOD
    aal: float | None = None

    def __post_init__(self) -> None:
        if self.draft is not None:
            object.__setattr__(self, "draft", as_config(SparsityConfig, self.draft))
        if self.link is not None and not (isfinite(self.link) and self.link > 0):
            raise ConfigError(f"link is a finite number of bytes a second, above 0; got {self.link}")
        if min(self.rows, self.window) < 1:
            raise ConfigError(f"rows and window count texts and guesses, at least 1; got {self.rows} and {self.window}")
        if self.period < 2:
            raise ConfigError(f"rounds that are planned for have a period of at least 2; got {self.period}")
        if self.aal is not None and not 1 <= self.aal <= self.period:
            raise ConfigError(f"a round of {self.period} brings from 1 to {self.period} tokens; got aal {self.aal}")


def window_of(correction: CorrectionConfig | None) -> int:
    """Return the most guesses of a correction's check, at least as many as where none is named."""
    return LONGEST if correction is None else max(LONGEST, (correction.longest - 1) * correction.tree_width)


def as_budget(given: int | str | Budget, draft: Any, context: int | None) -> Budget:
    """Return a budget given as such, or by its size alone beside a draft and a context.

    Raises ConfigError of a draft that is none, and of one beside a whole budget, which has its own.
    """
    if not isinstance(given, Budget):
        return Budget(given, draft, context)
    if draft is not None:
        raise ConfigError("the memory budget says what it is planned for; give the draft there: Budget(..., draft=)")
    return given if context is None else replace(given, context=context)


def load_within(
    source: Source, dtype: str | torch.dtype, device: str, budget: Budget
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, int]:
    """Load and prepare a model of which as much stays in memory as a budget allows.

    Returns it with its tokenizer, and the most tokens of a prompt and its text. The link is measured first, and the
    plan is logged. Raises ConfigError of a budget that is too small or more than there is. Raises ModelError and
    UnsupportedModelError of a checkpoint that cannot be read in part, and FileError where reading fails.
    """
    source = source.found()
    check_source(source)
    check_context(budget.context)
    config, target = load_config(source), find_device(device)
    _check_device(target, budget)
    stored = find_weights(source)
    model = load_empty(source, config, chosen_dtype(dtype, config, stored))
    where = match(source, model, stored)
    tokenizer = load_tokenizer(source)  # before memory is planned, of which it takes some
    transfer = Transfer(target, target.type == "cuda" if budget.host is None else budget.host, budget.link)
    planned = _plan(model, where, transfer, budget)
    try:
        fill(model, where, planned, transfer)
    except SHORTAGE as error:
        if not ran_out(error):
            raise
        raise ModelError(f"{target} ran out of memory below the budget of {in_words(planned.plan.budget)}") from error
    prepared = prepared_of(model)
    prepared.plan, prepared.slots = in_short(planned), planned.slots
    logging.getLogger("sirius.offload").info("%s", prepared.plan)
    return model, tokenizer, _context(budget, config)


def _check_device(device: torch.device, budget: Budget) -> None:
    """Raise ConfigError of a device that takes no budget, or not this one."""
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"a memory budget is for a CPU or a CUDA GPU; got {device}")
    if device.type == "cuda" and (budget.host is False or budget.link is not None):
        raise ConfigError("a GPU takes weights from the host's memory, as fast as they come; leave host and link out")
    size, free = _bytes(budget, device), free_memory(device)
    if size > free:
        where = "this machine has" if device.type == "cpu" else f"is free on {device}"
        raise ConfigError(f"a memory budget of {in_words(size)} is more than {where}: {in_words(free)}; give less")


def _bytes(budget: Budget, device: torch.device) -> int:
    return parse_budget(str(budget.size), memory_of(device))


def in_short(planned: Planned) -> str:
    """Return a plan in one line: what stays, what crosses the link, and the predicted time of a token."""
    plan = planned.plan
    parts = {"attention": plan.attention, "MLP": plan.mlp, "rounded weights": plan.rounded, "kept neurons": plan.kept}
    stays = ", ".join(f"{name} of {sum(each)}" for name, each in parts.items() if any(each)) or "none"
    drafted = f" and {in_words(plan.draft_streamed)} a draft pass" if plan.draft != "none" else ""
    advance = f" (a window of {plan.period} taken to bring {plan.aal:g} tokens)" if plan.draft != "none" else ""
    beside = f", {planned.rows} texts side by side" if planned.rows > 1 else ""
    return (
        f"{in_words(plan.used)} of {in_words(plan.budget)}; in memory of {len(plan.mlp)} blocks: {stays}; over the "
        f"link {in_words(plan.full_streamed)} a full pass{drafted}; {plan.seconds_per_token:.3g} s a token expected"
        f"{advance}{beside}, {plan.plain_seconds:.3g} s without a draft"
    )


def _context(budget: Budget, config: PreTrainedConfig) -> int:
    """Return the most tokens of a prompt and its text."""
    return budget.context or min(CONTEXT, context_limit(config) or CONTEXT)


def _plan(model: PreTrainedModel, where: dict[int, Stored], transfer: Transfer, budget: Budget) -> Planned:
    """Return the plan that is expected to bring the most tokens per second."""
    size = _bytes(budget, transfer.device)
    link = Link(transfer_speed(model, where, transfer))
    speed = memory_speed(model.dtype, transfer.device)
    held = reserved() if transfer.device.type == "cpu" else 0

    def planned(room: Room, rows: int) -> Planned:
        kind = draft_of(room.draft)
        plan = make_plan(room.sizes(rows), size, link, speed, kind, budget.period, _advance(kind, budget))
        return Planned(plan, room.draft, room.slots(rows), rows, max(rows, room.most))

    first, *others = (Room.of(model, draft, budget, held) for draft in _drafts(budget, transfer.device, model.dtype))
    found = [planned(first, 1)]  # which takes the least memory
    for room in (first, *others):
        for rows in _counts(budget.rows):
            with suppress(ConfigError):  # too little memory
                found.append(planned(room, rows))
    return min(found, key=lambda each: each.plan.seconds_per_token / each.rows)


def reserved() -> int:
    """Return the bytes of a process that are not for a model; rounded up, so that the same command has the same."""
    return -(-(held_now() + SLACK) // ROUNDED_TO) * ROUNDED_TO


def _advance(draft: Draft, budget: Budget) -> float:
    """Return the tokens that a round is expected to bring; at any period a guess has the same chance."""
    if budget.aal is not None and draft != "none":
        return budget.aal
    accepted = acceptance(ADVANCE[draft], PERIOD)
    return sum(accepted**n for n in range(budget.period))


def _drafts(budget: Budget, device: torch.device, dtype: torch.dtype) -> list[SparsityConfig]:
    """Return the drafts that are planned for, of which the fastest one is taken; the first one needs the least.

    Raises ConfigError of a draft at fewer bits where no kernel reads such weights: they would be widened in memory.
    """
    multiplies = ops.multiplies_quantized(device, dtype)
    if (asked := budget.draft) is None:
        return [UNDRAFTED, ROUNDED] if multiplies else [UNDRAFTED]
    bits = ROUNDED.draft_bits if asked.draft_bits == AUTO else asked.draft_bits
    if bits and not multiplies:
        raise ConfigError(
            f"no kernel multiplies weights of {bits} bits in {dtype} on {device}, and there is no memory planned to "
            "widen them; set draft_bits to 0, and name the method coarse to draft with"
        )
    return [replace(asked, draft_bits=bits)]


def _counts(rows: int) -> list[int]:
    """Return the numbers of texts side by side that are tried: 1, 2, 4, ... and the largest one."""
    return [*(2**power for power in range(rows.bit_length()) if 2**power < rows), rows]


@dataclass(frozen=True)
class Room:
    """What texts side by side take of memory.

    one     the sizes of a model with one text
    scores  bytes of the scores of one text's check
    most    texts whose scores take no more than what a prompt's pass takes
    """

    draft: SparsityConfig
    one: Sizes
    budget: Budget
    context: int
    scores: int
    most: int

    @classmethod
    def of(cls, model: PreTrainedModel, draft: SparsityConfig, budget: Budget, held: int) -> "Room":
        """Return what texts of a model take beside a draft and what the process holds already."""
        config, dtype, context = model.config, model.dtype, _context(budget, model.config)
        checked = budget.window
        one = sizes_of(config, dtype, draft, context + checked, MOST_READ, held, checked)
        scores = score_bytes(config, dtype, checked)
        return cls(draft, one, budget, context + checked, scores, one.working // scores)

    def slots(self, rows: int) -> int:
        """Return the slots of keys and values of so many texts together."""
        return self.context * (1 if self.budget.context is None else rows)

    def sizes(self, rows: int) -> Sizes:
        """Return the sizes of the model with so many texts side by side."""
        sets = 1 if self.draft.shared_set else rows
        return replace(
            self.one,
            kept=tuple(sets * each for each in self.one.kept),
            cache=self.one.cache * self.slots(rows) // self.context,
            working=self.one.working + max(0, rows - max(1, self.most)) * self.scores,
        )


def transfer_speed(model: PreTrainedModel, where: dict[int, Stored], transfer: Transfer) -> float:
    """Return the bytes per second at which the blocks of a model come to a device."""
    parts = all_parts(model, where)[: 2 if transfer.from_host else None]
    for part in parts:
        part.checks = False  # as in all passes but the first
    units = [unit_of(part, transfer) for part in parts]
    measured = link_speed(units, replace(transfer, throttle=None).make_mover())
    return measured if transfer.throttle is None else min(measured, transfer.throttle)


def chosen_dtype(dtype: str | torch.dtype, config: PreTrainedConfig, stored: dict[str, Stored]) -> torch.dtype:
    """Return the dtype that is asked for, "auto" being the checkpoint's."""
    if dtype != "auto":
        return find_dtype(dtype, auto=True)
    own = getattr(config, "dtype", None)
    if isinstance(own, torch.dtype):
        return own
    numbers = [each for each in stored.values() if each.dtype in NUMBERS.values()]
    return max(numbers, key=lambda each: each.nbytes).dtype if numbers else torch.float32  # `match` says what is wrong
