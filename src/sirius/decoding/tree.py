"""The guesses of a round as a tree, one for each row, laid out as they stand in the cache.

A node's number is the offset of its slot after those that the row holds. The newest token is the root. A window of
width 3 and three levels:

    node     0     1  2  3     4  5  6      7  8  9
    depth    0     1  1  1     2  2  2      3  3  3       its position, counted from the root's
    parent   -     0  0  0     1  1  3      4  5  5

A chain is the tree of width 1. A node that a row does not use is dead, because the row has less room, its text ended
or a branch was pruned. Its score is minus infinity, and nothing is accepted at it or after it.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sirius.core import Window
from sirius.decoding.host import answers_at_once


@dataclass(frozen=True)
class Tree:
    """The guesses of every row; N nodes, the root's included.

    tokens   [B, N] int64    the root is the newest token of the text
    parents  [B, N] int64    each node's parent; the root's is 0
    depths   [B, N] int64    0 at the root
    scores   [B, N] float    cumulative log-probability under the draft model, in a chain up to a constant of each
                             level; -inf where dead
    seen     [B, N, N] bool  the nodes that each node attends to: its ancestors and itself
    levels   the first node of each level, and N
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    scores: Tensor
    seen: Tensor
    levels: tuple[int, ...]

    @classmethod
    def root(cls, newest: Tensor) -> "Tree":
        """Return the tree of the newest tokens alone, newest [B] int64."""
        tokens = newest[:, None]
        zeros = torch.zeros_like(tokens)
        seen = torch.ones(len(newest), 1, 1, dtype=torch.bool, device=newest.device)
        return cls(tokens, zeros, zeros, zeros.float(), seen, (0, 1))

    @classmethod
    def chain(cls, tokens: Tensor, counts: Tensor | None = None) -> "Tree":
        """Return the chains of known tokens [B, N] int64, their roots first.

        counts  [B] int64  the tokens of each chain, its root among them; those after are dead. None: all
        """
        rows, count = tokens.shape
        nodes = torch.arange(count, device=tokens.device).expand(rows, -1)
        seen = torch.ones(count, count, dtype=torch.bool, device=tokens.device).tril().expand(rows, -1, -1)
        scores = torch.zeros(rows, count, device=tokens.device)
        chain = cls(tokens, (nodes - 1).clamp_min(0), nodes, scores, seen, tuple(range(count + 1)))
        return chain if counts is None else chain._cut(nodes >= counts[:, None])

    def _cut(self, dead: Tensor) -> "Tree":
        """Return a chain without the nodes dead [B, N] bool; they stand after the root, as those of `grow` do."""
        eye = torch.eye(dead.shape[1], dtype=torch.bool, device=dead.device)
        alone = eye | torch.arange(dead.shape[1], device=dead.device).eq(0)
        return replace(
            self,
            tokens=self.tokens.masked_fill(dead, 0),
            parents=self.parents.masked_fill(dead, 0),
            depths=self.depths.masked_fill(dead, 1),
            scores=self.scores.masked_fill(dead, -torch.inf),
            seen=torch.where(dead[..., None], alone, self.seen),
        )

    @property
    def alive(self) -> Tensor:
        """Which nodes hold a guess (or the root), [B, N] bool."""
        return self.scores > -torch.inf

    @property
    def last(self) -> slice:
        """The nodes of the deepest level."""
        return slice(self.levels[-2], self.levels[-1])

    def window(self, level: slice | None = None, fixed: int = 0, apart: bool = False) -> Window:
        """Return the window of a pass over the nodes of a level, or over all; `fixed` and `apart` as in `Window`."""
        level = level or slice(0, self.levels[-1])
        weights = self.scores[:, level].softmax(-1).nan_to_num()
        return Window(level.start, self.depths[:, level], self.seen[:, level, : level.stop], weights, fixed, apart)

    def grow(self, likely: Tensor, width: int, prune: float) -> "Tree":
        """Add a level: the best `width` continuations of the deepest one, ranked by cumulative score.

        likely  [B, m, V]  log-probabilities of the tokens after each node of the deepest level; -inf excludes a token
        prune   continuations with less than this share of the best one's probability are dead
        """
        best, tokens = _best(likely, min(width, likely.shape[2]))
        pooled = (best + self.scores[:, self.last, None]).flatten(1)
        scores, order = pooled.topk(min(width, pooled.shape[1]), dim=-1)
        if prune > 0:
            scores = torch.where(scores < scores[:, :1] + torch.tensor(prune).log(), -torch.inf, scores)
        if answers_at_once(scores):
            count = max(1, int((scores > -torch.inf).sum(1).max()))
            scores, order = scores[:, :count], order[:, :count]
        parents = order // best.shape[2] + self.last.start
        return self._joined(tokens.flatten(1).gather(1, order), parents, scores)

    def _joined(self, tokens: Tensor, parents: Tensor, scores: Tensor) -> "Tree":
        rows, count = tokens.shape
        start = self.levels[-1]
        dead = scores == -torch.inf
        parents = parents.masked_fill(dead, 0)
        own = torch.eye(count, dtype=torch.bool, device=tokens.device).expand(rows, -1, -1)
        inherited = self.seen.gather(1, parents[:, :, None].expand(-1, -1, start))
        seen = torch.cat([torch.nn.functional.pad(self.seen, (0, count)), torch.cat([inherited, own], 2)], 1)
        return Tree(
            torch.cat([self.tokens, tokens.masked_fill(dead, 0)], 1),
            torch.cat([self.parents, parents], 1),
            torch.cat([self.depths, self.depths.gather(1, parents) + 1], 1),
            torch.cat([self.scores, scores], 1),
            seen,
            (*self.levels, start + count),
        )


def _best(likely: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if count == 1:  # a maximum is many times faster on a GPU than a selection
        return likely.max(-1, keepdim=True)
    return likely.topk(count, dim=-1)
