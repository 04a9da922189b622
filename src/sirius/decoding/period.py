"""How long the next window is: always the same, or what measured cost and acceptance make the best of."""

from collections import Counter, deque
from dataclasses import dataclass, field
from statistics import median

from sirius.core import LONGEST

CHOICES = tuple(k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= LONGEST)
GAIN = 1.05  # drafting must promise that much more speed than plain decoding to begin
BETTER = 1.02  # and another period than the last one: noise alone should change nothing
FORGET = 0.99  # weight of earlier guesses at each draft pass
SETTLED = 3  # passes of a shape in a session that are slower than later ones, as they are recorded then
KEPT = 9  # settled times of a shape whose median counts
EACH = 0.02  # what a further token of a check costs, over a plain step, until that is measured
PROBED = 16  # tokens that a probe asks the draft about
FEWEST = 8  # tokens from which on a probe tells enough
FIRST_WAIT, LONGEST_WAIT = 256, 4096  # tokens between probes; each that promises nothing doubles the wait
HORIZON = 200  # tokens over which the first, slow passes of a new shape must pay for themselves
REFRESH = 64  # windows between two plain steps while windows are drafted, to keep the plain step's time fresh


@dataclass(frozen=True)
class Measured:
    """What a round cost and brought.

    rows             texts that took part
    draft, verify    seconds of all its draft passes, and of its check
    steps            its draft passes
    kept, rejected   guesses kept, and branches that ended in a rejection, over all rows
    """

    rows: int
    draft: float
    verify: float
    steps: int
    kept: int
    rejected: int


@dataclass(frozen=True)
class Probed:
    """What a probe told: one sparse pass over tokens that are in the texts already.

    rows           texts that took part
    seconds        of the pass
    tokens         of each row that it read
    kept, judged   guesses that would have been kept, and all of them, over all rows
    """

    rows: int
    seconds: float
    tokens: int
    kept: int
    judged: int


class Period:
    """A period that stays."""

    def __init__(self, now: int) -> None:
        self.now = now

    def begin(self) -> None:
        """Begin a session, whose first passes of each shape are slow."""

    def probes(self, rows: int, new: int) -> int:
        """Return how many of the last tokens the draft is to be asked about, 0 mostly.

        new  the new tokens that each row has at least
        """
        return 0

    def choose(self, rows: int) -> int:
        """Return the period of the next round of so many rows."""
        return self.now

    def learn(self, measured: Measured) -> None:
        """Take note of a round."""

    def learn_probe(self, probed: Probed) -> None:
        """Take note of a probe."""


@dataclass
class Costs:
    """Seconds of settled passes for one number of rows.

    steps   of a draft pass
    checks  of a check, by its tokens a row; that of 1 is a plain step
    points  the median of each, by tokens, none under a plain step's
    each    of a further token of a check, over a plain step, while no check was measured
    early   of plain steps before they settled
    seen    how many passes of each kind the session has had
    """

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    checks: dict[int, deque[float]] = field(default_factory=dict)
    points: list[tuple[int, float]] = field(default_factory=list)
    each: float = EACH
    early: float = 0.0
    seen: Counter[str | int] = field(default_factory=Counter)

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step, None until one has settled."""
        return self.points[0][1] if 1 in self.checks else None

    def add_check(self, tokens: int, seconds: float) -> None:
        """Take note of a check's time."""
        self.seen[tokens] += 1
        if self.seen[tokens] > SETTLED:
            self.checks.setdefault(tokens, deque(maxlen=KEPT)).append(seconds)
            medians = [(size, median(times)) for size, times in sorted(self.checks.items())]
            self.points = [(size, max(seconds, medians[0][1])) for size, seconds in medians]
        elif tokens == 1 and self.seen[1] == SETTLED - 1:  # no longer the first, not yet recorded
            self.early = seconds

    def add_steps(self, count: int, seconds: float) -> None:
        """Take note of the time of a window's draft passes, which come with one time for all."""
        if self.seen["draft"] >= SETTLED:
            self.steps.append(seconds / count)
        self.seen["draft"] += count

    def price(self, period: int) -> float:
        """Return the seconds that the first passes of a period's shapes, those yet to come, cost over settled ones."""
        shapes = (period, "draft") if period > 1 else (period,)
        return max(self.early - (self.plain or 0.0), 0.0) * sum(max(SETTLED - self.seen[shape], 0) for shape in shapes)

    def step(self, floor: float) -> float:
        """Return the seconds of a draft pass: measured, or the share of a plain step that its weights are."""
        return median(self.steps) if self.steps else floor * (self.plain or 0.0)

    def check(self, tokens: int) -> float:
        """Return the seconds of a check: on the straight lines through what was measured."""
        plain, points = self.plain or 0.0, self.points
        if len(points) < 2:
            return plain * (1 + self.each * (tokens - 1))
        after = next((i for i in range(1, len(points)) if points[i][0] >= tokens), len(points) - 1)
        (a, low), (b, high) = points[after - 1], points[after]
        return max(low + (high - low) / (b - a) * (tokens - a), plain)


class AutoPeriod(Period):
    """The period of most tokens per second; 1, which is plain decoding, unless drafting promises to be faster.

    With acceptance a per guess a window of K tokens moves on by 1 + a + ... + a^(K-1), at the price of K-1 draft passes
    and one check. No window can pay unless a is above the draft's share of a plain step, which is at least its share of
    the weights (`floor`). So the first tokens are decoded plainly, then one sparse pass over them tells a (a probe).
    Drafting begins where that promises a gain, and ends where windows do not keep the promise. Then nothing is drafted
    until another probe, each wait twice the last one. What was learnt serves all texts of one setting.
    """

    def __init__(self, floor: float) -> None:
        """Take the share of the weights that a draft pass reads, 0 to 1."""
        super().__init__(1)
        self.floor = floor
        self.costs: dict[int, Costs] = {}
        self.kept = self.judged = 0.0
        self.wait, self.next_wait = 0, FIRST_WAIT  # tokens until the next probe, and until the one after that
        self.windows = 0  # since the last plain step

    def begin(self) -> None:
        """Begin a session: its first passes of each shape are slow, and not taken for what they cost."""
        for costs in self.costs.values():
            costs.seen.clear()

    def probes(self, rows: int, new: int) -> int:
        """Return how many of the last tokens the draft is to be asked about, 0 mostly; see `Period`."""
        costs = self._costs(rows)
        due = self.floor < 1 and self.now == 1 and self.wait <= 0 and costs.plain is not None
        count = min(PROBED, new - 1)
        return count if due and count >= (FEWEST if self.judged else PROBED) else 0

    def choose(self, rows: int) -> int:
        """Return the period of the next round of so many rows."""
        if self.now > 1 and (self._costs(rows).plain is None or self.windows >= REFRESH):
            self.windows = 0
            return 1
        return self.now

    def speed(self, period: int, rows: int) -> float:
        """Return the tokens per second and row that a period promises."""
        costs, acceptance = self._costs(rows), self.acceptance
        tokens = (1 - acceptance**period) / (1 - acceptance)
        seconds = (period - 1) * costs.step(self.floor) + costs.check(period) + costs.price(period) * tokens / HORIZON
        return tokens / max(seconds, 1e-9)

    @property
    def acceptance(self) -> float:
        """The chance that a guess stands after one that did; before any is judged, one half."""
        return (self.kept + 0.25) / (self.judged + 0.5)

    def learn(self, measured: Measured) -> None:
        """Take note of a round, and change the period where that promises enough."""
        costs = self._costs(measured.rows)
        costs.add_check(measured.steps + 1, measured.verify)
        if not measured.steps:
            self.wait -= 1
            return
        self.windows += 1
        costs.add_steps(measured.steps, measured.draft)
        self._judge(measured.kept, measured.kept + measured.rejected, measured.steps)
        if costs.plain is not None and self.now > 1:
            self._decide(measured.rows)

    def learn_probe(self, probed: Probed) -> None:
        """Take note of a probe, and begin to draft where it promises enough."""
        costs = self._costs(probed.rows)
        plain = costs.plain
        assert plain is not None, "a probe before any plain step"
        spent = probed.seconds - max(costs.early - plain, 0.0)  # without what passes cost that are not recorded
        further = (spent / max(self.floor, 0.1) / plain - 1) / (probed.tokens - 1)
        costs.each = min(max(further, EACH), 1.0)
        self._judge(probed.kept, probed.judged, probed.tokens)
        self._decide(probed.rows)

    def _judge(self, kept: int, judged: int, passes: int) -> None:
        past = FORGET**passes
        self.kept, self.judged = past * self.kept + kept, past * self.judged + judged

    def _decide(self, rows: int) -> None:
        best = max(CHOICES, key=lambda period: self.speed(period, rows))
        plain = self.speed(1, rows)
        if self.speed(best, rows) <= (GAIN if self.now == 1 else 1.0) * plain:
            self.now = 1
            self.wait, self.next_wait = self.next_wait, min(2 * self.next_wait, LONGEST_WAIT)
        elif self.now == 1 or self.speed(best, rows) > BETTER * self.speed(self.now, rows):
            self.now = best
        if self.windows == REFRESH:  # it has paid for long: a later doubt is asked about soon
            self.next_wait = FIRST_WAIT

    def _costs(self, rows: int) -> Costs:
        return self.costs.setdefault(rows, Costs())
