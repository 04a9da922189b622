"""How often the draft guesses right, told by one sparse pass over tokens that the texts already have."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sirius.core import LanguageModel, Mode
from sirius.decoding.accept import Check, accept_own
from sirius.decoding.host import Stopwatch, fetch
from sirius.decoding.loop import Plan, Row, noisy, processed
from sirius.decoding.period import Probed
from sirius.decoding.tree import Tree
from sirius.shortage import SHORTAGE, ran_out


def probe_if_due(model: LanguageModel, rows: Sequence[Row], plan: Plan) -> None:
    """Ask the draft about the rows' last tokens where the period wants to know; texts and cache stay as they are."""
    count = plan.period.probes(len(rows), min(row.new for row in rows))
    if not count or not all(row.stateless for row in rows):
        return
    try:
        plan.period.learn_probe(probe(model, rows, plan, count))
    except SHORTAGE as error:
        if not ran_out(error):
            raise
        plan.period.put_off(len(rows))  # a round needs less


def probe(model: LanguageModel, rows: Sequence[Row], plan: Plan, count: int) -> Probed:
    """Read each row's `count` tokens before the newest one with the sparse model, and tell how many guesses stand.

    A guess stands where it would pass the check, or, in a tree, one of the `width` likeliest tokens would.
    """
    earlier = [replace(row, tokens=row.tokens[:-count], new=row.new - count) for row in rows]
    tree = Tree.chain(torch.tensor([row.tokens[-count - 1 :] for row in rows], device=model.device))
    here = slice(0, count)
    model.rewind(count)
    try:
        watch = Stopwatch(model.device)
        scores = model.read(tree.tokens[:, here], Mode.SPARSE, tree.window(here, fixed=count, apart=True))
        watch.mark()
        guesses = _following(earlier, tree, scores).topk(min(plan.width, scores.shape[-1]), -1).indices
        check = _check(model, earlier, tree, count, plan)
    finally:
        model.keep(torch.arange(count).expand(len(rows), -1), torch.full((len(rows),), count))
    stand = torch.stack([_stands(check, guess, plan) for guess in guesses.unbind(-1)]).any(0)
    [kept] = fetch(stand.sum())
    return Probed(len(rows), watch.laps()[0], count, int(kept), stand.numel())


def _following(rows: Sequence[Row], tree: Tree, scores: Tensor) -> Tensor:
    """Return scores [B, count, V] after the first places, processed and with noise, as tokens are chosen."""
    found = _processed(rows, tree, scores)
    return torch.cat([noisy(rows, found[:, place, None], place) for place in range(found.shape[1])], 1)


def _processed(rows: Sequence[Row], tree: Tree, scores: Tensor) -> Tensor:
    """Return scores [B, count, V] after the first places as the rows' processors leave them."""
    return processed(rows, tree, [slice(place, place + 1) for place in range(scores.shape[1])], scores)


def _check(model: LanguageModel, rows: Sequence[Row], tree: Tree, count: int, plan: Plan) -> Check:
    """Return what the judge says at the tokens: they are its own choice, or under a lossy rule it is asked again."""
    if plan.rule is accept_own:
        return Check(tree, tree.tokens[:, :0], tree.tokens.roll(-1, 1))
    here = slice(0, count)
    scores = model.read(tree.tokens[:, here], plan.judge, tree.window(here, fixed=count))
    return Check(tree, _processed(rows, tree, scores), tree.tokens.roll(-1, 1))


def _stands(check: Check, guess: Tensor, plan: Plan) -> Tensor:
    """Tell which guesses [B, count] pass after the tokens before them."""
    tokens = torch.cat([check.tree.tokens[:, :1], guess], 1)
    return plan.rule(replace(check, tree=replace(check.tree, tokens=tokens)))[:, 1:]
