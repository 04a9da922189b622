"""A probe: one sparse pass over tokens that the texts already have measures how often the draft guesses right."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sirius.core import LanguageModel, Mode
from sirius.decoding.accept import Check, accept_own, ask_rule
from sirius.decoding.host import Stopwatch, fetch
from sirius.decoding.loop import Plan, Row, add_noise, process_scores
from sirius.decoding.period import Probed
from sirius.decoding.tree import Tree
from sirius.shortage import SHORTAGE, ran_out


def probe_if_due(model: LanguageModel, rows: Sequence[Row], plan: Plan) -> None:
    """Make a probe over the rows' last tokens if the period asks for one; texts and cache do not change."""
    count = plan.period.probes(len(rows), min(row.new for row in rows))
    if not count or not all(row.stateless for row in rows):
        return
    try:
        plan.period.learn_probe(probe(model, rows, plan, count))
    except SHORTAGE as error:
        if not ran_out(error):
            raise
        plan.period.postpone_probe(len(rows))  # decoding goes on, as a round needs less memory


def probe(model: LanguageModel, rows: Sequence[Row], plan: Plan, count: int) -> Probed:
    """Read each row's `count` tokens before the newest one with the draft model, and count the right guesses.

    At each token the guess is the draft model's likeliest one, or in a tree its `width` likeliest ones. It is right if
    it, or one of them, would pass the check there.
    """
    earlier = [replace(row, tokens=row.tokens[:-count], new=row.new - count) for row in rows]
    tree = Tree.chain(torch.tensor([row.tokens[-count - 1 :] for row in rows], device=model.device))
    here = slice(0, count)
    model.rewind(count)
    try:
        watch = Stopwatch(model.device)
        scores = model.read(tree.tokens[:, here], Mode.SPARSE, tree.window(here, fixed=count, apart=True))
        watch.mark()
        guesses = _next_scores(earlier, tree, scores).topk(min(plan.width, scores.shape[-1]), -1).indices
        check = _check(model, earlier, tree, count, plan)
    finally:
        model.keep(torch.arange(count).expand(len(rows), -1), torch.full((len(rows),), count))
    right = torch.stack([_would_pass(check, guess, plan) for guess in guesses.unbind(-1)]).any(0)
    [kept] = fetch(right.sum())
    return Probed(len(rows), watch.laps()[0], count, int(kept), right.numel())


def _next_scores(rows: Sequence[Row], tree: Tree, scores: Tensor) -> Tensor:
    """Return scores [B, count, V] after the first nodes, processed and with noise: the argmax is the next token."""
    scores = _processed_scores(rows, tree, scores)
    return torch.cat([add_noise(rows, scores[:, node, None], node) for node in range(scores.shape[1])], 1)


def _processed_scores(rows: Sequence[Row], tree: Tree, scores: Tensor) -> Tensor:
    """Return scores [B, count, V] after the first nodes as the rows' processors leave them."""
    return process_scores(rows, tree, [slice(node, node + 1) for node in range(scores.shape[1])], scores)


def _check(model: LanguageModel, rows: Sequence[Row], tree: Tree, count: int, plan: Plan) -> Check:
    """Return the verifier's check at the tokens, which are its own choice. Other rules need a pass for its scores."""
    if plan.rule is accept_own:
        return Check(tree, tree.tokens[:, :0], tree.tokens.roll(-1, 1))
    here = slice(0, count)
    scores = model.read(tree.tokens[:, here], plan.verifier, tree.window(here, fixed=count))
    return Check(tree, _processed_scores(rows, tree, scores), tree.tokens.roll(-1, 1))


def _would_pass(check: Check, guess: Tensor, plan: Plan) -> Tensor:
    """Tell which guesses [B, count] would pass, each after the tokens before it, [B, count] bool."""
    tokens = torch.cat([check.tree.tokens[:, :1], guess], 1)
    return ask_rule(plan.rule, replace(check, tree=replace(check.tree, tokens=tokens)))[:, 1:]
