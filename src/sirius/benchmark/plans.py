"""Plans of a model that is larger than its device, side by side: the paper's settings, and ours under a budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from sirius.benchmark.playback import NAMED, PUBLISHED_AAL, PUBLISHED_PERIOD, geometric, mean_advance
from sirius.offload.amounts import in_words
from sirius.offload.plan import Draft, Link, Plan, Sizes, acceptance, make_plan, stream_everything
from sirius.table import Figures

TRACE = "argmax-int4"
LEGEND = """\
memory: weights that stay, keys and values, working memory, and buffers.
draft, full: bytes streamed by a draft pass and by a full pass, and their seconds.
tokens: of a round, which is K-1 draft passes and a full pass.
ratio: time per token over that of full under the budget.
A pass takes the longer of streamed bytes over the link and read bytes over the
memory. docs/offloading.md has the rest of the model.
"""


@dataclass(frozen=True)
class PlanRow:
    """A plan with its name, and its time per token over that of planned full decoding."""

    name: str
    plan: Plan
    ratio: float


@dataclass(frozen=True)
class Question:
    """What is planned.

    sizes             with rounded weights and kept neurons both
    bits              of the rounded weights
    budget            bytes
    memory_bandwidth  bytes a second
    period            K of the plans with a draft
    aal               tokens of their rounds; None: those of `expected_advance`
    """

    sizes: Sizes
    bits: int
    budget: int
    link: Link
    memory_bandwidth: float
    period: int
    aal: float | None

    def advance(self, draft: Draft) -> float:
        """Return the tokens of a round with a draft."""
        return expected_advance(draft, self.period) if self.aal is None else self.aal


def expected_advance(draft: Draft, period: int) -> float:
    """Return the tokens per round that are published for a kind of draft, at any period.

    Coarse: 15.22 of 16, under the paper's lossy threshold. Rounded: 12.7 of 16, under the argmax rule, 4 bits. At other
    periods each guess is accepted with the same chance as at 16.
    """
    known = {"coarse": PUBLISHED_AAL, "rounded": mean_advance(NAMED[TRACE])}
    return mean_advance(geometric(acceptance(known[draft], PUBLISHED_PERIOD), period)) if draft in known else 1.0


def plan_rows(question: Question) -> list[PlanRow]:
    """Return the plans; raise ConfigError, with the smallest budget that works for all of them, where one does not."""
    drafts: tuple[Draft, ...] = "rounded", "coarse", "none"  # the first one needs most
    planned = {draft: _planned(question, draft) for draft in drafts}
    full = planned["none"]
    plans = {
        "full, every block streamed": _streamed(question, "none"),
        "full": full,
        "coarse corrected, everything streamed": _streamed(question, "coarse"),
        "coarse corrected": planned["coarse"],
        f"{question.bits} bits corrected": planned["rounded"],
    }
    return [PlanRow(name, plan, plan.seconds_per_token / full.seconds_per_token) for name, plan in plans.items()]


def _planned(question: Question, draft: Draft) -> Plan:
    own = question.memory_bandwidth, draft, question.period, question.advance(draft)
    return make_plan(question.sizes, question.budget, question.link, *own)


def _streamed(question: Question, draft: Draft) -> Plan:
    own = question.memory_bandwidth, draft, question.period, question.advance(draft)
    return stream_everything(question.sizes, question.link, *own)


def show_plans(question: Question, rows: Sequence[PlanRow]) -> RenderableType:
    """Return the sizes of the parts, the plans as a table, and how their figures come about."""
    table = Figures(padding=(0, 1, 0, 0))
    for name in ("", "memory", "draft", "full", "draft s", "full s", "tokens", "s/token", "ratio"):
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name))
    for row in rows:
        table.add_row(row.name, *_figures(row))
    lines = "\n".join(_arithmetic(question, rows))
    return Group(_parts(question), table, Text(lines + "\n"), Text(_advances(question) + LEGEND, "dim"))


def _figures(row: PlanRow) -> tuple[str, ...]:
    plan, drafts = row.plan, row.plan.draft != "none"
    return (
        in_words(plan.used),
        in_words(plan.draft_streamed) if drafts else "",
        in_words(plan.full_streamed),
        f"{plan.draft_seconds:.3g}" if drafts else "",
        f"{plan.full_seconds:.3g}",
        f"{plan.aal:.4g}",
        f"{plan.seconds_per_token:.3g}",
        f"{row.ratio:.3f}",
    )


def _parts(question: Question) -> Figures:
    """Return the bytes of each part, of all blocks and of one."""
    sizes = question.sizes
    table = Figures(padding=(0, 1, 0, 0))
    for name in ("part", "bytes", f"of each of {sizes.blocks} blocks"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    for name, part in {
        "embedding, head, norms, biases": sizes.fixed,
        "attention": sizes.attention,
        "MLPs": sizes.mlp,
        "kept neurons of the MLPs": sizes.kept,
        f"blocks at {question.bits} bits": sizes.rounded,
        f"head at {question.bits} bits": sizes.rounded_head,
        "keys and values": sizes.cache,
        "working memory": sizes.working,
    }.items():
        whole, each = (sum(part), in_words(max(part))) if isinstance(part, tuple) else (part, "")
        table.add_row(name, in_words(whole), each)
    return table


def _arithmetic(question: Question, rows: Sequence[PlanRow]) -> Iterator[str]:
    """Yield a line on each row: what stays, the link's seconds of its passes, and its time per token."""
    link, memory = in_words(question.link.bytes_per_second), in_words(question.memory_bandwidth)
    yield f"budget {in_words(question.budget)}, link {link}/s, memory {memory}/s"
    for row in rows:
        plan = row.plan
        kept = ", ".join(f"{what} of {sum(stays)}" for what, stays in _staying(plan) if any(stays)) or "none"
        buffers = f"{plan.buffers} buffers of {in_words(plan.unit)}" if plan.buffers else "no buffers"
        passes = {"full": plan.full_streamed, **({} if plan.draft == "none" else {"draft": plan.draft_streamed})}
        crossings = [f"{name} {_crossing(size, question.link)}" for name, size in passes.items()]
        if plan.fetched_ahead:
            crossings[0] += f" ({in_words(plan.fetched_ahead)} of it during drafts)"
        yield f"{row.name}: blocks in memory: {kept}; {buffers}; {', '.join(crossings)}{_per_token(plan)}"


def _crossing(size: int, link: Link) -> str:
    return f"{in_words(size)} / {in_words(link.bytes_per_second)}/s = {size / link.bytes_per_second:.3g} s"


def _per_token(plan: Plan) -> str:
    if plan.draft == "none":
        return ""
    seconds = f"{plan.period - 1} x {plan.draft_seconds:.3g} + {plan.full_seconds:.3g}"
    waits = f", with {plan.switch_seconds:.3g} s of waiting a round" if plan.switch_seconds else ""
    return f"; ({seconds}) / {plan.aal:.4g} = {plan.seconds_per_token:.3g} s a token{waits}"


def _staying(plan: Plan) -> list[tuple[str, tuple[bool, ...]]]:
    return [
        ("attention", plan.attention),
        ("MLP", plan.mlp),
        ("rounded weights", plan.rounded),
        ("kept neurons", plan.kept),
    ]


def _advances(question: Question) -> str:
    """Return where the tokens of a round come from."""
    if question.aal is not None:
        return f"tokens of a round: {question.aal:g} of {question.period}, given\n"
    period = "" if question.period == PUBLISHED_PERIOD else f"; at {question.period} with the same chance per guess"
    bits = "" if question.bits == 4 else f"; taken for {question.bits} bits too"
    return (
        f"tokens of a round: coarse {PUBLISHED_AAL} of 16, the paper's under a lossy rule; rounded weights "
        f"{mean_advance(NAMED[TRACE]):.1f} of 16, a published trace of 4 bits under the argmax rule{bits}{period}\n"
    )
