"""How long the next window is: always the same, or what measured cost and recent acceptance make the best of."""

from dataclasses import dataclass, field

from sirius.core import AUTO, LONGEST, CorrectionConfig

CHOICES = tuple(k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= LONGEST)
FIRST, SECOND = 8, 4  # periods to begin with: one size alone does not tell what a token of a check costs
GAIN = 1.05  # another period must promise that much more speed: noise alone should change nothing
SPREAD = 0.02  # below this share of their squares, sizes are too alike to fit a line through noise
FORGET = 0.9  # weight of the past at each window
PROBE_EVERY, PROBE = 64, 4  # at period 1 nothing is learnt of acceptance, so a window is drafted now and then


class Period:
    """A period that stays."""

    def __init__(self, now: int) -> None:
        self.now = now

    def learn(self, measured: "Measured") -> None:
        """Take note of a round."""


@dataclass(frozen=True)
class Measured:
    """What a round cost and brought.

    draft, verify    seconds of all its draft passes, and of its check
    steps            its draft passes
    kept, rejected   guesses kept, and branches that ended in a rejection, over all rows
    """

    draft: float
    verify: float
    steps: int
    kept: int
    rejected: int


@dataclass
class AutoPeriod(Period):
    """The period of most tokens per second, as far as the last few dozen windows tell.

    With acceptance a per guess a window of K tokens moves on by 1 + a + ... + a^(K-1), at the price of K-1 draft passes
    and one check. The check's price is taken as a straight line in K, fitted to the windows seen. Where no window beats
    plain decoding the period is 1, and correction costs nothing but a window to probe with now and then.
    """

    now: int = FIRST
    kept: float = 4.0  # a mild prior: four kept of five
    judged: float = 5.0
    drafts: list[float] = field(default_factory=lambda: [0.0, 0.0])  # seconds, passes
    checks: list[float] = field(default_factory=lambda: [0.0] * 5)  # weight, K, seconds, K^2, K * seconds
    slope: float = 0.0  # seconds of a check per token, kept while windows of one size teach nothing of it
    idle: int = 0
    rounds: int = 0

    def learn(self, measured: Measured) -> None:
        """Take note of a round, and change the period where that promises enough."""
        self.drafts = _mixed(self.drafts, (measured.draft, measured.steps))
        size, seconds = measured.steps + 1, measured.verify
        self.checks = _mixed(self.checks, (1, size, seconds, size * size, size * seconds))
        if measured.steps:
            judged = measured.kept + measured.rejected
            self.kept, self.judged = _mixed((self.kept, self.judged), (measured.kept, judged))
        self._fit()
        self.rounds += 1
        best = max(CHOICES, key=self.speed) if self.rounds > 1 else SECOND
        if self.rounds == 1 or self.speed(best) > GAIN * self.speed(self.now):
            self.now = best
        self._probe()

    def speed(self, period: int) -> float:
        """Return the tokens per second that a period promises."""
        seconds, passes = self.drafts
        step = seconds / passes if passes else 0.0
        acceptance = min(self.kept / self.judged, 1.0)
        tokens = sum(acceptance**i for i in range(period))
        return tokens / ((period - 1) * step + self._check(period))

    def _fit(self) -> None:
        weight, size, seconds, squares, products = self.checks
        spread = squares - size * size / weight
        if spread > SPREAD * squares:
            slope = (products - size * seconds / weight) / spread
            self.slope = min(max(slope, 0.0), seconds / size)  # no check is cheaper than nothing

    def _check(self, period: int) -> float:
        weight, size, seconds, *_ = self.checks
        return max((seconds + self.slope * (period * weight - size)) / weight, 1e-9)

    def _probe(self) -> None:
        self.idle = self.idle + 1 if self.now == 1 else 0
        if self.idle == PROBE_EVERY:
            self.now, self.idle = PROBE, 0


def make_period(config: CorrectionConfig) -> Period:
    """Return what a configuration asks for."""
    return AutoPeriod() if config.period == AUTO else Period(config.period)


def _mixed(old: "list[float] | tuple[float, ...]", new: tuple[float, ...]) -> list[float]:
    return [FORGET * a + b for a, b in zip(old, new, strict=True)]
