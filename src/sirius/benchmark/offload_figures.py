"""The figures of `sirius bench offload`, from what was measured in its turns."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles

from sirius.benchmark.offload_turn import OffloadSetting, Turn
from sirius.benchmark.playback import mean_advance

FULL, ACCELERATE = "full", "accelerate"
PARTS = ("attention", "mlp", "rounded", "kept")  # of a plan


@dataclass(frozen=True)
class OffloadFigures:
    """The figures of a setting: medians over its timed steps or windows where nothing else is said.

    aal                    tokens of a window, the histogram's mean; 1 without a draft
    planned_bytes          of memory, by the plan; None where nothing is streamed, and of accelerate
    peak_bytes             the most bytes in use, see `Turn`; None where the system does not tell
    host_bytes             of weights where the host's memory is played by this machine's
    swapped_bytes          of the process, swapped out at the end
    stays                  in how many blocks each part stays, see `Plan`; None as of `planned_bytes`
    draft_streamed, full_streamed   bytes that a pass copies over the link
    fetched_ahead          of a full pass's bytes, those that are copied during draft passes, by the plan
    streamed_per_round, moved_per_round   bytes that cross the link in a round: by the plan, and counted
    links                  bytes per second over the link, before and after the timed rounds of each turn
    draft_seconds, full_seconds   of a pass
    seconds_per_token, p10, p90   of a round, over `aal`
    floor                  seconds per token: bytes of a round over the link's speed in the same turn, over `aal`
    share_of_floor         the floor over the time; None where nothing is streamed
    predicted              seconds per token by the plan, with the link's speed at loading
    predicted_over_measured   in the same turn
    ratio_to_full, ratio_to_accelerate   of the times per token
    """

    name: str
    aal: float
    planned_bytes: int | None
    peak_bytes: int | None
    within_budget: bool | None
    host_bytes: int
    swapped_bytes: int | None
    stays: dict[str, int] | None
    buffers: int | None
    draft_streamed: int
    full_streamed: int
    fetched_ahead: int
    streamed_per_round: int
    moved_per_round: float | None
    links: tuple[tuple[float, float], ...]
    draft_seconds: float | None
    full_seconds: float
    seconds_per_token: float
    p10: float
    p90: float
    floor: float
    share_of_floor: float | None
    predicted: float | None
    predicted_over_measured: float | None
    ratio_to_full: float
    ratio_to_accelerate: float | None


@dataclass(frozen=True)
class _Timed:
    """A turn of a setting whose windows have `drafts` guesses and bring `aal` tokens.

    Seconds are per token; `predicted` is None where there is no plan.
    """

    turn: Turn
    drafts: int
    aal: float

    @property
    def streamed(self) -> int:
        """The bytes of a round."""
        return self.drafts * self.turn.streamed[0] + self.turn.streamed[1]

    @property
    def seconds(self) -> list[float]:
        return [each / self.aal for each in self.turn.rounds]

    @property
    def floor(self) -> float:
        return self.streamed / fmean(self.turn.links) / self.aal if self.turn.links else 0.0

    @property
    def predicted(self) -> float | None:
        plan = self.turn.plan
        return None if plan is None else (self.drafts * plan.draft_seconds + plan.full_seconds) / self.aal


def make_rows(settings: Sequence[OffloadSetting], turns: dict[str, list[Turn]], budget: int) -> list[OffloadFigures]:
    """Return the figures of each setting of which there are turns, under a budget of bytes."""
    timed = {each.name: _timed(each, turns[each.name]) for each in settings if turns.get(each.name)}
    medians = {name: median(all_seconds(each)) for name, each in timed.items()}
    return [_row(name, each, budget, medians) for name, each in timed.items()]


def _timed(setting: OffloadSetting, turns: Sequence[Turn]) -> list[_Timed]:
    drafts = max(len(setting.histogram) - 1, 0)
    return [_Timed(turn, drafts, mean_advance(setting.histogram) if drafts else 1.0) for turn in turns]


def all_seconds(timed: Sequence[_Timed]) -> list[float]:
    """Return the seconds per token of all rounds."""
    return [seconds for each in timed for seconds in each.seconds]


def _row(name: str, timed: Sequence[_Timed], budget: int, medians: dict[str, float]) -> OffloadFigures:
    turns, last = [each.turn for each in timed], timed[-1]
    plan, drafts = last.turn.plan, last.drafts
    seconds, mine = all_seconds(timed), medians[name]
    tenths = quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds
    peak = max((turn.peak for turn in turns if turn.peak is not None), default=None)
    full = [each for turn in turns for each in (turn.checks if drafts else turn.rounds)]
    return OffloadFigures(
        name=name,
        aal=round(last.aal, 3),
        planned_bytes=plan and plan.used,
        peak_bytes=peak,
        within_budget=None if peak is None else peak <= budget,
        host_bytes=max(turn.host for turn in turns),
        swapped_bytes=max((turn.swapped for turn in turns if turn.swapped is not None), default=None),
        stays=plan and {part: sum(getattr(plan, part)) for part in PARTS},
        buffers=plan and plan.buffers,
        draft_streamed=last.turn.streamed[0],
        full_streamed=last.turn.streamed[1],
        fetched_ahead=plan.fetched_ahead if plan else 0,
        streamed_per_round=last.streamed,
        moved_per_round=_median([turn.moved for turn in turns]),
        links=tuple(turn.links for turn in turns if turn.links),
        draft_seconds=_median([each / drafts for turn in turns for each in turn.drafts]),
        full_seconds=median(full),
        seconds_per_token=mine,
        p10=tenths[0],
        p90=tenths[-1],
        floor=median(each.floor for each in timed),
        share_of_floor=_median([each.floor / median(each.seconds) for each in timed]) or None,
        predicted=_median([each.predicted for each in timed]),
        predicted_over_measured=_median([each.predicted and each.predicted / median(each.seconds) for each in timed]),
        ratio_to_full=mine / medians[FULL],
        ratio_to_accelerate=mine / medians[ACCELERATE] if ACCELERATE in medians else None,
    )


def _median(values: Sequence[float | None]) -> float | None:
    """Return the median of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return median(known) if known else None
