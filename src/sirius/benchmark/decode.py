"""Time per token of one stream, beside the least time that reading the weights takes; settings take turns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from time import perf_counter
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from sirius.batch import Batch
from sirius.benchmark.ceiling import Ceiling
from sirius.benchmark.memory import peak_bytes, reset_peak
from sirius.benchmark.peer import NAME as PEER
from sirius.benchmark.peer import Peer
from sirius.benchmark.playback import Playback, mean_advance
from sirius.benchmark.timing import timed
from sirius.core import CorrectionConfig, SparsityConfig
from sirius.decoding.period import Measured, Period
from sirius.engine import Engine
from sirius.errors import ConfigError
from sirius.model.limits import cache_bytes, context_limit
from sirius.model.prepare import count_parameters, restore
from sirius.runtime.capture import WARM
from sirius.runtime.workspace import drop_idle
from sirius.stats import Parameters
from sirius.texts import Update

TRANSFORMERS, STATIC, FULL = "transformers", "transformers, static", "full"
SETTLED = WARM + 1  # rounds of a turn until its passes are captured


@dataclass(frozen=True)
class Workload:
    """One stream: `context` tokens held while `tokens` more are decoded, in each of `cycles` turns.

    histogram  weights of 0, 1, ... K-1 accepted guesses of a window
    acceptance  where the histogram comes from; for other drafts than its own it is an assumption
    compile    our passes are compiled, on a GPU

    Raises ConfigError where a turn has no room for two whole windows that count.
    """

    context: int
    tokens: int
    cycles: int
    histogram: tuple[float, ...]
    device: str = "cpu"
    compile: bool = False
    acceptance: str = ""

    def __post_init__(self) -> None:
        windows = SETTLED + 2
        least = windows * len(self.histogram) + 1
        if self.tokens < least:
            raise ConfigError(
                f"{windows} windows of {len(self.histogram)} tokens, the first {SETTLED} of them not counted, need "
                f"{least} tokens a turn; got {self.tokens}: raise --tokens or lower --period"
            )


@dataclass(frozen=True)
class TimedSetting:
    """A way to decode that is timed; one without sparsity runs in transformers or llama.cpp."""

    name: str
    sparsity: SparsityConfig | None = None
    correction: CorrectionConfig | None = None

    @property
    def guesses(self) -> int:
        """The guesses of a whole window, one after the other."""
        return self.correction.longest - 1 if self.correction else 0


@dataclass
class Times:
    """Seconds of every pass or window of a setting, and of all drafts and the check of each window."""

    rounds: list[float] = field(default_factory=list)
    drafts: list[float] = field(default_factory=list)
    checks: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    density: float = 1.0
    aal: float = 1.0


@dataclass(frozen=True)
class DecodeFigures:
    """The figures of a setting.

    ms_per_token, p10, p90   milliseconds: median and percentiles over its windows (or steps), each over `aal` tokens
    aal                      tokens of a window, the histogram's mean; 1 without a draft
    gb_per_s                 bytes that its passes must read, over the median
    share_of_ceiling         of the measured bandwidth
    ratio_to_full, ratio_to_transformers   of the medians
    draft, verify, rest      shares of a window's time; verify includes accepting, rest is keeping and the host's
    """

    name: str
    ms_per_token: float
    p10: float
    p90: float
    aal: float
    gb_per_s: float
    share_of_ceiling: float
    ratio_to_full: float
    ratio_to_transformers: float
    peak_bytes: int | None
    draft: float | None
    verify: float | None
    rest: float | None


class _Watched(Period):
    """A fixed period that notes the times of its windows."""

    def __init__(self, now: int, times: Times) -> None:
        super().__init__(now)
        self.times = times

    def learn(self, measured: Measured) -> None:
        """Note the times of a whole window."""
        if measured.steps < self.now - 1:
            return
        self.times.drafts.append(measured.draft)
        self.times.checks.append(measured.verify)


class _Clock(BaseStreamer):
    """Notes when transformers gives each token."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.at.append(perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def check_context(workload: Workload, config: PreTrainedConfig) -> None:
    """Raise ConfigError where a turn passes what the model was made for, before anything takes its time."""
    limit, wanted = context_limit(config), workload.context + workload.tokens
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"--context {workload.context} and --tokens {workload.tokens} pass the model's limit of {limit}; lower "
            f"--context to at most {limit - workload.tokens}"
        )


def make_settings(
    keep: float, fine_keeps: Sequence[float], bits: Sequence[int], period: int, widths: Sequence[int], device: str
) -> list[TimedSetting]:
    """Return the settings of a run: transformers, our full decoding, each draft alone, and corrected ones.

    bits  of the weights of drafts that keep every neuron

    On a GPU transformers' static cache, with which it compiles its steps, is one more.
    """
    coarse, fines = SparsityConfig("coarse", keep), [SparsityConfig("fine", each) for each in fine_keeps]
    theirs = [TimedSetting(TRANSFORMERS), *([TimedSetting(STATIC)] if device.startswith("cuda") else [])]
    settings = [*theirs, TimedSetting(FULL, SparsityConfig("none")), TimedSetting(f"coarse {keep:g}", coarse)]
    settings += [TimedSetting(f"fine {each.keep:g}", each) for each in fines]
    rounded = [SparsityConfig("none", draft_bits=each) for each in bits]
    settings += [TimedSetting(f"int{each.draft_bits}", each) for each in rounded]
    for width in widths:
        tree = f", tree {width}" if width > 1 else ""
        rule = CorrectionConfig(period, tree_width=width)
        settings += [TimedSetting(f"{s.method} {s.keep:g} corrected{tree}", s, rule) for s in (coarse, *fines[:1])]
        settings += [TimedSetting(f"int{s.draft_bits} corrected{tree}", s, rule) for s in rounded]
    return settings


def run(
    model: PreTrainedModel,
    settings: Sequence[TimedSetting],
    workload: Workload,
    ceiling: Ceiling,
    peer: Peer | None = None,
    on_turn: Callable[[], None] = lambda: None,
) -> list[DecodeFigures]:
    """Time every setting in turns, a peer after them, and return the figures; `on_turn` is called after each turn."""
    times = {setting.name: Times() for setting in settings}
    for _ in range(workload.cycles):
        for setting in settings:
            _turn(model, setting, workload, times[setting.name])
            on_turn()
        if peer is not None:
            turn = peer.turn(prompt(model, workload.context), workload.tokens - 1)
            times.setdefault(PEER, Times()).rounds += turn.seconds
            on_turn()
    settings = [*settings, *([TimedSetting(PEER)] if peer else [])]
    return _rows(Engine(model), settings, times, workload, ceiling)


def _turn(model: PreTrainedModel, setting: TimedSetting, workload: Workload, times: Times) -> None:
    drop_idle(model)  # another setting's cache is none of this one's memory
    known = reset_peak(workload.device)
    if setting.sparsity is None:
        _run_transformers(model, setting, workload, times)
    else:
        _run_ours(Engine(model, compile=workload.compile), setting, workload, times)
    if known:
        times.peaks.append(peak_bytes(workload.device))


def _run_transformers(model: PreTrainedModel, setting: TimedSetting, workload: Workload, times: Times) -> None:
    restore(model)
    ids, clock = torch.tensor([prompt(model, workload.context)], device=workload.device), _Clock()
    with torch.inference_mode():
        cast("Any", model).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=workload.tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
            **({"cache_implementation": "static"} if setting.name == STATIC else {}),
        )
    times.rounds += [b - a for a, b in zip(clock.at[1:], clock.at[2:], strict=False)]  # the first put is the prompt


def _run_ours(engine: Engine, setting: TimedSetting, workload: Workload, times: Times) -> None:
    batch = open_batch(engine, setting, workload.histogram, times)
    batch.add(engine.text(prompt(engine.model, workload.context), max_new_tokens=workload.tokens))
    step(batch)
    rounds, known = 0, len(times.drafts)
    while batch.busy:
        seconds, [update] = timed(lambda: step(batch), workload.device)
        rounds += 1
        if rounds <= SETTLED:
            del times.drafts[known:], times.checks[known:]
        if update.round.steps == setting.guesses and rounds > SETTLED:  # the budget cuts the last ones
            times.rounds.append(seconds)
        if update.completion is not None:
            times.density = update.completion.stats.density_streamed


def open_batch(engine: Engine, setting: TimedSetting, histogram: Sequence[float], times: Times, rows: int = 1) -> Batch:
    """Open the batch of a setting; its windows play the histogram back, and `times` gets those of draft and check."""
    options: dict[str, Any] = {"sparsity": setting.sparsity or "none", "correction": setting.correction}
    if setting.guesses:
        options |= {"rule": Playback(histogram), "period": _Watched(setting.guesses + 1, times)}
        times.aal = mean_advance(histogram)
    return engine.batch(rows=rows, **options)


def step(batch: Batch) -> list[Update]:
    """Bring a batch on by a round; raise what ends a text without a completion."""
    updates = batch.step()
    for update in updates:
        if update.error is not None:
            raise update.error
    return updates


def prompt(model: PreTrainedModel, count: int) -> list[int]:
    """Return token ids, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, (count,), generator=generator).tolist()


def _rows(
    engine: Engine, settings: Sequence[TimedSetting], times: dict[str, Times], workload: Workload, ceiling: Ceiling
) -> list[DecodeFigures]:
    parameters = count_parameters(engine.model)
    held = cache_bytes(engine.model.config, workload.context + workload.tokens // 2, engine.model.dtype)
    medians = {name: median(each.rounds) / each.aal for name, each in times.items()}
    rows = []
    for setting in settings:
        mine, seconds = times[setting.name], medians[setting.name]
        tenths = [each / mine.aal for each in quantiles(mine.rounds, n=10)]
        read = bytes_per_token(setting, mine, parameters, held)
        window = median(mine.rounds)
        parts = (median(mine.drafts) / window, median(mine.checks) / window) if mine.drafts else None
        rows.append(
            DecodeFigures(
                name=setting.name,
                ms_per_token=round(1e3 * seconds, 3),
                p10=round(1e3 * tenths[0], 3),
                p90=round(1e3 * tenths[-1], 3),
                aal=round(mine.aal, 3),
                gb_per_s=round(read / seconds / 1e9, 2),
                share_of_ceiling=round(read / seconds / 1e9 / ceiling.gb_per_s, 3),
                ratio_to_full=round(seconds / medians[FULL], 3),
                ratio_to_transformers=round(seconds / medians[TRANSFORMERS], 3),
                peak_bytes=max(mine.peaks, default=None),
                draft=parts and round(parts[0], 3),
                verify=parts and round(parts[1], 3),
                rest=parts and round(1 - sum(parts), 3),
            )
        )
    return rows


def bytes_per_token(setting: TimedSetting, times: Times, parameters: Parameters, held: int) -> float:
    """Return the bytes that a token must read: of the weights, and of `held` bytes of keys and values a pass."""
    weights = parameters.counted("streamed")
    sparse = times.density * weights + held
    if setting.correction is None:
        return sparse
    return (setting.guesses * sparse + weights + held) / times.aal
