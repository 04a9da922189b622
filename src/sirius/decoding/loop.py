"""The decoding loop: start, then rounds of draft, verify, accept, keep, for any number of rows side by side.

Between rounds each row holds every token but the newest, all of it written by the full model. A round of a row that
holds n tokens, by slots of the cache:

    held    [0 ........ n)
    draft   [0 ........ n)[n .. )        a tree of guesses, level by level, written by the draft model: provisional
    verify  [0 ........ n)[n .... )      the same slots again and the deepest level's, written by the full model
    keep    [0 .......... n+kept+1)      the accepted branch, gathered into place; the rest is free
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import isnan, log
from typing import NamedTuple

import torch
from torch import Tensor

from sirius.core import LanguageModel, Mode, Round, Verdict, Window
from sirius.decoding.accept import Check, Rule, Verified, accept, accept_own
from sirius.decoding.host import Stopwatch, answers_at_once, fetch, send
from sirius.decoding.lookup import Lookup, NGrams, Used
from sirius.decoding.period import PROBE_TOKENS, Measured, Period
from sirius.decoding.sampling import Noise
from sirius.decoding.tree import Tree
from sirius.errors import ModelError, RequestError, SiriusError
from sirius.scoring import Lines, Processor, SharedProcessor, ask
from sirius.shortage import ran_out


@dataclass(frozen=True)
class Plan:
    """How texts are decoded.

    period       K, from round to round; 1 drafts nothing, so every round is one pass of the verifier
    rule         tells which guesses are accepted
    verifier     the mode of the pass that ends a round: DENSE, or SPARSE to decode with the draft model alone
    ends         token ids that end a text: a branch that reaches one goes no further
    width, prune, temperature   of the tree, see `CorrectionConfig`
    confidence   a chain ends after a guess to which the draft gives less probability
    lookup       takes guesses from the texts themselves where that is faster; None: never
    window       returns the nodes of a tree that a check reads and writes
    accept       checks a tree's guesses by the rule
    """

    period: Period = field(default_factory=lambda: Period(1))
    rule: Rule = accept_own
    verifier: Mode = Mode.DENSE
    ends: frozenset[int] = frozenset()
    width: int = 1
    prune: float = 0.0
    temperature: float = 1.0
    confidence: float = 0.0
    lookup: Lookup | None = None
    window: Callable[[Tree], Window] = Tree.window
    accept: Callable[[Check, Tensor, Rule], Verified] = accept


@dataclass
class Row:
    """A text at work.

    tokens   the prompt's and the new ones
    room     how many more new tokens the budget allows
    slots    of the cache to begin with, enough for the prompt and one tree
    process  applied to the scores of both models before a token is chosen
    noise    random numbers that make the choice a sample; None is greedy
    grams    the text's n-grams, of which guesses are looked up
    new      how many new tokens there are
    error    why the text cannot go on; the other rows do

    keep_scores  whether rounds return the scores of their tokens
    stateless    whether `process` keeps no state. If it may, nothing is drafted in the batch, so that the processor is
                 called once for each token
    """

    tokens: list[int]
    room: int
    slots: int
    process: Processor | SharedProcessor | None = None
    noise: Noise | None = None
    keep_scores: bool = False
    stateless: bool = True
    grams: NGrams | None = None
    new: int = 0
    error: SiriusError | None = None


def start(model: LanguageModel, row: Row) -> Tensor:
    """Read a row's prompt with the full model, observed by the sparsity method; return the next token's scores [V]."""
    return model.open(send(row.tokens, model.device), row.slots)


def first_round(rows: Sequence[Row], raw: Sequence[Tensor]) -> list[Round | None]:
    """Choose the rows' first tokens.

    raw  the scores [V] after each row's prompt

    Returns a round of each row, None for a row with an error.
    """
    calls = []
    for row, line in zip(rows, raw, strict=True):
        scores = line.clone() if row.process else line
        calls.append(_ProcessorCall(row, send(row.tokens, line.device)[None], scores[None], line[None]))
    pairs = zip(calls, _run_calls(calls), strict=True)
    return [_choose_first(each.row, each.raw, answer) for each, answer in pairs]


def _choose_first(row: Row, raw: Tensor, scores: Tensor) -> Round | None:
    token = add_noise([row], scores[None], 0)[0].argmax(-1)
    [token, logprob] = fetch(token, raw.log_softmax(-1)[0, token])
    verdict = Verdict((), int(token), "full", ())
    return _add_tokens(row, (int(token),), (float(logprob),), verdict, (raw, scores))


def next_round(model: LanguageModel, rows: Sequence[Row], plan: Plan) -> list[Round | None]:
    """Run one round: draft, verify, accept, keep. Returns each row's round, None for a row with an error."""
    watch = Stopwatch(model.device)
    stateless = all(row.stateless for row in rows)
    looked_up = look_up(model, rows, plan) if stateless else None
    if looked_up is not None:
        tree, period = looked_up, len(looked_up.levels) - 1
    else:
        period = plan.period.choose(len(rows)) if stateless else 1
        tree = draft(model, rows, plan, period)
    watch.mark()
    raw, check = verify(model, rows, tree, plan)
    verified = plan.accept(check, raw, plan.rule)
    watch.mark()
    rounds = keep(model, rows, verified, (raw, check.scores), period, looked_up is not None)
    verdicts = verified.verdicts
    kept, rejected = sum(v.accepted for v in verdicts), sum(v.origin == "correction" for v in verdicts)
    drafted, checked = watch.laps()
    if looked_up is None:
        plan.period.learn(Measured(len(rows), drafted, checked, len(tree.levels) - 2, kept, rejected))
    if plan.lookup is not None:
        plan.lookup.learn(looked_up and Used(period - 1, rejected == 0), 1 + kept / len(rows), drafted + checked)
    return rounds


def look_up(model: LanguageModel, rows: Sequence[Row], plan: Plan) -> Tree | None:
    """Return chains of guesses from the texts themselves; None where guesses are to be drafted."""
    if plan.lookup is None or not all(row.room > 1 for row in rows):
        return None
    texts = [(row.grams, row.tokens, row.room - 1) for row in rows if row.grams is not None]
    found = plan.lookup.propose(texts) if len(texts) == len(rows) else None
    if found is None:
        return None
    ends = [next((at + 1 for at, token in enumerate(each) if token in plan.ends), len(each)) for each in found]
    most = max(ends)
    padded = [[row.tokens[-1], *each, *[0] * most][: most + 1] for row, each in zip(rows, found, strict=True)]
    return Tree.chain(send(padded, model.device), send(ends, model.device) + 1)


def draft(model: LanguageModel, rows: Sequence[Row], plan: Plan, period: int) -> Tree:
    """Guess up to period-1 tokens on every branch, one sparse pass a level, as far as budget and ends of text allow.

    A branch that ends the text goes no further, nor does a chain after a guess that the draft gives less probability
    than the plan's `confidence`. No branch of a row does, once it is more likely that the text has ended
    than that it goes on. On a GPU the host does not wait to learn whether any branch goes on: it runs every level.
    """
    tree = Tree.root(send([row.tokens[-1] for row in rows], model.device))
    depths = [min(period, row.room) - 1 for row in rows]
    depth, ends = send(depths, model.device), send(sorted(plan.ends), model.device)
    sure = torch.ones(len(rows), 1, dtype=torch.bool, device=model.device)
    for level in range(max(depths)):
        here = tree.last
        scores, ended = tree.scores[:, here], (tree.tokens[:, here, None] == ends).any(-1) & (level > 0)
        over, on = (torch.where(which, scores, -torch.inf).logsumexp(1, keepdim=True) for which in (ended, ~ended))
        going = ~ended & (scores > -torch.inf) & (over <= on) & (depth[:, None] > level) & sure
        if answers_at_once(going) and not bool(going.any()):
            break
        scores = model.read(tree.tokens[:, here], Mode.SPARSE, tree.window(here))
        likelihood = process_scores(rows, tree, [here], scores)
        scores = add_noise(rows, likelihood, level)
        if plan.confidence and answers_at_once(scores):
            guess = scores.argmax(-1, keepdim=True)
            sure = likelihood.gather(-1, guess)[..., 0] - likelihood.logsumexp(-1) >= log(plan.confidence)
        chain = plan.width == 1  # its one branch is ranked against none
        likely = scores if chain else torch.log_softmax(scores / plan.temperature, dim=-1)
        tree = tree.grow(likely.masked_fill(~going[..., None], -torch.inf), plan.width, plan.prune)
    return tree


def verify(model: LanguageModel, rows: Sequence[Row], tree: Tree, plan: Plan) -> tuple[Tensor, Check]:
    """Read the newest token and every guess in one pass, over the draft's own slots.

    Returns the verifier's scores [B, N, V], and the check, which holds them after the rows' processors.
    """
    raw = model.read(tree.tokens, plan.verifier, plan.window(tree))
    levels = [slice(a, b) for a, b in zip(tree.levels, tree.levels[1:], strict=False)]
    scores = process_scores(rows, tree, levels, raw)
    choice = [add_noise(rows, scores[:, here], depth).argmax(-1) for depth, here in enumerate(levels)]
    return raw, Check(tree, scores, torch.cat(choice, 1))


def keep(
    model: LanguageModel,
    rows: Sequence[Row],
    verified: Verified,
    scores: tuple[Tensor, Tensor],
    period: int,
    looked_up: bool = False,
) -> list[Round | None]:
    """Gather each row's accepted branch into place in the cache, and add its tokens to the text.

    scores     the verifier's [B, N, V] before and after processors
    looked_up  whether guesses come from the texts themselves
    """
    verdicts = verified.verdicts
    rounds: list[Round | None] = []
    for b, (row, verdict) in enumerate(zip(rows, verdicts, strict=True)):
        tokens, guessed = verified.tokens[b], verified.guessed[b]
        logprobs = [*(guessed[node] for node in verdict.path), verified.added[b]]
        nodes = [0, *verdict.path]
        taken = (*(tokens[node] for node in verdict.path), verdict.next)
        seen = (scores[0][b, nodes], scores[1][b, nodes]) if row.keep_scores else scores
        done = _add_tokens(row, taken, tuple(logprobs), verdict, seen)
        branch = tuple(tokens[node] for node in verdict.tip)
        known = tuple(guessed[node] for node in verdict.tip)
        drawn = {"steps": verified.depth[b], "period": period, "looked_up": looked_up}
        rounds.append(done and replace(done, draft=branch, guessed=known, **drawn))
    counts = [0 if row.error else 1 + len(v.path) for row, v in zip(rows, verdicts, strict=True)]
    paths = [([0, *v.path] + [0] * max(counts))[: max(counts)] for v in verdicts]
    model.keep(torch.tensor(paths, dtype=torch.int64), torch.tensor(counts))
    return rounds


def _add_tokens(
    row: Row,
    tokens: tuple[int, ...],
    logprobs: tuple[float, ...],
    verdict: Verdict,
    scores: tuple[Tensor, Tensor],
) -> Round | None:
    """Add kept guesses and the token after them to a row; `scores` of these tokens before and after processors."""
    if row.error is None and any(map(isnan, logprobs)):
        row.error = ModelError(
            "the model's scores are not numbers; its weights are damaged, or dtype is too narrow for it"
        )
    if row.error is not None:
        return None
    row.tokens += tokens
    row.room -= len(tokens)
    row.new += len(tokens)
    if row.noise is not None:
        row.noise.forget(max(0, row.new - PROBE_TOKENS))  # a probe reads tokens up to there
    raw, processed = (each.clone() for each in scores) if row.keep_scores else (None, None)
    origins = ("draft",) * len(verdict.path) + (verdict.origin,)
    return Round(tokens, origins, logprobs, accepted=verdict.accepted, scores=processed, logits=raw)


def process_scores(rows: Sequence[Row], tree: Tree, levels: Sequence[slice], scores: Tensor) -> Tensor:
    """Return scores [B, m, V] changed by the rows' processors.

    levels  the nodes of the tree that the scores follow, m in all
    """
    if not any(row.process for row in rows):
        return scores
    changed = scores.clone()
    for level in levels:
        here = slice(level.start - levels[0].start, level.stop - levels[0].start)
        _write_processed(rows, tree, level, scores[:, here], changed[:, here])
    return changed


def _write_processed(rows: Sequence[Row], tree: Tree, level: slice, raw: Tensor, scores: Tensor) -> None:
    """Write to `scores` the raw ones [B, m, V] after the nodes of a level, changed by the rows' processors."""
    calls, targets = [], []
    for b, row in enumerate(rows):
        nodes = tree.alive[b, level].nonzero()[:, 0] + level.start
        if row.process is not None and len(nodes):
            branches = tree.tokens[b].expand(len(nodes), -1)[tree.seen[b, nodes]].view(len(nodes), -1)
            held = torch.tensor(row.tokens[:-1], device=scores.device).expand(len(nodes), -1)
            targets.append((b, slice(None) if len(nodes) == scores.shape[1] else nodes - level.start))
            calls.append(_ProcessorCall(row, torch.cat([held, branches], 1), scores[targets[-1]], raw[targets[-1]]))
    for target, answer in zip(targets, _run_calls(calls), strict=True):
        scores[target] = answer


class _ProcessorCall(NamedTuple):
    """The arguments of one call of a row's processor.

    tokens  [m, n] int64  m branches, from the beginning of the text
    scores  [m, V]        of the tokens that follow them; a copy, to which the processor may write
    raw     [m, V]        the model's own
    """

    row: Row
    tokens: Tensor
    scores: Tensor
    raw: Tensor


def _run_calls(calls: Sequence[_ProcessorCall]) -> list[Tensor]:
    """Return the scores that processors give; rows that share a processor are handed to it in one call."""
    answers = [call.scores for call in calls]
    together: dict[int, list[int]] = {}
    for index, (row, *_) in enumerate(calls):
        if row.process is not None and row.error is None:
            key = id(row.process.act if isinstance(row.process, SharedProcessor) else row)
            together.setdefault(key, []).append(index)
    for indices in together.values():
        for index, answer in zip(indices, _run_together([calls[index] for index in indices]), strict=True):
            answers[index] = answer
    return answers


def _run_together(calls: Sequence[_ProcessorCall]) -> list[Tensor]:
    """Apply one row's processor, or the one that rows share; if it fails, these rows get an error.

    They get none here where the model's scores are not numbers, which `_add_tokens` reports. Raises where memory runs
    out.
    """
    process = calls[0].row.process
    try:
        if isinstance(process, SharedProcessor):
            texts = [each.row.process.text for each in calls if isinstance(each.row.process, SharedProcessor)]
            answers = process.act([Lines(t, a.tokens, a.scores) for t, a in zip(texts, calls, strict=True)])
        else:
            assert process is not None
            answers = [ask(process, calls[0].tokens, calls[0].scores)]
        return [_check_answer(answer, each.scores) for answer, each in zip(answers, calls, strict=True)]
    except Exception as error:  # a user's function may raise anything; only these rows end
        if ran_out(error):
            raise
        for each in calls:
            if not bool(each.raw.isnan().any()):
                each.row.error = _processor_error(error, each.row.stateless)
        return [each.raw for each in calls]


def _processor_error(error: Exception, stateless: bool) -> RequestError:
    way = "; if it keeps state from call to call, decode without a draft (correction=1)" if stateless else ""
    failed = RequestError(f"a logits processor failed: {error!r}{way}")
    failed.__cause__ = error
    return failed


def _check_answer(answer: Tensor, scores: Tensor) -> Tensor:
    if answer.shape != scores.shape or not bool(answer.amax(-1).isfinite().all()):
        raise ValueError(f"it must return [{len(scores)}, {scores.shape[1]}] numbers, not all of a line -inf")
    return answer.to(scores)


def add_noise(rows: Sequence[Row], scores: Tensor, depth: int) -> Tensor:
    """Add to scores [B, m, V] the noise of the new token that follows the nodes of a depth, in rows that sample."""
    if not any(row.noise for row in rows):
        return scores
    none = torch.zeros_like(scores[0, 0])
    noise = [row.noise.at(row.new + depth, none) if row.noise else none for row in rows]
    return scores + torch.stack(noise)[:, None]
