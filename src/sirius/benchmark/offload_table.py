"""How the figures of `sirius bench offload` look on a terminal."""

from collections.abc import Iterator, Mapping
from statistics import fmean

from rich.console import Group, RenderableType
from rich.text import Text

from sirius.benchmark.offload import Outcome
from sirius.benchmark.offload_figures import ACCELERATE, OffloadFigures
from sirius.offload.amounts import in_words
from sirius.table import Figures

LEGEND = """\
Sizes in GB. peak: the most memory in use. used: its share of the budget.
draft, full: what a pass copies over the link. moved: what crossed it in a
round, counted. link: GB/s. A round is K - 1 draft passes and a full pass, or
a full pass alone.
draft s, full s: seconds of a pass. floor: the share of the time that the link
needs at least. plan: predicted over measured time. /full, /acc: time over that
of full, and of accelerate. Prompts and first rounds are not counted. Texts of
corrected rows are not the model's, as acceptance is played back.
"""


def show_offload(outcome: Outcome, budget: int, acceptance: Mapping[str, str]) -> RenderableType:
    """Return the figures as two tables, of memory and of time.

    acceptance  where the histograms come from, by the setting's name
    """
    rows = outcome.rows
    memory, time = Figures(padding=(0, 1, 0, 0)), Figures(padding=(0, 1, 0, 0))
    for name in ("", "peak", "used", "draft", "full", "moved", "link"):
        memory.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name in ("", "draft s", "full s", "s/token", "floor", "plan", "/full", "/acc"):
        time.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in rows:
        memory.add_row(row.name, *_memory(row, budget))
        time.add_row(row.name, *_time(row))
    lines = "\n".join(_lines(outcome, acceptance))
    return Group(Text(_head(rows, budget)), memory, time, Text(lines + "\n"), Text(LEGEND, "dim"))


def _head(rows: list[OffloadFigures], budget: int) -> str:
    """Return the budget, and the link's speed when it was measured first and last."""
    links = [link for row in rows for link in row.links]
    speed = f"; link {in_words(links[0][0])}/s at first, {in_words(links[-1][1])}/s at last" if links else ""
    return f"budget {in_words(budget)}{speed}"


def _memory(row: OffloadFigures, budget: int) -> tuple[str, ...]:
    over = "" if row.within_budget else " over"
    return (
        _giga(row.peak_bytes),
        "" if row.peak_bytes is None else f"{row.peak_bytes / budget:.2f}{over}",
        "" if row.draft_seconds is None else _giga(row.draft_streamed),
        _giga(row.full_streamed),
        _giga(row.moved_per_round),
        _giga(fmean(speed for link in row.links for speed in link) if row.links else None),
    )


def _giga(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.3f}"


def _time(row: OffloadFigures) -> tuple[str, ...]:
    return (
        _figure(row.draft_seconds, ".3g"),
        _figure(row.full_seconds, ".3g"),
        _figure(row.seconds_per_token, ".3g"),
        _figure(row.share_of_floor, ".2f"),
        _figure(row.predicted_over_measured, ".2f"),
        _figure(row.ratio_to_full, ".3f"),
        _figure(row.ratio_to_accelerate, ".3f"),
    )


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _lines(outcome: Outcome, acceptance: Mapping[str, str]) -> Iterator[str]:
    """Yield what stays in memory, what is played back, what was left out, and whether the text is right."""
    for row in outcome.rows:
        if row.stays is not None:
            parts = ", ".join(f"{part} of {count}" for part, count in row.stays.items() if count) or "none"
            yield f"{row.name}: in memory of the blocks: {parts}; {row.buffers} buffers"
        elif row.name != ACCELERATE:
            yield f"{row.name}: the whole model fits in the budget, so nothing is streamed"
    for name, source in acceptance.items():
        yield f"{name}: acceptance played back: {source}"
    for name, reason in outcome.left_out.items():
        yield f"{name} is left out: {reason}"
    if outcome.same_text is not None:
        yield f"the text of full is {'' if outcome.same_text else 'not '}that of the model in memory, token for token"
