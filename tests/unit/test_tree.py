"""The layout of a tree of guesses, on one made by hand and against the plain definition on many."""

from itertools import pairwise
from math import exp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sirius.decoding.tree import Tree

INF = float("inf")


def logs(vocabulary: int, nodes: list[dict[int, float]]) -> Tensor:
    """Return log-probabilities [1, m, V] that are those given for each node, and -9 elsewhere."""
    likely = torch.full((1, len(nodes), vocabulary), -9.0)
    for node, given_ones in enumerate(nodes):
        for token, value in given_ones.items():
            likely[0, node, token] = value
    return likely


def by_hand() -> Tree:
    """The tree in the module's drawing: width 3, three levels."""
    tree = Tree.root(torch.tensor([7]))
    tree = tree.grow(logs(4, [{2: -1, 0: -2, 3: -3}]), 3, 0)
    tree = tree.grow(logs(4, [{1: -0.5, 0: -0.75}, {}, {3: -0.125}]), 3, 0)
    return tree.grow(logs(4, [{2: -0.25}, {1: -0.5, 3: -0.75}, {}]), 3, 0)


@st.composite
def growths(draw):
    """Draw what a tree is grown from: width, prune, the newest tokens and the log-probabilities after each node."""
    rows, vocabulary = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    ruled_out = draw(st.sampled_from([0.0, 0.3, 0.8]))

    def likely(nodes: int) -> Tensor:
        scores = torch.randn(rows, nodes, vocabulary, dtype=torch.float64, generator=g).log_softmax(-1)
        return scores.masked_fill(torch.rand(scores.shape, generator=g) < ruled_out, -INF)

    newest = torch.randint(vocabulary, (rows,), generator=g)
    return (
        draw(st.integers(1, 7)),
        draw(st.sampled_from([0.0, 0.05, 0.5, 1.0])),
        draw(st.integers(1, 4)),
        newest,
        likely,
    )


def grow(growth) -> tuple[Tree, list[Tensor]]:
    width, prune, levels, newest, likely = growth
    tree, used = Tree.root(newest), []
    for _ in range(levels):
        used.append(likely(tree.last.stop - tree.last.start))
        tree = tree.grow(used[-1], width, prune)
    return tree, used


def alive(tree: Tree) -> list[tuple[int, int]]:
    return [(int(b), int(n)) for b, n in tree.alive.nonzero()]


def chain(tree: Tree, row: int, node: int) -> list[int]:
    """Return a node's ancestors and itself, from the root on."""
    return [*chain(tree, row, int(tree.parents[row, node])), node] if node else [0]


def continuations(tree: Tree, used: list[Tensor], row: int, level: int) -> dict[tuple[int, int], float]:
    """Return every continuation of the living nodes of a level, parent and token, with its score."""
    places = range(tree.levels[level], tree.levels[level + 1])
    scores = {
        (place, token): float(tree.scores[row, place] + value)
        for place, line in zip(places, used[level][row], strict=True)
        for token, value in enumerate(line)
    }
    return {key: score for key, score in scores.items() if score > -INF}


def test_the_tree_made_by_hand_stands_as_it_is_drawn():
    tree = by_hand()
    assert tree.levels == (0, 1, 4, 7, 10)
    assert tree.depths.tolist() == [[0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    assert tree.parents.tolist() == [[0, 0, 0, 0, 1, 1, 3, 4, 5, 5]]
    assert tree.tokens.tolist() == [[7, 2, 0, 3, 1, 0, 3, 2, 1, 3]]
    assert tree.scores.tolist() == [[0, -1, -2, -3, -1.5, -1.75, -3.125, -1.75, -2.25, -2.5]]


def test_in_the_tree_made_by_hand_each_node_sees_its_branch():
    seen = [line.nonzero()[:, 0].tolist() for line in by_hand().seen[0]]
    assert seen[:4] == [[0], [0, 1], [0, 2], [0, 3]]
    assert seen[4:] == [[0, 1, 4], [0, 1, 5], [0, 3, 6], [0, 1, 4, 7], [0, 1, 5, 8], [0, 1, 5, 9]]


def test_a_window_is_of_one_level_or_of_the_whole_tree():
    tree = by_hand()
    deepest, whole = tree.window(tree.last), tree.window(fixed=7)
    assert (deepest.first, deepest.fixed, whole.first, whole.fixed) == (7, 0, 0, 7)
    assert deepest.depths.tolist() == [[3, 3, 3]]
    assert torch.equal(deepest.seen, tree.seen[:, 7:]) and torch.equal(whole.seen, tree.seen)
    middle = tree.window(slice(1, 4))
    assert middle.seen.tolist() == [
        [[True, True, False, False], [True, False, True, False], [True, False, False, True]]
    ]


@settings(derandomize=True, deadline=None)
@given(growths())
def test_the_weights_of_a_window_are_the_shares_of_its_branches(growth):
    tree, _ = grow(growth)
    for level in (tree.last, None):
        for weights, scores in zip(tree.window(level).weights, tree.scores[:, level or slice(None)], strict=True):
            likely = [exp(float(score)) for score in scores]
            assert weights.tolist() == pytest.approx([each / (sum(likely) or 1) for each in likely])


@settings(derandomize=True, deadline=None)
@given(growths())
def test_a_living_node_sees_its_ancestors_and_itself_alone(growth):
    tree, _ = grow(growth)
    for row, node in alive(tree):
        branch = chain(tree, row, node)
        assert tree.seen[row, node].nonzero()[:, 0].tolist() == branch
        assert int(tree.depths[row, node]) == len(branch) - 1
        assert tree.levels[len(branch) - 1] <= node < tree.levels[len(branch)]


@settings(derandomize=True, deadline=None)
@given(growths())
def test_a_score_is_the_sum_along_the_branch(growth):
    tree, used = grow(growth)
    for row, node in alive(tree):
        branch = chain(tree, row, node)
        steps = [
            float(used[level][row, parent - tree.levels[level], tree.tokens[row, child]])
            for level, (parent, child) in enumerate(pairwise(branch))
        ]
        assert float(tree.scores[row, node]) == pytest.approx(sum(steps))


@settings(derandomize=True, deadline=None)
@given(growths())
def test_a_level_holds_the_best_continuations_of_the_one_before(growth):
    width, prune, levels = growth[:3]
    tree, used = grow(growth)
    for level in range(levels):
        for row in range(len(tree.tokens)):
            every = continuations(tree, used, row, level)
            best = sorted(every, key=lambda key: -every[key])[:width]
            want = [
                key for key in best if every[key] >= every[best[0]] + (torch.tensor(prune).log() if prune else -INF)
            ]
            here = [n for n in range(tree.levels[level + 1], tree.levels[level + 2]) if tree.alive[row, n]]
            assert [(int(tree.parents[row, n]), int(tree.tokens[row, n])) for n in here] == want


@settings(derandomize=True, deadline=None)
@given(growths())
def test_a_level_has_no_place_more_than_its_fullest_row_needs(growth):
    tree, _ = grow(growth)
    for start, stop in pairwise(tree.levels[1:]):
        fullest = int(tree.alive[:, start:stop].sum(1).max())
        assert stop - start == max(1, fullest) <= growth[0]


@settings(derandomize=True, deadline=None)
@given(growths())
def test_nothing_grows_from_the_dead(growth):
    tree, _ = grow(growth)
    for row, node in alive(tree):
        assert tree.alive[row, chain(tree, row, node)].all()
    assert tree.parents[~tree.alive].eq(0).all() and tree.tokens[~tree.alive].eq(0).all()


def test_more_branches_than_tokens_are_filled_from_the_second_level_on():
    tree = Tree.root(torch.tensor([0]))
    for _ in range(3):
        tree = tree.grow(torch.zeros(1, tree.last.stop - tree.last.start, 3), 8, 0)
    assert tree.levels == (0, 1, 4, 12, 20)
    assert bool(tree.alive.all())


def test_a_row_without_continuations_dies_beside_one_that_goes_on():
    likely = torch.tensor([[[-1.0, -2.0, -3.0]], [[-INF] * 3]])
    tree = Tree.root(torch.tensor([1, 2])).grow(likely, 2, 0)
    tree = tree.grow(torch.full((2, 2, 3), -1.0), 2, 0)
    assert tree.alive.tolist() == [[True] * 5, [True] + [False] * 4]


def test_prune_drops_what_is_less_likely_than_its_share_of_the_best():
    likely = torch.tensor([[[0.5, 0.3, 0.125, 0.075]]]).log()
    for prune, left in ((0.0, 4), (0.2, 3), (0.3, 2), (0.7, 1), (1.0, 1)):
        assert Tree.root(torch.tensor([0])).grow(likely, 4, prune).levels == (0, 1, 1 + left)
