"""The automatic period over simulated rounds: what passes cost, and how many guesses stand, is known."""

import random
from dataclasses import dataclass
from itertools import pairwise
from statistics import mode

import pytest

from sirius.core import AUTO, LONGEST, CorrectionConfig
from sirius.decoding.period import CHOICES, GAIN, PROBE, PROBE_EVERY, AutoPeriod, Measured, make_period


@dataclass
class World:
    """Seconds of a draft pass, and of a check of K tokens; the chance that a guess stands after one that did.

    Noise is the share by which measured times are off. Many rows draw at once, so that acceptance is nearly certain.
    """

    step: float
    check: float
    each: float
    acceptance: float
    noise: float = 0.0
    rows: int = 100

    def speed(self, period: int) -> float:
        tokens = sum(self.acceptance**i for i in range(period))
        return tokens / ((period - 1) * self.step + self.check + self.each * period)

    def round(self, period: int, chance: random.Random) -> Measured:
        kept = [self.stand(period - 1, chance) for _ in range(self.rows)]
        off = [1 + self.noise * chance.uniform(-1, 1) for _ in range(2)]
        return Measured(
            draft=(period - 1) * self.step * off[0],
            verify=(self.check + self.each * period) * off[1],
            steps=period - 1,
            kept=sum(kept),
            rejected=sum(k < period - 1 for k in kept),
        )

    def stand(self, guesses: int, chance: random.Random) -> int:
        return next((i for i in range(guesses) if chance.random() >= self.acceptance), guesses)


def run(world: World, period: AutoPeriod, rounds: int) -> list[int]:
    """Return the period of each round, and of the one to come."""
    chance, periods = random.Random(0), [period.now]
    for _ in range(rounds):
        period.learn(world.round(period.now, chance))
        periods.append(period.now)
    return periods


COSTS = {
    "memory-bound check": (0.5, 1.0, 0.0),
    "check dearer by the token": (0.3, 1.0, 0.05),
    "compute-bound check": (0.6, 0.8, 0.2),
    "nearly all by the token": (0.2, 0.1, 0.3),
    "draft that saves little": (0.95, 1.0, 0.01),
}


@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_it_settles_where_no_period_is_faster_by_more_than_the_gain_it_asks_for(costs, acceptance):
    world = World(*costs, acceptance=acceptance)
    best = max(world.speed(period) for period in CHOICES)
    usual = mode(run(world, AutoPeriod(), 300)[100:])
    assert world.speed(usual) > best / (GAIN + 0.02)  # acceptance is measured, not known


@pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)
def test_noise_below_the_gain_changes_nothing_once_it_has_settled(costs):
    world = World(*costs, acceptance=0.9, noise=0.02)
    periods = run(world, AutoPeriod(), 600)[100:]
    changes = [(a, b) for a, b in pairwise(periods) if a != b]
    assert set(changes) <= {(1, PROBE), (PROBE, 1)}
    assert len(changes) <= 2 * (500 // PROBE_EVERY + 1)


def test_it_falls_to_one_where_a_draft_cannot_gain_and_probes_now_and_then():
    periods = run(World(step=1.0, check=1.0, each=0.0, acceptance=0.2), AutoPeriod(), 400)
    assert periods.index(1) < 20
    probes = [i for i, period in enumerate(periods) if period == PROBE and i > 20]
    assert {b - a for a, b in pairwise(probes)} == {PROBE_EVERY} and len(probes) >= 4
    assert set(periods[20:]) == {1, PROBE}


def test_it_recovers_when_acceptance_does():
    bad, good = (World(0.3, 1.0, 0.0, acceptance) for acceptance in (0.05, 0.95))
    period = AutoPeriod()
    assert run(bad, period, 200)[-1] == 1
    assert good.speed(run(good, period, 300)[-1]) > max(map(good.speed, CHOICES)) / (GAIN + 0.02)


def test_it_shortens_when_acceptance_falls():
    good, bad = (World(0.3, 1.0, 0.0, acceptance) for acceptance in (0.98, 0.5))
    period = AutoPeriod()
    before, after = run(good, period, 100)[-1], run(bad, period, 100)[-1]
    assert before >= 8 and after <= 3


def test_a_window_shorter_than_the_period_counts_as_what_it_was():
    """Budgets and ends of text cut drafts short: the passes made are what seconds are divided by."""
    period = AutoPeriod()
    period.learn(Measured(draft=1.0, verify=1.0, steps=2, kept=2, rejected=0))
    assert period.drafts == [1.0, 2]


def test_the_configuration_fixes_the_period_or_leaves_it_open():
    fixed, auto = make_period(CorrectionConfig(period=5)), make_period(CorrectionConfig(period=AUTO))
    fixed.learn(Measured(1.0, 1.0, 4, 0, 1))
    assert fixed.now == 5 and type(auto) is AutoPeriod


def test_what_it_chooses_among_fits_the_longest_window():
    assert list(CHOICES) == sorted(set(CHOICES)) and CHOICES[0] == 1 and CHOICES[-1] == LONGEST
    assert PROBE in CHOICES
