"""Prompt lookup: guesses from the text itself, where its last tokens stood before. They cost no draft pass.

Source of the idea: prompt lookup decoding (A. Saxena, 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

SHORTEST = 2  # tokens of the shortest match: a single token stands nearly everywhere
FIRST, FEWEST = 4, 2  # guesses of the first window, and of the shortest
TRIALS = 3  # windows after which lookup is judged by its speed
OTHERS_EVERY = 64  # windows after which one other round is made, to measure its speed again
WEIGHT = 0.2  # of the newest round in a speed
FIRST_WAIT, LONGEST_WAIT = 8, 256  # rounds in which nothing is looked up after windows were slower than other rounds


class NGrams:
    """Where the n-grams of one text stand.

    longest  tokens of the longest match that is looked for
    """

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.ends: dict[tuple[int, ...], int] = {}  # n-grams by their tokens: the place after the latest one
        self.known = 0  # how many tokens of the text are in it

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Return the `count` tokens that followed the text's last tokens where those stood before; none if nowhere.

        Longer matches go before shorter ones, later places before earlier ones. Where a place is so near to the end
        that fewer tokens follow it, the text is taken to repeat itself.
        """
        for end in range(max(self.known, SHORTEST), len(tokens)):
            for size in range(SHORTEST, min(self.longest, end) + 1):
                self.ends[tuple(tokens[end - size : end])] = end
        self.known = len(tokens)
        for size in range(min(self.longest, len(tokens) - 1), SHORTEST - 1, -1):
            if (place := self.ends.get(tuple(tokens[-size:]))) is not None:
                period = len(tokens) - place
                return [tokens[place + step % period] for step in range(count)]
        return []


@dataclass
class _Speed:
    """Moving means of the tokens and seconds of a kind of rounds."""

    tokens: float = 0.0
    seconds: float = 0.0
    rounds: int = 0

    def add(self, tokens: float, seconds: float) -> None:
        share = max(WEIGHT, 1 / (self.rounds + 1))
        self.tokens += share * (tokens - self.tokens)
        self.seconds += share * (seconds - self.seconds)
        self.rounds += 1

    @property
    def per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


class Used(NamedTuple):
    """A window of guesses from the text.

    guesses  of the row that had most
    whole    whether all of them were accepted, in every row
    """

    guesses: int
    whole: bool


class Lookup:
    """Whether the next window's guesses are looked up, and how many: as long as that is faster than the other rounds.

    longest  tokens of the longest match that is looked for
    most     guesses of the longest window
    """

    def __init__(self, longest: int, most: int) -> None:
        self.longest, self.most = longest, most
        self.count = min(FIRST, most)  # guesses of the next window
        self.looked_up, self.others = _Speed(), _Speed()
        self.since = 0  # windows since the last other round
        self.wait, self.next_wait = 0, FIRST_WAIT

    def propose(self, texts: Sequence[tuple[NGrams, Sequence[int], int]]) -> list[list[int]] | None:
        """Return guesses for each text, None where there are to be none: one has no match, or lookup is slower.

        Now and then an other round is asked for, to measure its speed.

        texts  the n-grams of each, its tokens, and the most guesses that it has room for
        """
        if self.wait > 0:
            self.wait -= 1
            return None
        if self.since >= (OTHERS_EVERY if self.others.rounds else TRIALS):
            self.since = 0
            return None
        found = [grams.propose(tokens, min(self.count, room)) for grams, tokens, room in texts]
        return found if all(found) else None

    def learn(self, used: Used | None, tokens: float, seconds: float) -> None:
        """Learn from a round.

        used    the window, where it was looked up
        tokens  that the round brought, a row
        """
        (self.looked_up if used else self.others).add(tokens, seconds)
        self.since = self.since + 1 if used else 0
        if used is None:
            return
        # twice as many guesses after whole windows, otherwise two more than were accepted, so 5 after 3 of 4
        self.count = min(max(self.count, 2 * used.guesses) if used.whole else max(int(tokens) + 1, FEWEST), self.most)
        if self.looked_up.rounds < TRIALS or not self.others.rounds:
            return
        if self.looked_up.per_second < self.others.per_second:
            self.wait, self.next_wait = self.next_wait, min(2 * self.next_wait, LONGEST_WAIT)
        else:
            self.next_wait = FIRST_WAIT
