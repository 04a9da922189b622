"""Load a model under a memory budget: measure the link, plan what stays, and bring that."""

import logging
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sirius.core import AUTO, LONGEST, SparsityConfig
from sirius.errors import ConfigError
from sirius.kernels import ops
from sirius.model.limits import MOST_READ, context_limit
from sirius.model.loading import Source, find_device, find_dtype, load_config, load_empty, load_tokenizer
from sirius.model.prepared import prepared_of
from sirius.offload.amounts import in_words, memory_of
from sirius.offload.checkpoint import Stored
from sirius.offload.load import Way, all_blocks, fill, find_weights, match, unit_of
from sirius.offload.measure import held_now, link_speed, memory_speed
from sirius.offload.plan import Draft, Link, Plan, make_plan, parse_budget
from sirius.offload.sizes import draft_of, sizes_of
from sirius.offload.stream import Planned

CONTEXT = 4096  # tokens that memory is planned for where nothing is said
SLACK = 96 << 20  # bytes of a process for what comes and goes: a layer being rounded, modules imported later
PERIOD = 16  # of rounds in predictions
ADVANCE: dict[Draft, float] = {"none": 1.0, "rounded": 12.7, "coarse": 6.0}  # their tokens under a lossless rule
UNDRAFTED = SparsityConfig("none")
ROUNDED = SparsityConfig("none", draft_bits=4)


@dataclass(frozen=True)
class Budget:
    """What a model may take of a device's memory, and what it is planned for.

    size     bytes, or as a user writes it: "8GiB", "50%". On a CPU all that the process holds counts
    draft    what drafts read; None: every neuron at 4 bits where that is expected to be faster, else nothing
    context  most tokens of a prompt and its text; None: 4096, or the model's limit where that is less
    host     keep what does not stay in the host's memory, not in its files; None: on a GPU
    link     the most bytes per second that cross the link, on a CPU; None: all that it has
    """

    size: int | str
    draft: SparsityConfig | None = None
    context: int | None = None
    host: bool | None = None
    link: float | None = None


def load_within(
    source: Source, dtype: str | torch.dtype, device: str, budget: Budget
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, int]:
    """Load and prepare a model of which as much stays in memory as a budget allows.

    Returns it with its tokenizer, and the most tokens of a prompt and its text. The link is measured first, and the
    plan is logged. Raises ConfigError of a budget that is too small, ModelError and UnsupportedModelError of a
    checkpoint that cannot be read in part, and FileError where reading fails.
    """
    source = source.found()
    config, target = load_config(source), find_device(device)
    if target.type not in ("cpu", "cuda"):
        raise ConfigError(f"a memory budget is for a CPU or a CUDA GPU; got {target}")
    stored = find_weights(source)
    model = load_empty(source, config, _dtype(dtype, config, stored))
    where = match(source, model, stored)
    tokenizer = load_tokenizer(source)  # before memory is planned, of which it takes some
    way = Way(target, target.type == "cuda" if budget.host is None else budget.host, budget.link)
    planned = _plan(model, where, way, budget)
    fill(model, where, planned, way)
    prepared_of(model).plan = in_short(planned.plan)
    logging.getLogger("sirius").info("%s", prepared_of(model).plan)
    return model, tokenizer, planned.slots - LONGEST


def in_short(plan: Plan) -> str:
    """Return a plan in one line: what stays, what crosses the link, and the predicted time of a token."""
    parts = {"attention": plan.attention, "MLP": plan.mlp, "rounded weights": plan.rounded, "kept neurons": plan.kept}
    stays = ", ".join(f"{name} of {sum(each)}" for name, each in parts.items() if any(each)) or "none"
    drafted = f" and {in_words(plan.draft_streamed)} a draft pass" if plan.draft != "none" else ""
    advance = f" (a window of {plan.period} taken to bring {plan.aal:g} tokens)" if plan.draft != "none" else ""
    return (
        f"{in_words(plan.used)} of {in_words(plan.budget)}; in memory of {len(plan.mlp)} blocks: {stays}; over the "
        f"link {in_words(plan.full_streamed)} a full pass{drafted}; {plan.seconds_per_token:.3g} s a token expected"
        f"{advance}, {plan.plain_seconds:.3g} s without a draft"
    )


def _plan(model: PreTrainedModel, where: dict[int, Stored], way: Way, budget: Budget) -> Planned:
    """Return the plan that is expected to be the fastest."""
    held = (held_now() + SLACK) if way.device.type == "cpu" else 0
    limit = context_limit(model.config)
    slots = (budget.context or min(CONTEXT, limit or CONTEXT)) + LONGEST
    size = parse_budget(str(budget.size), memory_of(way.device))
    link = Link(_speed(model, where, way), "host" if way.held else "disk")
    speed = memory_speed(model.dtype, way.device)

    def planned(draft: SparsityConfig) -> Planned:
        kind = draft_of(draft)
        sizes = sizes_of(model.config, model.dtype, draft, slots, MOST_READ, held)
        return Planned(make_plan(sizes, size, link, speed, kind, PERIOD, ADVANCE[kind]), draft, slots)

    if (asked := budget.draft) is not None:
        return planned(replace(asked, draft_bits=ROUNDED.draft_bits) if asked.draft_bits == AUTO else asked)
    plain = planned(UNDRAFTED)
    if ops.multiplies_quantized(way.device, model.dtype):
        with suppress(ConfigError):  # too little memory for the draft's head
            return min(plain, planned(ROUNDED), key=lambda each: each.plan.seconds_per_token)
    return plain


def _speed(model: PreTrainedModel, where: dict[int, Stored], way: Way) -> float:
    """Return the bytes per second that blocks take to come."""
    units = [unit_of(block, way) for block in all_blocks(model, where)[: 1 if way.held else None]]
    measured = link_speed(units, replace(way, throttle=None).make_mover())
    return measured if way.throttle is None else min(measured, way.throttle)


def _dtype(dtype: str | torch.dtype, config: PreTrainedConfig, stored: dict[str, Stored]) -> torch.dtype:
    """Return the dtype that is asked for, "auto" being the checkpoint's."""
    if dtype != "auto":
        return find_dtype(dtype, auto=True)
    own = getattr(config, "dtype", None)
    return own if isinstance(own, torch.dtype) else max(stored.values(), key=lambda each: each.nbytes).dtype
