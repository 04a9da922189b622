"""The automatic period under a simulated clock: what passes cost, and how many guesses stand, is known."""

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from sirius.core import LONGEST
from sirius.decoding.period import (
    CHOICES,
    PROBE_TOKENS,
    TIMES_KEPT,
    UNLIKE_COST,
    WARM_UP,
    AutoPeriod,
    Costs,
    Learnt,
    Measured,
    Period,
    Probed,
)

FIXED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
TEXT = 200  # tokens


@dataclass
class World:
    """A machine and a draft; times are in plain steps.

    step        of a draft pass, `floor` the share of the weights that it reads
    each        of a further token of a check
    first       what any check of several tokens costs besides
    acceptance  the chance that a guess stands after one that did
    warm        what each of the first passes of a shape costs besides, in every session
    noise       the share by which times are off, at most
    busy        what all times are multiplied by, while other programs run
    """

    step: float
    each: float
    acceptance: float
    floor: float = 0.6
    first: float = 0.0
    warm: float = 0.0
    noise: float = 0.0
    busy: float = 1.0
    rows: int = 1
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def text(self, period: Period, tokens: int = TEXT) -> float:
        """Decode a text by a period, and return what it took."""
        seen: dict[object, int] = {}
        spent, new = 0.0, 1

        def took(shape: object, cost: float) -> float:
            seen[shape] = seen.get(shape, 0) + 1
            cost += self.warm if seen[shape] <= WARM_UP else 0.0
            return self.busy * cost * (1 + self.noise * self.chance.uniform(-1, 1))

        while new < tokens:
            if count := period.probes(self.rows, new):
                cost = took("probe", self.step * (1 + self.each * (count - 1)))
                kept = sum(self.chance.random() < self.acceptance for _ in range(count * self.rows))
                period.learn_probe(Probed(self.rows, cost, count, kept, count * self.rows))
                spent += cost
            size = min(period.choose(self.rows), tokens - new)
            draft = sum(took("draft", self.step) for _ in range(size - 1))
            check = took(size, 1 + self.each * (size - 1) + (self.first if size > 1 else 0.0))
            kept = [self._stand(size - 1) for _ in range(self.rows)]
            rejected = sum(k < size - 1 for k in kept)
            period.learn(Measured(self.rows, draft, check, size - 1, sum(kept), rejected))
            spent, new = spent + draft + check, new + 1 + kept[0]
        return spent

    def _stand(self, guesses: int) -> int:
        return next((i for i in range(guesses) if self.chance.random() >= self.acceptance), guesses)


def mean(world: World, make, texts: int) -> float:
    return sum(world.text(make()) for _ in range(texts)) / texts


CANNOT_PAY = {
    "half of the guesses stand": World(0.75, 0.02, 0.5),
    "four of five stand, which is too few": World(0.85, 0.03, 0.8, floor=0.8),
    "nearly none stands": World(0.5, 0.0, 0.1, floor=0.5),
    "all stand, and the draft is as dear as a step": World(1.0, 0.05, 1.0, floor=0.95),
    "checks are dear": World(0.8, 0.25, 0.95, floor=0.7),
    "first passes are slow": World(0.75, 0.02, 0.5, warm=4.0),
    "first passes are slow and checks dear": World(0.8, 0.25, 0.9, floor=0.7, warm=0.5),
    "a batch": World(0.7, 0.15, 0.7, rows=8),
    "few bytes, and checks are dear": World(0.6, 0.2, 0.8, floor=0.27),
    "few bytes, and slower than a step": World(1.1, 0.2, 0.97, floor=0.27),
    "short checks are dear": World(0.6, 0.02, 0.85, floor=0.3, first=0.8),
}


@pytest.mark.parametrize("alike", [True, False], ids=["sparse", "rounded"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("world", CANNOT_PAY.values(), ids=CANNOT_PAY)
def test_a_draft_that_cannot_pay_costs_at_most_a_twentieth_from_an_engines_first_text_on(world, noise, alike):
    world = World(**{**vars(world), "noise": noise, "chance": random.Random(0)})
    plain = mean(world, lambda: Period(1), 15)
    assert mean(world, lambda: AutoPeriod(world.floor, alike=alike), 15) < 1.05 * plain
    learnt = Learnt()
    assert mean(world, lambda: AutoPeriod(world.floor, learnt, alike=alike), 15) < 1.02 * plain


PAYS = {
    "a good draft": World(0.6, 0.02, 0.97),
    "a fair draft of few bytes": World(0.3, 0.02, 0.85, floor=0.28),
    "checks are dear": World(0.3, 0.15, 0.95, floor=0.3),
    "first passes are slow": World(0.4, 0.02, 0.95, floor=0.35, warm=2.0),
    "a batch": World(0.5, 0.05, 0.95, floor=0.5, rows=8),
    "nearly perfect": World(0.4, 0.01, 0.995, floor=0.4),
    "short checks are as dear as long ones": World(0.28, 0.01, 0.96, floor=0.28, first=0.4),
    "the same, and first passes are slow": World(0.28, 0.01, 0.96, floor=0.28, first=0.4, warm=0.3),
    "long checks are dearer than short ones promise": World(0.28, 0.12, 0.97, floor=0.28, first=-0.2),
}


@pytest.mark.parametrize("alike", [True, False], ids=["sparse", "rounded"])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("world", PAYS.values(), ids=PAYS)
def test_a_draft_that_pays_reaches_nineteen_twentieths_of_the_best_fixed_period(world, noise, alike):
    world = World(**{**vars(world), "noise": noise, "chance": random.Random(0)})
    best = min(mean(world, lambda k=k: Period(k), 30) for k in FIXED)
    learnt = Learnt()
    world.text(AutoPeriod(world.floor, learnt, alike=alike))
    assert best < 0.9 * mean(world, lambda: Period(1), 15), "nothing is to be gained here"
    assert mean(world, lambda: AutoPeriod(world.floor, learnt, alike=alike), 30) < best / 0.95


@pytest.mark.parametrize("busy", [1.5, 3.0])
@pytest.mark.parametrize("texts", [2, 5])
def test_drafting_goes_on_when_a_machine_becomes_busy_and_when_it_is_quiet_again(busy, texts):
    """Times of before, beside those of now, promise too much or too little."""
    quiet, while_busy, after = 0.0, 0.0, 0.0
    for seed in range(20):
        world, learnt = World(0.3, 0.02, 0.96, floor=0.28, noise=0.05, chance=random.Random(seed)), Learnt()
        times = []
        for world.busy, count in ((1.0, 10), (busy, texts), (1.0, 10)):
            times.append(mean(world, lambda learnt=learnt: AutoPeriod(0.28, learnt, alike=False), count))
        quiet, while_busy, after = quiet + times[0], while_busy + times[1], after + times[2]
    assert while_busy < 1.15 * busy * quiet
    assert after < 1.02 * quiet


def test_a_draft_that_reads_every_weight_is_never_asked():
    period, world = AutoPeriod(1.0), World(0.1, 0.0, 1.0, floor=1.0)
    assert world.text(period) == TEXT - 1 and period.costs(1).period == 1


def test_each_probe_that_promises_nothing_doubles_the_wait():
    period, probes = AutoPeriod(0.6), []
    for token in range(5000):
        if count := period.probes(1, token + 2):
            probes.append(token)
            period.learn_probe(Probed(1, 3.0, count, kept=0, judged=count))
        assert period.choose(1) == 1
        period.learn(Measured(1, 0.0, 1.0, 0, 0, 0))
    waits = [b - a for a, b in pairwise(probes)]
    assert len(waits) >= 4 and all(b == 2 * a for a, b in pairwise(waits))


def test_it_begins_when_acceptance_rises_and_ends_when_it_falls():
    period = AutoPeriod(0.4)
    bad, good = World(0.4, 0.02, 0.1, floor=0.4), World(0.4, 0.02, 0.97, floor=0.4)
    bad.text(period)
    assert period.costs(1).period == 1
    for _ in range(5):
        good.text(period)
    assert period.costs(1).period >= 6
    bad.text(period)
    assert period.costs(1).period == 1


def test_a_batch_for_which_drafting_does_not_pay_leaves_single_texts_their_gain():
    learnt = Learnt()
    alone, batch = World(0.5, 0.02, 0.95, floor=0.5), World(0.5, 0.5, 0.95, floor=0.5, rows=8)
    plain = mean(alone, lambda: Period(1), 15)
    for _ in range(8):
        alone.text(AutoPeriod(0.5, learnt))
        batch.text(AutoPeriod(0.5, learnt))
    assert learnt.costs[1].period > 1 == learnt.costs[8].period
    assert mean(alone, lambda: AutoPeriod(0.5, learnt), 15) < 0.8 * plain


def test_another_number_of_rows_needs_no_probe_once_acceptance_is_known():
    learnt = Learnt()
    World(0.5, 0.02, 0.95, floor=0.5).text(AutoPeriod(0.5, learnt))
    world, period = World(0.5, 0.04, 0.95, floor=0.5, rows=2), AutoPeriod(0.5, learnt)
    period.probes = lambda rows, new: 0  # type: ignore[method-assign]
    world.text(period)
    assert learnt.costs[2].period > 1


def test_after_windows_that_paid_for_long_a_stop_waits_longer_each_time():
    period, waits = AutoPeriod(0.4), []
    World(0.4, 0.02, 0.97, floor=0.4).text(period, tokens=800)
    World(0.4, 0.02, 0.1, floor=0.4).text(period)
    costs = period.costs(1)
    assert costs.period == 1
    for _ in range(3):
        waits.append(costs.wait)
        costs.wait = 0
        period.learn_probe(Probed(1, 3.0, 16, kept=0, judged=16))
    assert waits[0] < waits[1] < waits[2] == 2 * waits[1]


def test_a_probe_for_which_there_is_no_memory_is_postponed():
    period = AutoPeriod(0.25)
    for _ in range(WARM_UP + 1):
        period.learn(Measured(1, 0.0, 1.0, 0, 0, 0))
    assert period.probes(1, 100)
    period.postpone_probe(1)
    assert not period.probes(1, 100) and period.choose(1) == 1
    for _ in range(3 * TIMES_KEPT):
        period.learn(Measured(1, 0.0, 1.0, 0, 0, 0))
        assert period.choose(1) == 1, "drafting began with nothing measured"


def test_an_end_of_drafting_is_judged_once_more_by_new_plain_steps_and_then_waits_for_a_probe():
    period = AutoPeriod(0.3)
    World(0.3, 0.02, 0.97, floor=0.3).text(period, tokens=400)

    def draft_until_the_end(step: float, check: float) -> None:
        for _ in range(100):
            if (size := period.choose(1)) == 1:
                return
            period.learn(Measured(1, step * (size - 1), check, size - 1, size - 1, 0))
        pytest.fail("drafting does not end")

    def decode_plainly(step: float, count: int) -> None:
        for _ in range(count):
            period.learn(Measured(1, 0.0, step, 0, 0, 0))

    assert period.choose(1) > 1
    draft_until_the_end(step=1.8, check=7.0)  # the machine is six times as slow, and no plain step has told yet
    decode_plainly(6.0, TIMES_KEPT)
    assert period.choose(1) > 1
    draft_until_the_end(step=9.0, check=9.0)
    decode_plainly(60.0, 3 * TIMES_KEPT)
    assert period.choose(1) == 1


def test_a_probe_judges_windows_by_the_least_of_their_latest_times():
    """Those at which the machine was busy would keep drafting off, as no window is made that could correct them."""
    period = AutoPeriod(0.3)
    World(0.3, 0.02, 0.97, floor=0.3).text(period, tokens=400)
    while (size := period.choose(1)) > 1:
        period.learn(Measured(1, 2.0 * (size - 1), 4.0, size - 1, size - 1, 0))
    for _ in range(3 * TIMES_KEPT):
        period.learn(Measured(1, 0.0, 1.0, 0, 0, 0))
    assert period.choose(1) == 1
    period.learn_probe(Probed(1, 1.0, 16, 15, 16))
    assert period.choose(1) > 1


def test_of_times_that_contradict_each_other_the_older_gives_way():
    """No check is cheaper than a shorter one, so the machine was busy at one of the two times."""
    costs = Costs()
    costs.add_check(1, 3.0)
    costs.add_check(8, 1.2)
    assert costs.plain == 1.2 and costs.check_seconds(8, 1) == 1.2
    for _ in range(3):
        costs.add_check(1, 2.0)
    assert costs.plain == 2.0 and costs.check_seconds(8, 1) == 2.0


def test_of_a_tree_every_branch_counts_in_a_check_that_was_not_measured():
    chain, tree = AutoPeriod(0.5), AutoPeriod(0.5, width=4)
    for period in (chain, tree):
        for _ in range(WARM_UP + 1):
            period.learn(Measured(1, 0.0, 1.0, 0, 0, 0))
    assert chain.costs(1).check_seconds(11, chain.width) == pytest.approx(1.2)
    assert tree.costs(1).check_seconds(11, tree.width) == pytest.approx(1.8)


def test_costs_are_known_apart_for_each_number_of_rows():
    period = AutoPeriod(0.6)
    for rows in (1, 8):
        World(0.6, 0.02 * rows, 0.97, rows=rows).text(period)
    assert period.costs(1).check_seconds(16, 1) < 1.5 < period.costs(8).check_seconds(16, 1)


def test_a_window_shorter_than_the_period_counts_as_what_it_was():
    """Budgets and ends of text cut drafts short: the passes made are what seconds are divided by."""
    period = AutoPeriod(0.5)
    for _ in range(4):
        period.learn(Measured(1, draft=1.0, verify=1.0, steps=2, kept=2, rejected=0))
    assert period.costs(1).draft_seconds(0.5) == 0.5 and 3 in period.costs(1).checks


def test_a_fixed_period_never_changes_and_makes_no_probe():
    fixed = Period(5)
    fixed.learn(Measured(1, 1.0, 1.0, 4, 0, 1))
    assert fixed.choose(1) == 5 and not fixed.probes(1, 100)


def test_what_it_chooses_among_fits_the_longest_window():
    assert list(CHOICES) == sorted(set(CHOICES)) and CHOICES[0] == 1 and CHOICES[-1] == LONGEST


def test_a_probe_of_other_kernels_says_nothing_of_what_checks_cost():
    """Sixteen tokens of a draft of few bits are bound by arithmetic where a check is not."""
    costs = []
    for alike in (True, False):
        period = AutoPeriod(0.25, alike=alike)
        for _ in range(PROBE_TOKENS + 2):
            period.learn(Measured(1, 0.0, 1.0, 0, 0, 0))
        period.learn_probe(Probed(1, 1.0, PROBE_TOKENS, PROBE_TOKENS - 1, PROBE_TOKENS))
        costs.append(period.costs(1).token_cost)
    assert costs[0] > 0.15 and costs[1] == UNLIKE_COST
