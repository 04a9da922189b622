"""Rules of acceptance, as pure functions of guesses and the full model's scores, and what follows from them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sirius.core import OWN, CorrectionConfig, Origin, Verdict
from sirius.decoding.tree import Tree


@dataclass(frozen=True)
class Check:
    """What the full model says of a tree's guesses.

    tree    B rows of N places
    scores  [B, N, V] float  the next token's after each place, processors applied; a guess is judged at its parent
    choice  [B, N] int64     the full model's own next token after each place: the argmax, or its sample
    """

    tree: Tree
    scores: Tensor
    choice: Tensor

    def own(self) -> Tensor:
        """Tell which guesses are the full model's own choice, [B, N] bool."""
        return self.tree.tokens == self.choice.gather(1, self.tree.parents)

    def judging(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the tempered log-probabilities after each place [B, N, V], and those of the guesses [B, N]."""
        logs = torch.log_softmax(self.scores / temperature, dim=-1)
        row = torch.arange(len(logs), device=logs.device)[:, None]
        return logs, logs[row, self.tree.parents, self.tree.tokens]


Rule = Callable[[Check], Tensor]  # which guesses pass after their parents, [B, N] bool


def accept_own(check: Check) -> Tensor:
    """Pass the full model's own choice alone.

    Lossless, whatever the draft: the tokens of plain greedy decoding, or with a temperature those that the full model
    would sample with the same noise.
    """
    return check.own()


def accept_threshold(check: Check, *, threshold: float, temperature: float) -> Tensor:
    """Pass guesses of probability at least `threshold`, and the full model's own choice.

    Lossy up to threshold 0.5. Source: Sirius (arXiv 2409.03856), section 4; that the own choice passes at any threshold
    is ours: rejecting it would only write it again.
    """
    _, guessed = check.judging(temperature)
    return (guessed.exp() >= threshold) | check.own()


def accept_relative(check: Check, *, threshold: float, temperature: float) -> Tensor:
    """Pass guesses of probability at least `threshold` times the likeliest token's, and the full model's own choice.

    Lossy. A flat distribution, in which no token reaches a fixed threshold, rejects nothing likely.
    """
    logs, guessed = check.judging(temperature)
    most = logs.amax(-1).gather(1, check.tree.parents)
    return ((guessed - most).exp() >= threshold) | check.own()


def accept_typical(check: Check, *, threshold: float, temperature: float) -> Tensor:
    """Pass guesses of probability at least min(threshold, sqrt(threshold) exp(-H)), and the full model's own choice.

    H is the entropy of the distribution, so the less certain the full model is, the more passes. Lossy. Source: Medusa
    (arXiv 2401.10774), section 2.3.1, with its recommended delta = sqrt(epsilon).
    """
    logs, guessed = check.judging(temperature)
    entropy = -(logs.exp() * logs.clamp_min(-1e30)).sum(-1).gather(1, check.tree.parents)
    return (guessed.exp() >= (threshold**0.5 * (-entropy).exp()).clamp_max(threshold)) | check.own()


def accept_all(check: Check) -> Tensor:
    """Pass every guess: the study without rollback."""
    return torch.ones_like(check.tree.alive)


LOSSY = {
    "threshold": accept_threshold,
    "relative": accept_relative,
    "typical": accept_typical,
}


def make_rule(config: CorrectionConfig) -> Rule:
    """Return the rule that a configuration names."""
    if "rollback" in config.ablate:
        return accept_all
    if config.accept in OWN:
        return accept_own
    return partial(LOSSY[config.accept], threshold=config.least, temperature=config.accept_temperature)


class Branches(NamedTuple):
    """Each row's longest branch of passing guesses.

    kept   [B, N] bool   its places, the root's included
    tip    [B, N] bool   the places on to the deepest guess that follows it, of those the one of highest score
    end    [B] int64     its last place
    next   [B] int64     the full model's token after it, read at that place
    depth  [B] int64     of the tree's deepest guess
    """

    kept: Tensor
    tip: Tensor
    end: Tensor
    next: Tensor
    depth: Tensor


def longest_branches(check: Check, passed: Tensor) -> Branches:
    """Return each row's longest branch of passing guesses, ties to the higher draft score.

    passed  [B, N] bool  which guesses pass after their parents

    Every node of the tree may end the branch, one whose continuations were dropped too.
    """
    tree = check.tree
    stands = passed | (tree.depths == 0)
    kept = tree.alive & ~(tree.seen & ~stands[:, None]).any(-1)  # no ancestor fails
    end = _deepest(tree, kept)
    following = tree.alive & tree.seen.gather(2, end[:, None, None].expand(-1, tree.seen.shape[1], 1))[:, :, 0]
    tip = _deepest(tree, following)
    row = torch.arange(len(end), device=end.device)
    depth = torch.where(tree.alive, tree.depths, 0).amax(1)
    return Branches(tree.seen[row, end], tree.seen[row, tip], end, check.choice[row, end], depth)


def make_verdicts(found: Branches) -> list[Verdict]:
    """Return what branches, fetched to the host, mean for each row."""
    return [_verdict(*each) for each in zip(*(part.tolist() for part in found), strict=True)]


def without_interleave(verdict: Verdict, tokens: list[int]) -> Verdict:
    """Return the verdict of the study without interleaved tokens: a draft that passed whole gets no bonus.

    Its last guess is then the newest token, to be fed again. `tokens` are the row's, by place.
    """
    if verdict.origin != "bonus":
        return verdict
    return replace(verdict, path=verdict.path[:-1], next=tokens[verdict.path[-1]], origin="draft")


def _deepest(tree: Tree, among: Tensor) -> Tensor:
    """Return the deepest place of each row among those marked, [B] int64; ties go to the higher score."""
    depth = torch.where(among, tree.depths, -1)
    deepest = depth == depth.amax(1, keepdim=True)
    return torch.where(deepest, tree.scores, -torch.inf).argmax(1)


def _verdict(kept: list[bool], tip: list[bool], end: int, following: int, depth: int) -> Verdict:
    path, furthest = (tuple(place for place, on in enumerate(branch) if on and place) for branch in (kept, tip))
    origin: Origin = "full" if depth == 0 else "bonus" if len(path) == depth else "correction"
    return Verdict(path, following, origin, furthest)
