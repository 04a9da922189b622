"""Rules of acceptance and the register of their names, and what a rule's answer means for each row."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from sirius.core import OWN, CorrectionConfig, Origin, Verdict
from sirius.decoding.host import fetch
from sirius.decoding.tree import Tree
from sirius.errors import ConfigError


@dataclass(frozen=True)
class Check:
    """A tree's guesses with the full model's scores, by which a rule accepts them.

    tree    B rows of N nodes
    scores  [B, N, V] float  the next token's after each node, processors applied; a guess's are at its parent
    choice  [B, N] int64     the full model's own next token after each node: the argmax, or its sample
    """

    tree: Tree
    scores: Tensor
    choice: Tensor

    def own(self) -> Tensor:
        """Tell which guesses are the full model's own choice, [B, N] bool."""
        return self.tree.tokens == self.choice.gather(1, self.tree.parents)

    def log_probabilities(self, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the tempered log-probabilities after each node [B, N, V], and those of the guesses [B, N]."""
        logs = torch.log_softmax(self.scores / temperature, dim=-1)
        row = torch.arange(len(logs), device=logs.device)[:, None]
        return logs, logs[row, self.tree.parents, self.tree.tokens]


Rule = Callable[[Check], Tensor]  # tells which guesses are accepted after their parents, [B, N] bool


class LossyRule(Protocol):
    """A rule with the two numbers of a `CorrectionConfig`, which `make_rule` binds."""

    def __call__(self, check: Check, *, threshold: float, temperature: float) -> Tensor:
        """Tell which guesses are accepted after their parents, [B, N] bool."""
        ...


Registered = TypeVar("Registered", bound=LossyRule)
_RULES: dict[str, LossyRule] = {}


def register(*names: str) -> Callable[[Registered], Registered]:
    """Register a lossy rule under its names: `@register("threshold")` above the function.

    A text decoded by it counts as lossy. Raises ConfigError of a name that is taken.
    """

    def add(rule: Registered) -> Registered:
        for name in names:
            if name in OWN or _RULES.get(name, rule) is not rule:
                raise ConfigError(f"a rule of acceptance named {name!r} is already there; choose another name")
            _RULES[name] = rule
        return rule

    return add


def known() -> list[str]:
    """Return the names of all rules, the lossless ones first."""
    return [*OWN, *_RULES]


def check_rule(name: str) -> None:
    """Raise ConfigError, with the known names, where no rule has this name."""
    if name not in known():
        raise ConfigError(f"accept is one of {', '.join(known())}; got {name!r}")


def accept_own(check: Check) -> Tensor:
    """Accept the full model's own choice alone.

    Lossless, whatever the draft: the tokens of plain greedy decoding, or with a temperature those that the full model
    would sample with the same noise.
    """
    return check.own()


@register("threshold")
def accept_threshold(check: Check, *, threshold: float, temperature: float) -> Tensor:
    """Accept guesses of probability at least `threshold`, and the full model's own choice.

    Lossy up to threshold 0.5. Source: Sirius (arXiv 2409.03856), section 4. Accepting the own choice at any threshold
    is our addition: if rejected, it would only be written again.
    """
    _, guessed = check.log_probabilities(temperature)
    return (guessed.exp() >= threshold) | check.own()


def make_rule(config: CorrectionConfig) -> Rule:
    """Return the rule that a configuration names; raise ConfigError, with the known names, where there is none."""
    check_rule(config.accept)
    if config.accept in OWN:
        return accept_own
    return partial(_RULES[config.accept], threshold=config.least, temperature=config.accept_temperature)


def ask_rule(rule: Rule, check: Check) -> Tensor:
    """Return which guesses a rule accepts, [B, N] bool; raise ConfigError where it returns anything else."""
    answer, shape = rule(check), check.tree.tokens.shape
    if isinstance(answer, Tensor) and answer.dtype is torch.bool and answer.shape == shape:
        return answer
    function = getattr(rule, "func", rule)
    names = [name for name, each in _RULES.items() if each is function]
    name = names[0] if names else getattr(function, "__name__", type(function).__name__)
    got = f"{list(answer.shape)} {answer.dtype}" if isinstance(answer, Tensor) else type(answer).__name__
    raise ConfigError(f"accept {name!r} must return which guesses are accepted, {list(shape)} torch.bool; got {got}")


@dataclass(frozen=True)
class Verified:
    """The result of a check on the host, fetched in one transfer.

    verdicts  [B]
    tokens    [B][N]  the trees' tokens, by node
    guessed   [B][N]  natural logs of the verifier's probabilities of these tokens, each after its parent
    added     [B]     natural log of the verifier's probability of each verdict's `next`
    depth     [B]     the trees' depths
    """

    verdicts: list[Verdict]
    tokens: list[list[int]]
    guessed: list[list[float]]
    added: list[float]
    depth: list[int]


def accept(check: Check, raw: Tensor, rule: Rule) -> Verified:
    """Check the guesses by a rule: each row keeps its longest branch of accepted guesses.

    raw  [B, N, V]  the verifier's scores before processors, from which the log-probabilities are computed
    """
    tree = check.tree
    found = longest_branches(check, ask_rule(rule, check))
    row = torch.arange(len(raw), device=raw.device)
    total = raw.logsumexp(-1)
    guessed = raw[row[:, None], tree.parents, tree.tokens] - total.gather(1, tree.parents)
    added = raw[row, found.end, found.next] - total[row, found.end]
    *branches, tokens, guessed, added = fetch(*found, tree.tokens, guessed, added)
    found = Branches(*branches)
    return Verified(make_verdicts(found), tokens.tolist(), guessed.tolist(), added.tolist(), found.depth.tolist())


class Branches(NamedTuple):
    """Each row's longest branch of accepted guesses, "the branch" below.

    kept   [B, N] bool   the nodes of the branch, the root's included
    tip    [B, N] bool   the nodes from the root to the deepest guess that follows the branch; of several such guesses
                         the one of highest score
    end    [B] int64     the last node of the branch
    next   [B] int64     the full model's token after the branch, read at its last node
    depth  [B] int64     the depth of the tree's deepest guess
    """

    kept: Tensor
    tip: Tensor
    end: Tensor
    next: Tensor
    depth: Tensor


def longest_branches(check: Check, accepted: Tensor) -> Branches:
    """Return each row's longest branch of accepted guesses, ties to the higher draft score.

    accepted  [B, N] bool  which guesses are accepted after their parents

    Every node of the tree may end the branch, even one whose continuations were pruned.
    """
    tree = check.tree
    accepted = accepted | (tree.depths == 0)
    kept = tree.alive & ~(tree.seen & ~accepted[:, None]).any(-1)  # no ancestor fails
    end = _deepest(tree, kept)
    following = tree.alive & tree.seen.gather(2, end[:, None, None].expand(-1, tree.seen.shape[1], 1))[:, :, 0]
    tip = _deepest(tree, following)
    row = torch.arange(len(end), device=end.device)
    depth = torch.where(tree.alive, tree.depths, 0).amax(1)
    return Branches(tree.seen[row, end], tree.seen[row, tip], end, check.choice[row, end], depth)


def make_verdicts(found: Branches) -> list[Verdict]:
    """Return each row's verdict, from branches that were fetched to the host."""
    return [_verdict(*each) for each in zip(*(part.tolist() for part in found), strict=True)]


def _deepest(tree: Tree, among: Tensor) -> Tensor:
    """Return the deepest node of each row among those marked, [B] int64; ties go to the higher score."""
    depth = torch.where(among, tree.depths, -1)
    deepest = depth == depth.amax(1, keepdim=True)
    return torch.where(deepest, tree.scores, -torch.inf).argmax(1)


def _verdict(kept: list[bool], tip: list[bool], end: int, following: int, depth: int) -> Verdict:
    path, furthest = (tuple(node for node, on in enumerate(branch) if on and node) for branch in (kept, tip))
    origin: Origin = "full" if depth == 0 else "bonus" if len(path) == depth else "correction"
    return Verdict(path, following, origin, furthest)
