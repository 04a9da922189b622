"""Lossy variants of decoding for studies: two rules of acceptance, and the method with one of its parts left out.

None of them made texts better or faster than the paper's own rule (dev/README.md). The loop knows none: a `Plan` is
given other functions.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sirius.core import Ablation, Verdict, Window
from sirius.decoding.accept import Check, Rule, Verified, accept, register
from sirius.decoding.loop import Plan
from sirius.decoding.tree import Tree


@register("relative")
def accept_relative(check: Check, *, threshold: float, temperature: float) -> Tensor:
    """Accept guesses of probability at least `threshold` times the likeliest token's, and the full model's own choice.

    Lossy. A flat distribution, in which no token reaches a fixed threshold, rejects nothing likely.
    """
    logs, guessed = check.log_probabilities(temperature)
    most = logs.amax(-1).gather(1, check.tree.parents)
    return ((guessed - most).exp() >= threshold) | check.own()


@register("typical")
def accept_typical(check: Check, *, threshold: float, temperature: float) -> Tensor:
    """Accept guesses of probability at least min(threshold, sqrt(threshold) exp(-H)), and the full model's own choice.

    H is the entropy of the distribution: more is accepted where the full model is less certain. Lossy. Source: Medusa
    (arXiv 2401.10774), section 2.3.1, with its recommended delta = sqrt(epsilon).
    """
    logs, guessed = check.log_probabilities(temperature)
    entropy = -(logs.exp() * logs.clamp_min(-1e30)).sum(-1).gather(1, check.tree.parents)
    return (guessed.exp() >= (threshold**0.5 * (-entropy).exp()).clamp_max(threshold)) | check.own()


def accept_all(check: Check) -> Tensor:
    """Accept every guess, so that nothing is rolled back."""
    return torch.ones_like(check.tree.alive)


def without_rollback(plan: Plan) -> Plan:
    """Return a plan under which every guess is accepted."""
    return replace(plan, rule=accept_all)


def without_rewrite(plan: Plan) -> Plan:
    """Return a plan under which the draft's own keys and values stay in the cache."""
    return replace(plan, window=_only_the_deepest_written)


def without_interleave(plan: Plan) -> Plan:
    """Return a plan under which a draft that was accepted whole gets no further token of the full model."""
    return replace(plan, accept=_accept_without_bonus)


WITHOUT: dict[Ablation, Callable[[Plan], Plan]] = {
    "rewrite": without_rewrite,
    "interleave": without_interleave,
    "rollback": without_rollback,
}


def _only_the_deepest_written(tree: Tree) -> Window:
    """Return a check's window that leaves the draft's keys and values; it has none of the deepest level."""
    return tree.window(fixed=tree.last.start)


def _accept_without_bonus(check: Check, raw: Tensor, rule: Rule) -> Verified:
    verified = accept(check, raw, rule)
    verdicts, added = list(verified.verdicts), list(verified.added)
    for row, verdict in enumerate(verified.verdicts):
        if verdict.origin == "bonus":
            verdicts[row] = drop_bonus(verdict, verified.tokens[row])
            added[row] = verified.guessed[row][verdict.path[-1]]
    return replace(verified, verdicts=verdicts, added=added)


def drop_bonus(verdict: Verdict, tokens: list[int]) -> Verdict:
    """Return the verdict of a draft that was accepted whole without the full model's token after it.

    Its last guess is then the newest token, to be fed again. `tokens` are the row's, by node.
    """
    return replace(verdict, path=verdict.path[:-1], next=tokens[verdict.path[-1]], origin="draft")
