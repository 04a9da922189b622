"""The period K of each round: fixed, or chosen from the measured cost of passes and the acceptance of guesses."""

from collections import Counter, deque
from dataclasses import dataclass, field
from math import inf
from statistics import median

from sirius.core import LONGEST

CHOICES = tuple(k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) if k <= LONGEST)
GAIN_TO_BEGIN = 1.05  # the speed over plain decoding that drafting must promise before it begins
GAIN_TO_CHANGE = 1.02  # the speed over the present period that another one must promise: noise should change nothing
DECAY = 0.99  # by which each draft pass lowers the weight of earlier guesses
WARM_UP = 3  # first passes of a shape in a session; they are slower than later ones, which run as captured passes
TIMES_KEPT = 9  # latest times of a shape after its warm-up, whose median counts
TOKEN_COST = 0.02  # cost of a further token of a check, in plain steps, until it is measured
UNLIKE_COST = 0.05  # the same where a probe says nothing of checks, as its weights have other kernels
UNLIKE_MOST = 4  # longest period there until a check of several tokens was timed: the cost may be several times as high
PROBE_TOKENS = 16  # tokens that a probe reads
PROBE_LEAST = 8  # fewest tokens that a probe is made of
FIRST_WAIT, LONGEST_WAIT = 256, 4096  # tokens between probes; each probe that promises nothing doubles the wait
HORIZON = 200  # tokens within which the warm-up of a new shape must pay for itself, or a text's length if shorter
LEAST_TOKENS = 16  # shortest length that a text is taken to have
DRAFT_PASS = 0  # key of a draft pass where passes are counted by the tokens of a check
PLAIN_EVERY = 64  # windows after which one plain step is made, to measure its time again


@dataclass(frozen=True)
class Measured:
    """The cost of a round, and its accepted and rejected guesses.

    rows            number of texts in the batch
    draft, verify   seconds of all draft passes, and of the check
    steps           number of draft passes
    kept, rejected  guesses that were kept, and rows that rejected a guess, over all rows
    """

    rows: int
    draft: float
    verify: float
    steps: int
    kept: int
    rejected: int


@dataclass(frozen=True)
class Probed:
    """The result of a probe: one sparse pass over tokens that are in the texts already.

    rows          number of texts in the batch
    seconds       duration of the pass
    tokens        tokens read of each row
    kept, judged  guesses that would have been kept, and all guesses, over all rows
    """

    rows: int
    seconds: float
    tokens: int
    kept: int
    judged: int


class Period:
    """A fixed period. Subclasses choose another one from round to round."""

    def __init__(self, now: int) -> None:
        """Take the period of the first round."""
        self.now = now

    def probes(self, rows: int, new: int) -> int:
        """Return how many of the last tokens a probe is to read now; 0 means no probe.

        new  the fewest new tokens that a row has
        """
        return 0

    def choose(self, rows: int) -> int:
        """Return the period of the next round of so many rows."""
        return self.now

    def learn(self, measured: Measured) -> None:
        """Learn from the times and guesses of a round."""

    def learn_probe(self, probed: Probed) -> None:
        """Learn from a probe."""

    def postpone_probe(self, rows: int) -> None:
        """Ask for no probe for a while, because memory ran out in the last one."""


@dataclass
class Costs:
    """The measured seconds of passes over one number of rows, and the period chosen by them.

    steps            latest times of a draft pass after its warm-up
    checks           latest times of a check after its warm-up, by its tokens a row, the latest made last; a check of 1
                     token is a plain step
    points           tokens and median time of each check, in which no check is cheaper than a shorter one
    token_cost       cost of a further token of a check, in plain steps, used while no check is measured
    early_steps      times of the second and third plain step of a session, which are part of the warm-up
    decided          whether the period was chosen from measurements at least once
    period           the present period
    wait, next_wait  tokens until the next probe, and from that one to the probe after it
    review           plain steps until an end of drafting is judged again by their times; 0 or less is never
    reviewed         whether drafting has begun again by such a judgement
    windows          windows drafted since the last plain step
    """

    steps: deque[float] = field(default_factory=lambda: deque(maxlen=TIMES_KEPT))
    checks: dict[int, deque[float]] = field(default_factory=dict)
    points: list[tuple[int, float]] = field(default_factory=list)
    token_cost: float = TOKEN_COST
    early_steps: list[float] = field(default_factory=list)
    decided: bool = False
    period: int = 1
    wait: int = 0
    next_wait: int = FIRST_WAIT
    review: int = 0
    reviewed: bool = False
    windows: int = 0

    @property
    def plain(self) -> float | None:
        """Seconds of a plain step, None during its warm-up."""
        return self.points[0][1] if 1 in self.checks else None

    @property
    def early_excess(self) -> float:
        """Extra seconds of a pass during its warm-up; the third costs more than the second, as it is being captured."""
        return max(min(self.early_steps, default=0.0) - (self.plain or 0.0), 0.0)

    @property
    def warm_up_cost(self) -> float:
        """Extra seconds of the whole warm-up of a shape."""
        return sum(max(seconds - (self.plain or 0.0), 0.0) for seconds in (*self.early_steps[:1], *self.early_steps))

    def add_check(self, tokens: int, seconds: float) -> None:
        """Add the time of a check after its warm-up."""
        times = self.checks.pop(tokens, deque(maxlen=TIMES_KEPT))
        self.checks[tokens] = times
        times.append(seconds)
        self._set_points()

    def keep_least(self) -> None:
        """Forget all but the least times of draft passes and of checks of several tokens.

        Windows that were too slow are made no more, so nothing else would correct times at which the machine was busy.
        """
        for times in (self.steps, *(times for tokens, times in self.checks.items() if tokens > 1)):
            if times:
                least = min(times)
                times.clear()
                times.append(least)
        self._set_points()

    def _set_points(self) -> None:
        """Set the points. Where times contradict each other the older one gives way."""
        points: dict[int, float] = {}
        for tokens, times in reversed(self.checks.items()):
            shorter = max((seconds for size, seconds in points.items() if size < tokens), default=0.0)
            longer = min((seconds for size, seconds in points.items() if size > tokens), default=inf)
            points[tokens] = min(max(median(times), shorter), longer)
        self.points = sorted(points.items())

    def draft_seconds(self, floor: float) -> float:
        """Return the seconds of a draft pass; before any is measured, estimated by its share `floor` of the weights."""
        return median(self.steps) if self.steps else floor * (self.plain or 0.0)

    def check_seconds(self, tokens: int, width: int) -> float:
        """Return the seconds of a check of a tree, interpolated linearly between the measured sizes.

        tokens  the tokens of each of its `width` branches
        """
        plain, points = self.plain or 0.0, self.points
        if len(points) < 2:
            return plain * (1 + self.token_cost * width * (tokens - 1))
        after = next((i for i in range(1, len(points)) if points[i][0] >= tokens), len(points) - 1)
        (a, low), (b, high) = points[after - 1], points[after]
        return max(low + (high - low) / (b - a) * (tokens - a), plain)

    def end_drafting(self) -> None:
        """Stop drafting after windows that were too slow, and judge once more when plain steps were timed anew."""
        if self.reviewed:
            self.period, self.windows = 1, 0  # the wait for the next probe goes on
        else:
            self.stop_drafting()
            self.review = TIMES_KEPT

    def stop_drafting(self) -> None:
        """Draft nothing until the next probe, and wait twice as long for the one after it."""
        self.decided, self.period, self.windows = True, 1, 0
        self.wait, self.next_wait = self.next_wait, min(2 * self.next_wait, LONGEST_WAIT)


@dataclass
class Learnt:
    """What earlier texts of one configuration have taught.

    costs         by the number of rows
    kept, judged  accepted guesses and all of them; later ones weigh more
    sessions      how many there were
    tokens        new tokens of a row, over all sessions
    """

    costs: dict[int, Costs] = field(default_factory=dict)
    kept: float = 0.0
    judged: float = 0.0
    sessions: int = 0
    tokens: float = 0.0

    @classmethod
    def expected(cls, plain: float, draft: float, acceptance: float) -> "Learnt":
        """Return what is expected before anything is measured, so that one text drafts from its first round on.

        plain, draft  seconds of a plain step and of a draft pass
        """
        costs = Costs(token_cost=0.0, wait=FIRST_WAIT)  # a further token of a check costs nothing beside the link
        costs.add_check(1, plain)
        costs.steps.append(draft)
        return cls({1: costs}, acceptance * PROBE_LEAST, PROBE_LEAST)

    @property
    def acceptance(self) -> float:
        """The chance that a guess is accepted if the one before it was; one half before any is judged."""
        return (self.kept + 0.25) / (self.judged + 0.5)

    @property
    def horizon(self) -> float:
        """Tokens within which the warm-up of a session must pay for itself."""
        if self.sessions < 2:
            return HORIZON
        return min(max(self.tokens / (self.sessions - 1), LEAST_TOKENS), HORIZON)  # the present session is not over

    def count_guesses(self, kept: int, judged: int, passes: int) -> None:
        """Add guesses, and lower the weight of earlier ones once for each of `passes` draft passes."""
        past = DECAY**passes
        self.kept, self.judged = past * self.kept + kept, past * self.judged + judged


class AutoPeriod(Period):
    """The period of most tokens per second; 1, which is plain decoding, unless drafting promises to be faster.

    If each guess is accepted with probability a, a window of K tokens brings 1 + a + ... + a^(K-1) tokens. It costs K-1
    draft passes and one check. No window can pay unless a is above the cost of a draft pass in plain steps, which is at
    least its share of the weights (`floor`). So the first tokens are decoded plainly. One sparse pass over them, the
    probe, then measures a. Drafting begins if that promises a gain, and ends if windows turn out slower than promised.
    After that nothing is drafted until the next probe, and each wait is twice as long as the one before. But an end is
    judged once more after some plain steps: their former time may be that of a machine which was less busy.
    """

    def __init__(
        self,
        floor: float,
        learnt: Learnt | None = None,
        *,
        probe_share: float | None = None,
        width: int = 1,
        alike: bool = True,
    ) -> None:
        """Begin a session with what earlier ones have learnt.

        floor        the share of the weights that a draft pass reads, 0 to 1
        probe_share  the share of the weights that a probe reads; None is the same
        width        branches of a tree
        alike        whether a probe runs the kernels of a check, so that its time tells what a further token costs
        """
        super().__init__(1)
        self.floor, self.width, self.alike = floor, width, alike
        self.probe_share = floor if probe_share is None else probe_share
        self.learnt = Learnt() if learnt is None else learnt
        self.learnt.sessions += 1
        self.passes: Counter[tuple[int, int]] = Counter()  # by rows and tokens of a check, or DRAFT_PASS

    def probes(self, rows: int, new: int) -> int:
        """Return how many of the last tokens a probe is to read now, see `Period`."""
        costs = self.costs(rows)
        due = self.floor < 1 and costs.period == 1 and costs.wait <= 0 and costs.plain is not None
        count = min(PROBE_TOKENS, new - 1)
        return count if due and count >= (PROBE_LEAST if self.learnt.judged else PROBE_TOKENS) else 0

    def choose(self, rows: int) -> int:
        """Return the period of the next round of so many rows."""
        costs = self.costs(rows)
        if not costs.decided and costs.plain is not None and self.learnt.judged >= PROBE_LEAST:
            self._decide(rows)  # acceptance is known from other numbers of rows
        if costs.period > 1 and not self.passes:  # no shape of this session is warm yet: none has an advantage
            best = self._best(rows)
            if best > 1 and self.speed(best, rows) > GAIN_TO_CHANGE * self.speed(costs.period, rows):
                costs.period = best
        if costs.windows >= PLAIN_EVERY:
            costs.windows = 0
            return 1
        return costs.period

    def speed(self, period: int, rows: int) -> float:
        """Return the tokens per second and row that are expected of a period."""
        costs, acceptance = self.costs(rows), self.learnt.acceptance
        tokens = (1 - acceptance**period) / (1 - acceptance)
        seconds = (period - 1) * costs.draft_seconds(self.floor) + costs.check_seconds(period, self.width)
        return tokens / max(seconds + self._warm_up_left(period, rows) * tokens / self.learnt.horizon, 1e-9)

    def learn(self, measured: Measured) -> None:
        """Learn from a round, and change the period if another one promises enough."""
        costs, rows, size = self.costs(measured.rows), measured.rows, measured.steps + 1
        self.learnt.tokens += 1 + measured.kept / rows
        self.passes[rows, size] += 1
        if self.passes[rows, size] > WARM_UP:
            costs.add_check(size, measured.verify)
        elif size == 1 and self.passes[rows, 1] > 1:  # the very first also loads what all shapes share
            costs.early_steps = [*costs.early_steps, measured.verify][-2:]
        if not measured.steps:
            costs.wait -= 1
            costs.review -= 1
            if costs.review == 0:
                self._review(rows)
            return
        if self.passes[rows, DRAFT_PASS] >= WARM_UP:
            costs.steps.append(measured.draft / measured.steps)
        self.passes[rows, DRAFT_PASS] += measured.steps
        self.learnt.count_guesses(measured.kept, measured.kept + measured.rejected, measured.steps)
        if costs.plain is not None and costs.period > 1:
            costs.windows += 1
            self._decide(rows)
            if costs.windows == PLAIN_EVERY:  # it has paid for long, so the next probe comes early
                costs.next_wait, costs.reviewed = FIRST_WAIT, False

    def learn_probe(self, probed: Probed) -> None:
        """Learn from a probe, and begin to draft if it promises enough."""
        costs = self.costs(probed.rows)
        assert costs.plain is not None, "a probe before any plain step"
        further = ((probed.seconds - costs.early_excess) / max(self.probe_share, 0.1) / costs.plain - 1) / (
            probed.tokens - 1
        )
        costs.token_cost = min(max(further, TOKEN_COST), 1.0) if self.alike else UNLIKE_COST
        costs.keep_least()
        costs.reviewed = False
        self.learnt.count_guesses(probed.kept, probed.judged, probed.tokens)
        self._decide(probed.rows)

    def postpone_probe(self, rows: int) -> None:
        """Ask for no probe for a while, because memory ran out in the last one."""
        self.costs(rows).stop_drafting()

    def costs(self, rows: int) -> Costs:
        """Return the costs of passes over so many rows; the `token_cost` of a new number is estimated from others."""
        known = self.learnt.costs
        if rows not in known:
            each = max(
                (costs.token_cost * rows / count for count, costs in known.items() if costs.decided), default=TOKEN_COST
            )
            known[rows] = Costs(token_cost=min(max(each, TOKEN_COST), 1.0))
        return known[rows]

    def _warm_up_left(self, period: int, rows: int) -> float:
        """Return the extra seconds of those warm-up passes of a period that are yet to come."""
        shapes = (period, DRAFT_PASS) if period > 1 else (period,)
        left = sum(max(WARM_UP - self.passes[rows, shape], 0) for shape in shapes)
        return self.costs(rows).warm_up_cost * left / WARM_UP

    def _best(self, rows: int) -> int:
        """Return the period that promises most."""
        costs = self.costs(rows)
        guessed = not self.alike and costs.token_cost > 0 and len(costs.points) < 2
        choices = [period for period in CHOICES if period <= UNLIKE_MOST or not guessed]
        return max(choices, key=lambda period: self.speed(period, rows))

    def _decide(self, rows: int) -> None:
        costs, best = self.costs(rows), self._best(rows)
        costs.decided = True
        most, now, plain = (self.speed(period, rows) for period in (best, costs.period, 1))
        if costs.period > 1 and most <= plain:
            costs.end_drafting()
        elif costs.period == 1 and most <= GAIN_TO_BEGIN * plain:
            costs.stop_drafting()
        elif costs.period == 1 or now < plain or most > GAIN_TO_CHANGE * now:
            costs.period = best

    def _review(self, rows: int) -> None:
        """Begin to draft again if the times of the plain steps since the end promise enough."""
        costs, best = self.costs(rows), self._best(rows)
        if self.speed(best, rows) > GAIN_TO_BEGIN * self.speed(1, rows):
            costs.period, costs.reviewed = best, True
