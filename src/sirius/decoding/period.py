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
HORIZON = 200  # tokens over which the first, slow passes of a new shape must pay for themselves, or a text if shorter
SHORTEST = 16  # tokens that a text is taken to have at least
DRAFT = 0  # stands for a draft pass where shapes are counted by the tokens of a check
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

    def put_off(self, rows: int) -> None:
        """Ask for no probe for a while, as there was no memory for one."""


@dataclass
class Costs:
    """What passes over one number of rows cost, in seconds, and what the period makes of it.

    steps      of a draft pass, the last few settled ones
    checks     of a check, by its tokens a row; that of 1 is a plain step
    points     the median of each, by tokens, none under a plain step's
    each       what a further token of a check costs in plain steps, while no check was measured
    early      seconds of the second and the third plain step of a session, before they settled
    asked      whether it was decided if drafting can pay
    now        the period
    wait       tokens until the next probe; next_wait is the wait after that
    windows    drafted since the last plain step
    """

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    checks: dict[int, deque[float]] = field(default_factory=dict)
    points: list[tuple[int, float]] = field(default_factory=list)
    each: float = EACH
    early: list[float] = field(default_factory=list)
    asked: bool = False
    now: int = 1
    wait: int = 0
    next_wait: int = FIRST_WAIT
    windows: int = 0

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step, None until one has settled."""
        return self.points[0][1] if 1 in self.checks else None

    @property
    def slow(self) -> float:
        """Seconds that an early pass costs more than a settled one; the third is dearer, as it is recorded."""
        return max(min(self.early, default=0.0) - (self.plain or 0.0), 0.0)

    @property
    def price(self) -> float:
        """Seconds that the first passes of a shape cost more than settled ones, all together."""
        return sum(max(seconds - (self.plain or 0.0), 0.0) for seconds in (*self.early[:1], *self.early))

    def add_check(self, tokens: int, seconds: float) -> None:
        """Take note of the time of a check that has settled."""
        self.checks.setdefault(tokens, deque(maxlen=KEPT)).append(seconds)
        medians = [(size, median(times)) for size, times in sorted(self.checks.items())]
        self.points = [(size, max(seconds, medians[0][1])) for size, seconds in medians]

    def step(self, floor: float) -> float:
        """Return the seconds of a draft pass: measured, or the share of a plain step that its weights are."""
        return median(self.steps) if self.steps else floor * (self.plain or 0.0)

    def check(self, tokens: int, width: int) -> float:
        """Return the seconds of a check of a tree: on the straight lines through what was measured.

        tokens  on each of its `width` branches
        """
        plain, points = self.plain or 0.0, self.points
        if len(points) < 2:
            return plain * (1 + self.each * width * (tokens - 1))
        after = next((i for i in range(1, len(points)) if points[i][0] >= tokens), len(points) - 1)
        (a, low), (b, high) = points[after - 1], points[after]
        return max(low + (high - low) / (b - a) * (tokens - a), plain)

    def stop(self) -> None:
        """Draft nothing until the next probe, and wait twice as long for the one after it."""
        self.asked, self.now, self.windows = True, 1, 0
        self.wait, self.next_wait = self.next_wait, min(2 * self.next_wait, LONGEST_WAIT)


@dataclass
class Learnt:
    """What the texts of one setting have taught: costs by the number of rows, and how many guesses stood of all."""

    costs: dict[int, Costs] = field(default_factory=dict)
    kept: float = 0.0
    judged: float = 0.0
    sessions: int = 0
    tokens: float = 0.0  # of a row, over all sessions

    @property
    def acceptance(self) -> float:
        """The chance that a guess stands after one that did; before any is judged, one half."""
        return (self.kept + 0.25) / (self.judged + 0.5)

    @property
    def horizon(self) -> float:
        """Tokens over which the slow passes of a session must pay for themselves."""
        if self.sessions < 2:
            return HORIZON
        return min(max(self.tokens / (self.sessions - 1), SHORTEST), HORIZON)  # the last session goes on

    def judge(self, kept: int, judged: int, passes: int) -> None:
        """Count guesses, and let those before them weigh less, by the number of draft passes."""
        past = FORGET**passes
        self.kept, self.judged = past * self.kept + kept, past * self.judged + judged


class AutoPeriod(Period):
    """The period of most tokens per second; 1, which is plain decoding, unless drafting promises to be faster.

    With acceptance a per guess a window of K tokens moves on by 1 + a + ... + a^(K-1), at the price of K-1 draft passes
    and one check. No window can pay unless a is above the draft's share of a plain step, which is at least its share of
    the weights (`floor`). So the first tokens are decoded plainly, then one sparse pass over them tells a (a probe).
    Drafting begins where that promises a gain, and ends where windows do not keep the promise. Then nothing is drafted
    until another probe, each wait twice the last one.
    """

    def __init__(
        self, floor: float, learnt: Learnt | None = None, *, probed: float | None = None, width: int = 1
    ) -> None:
        """Begin a session, whose first passes of each shape are slow, with what earlier ones have learnt.

        floor   the share of the weights that a draft pass reads, 0 to 1
        probed  the share that a probe reads; None is the same
        width   branches of a tree
        """
        super().__init__(1)
        self.floor, self.width = floor, width
        self.probed = floor if probed is None else probed
        self.learnt = Learnt() if learnt is None else learnt
        self.learnt.sessions += 1
        self.seen: Counter[tuple[int, int]] = Counter()  # passes by rows and tokens of a check, DRAFT of a draft pass

    def probes(self, rows: int, new: int) -> int:
        """Return how many of the last tokens the draft is to be asked about, 0 mostly; see `Period`."""
        costs = self.costs(rows)
        due = self.floor < 1 and costs.now == 1 and costs.wait <= 0 and costs.plain is not None
        count = min(PROBED, new - 1)
        return count if due and count >= (FEWEST if self.learnt.judged else PROBED) else 0

    def choose(self, rows: int) -> int:
        """Return the period of the next round of so many rows."""
        costs = self.costs(rows)
        if not costs.asked and costs.plain is not None and self.learnt.judged >= FEWEST:
            self._decide(rows)  # other numbers of rows have told how many guesses stand
        if costs.windows >= REFRESH:
            costs.windows = 0
            return 1
        return costs.now

    def speed(self, period: int, rows: int) -> float:
        """Return the tokens per second and row that a period promises."""
        costs, acceptance = self.costs(rows), self.learnt.acceptance
        tokens = (1 - acceptance**period) / (1 - acceptance)
        seconds = (period - 1) * costs.step(self.floor) + costs.check(period, self.width)
        return tokens / max(seconds + self._price(period, rows) * tokens / self.learnt.horizon, 1e-9)

    def learn(self, measured: Measured) -> None:
        """Take note of a round, and change the period where that promises enough."""
        costs, rows, size = self.costs(measured.rows), measured.rows, measured.steps + 1
        self.learnt.tokens += 1 + measured.kept / rows
        self.seen[rows, size] += 1
        if self.seen[rows, size] > SETTLED:
            costs.add_check(size, measured.verify)
        elif size == 1 and self.seen[rows, 1] > 1:  # the first of all passes makes more ready than its shape
            costs.early = [*costs.early, measured.verify][-2:]
        if not measured.steps:
            costs.wait -= 1
            return
        if self.seen[rows, DRAFT] >= SETTLED:
            costs.steps.append(measured.draft / measured.steps)
        self.seen[rows, DRAFT] += measured.steps
        self.learnt.judge(measured.kept, measured.kept + measured.rejected, measured.steps)
        if costs.plain is not None and costs.now > 1:
            costs.windows += 1
            self._decide(rows)
            if costs.windows == REFRESH:  # it has paid for long: a later doubt is asked about soon
                costs.next_wait = FIRST_WAIT

    def learn_probe(self, probed: Probed) -> None:
        """Take note of a probe, and begin to draft where it promises enough."""
        costs = self.costs(probed.rows)
        assert costs.plain is not None, "a probe before any plain step"
        further = ((probed.seconds - costs.slow) / max(self.probed, 0.1) / costs.plain - 1) / (probed.tokens - 1)
        costs.each = min(max(further, EACH), 1.0)
        self.learnt.judge(probed.kept, probed.judged, probed.tokens)
        self._decide(probed.rows)

    def put_off(self, rows: int) -> None:
        """Ask for no probe for a while, as there was no memory for one."""
        self.costs(rows).stop()

    def costs(self, rows: int) -> Costs:
        """Return what passes over so many rows cost; a further token costs by the rows, until that is measured."""
        known = self.learnt.costs
        if rows not in known:
            each = max((costs.each * rows / count for count, costs in known.items() if costs.asked), default=EACH)
            known[rows] = Costs(each=min(max(each, EACH), 1.0))
        return known[rows]

    def _price(self, period: int, rows: int) -> float:
        """Return the seconds that a period's first passes cost more, those of them that are yet to come."""
        shapes = (period, DRAFT) if period > 1 else (period,)
        left = sum(max(SETTLED - self.seen[rows, shape], 0) for shape in shapes)
        return self.costs(rows).price * left / SETTLED

    def _decide(self, rows: int) -> None:
        costs = self.costs(rows)
        costs.asked = True
        best = max(CHOICES, key=lambda period: self.speed(period, rows))
        most, now, plain = (self.speed(period, rows) for period in (best, costs.now, 1))
        if most <= (GAIN if costs.now == 1 else 1.0) * plain:
            costs.stop()
        elif costs.now == 1 or now < plain or most > BETTER * now:
            costs.now = best
