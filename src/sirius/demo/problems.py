"""Endless problems for the embedded model: worked arithmetic (`reasoning`) and look-up in a passage (`understanding`).

A problem is a pure function of its task, split, seed and index, so training and evaluation draw from streams that
never meet and a figure can be made again from three numbers.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

TASKS = ("reasoning", "understanding")
SPLITS = ("train", "test")

NAMES_HE = "Adam Ben Carl Dan Eric Finn George Hugo Ivan Jack Karl Leo Max Noah Oscar Paul Ravi Sam Tom Victor".split()
NAMES_SHE = (
    "Anna Bella Clara Diana Emma Fiona Grace Hana Iris Julia Kate Lena Mia Nora Olga Petra Rosa Sara Tina Vera".split()
)
THINGS = (
    "apples marbles coins books cards stamps pencils cookies stickers shells eggs pens balls plums roses beads "
    "stones peaches buttons nuts"
).split()
CONTAINERS = "bags boxes packs baskets jars trays crates bundles".split()
GAINS = ("finds", "buys", "gets", "wins", "collects", "receives")
LOSSES = ("loses", "sells", "breaks", "drops", "throws away", "uses up")
FACTORS = {2: "doubles", 3: "triples"}
MOST = 150  # the largest number in any problem


@dataclass(frozen=True)
class Problem:
    """One question with its worked answer; `final` is what stands after "The answer is"."""

    task: str
    question: str
    answer: str
    final: str


def make_problem(task: str, split: str, seed: int, index: int) -> Problem:
    """Return problem number `index` of a stream; the same four arguments always give the same problem."""
    if task not in TASKS or split not in SPLITS:
        raise ValueError(f"task must be one of {TASKS} and split one of {SPLITS}, got {task!r} and {split!r}")
    rng = Random(f"{split}/{task}/{seed}/{index}")
    return _reasoning(rng) if task == "reasoning" else _understanding(rng)


def few_shot(task: str, split: str, seed: int, index: int, shots: int = 2) -> tuple[list[dict[str, str]], Problem]:
    """Return a conversation that shows `shots` solved problems and asks one more, and that last problem."""
    *shown, asked = [make_problem(task, split, seed, index * (shots + 1) + i) for i in range(shots + 1)]
    messages = [m for problem in shown for m in conversation(problem)]
    return [*messages, {"role": "user", "content": asked.question}], asked


def conversation(problem: Problem) -> list[dict[str, str]]:
    """Return the two chat messages of a solved problem."""
    return [{"role": "user", "content": problem.question}, {"role": "assistant", "content": problem.answer}]


def final_answer(text: str) -> str | None:
    """Return what a text gives as its answer, or None where it never says "The answer is"."""
    found = re.findall(r"The answer is ([^.]*)\.", text)
    return found[-1].strip() if found else None


# --- reasoning: a story of one person's things, two to five sums


@dataclass
class _Story:
    """A person, what they count, and the value reached so far."""

    rng: Random
    name: str
    he: str
    things: str
    value: int
    sums: int = 0

    def work(self, left: int, sign: str, right: int, result: int) -> str:
        self.sums += 1
        return f"{left} {sign} {right} = {result}"


_Told = tuple[str, str]  # what the story says, what the answer says


def _gain(s: _Story) -> _Told | None:
    n = s.rng.randint(2, 40)
    if s.value + n > MOST:
        return None
    before, s.value = s.value, s.value + n
    verb = s.rng.choice(GAINS)
    return f"{s.he} {verb} {n} more {s.things}.", f"{s.he} {verb} {n}, so {s.work(before, '+', n, s.value)}."


def _lose(s: _Story) -> _Told | None:
    if s.value < 4:
        return None
    n = s.rng.randint(2, min(40, s.value - 1))
    before, s.value = s.value, s.value - n
    if s.rng.random() < 0.5:
        friend = s.rng.choice([x for x in NAMES_HE + NAMES_SHE if x != s.name])
        told, short = f"{s.he} gives {n} {s.things} to {friend}.", f"{s.he} gives away {n}"
    else:
        verb = s.rng.choice(LOSSES)
        told, short = f"{s.he} {verb} {n} {s.things}.", f"{s.he} {verb} {n}"
    return told, f"{short}, so {s.work(before, '-', n, s.value)}."


def _bundles(s: _Story) -> _Told | None:
    a, b = s.rng.randint(2, 9), s.rng.randint(2, 9)
    if s.value + a * b > MOST:
        return None
    before, s.value = s.value, s.value + a * b
    verb, held = s.rng.choice(GAINS), s.rng.choice(CONTAINERS)
    first = s.work(a, "*", b, a * b)
    return (
        f"{s.he} {verb} {a} {held} with {b} {s.things} in each.",
        f"{a} {held} of {b} is {first}. Now {s.work(before, '+', a * b, s.value)}.",
    )


def _days(s: _Story) -> _Told | None:
    a, b = s.rng.randint(2, 9), s.rng.randint(2, 7)
    if s.value - a * b < 1:
        return None
    before, s.value = s.value, s.value - a * b
    verb = s.rng.choice(LOSSES)
    first = s.work(a, "*", b, a * b)
    return (
        f"{s.he} {verb} {a} {s.things} every day for {b} days.",
        f"{b} days of {a} is {first}. Now {s.work(before, '-', a * b, s.value)}.",
    )


def _times(s: _Story) -> _Told | None:
    n = s.rng.choice((2, 3))
    if s.value * n > MOST:
        return None
    before, s.value = s.value, s.value * n
    return (
        f"Then the number of {s.things} {FACTORS[n]}.",
        f"The number {FACTORS[n]}, so {s.work(before, '*', n, s.value)}.",
    )


def _split(s: _Story) -> _Told | None:
    n = s.rng.choice((2, 3, 4, 5))
    if s.value % n or s.value // n < 2:
        return None
    before, s.value = s.value, s.value // n
    held = s.rng.choice(CONTAINERS)
    return (
        f"{s.he} puts the {s.things} into {n} equal {held} and keeps only one of them.",
        f"One of {n} {held} is left, so {s.work(before, '/', n, s.value)}.",
    )


_Event = Callable[[_Story], _Told | None]
_SINGLE: tuple[_Event, ...] = (_gain, _gain, _lose, _lose, _times, _split)  # one sum each
_DOUBLE: tuple[_Event, ...] = (_bundles, _days)  # two sums each


def _together(s: _Story) -> _Told | None:
    """End on a second person's share: more than the first, or a multiple."""
    friend = s.rng.choice([x for x in NAMES_HE + NAMES_SHE if x != s.name])
    if s.rng.random() < 0.5:
        n = s.rng.randint(2, 30)
        other, told = s.value + n, f"{friend} has {n} {s.things} more than {s.name}."
        sign = "+"
    else:
        n = s.rng.choice((2, 3))
        other, told = s.value * n, f"{friend} has {n} times as many {s.things} as {s.name}."
        sign = "*"
    if s.value + other > MOST:
        return None
    before, s.value = s.value, s.value + other
    first = s.work(before, sign, n, other)
    return (
        f"{told} How many {s.things} do they have together?",
        f"{friend} has {first}. Together {s.work(before, '+', other, s.value)}.",
    )


def _money(s: _Story) -> _Told | None:
    """End on the price of what is left."""
    price = s.rng.randint(2, 9)
    if s.value > 12 or s.value * price > MOST:
        return None
    before, s.value = s.value, s.value * price
    return (
        f"{s.he} sells all the {s.things} for {price} dollars each. How many dollars does {s.name} get?",
        f"{before} {s.things} for {price} dollars is {s.work(before, '*', price, s.value)}.",
    )


def _reasoning(rng: Random) -> Problem:
    """Tell a story of two to five sums."""
    names, he = (NAMES_HE, "He") if rng.random() < 0.5 else (NAMES_SHE, "She")
    s = _Story(rng, rng.choice(names), he, rng.choice(THINGS), rng.randint(3, 60))
    asked, worked = [f"{s.name} has {s.value} {s.things}."], [f"{s.name} starts with {s.value}."]
    wanted = rng.randint(2, 5)
    ending = rng.random()
    while s.sums < wanted:
        event = rng.choice(_SINGLE + _DOUBLE if wanted - s.sums > 1 else _SINGLE)
        if told := event(s):
            asked.append(told[0])
            worked.append(told[1])
    closing = _together(s) if ending < 0.2 and s.sums <= 3 else _money(s) if ending < 0.4 and s.sums <= 4 else None
    asked.append(closing[0] if closing else f"How many {s.things} does {s.name} have now?")
    worked.extend([closing[1]] if closing else [])
    worked.append(f"The answer is {s.value}.")
    return Problem("reasoning", " ".join(asked), " ".join(worked), str(s.value))


# --- understanding: facts about a few people, one of them asked for


@dataclass(frozen=True)
class _Fact:
    """A kind of fact: its sentence, the question for the value, the question for the person, and the values."""

    says: str
    asks_value: str
    asks_person: str
    values: tuple[str, ...]


_FACTS = (
    _Fact("{} lives in {}", "Where does {} live?", "Who lives in {}?",
          tuple("Oslo Rome Paris Lima Cairo Delhi Tokyo Quebec Dublin Vienna Prague Madrid".split())),
    _Fact("{} works as a {}", "What is the job of {}?", "Who works as a {}?",
          tuple("baker nurse pilot farmer teacher lawyer painter doctor driver tailor singer barber".split())),
    _Fact("{} plays the {}", "What instrument does {} play?", "Who plays the {}?",
          tuple("violin piano flute drum guitar harp trumpet cello organ banjo".split())),
    _Fact("{} keeps a {}", "What animal does {} keep?", "Who keeps a {}?",
          tuple("cat dog horse parrot rabbit turtle goat duck hamster pony".split())),
    _Fact("{} likes to eat {}", "What does {} like to eat?", "Who likes to eat {}?",
          tuple("soup rice bread cheese fish pasta salad honey beans cake".split())),
    _Fact("{} drives a {} car", "What colour is the car of {}?", "Who drives a {} car?",
          tuple("red blue green white black yellow brown grey purple pink".split())),
    _Fact("{} travels by {}", "How does {} travel?", "Who travels by {}?",
          tuple("train bus boat plane tram bicycle ferry taxi".split())),
)  # fmt: skip


def _understanding(rng: Random) -> Problem:
    """Tell four to eight facts about two to four people and ask for one of them."""
    people = rng.sample(NAMES_HE + NAMES_SHE, rng.randint(2, 4))
    position = {person: i for i, person in enumerate(people)}
    pairs = rng.sample([(p, f) for p in people for f in _FACTS], rng.randint(4, 8))
    values = {fact: rng.sample(fact.values, len(people)) for fact in _FACTS}
    facts = [(person, fact, values[fact][position[person]]) for person, fact in pairs]
    passage = " ".join(fact.says.format(person, value) + "." for person, fact, value in facts)
    person, fact, value = rng.choice(facts)
    of_value = rng.random() < 0.6
    question = fact.asks_value.format(person) if of_value else fact.asks_person.format(value)
    final = value if of_value else person
    answer = f"The passage says that {fact.says.format(person, value)}. The answer is {final}."
    return Problem("understanding", f"{passage} {question}", answer, final)
