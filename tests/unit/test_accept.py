"""Rules of acceptance and the branch they leave, on trees made by hand and by brute force on drawn ones."""

from functools import partial
from math import exp, log

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius.core import CorrectionConfig, Verdict
from sirius.decoding import accept
from sirius.decoding.accept import (
    Check,
    Rule,
    accept_own,
    accept_threshold,
    known,
    longest_branches,
    make_rule,
    make_verdicts,
    register,
)
from sirius.decoding.period import Period
from sirius.decoding.plan import make_plan
from sirius.decoding.studies import accept_relative, accept_typical, drop_bonus
from sirius.decoding.tree import Tree
from sirius.errors import ConfigError

V = 5
INF = float("inf")
LOSSY = [accept_threshold, accept_relative, accept_typical]


def tree_of(parents: list[list[int]], tokens: list[list[int]], scores: list[list[float]]) -> Tree:
    """Return the tree in which each node has the parent given; the root comes first, and parents before children."""
    depths = torch.zeros(len(parents), len(parents[0]), dtype=torch.int64)
    seen = torch.eye(len(parents[0]), dtype=torch.bool).repeat(len(parents), 1, 1)
    for row, line in enumerate(parents):
        for node, parent in list(enumerate(line))[1:]:
            depths[row, node] = depths[row, parent] + 1
            seen[row, node] |= seen[row, parent]
    return Tree(torch.tensor(tokens), torch.tensor(parents), depths, torch.tensor(scores), seen, (0, len(parents[0])))


def chain_of(tokens: list[int]) -> Tree:
    nodes = range(len(tokens) + 1)
    return tree_of([[max(0, n - 1) for n in nodes]], [[0, *tokens]], [[-float(n) for n in nodes]])


def check_of(tree: Tree, scores: Tensor, choice: list[list[int]] | None = None) -> Check:
    """Return a check of scores [N, V] or [B, N, V]; greedy, unless what the full model samples is given."""
    scores = scores.expand(len(tree.tokens), -1, -1)
    return Check(tree, scores, scores.argmax(-1) if choice is None else torch.tensor(choice))


def longest_paths(check: Check, accepted: Tensor) -> list[Verdict]:
    return make_verdicts(longest_branches(check, accepted))


def judged(scores: list[float], guess: int, rule: Rule) -> bool:
    """Tell whether a single guess passes, given the scores it is judged by."""
    return bool(rule(check_of(chain_of([guess]), torch.tensor([scores, [0.0] * V])))[0, 1])


def probabilities(scores: list[float], temperature: float) -> list[float]:
    weights = [exp(score / temperature) for score in scores]
    return [weight / sum(weights) for weight in weights]


def verdict_of(tree: Tree, passed: list[bool], choice: list[int]) -> Verdict:
    check = Check(tree, torch.zeros(1, len(choice), V), torch.tensor([choice]))
    return longest_paths(check, torch.tensor([passed]))[0]


@st.composite
def checks(draw, sampled: bool = False):
    """Draw rows of trees, dead nodes among them, with the full model's scores, and which guesses are accepted."""
    rows, levels = draw(st.integers(1, 3)), draw(st.lists(st.integers(1, 3), max_size=4))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    first = [1 + sum(levels[:i]) for i in range(len(levels) + 1)]
    parents, tokens, scores = [], [], []
    for _ in range(rows):
        line, values = [0], [0.0]
        for level, count in enumerate(levels):
            before = list(range(first[level - 1], first[level])) if level else [0]
            for _ in range(count):
                parent = before[int(torch.randint(len(before), (), generator=g))]
                dead = values[parent] == -INF or float(torch.rand((), generator=g)) < 0.15
                line.append(0 if dead else parent)
                values.append(-INF if dead else values[parent] - float(torch.rand((), generator=g)))
        parents.append(line)
        scores.append(values)
        tokens.append(torch.randint(V, (len(line),), generator=g).tolist())
    tree = tree_of(parents, tokens, scores)
    full = 2 * torch.randn(rows, first[-1], V, dtype=torch.float64, generator=g)
    choice = torch.randint(V, (rows, first[-1]), generator=g) if sampled else full.argmax(-1)
    return Check(tree, full, choice), torch.rand(rows, first[-1], generator=g) < 0.7


def branch(check: Check, row: int, node: int) -> tuple[int, ...]:
    """Return the places from the root's child down to a node."""
    return (*branch(check, row, int(check.tree.parents[row, node])), node) if node else ()


def furthest(check: Check, row: int, among: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the longest of some branches, of those the one of highest score."""
    return max(among, key=lambda path: (len(path), float(check.tree.scores[row, path[-1] if path else 0])))


def by_brute_force(check: Check, accepted: Tensor, row: int) -> Verdict:
    every = [branch(check, row, n) for n in range(check.choice.shape[1]) if check.tree.alive[row, n]]
    path = furthest(check, row, [b for b in every if all(accepted[row, n] for n in b)])
    tip = furthest(check, row, [b for b in every if b[: len(path)] == path])
    depth = max(map(len, every))
    origin = "full" if depth == 0 else "bonus" if len(path) == depth else "correction"
    return Verdict(path, int(check.choice[row, path[-1] if path else 0]), origin, tip)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(checks())
def test_each_row_keeps_its_longest_branch_of_passing_guesses(drawn):
    check, passed = drawn
    assert longest_paths(check, passed) == [by_brute_force(check, passed, row) for row in range(len(passed))]


@pytest.mark.parametrize(
    ("draft", "best", "kept"),
    [([1, 2, 3], [1, 2, 3, 4], 3), ([1, 2, 3], [1, 0, 3, 4], 1), ([1, 2, 3], [0, 2, 3, 4], 0), ([], [2], 0)],
    ids=["all", "first only", "none, though later ones match", "nothing drafted"],
)
def test_a_chain_keeps_the_leading_matches_and_adds_the_choice_after_them(draft, best, kept):
    check = check_of(chain_of(draft), torch.nn.functional.one_hot(torch.tensor(best), V).double())
    verdict = longest_paths(check, accept_own(check))[0]
    assert (verdict.path, verdict.next, len(verdict.tip)) == (tuple(range(1, kept + 1)), best[kept], len(draft))


def test_of_equally_long_branches_the_likelier_stays():
    for scores in ([0.0, -1.0, -2.0], [0.0, -2.0, -1.0]):
        tree = tree_of([[0, 0, 0]], [[0, 1, 2]], [scores])
        assert verdict_of(tree, [False, True, True], [0, 3, 4]).path == (1 + (scores[2] > scores[1]),)


def test_the_next_token_is_read_at_the_last_kept_guess():
    tree = tree_of([[0, 0, 0, 2]], [[0, 1, 2, 3]], [[0.0, -1.0, -2.0, -3.0]])
    assert verdict_of(tree, [False, False, True, False], [1, 2, 3, 4]) == Verdict((2,), 3, "correction", (2, 3))


def test_a_sibling_whose_continuations_were_dropped_may_win():
    tree = tree_of([[0, 0, 0, 1]], [[0, 1, 2, 3]], [[0.0, -1.0, -2.0, -1.5]])
    assert verdict_of(tree, [False, False, True, True], [2, 0, 4, 0]) == Verdict((2,), 4, "correction", (2,))


def test_the_tip_follows_what_was_kept_and_not_the_deepest_guess_of_all():
    tree = tree_of([[0, 0, 0, 1, 2]], [[0, 1, 2, 3, 3]], [[0.0, -1.0, -2.0, -1.5, -9.0]])
    assert verdict_of(tree, [False, False, True, True, False], [2, 0, 4, 0, 0]).tip == (2, 4)


def test_where_nothing_was_drafted_the_token_is_the_full_models():
    tree = tree_of([[0, 0]], [[0, 0]], [[0.0, -INF]])
    assert verdict_of(tree, [True, True], [3, 1]) == Verdict((), 3, "full", ())


@pytest.mark.parametrize("scores", [[2.0, 1.0, 0.0, 0.5, -1.0], [9.0, 0.0, 0.0, 0.0, 0.0], [1.0, 0.9, 0.8, 0.7, 0.6]])
@pytest.mark.parametrize("temperature", [0.3, 0.6, 2.0])
@pytest.mark.parametrize("rule", LOSSY)
def test_a_guess_passes_up_to_the_rules_bound(rule, temperature, scores):
    """Thresholds just under and just over the bound, solved by hand for each rule."""
    p = probabilities(scores, temperature)
    entropy = -sum(each * log(each) for each in p)
    for guess in range(1, V):
        typical = max(p[guess], p[guess] ** 2 * exp(2 * entropy))
        bound = {accept_threshold: p[guess], accept_relative: p[guess] / p[0], accept_typical: typical}[rule]
        for threshold, passes in ((0.98 * bound, True), (1.02 * bound, False)):
            assert judged(scores, guess, partial(rule, threshold=threshold, temperature=temperature)) is passes


def test_the_entropy_of_ruled_out_tokens_is_nothing():
    scores = [0.1, 0.0, 0.0, -INF, -INF]
    assert judged(scores, 1, partial(accept_typical, threshold=0.9, temperature=1.0))
    assert not judged(scores, 3, partial(accept_typical, threshold=0.9, temperature=1.0))


@pytest.mark.parametrize("rule", [accept_own, *(partial(r, threshold=1.0, temperature=0.6) for r in LOSSY)])
@settings(derandomize=True, deadline=None)
@given(drawn=checks(sampled=True))
def test_the_full_models_own_choice_passes_under_every_rule(rule, drawn):
    check, _ = drawn
    own = torch.stack([c[p] for c, p in zip(check.choice, check.tree.parents, strict=True)]) == check.tree.tokens
    assert bool(rule(check)[own].all())


@settings(derandomize=True, deadline=None)
@given(checks(sampled=True))
def test_the_own_rule_passes_nothing_else(drawn):
    check, _ = drawn
    row, parents = torch.arange(len(check.choice))[:, None], check.tree.parents
    assert torch.equal(accept_own(check), check.tree.tokens == check.choice[row, parents])


@settings(derandomize=True, deadline=None)
@given(checks(), st.floats(0.5001, 1.0), st.floats(0.05, 5.0))
def test_above_one_half_the_threshold_is_the_own_rule(drawn, threshold, temperature):
    check, _ = drawn
    passed = accept_threshold(check, threshold=threshold, temperature=temperature)
    assert longest_paths(check, passed) == longest_paths(check, accept_own(check))


@pytest.mark.parametrize("rule", LOSSY)
@settings(derandomize=True, deadline=None)
@given(drawn=checks(sampled=True), one=st.floats(0, 1), other=st.floats(0, 1))
def test_a_lower_threshold_never_keeps_fewer(rule, drawn, one, other):
    check, _ = drawn
    everything, low, high = (
        [len(v.path) for v in longest_paths(check, rule(check, threshold=t, temperature=0.6))]
        for t in (0.0, min(one, other), max(one, other))
    )
    assert everything == torch.where(check.tree.alive, check.tree.depths, 0).amax(1).tolist()
    assert all(more >= less for more, less in zip(low, high, strict=True))


def test_a_configuration_names_its_rule():
    scores = [1.1, 1.0, 0.0, 0.0, 0.0]  # at temperature 0.6 token 1 has probability 0.364, 0.846 times token 0's
    names: dict[tuple[str, float | None], bool] = {
        ("lossless", None): False,
        ("argmax", None): False,
        ("sampling", None): False,
        ("threshold", 0.37): False,
        ("threshold", 0.36): True,
        ("relative", 0.84): True,
        ("relative", 0.85): False,
        ("typical", 0.999): True,
    }
    for (name, threshold), passes in names.items():
        assert judged(scores, 1, make_rule(CorrectionConfig(accept=name, threshold=threshold))) is passes
    cold = CorrectionConfig(accept="threshold", threshold=0.35, accept_temperature=1e-2)
    assert not judged(scores, 1, make_rule(cold))
    everything = CorrectionConfig(accept="argmax", ablate=("rollback",))
    assert judged(scores, 4, make_plan(everything, Period(1), frozenset()).rule)


def test_a_name_that_no_rule_has_is_refused_with_the_known_ones():
    for name in ("greedy", ""):
        with pytest.raises(ConfigError, match=rf"accept is one of lossless, .*typical.*; got '{name}'"):
            make_rule(CorrectionConfig(accept=name))


@pytest.mark.parametrize("name", ["threshold", "argmax"])
def test_a_name_is_registered_once(name):
    with pytest.raises(ConfigError, match=f"named '{name}' is already there"):
        register(name)(lambda check, threshold, temperature: check.own())
    assert known().count(name) == 1


def test_without_interleaving_the_last_guess_of_a_whole_draft_is_the_newest_token():
    whole = Verdict((1, 3), 9, "bonus", (1, 3))
    assert drop_bonus(whole, [4, 5, 6, 7]) == Verdict((1,), 7, "draft", (1, 3))


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (lambda check: check.scores.amax(-1), r"\[1, 3\] torch.float32"),
        (lambda check: check.own()[:, 1:], r"\[1, 2\] torch.bool"),
        (lambda check: [True, True, False], "list"),
    ],
    ids=["numbers", "another shape", "a list"],
)
def test_a_rule_that_returns_no_bool_of_each_guess_is_refused_by_name(monkeypatch, answer, got):
    monkeypatch.setattr(accept, "_RULES", dict(accept._RULES))
    register("own idea")(lambda check, threshold, temperature: answer(check))
    check = check_of(chain_of([1, 2]), torch.zeros(3, V))
    with pytest.raises(ConfigError, match=rf"accept 'own idea' must return .*\[1, 3\] torch.bool; got {got}"):
        accept.accept(check, check.scores, make_rule(CorrectionConfig(3, "own idea")))
