"""Texts decoded side by side: they join and leave between rounds, and none disturbs another."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from itertools import islice
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sirius import sparsity
from sirius.core import SEEDS, CorrectionConfig, Round, SparsityConfig, check_together
from sirius.decoding.accept import Rule, accept_own
from sirius.decoding.lookup import NGrams
from sirius.decoding.loop import Row, first_round, next_round, start
from sirius.decoding.period import Period
from sirius.decoding.plan import make_plan, refuse_own
from sirius.decoding.probe import probe_if_due
from sirius.decoding.sampling import Noise
from sirius.decoding.stateless import Watch, is_stateless
from sirius.errors import ConfigError, FileError, OutOfMemoryError, RequestError, SiriusError
from sirius.learnt import LearntBefore
from sirius.model.prepare import count_parameters, prepare
from sirius.model.prepared import prepared_of
from sirius.model.quantized import make_twin
from sirius.processors import look_at_lines
from sirius.runtime.room import fitting
from sirius.runtime.session import Session, ordinary
from sirius.runtime.studies import RefreshingSession
from sirius.scoring import SharedProcessor
from sirius.shortage import ran_out, telling
from sirius.stats import Basis, summarise
from sirius.texts import Completion, Ending, Text, Update

Method = TypeVar("Method", bound=Callable[..., Any])
PLAIN = CorrectionConfig(period=1)  # every round is one pass of the full model
GROWTH = 1024  # slots of the cache that a text begins with beyond its prompt; they double when they are used up


@dataclass(eq=False)
class _Entry:
    """A text in the batch, with its rounds so far.

    most     slots of the cache that it needs at most
    least    slots that it begins with where no more are reserved
    seconds  time of all passes that it took part in
    """

    ticket: int
    text: Text
    ending: Ending
    row: Row
    most: int
    least: int
    watch: Watch | None = None
    rounds: list[Round] = field(default_factory=list)
    seconds: float = 0.0


def _one_at_a_time(method: Method) -> Method:
    """Run a batch's method under the model's lock: passes change the model's state and share one workspace."""

    @wraps(method)
    def waiting(self: "Batch", *args: Any) -> Any:
        with self.lock, ordinary():
            return method(self, *args)

    return cast("Method", waiting)


class Batch:
    """Up to `rows` texts at a time on one model, with one sparsity and one correction; further ones wait their turn.

    `step` brings every text on by a round. Rows are independent: under a lossless rule a text is what it would be
    alone. One that ends, fails or is cancelled leaves the others as they are. Threads may share a model: their batches
    take turns, step by step. The model may be called meanwhile, but must not be altered while texts are open.
    """

    def __init__(  # noqa: PLR0913 - a model, its two configurations, and options by their names
        self,
        model: PreTrainedModel,
        chosen: SparsityConfig,
        correction: CorrectionConfig | None,
        *,
        ends: frozenset[int] = frozenset(),
        rows: int = 8,
        compiled: bool = False,
        rule: Rule | None = None,
        period: Period | None = None,
    ) -> None:
        """Open an empty batch.

        correction    None decodes with the draft model alone
        ends          token ids at which drafts stop
        compiled      compile a GPU's passes: minutes at first, then less time a token
        rule, period  in place of those that the correction names, see `Engine.batch`

        Raises ConfigError where the arguments do not fit each other or the model.
        """
        if type(rows) is not int or rows < 1:
            raise ConfigError(f"a batch has a whole number of rows, at least 1; got {rows!r}")
        self.model, kept = model, prepared_of(model)
        self.lock, self.room = kept.lock, kept.slots
        with self.lock, ordinary():
            mlps = prepare(model)
            neurons, self.placed = tuple(mlp.size for mlp in mlps), kept.placed
            self.rows = min(rows, self.placed.rows_of(chosen)) if self.placed else rows
            twin = make_twin(model, chosen, correction, own_period=period is not None)
            self.draft_bits = twin.bits if twin else 0
            self.sparsity = read = replace(chosen, draft_bits=self.draft_bits)
            make, method = RefreshingSession if read.refresh else Session, partial(sparsity.create, read, neurons)
            self.session = make(model, mlps, method, compiled, twin, several=self.rows > 1)
            self.drafted = twin and count_parameters(model, twin.outline)
        self.asked = self.correction = correction
        if self.session.shared is None and twin is None:  # a draft with every weight would save nothing
            looks_up = bool(correction is not None and correction.draft_ngram)
            if not chosen.draft_bits:
                refuse_own(None if looks_up else rule, period)
            self.correction, period = correction if looks_up else PLAIN, period or Period(1)
        learnt = LearntBefore(self.session, self.sparsity, self.correction, self.drafted, compiled)
        lookup = learnt.lookup(self.rows)
        self.plan = make_plan(self.correction, period or learnt.period(self.placed), ends, rule, lookup)
        self.ruled = rule not in (None, accept_own)  # so that nobody knows whether texts are lossless
        self.window = (self.correction.longest - 1) * self.correction.tree_width if self.correction else 0
        self.compiled = compiled
        self.waiting: deque[_Entry] = deque()
        self.active: list[_Entry] = []  # by row of the session
        self.tickets = 0
        self.midway = False  # during a step, and for ever after one that was interrupted

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self.waiting or self.active)

    @_one_at_a_time
    def add(self, text: Text) -> int:
        """Put a text in line and return its ticket; raise ConfigError where its sampling contradicts the rule."""
        request = text.request
        check_together(request.sampling, self.asked)
        hot, seed = request.sampling.temperature > 0, request.sampling.seed
        noise = Noise(int(torch.randint(SEEDS, ())) if seed is None else seed) if hot else None
        most = len(request.prompt) + request.max_new_tokens + self.window
        least = min(most, len(request.prompt) + self.window + GROWTH)
        slots = most if self.compiled or self.placed else least  # growing would compile anew, or hold K/V twice
        row = Row(list(request.prompt), request.max_new_tokens, slots, text.process, noise, text.keep_scores)
        row.grams = NGrams(self.correction.draft_ngram) if self.correction and self.correction.draft_ngram else None
        row.stateless, watch = self._try_processor(text)
        self.tickets += 1
        self.waiting.append(_Entry(self.tickets, text, text.make_ending(), row, most, least, watch))
        return self.tickets

    @property
    def drafts(self) -> bool:
        """Whether anything may be drafted, so that processors are called with guesses."""
        return self.correction is not None and self.correction.period != 1

    def _try_processor(self, text: Text) -> tuple[bool, Watch | None]:
        """Tell whether a text's processor keeps no state, as far as trials show, and return its `Watch` if any."""
        process, held = text.process, text.watched
        if process is None or look_at_lines(process):
            return True, None
        if not self.drafts:
            return False, None  # no trial: without a draft it is called once for each token anyway
        stateless = text.stateless
        if stateless is None:
            assert not isinstance(process, SharedProcessor), "whoever shares a processor says whether it is stateless"
            prompt = torch.tensor([text.request.prompt], device=self.model.device)
            stateless, held = is_stateless(process, prompt, self.model.config.get_text_config().vocab_size), process
        return stateless, Watch(held) if stateless and held is not None else None

    @_one_at_a_time
    def end(self, ticket: int) -> Completion:
        """End a text between rounds, as its reader has enough of it, and return what there is.

        Raises RequestError where it is not at work, or in the midst of a step.
        """
        if self.midway:
            raise RequestError("a text is ended between steps of its batch, not within one")
        for index, entry in enumerate(self.active):
            if entry.ticket == ticket:
                entry.ending.finish()
                completion = self._completed(entry)
                self._close(index)
                return completion
        raise RequestError(f"text {ticket} is not at work in this batch")

    @_one_at_a_time
    def cancel(self, ticket: int) -> None:
        """Drop a text, between rounds; its row is free at once. A ticket that has ended is passed over."""
        self.waiting = deque(entry for entry in self.waiting if entry.ticket != ticket)
        for index, entry in enumerate(self.active):
            if entry.ticket == ticket:
                self._close(index)
                return

    @_one_at_a_time
    def step(self) -> list[Update]:
        """Read the prompts of texts for which there is a row, or bring every row on by a round.

        Raises RequestError after a step that ended midway (Ctrl-C, an error of the model): rows are half written then.
        """
        if self.midway:
            raise RequestError("a step of this batch ended midway, so its texts cannot go on; open another batch")
        self.midway = True
        count = self._joining()
        updates = self._admit(count) if count else self._round()
        self.midway = False
        return updates

    def _joining(self) -> int:
        """Return how many waiting texts join now: as many as there are rows, and slots where those were planned."""
        count = min(self.rows - len(self.active), len(self.waiting))
        active, waiting = ([entry.most for entry in each] for each in (self.active, islice(self.waiting, count)))
        return count if self.room is None else fitting(self.room, active, waiting)

    def _admit(self, count: int) -> list[Update]:
        """Read the prompts of the next waiting texts, one after the other, and choose their first tokens together."""
        failed, read = [], []
        for _ in range(count):
            entry, began = self.waiting.popleft(), perf_counter()
            try:
                read.append(self._read_prompt(entry))
            except (RequestError, FileError) as error:
                self._close_unread()
                failed.append(Update(entry.ticket, "", Round(()), error=error))
            else:
                self.active.append(entry)
            entry.seconds += perf_counter() - began
        entries = self.active[len(self.active) - len(read) :]
        try:
            with telling(max((entry.row.slots for entry in entries), default=0)):
                rounds = first_round([entry.row for entry in entries], read)
        except OutOfMemoryError as error:
            return failed + [self._end_with_error(self.active.index(entry), error) for entry in entries]
        _check_watches(entries)
        took = [self._add_round(entry, done) for entry, done in zip(entries, rounds, strict=True)]
        return sorted(failed + took, key=lambda update: update.ticket)

    def _read_prompt(self, entry: _Entry) -> Tensor:
        """Read a prompt; if memory suffices, reserve the slots of all waiting texts first, so that rows move once."""
        waiting = self.waiting if self.room is None else ()  # a budget may have no room for these
        rows = min(self.rows, len(self.active) + 1 + len(waiting))
        slots = max(e.row.slots for e in (*self.active, entry, *islice(waiting, self.rows)))
        try:
            with telling(slots):
                self.session.reserve(rows, slots)
                return start(self.session, entry.row)
        except OutOfMemoryError:
            self._close_unread()
        self.session.release()
        entry.row.slots = entry.least
        with telling(entry.row.slots):
            self.session.reserve(len(self.active) + 1, entry.row.slots)
            return start(self.session, entry.row)

    def _round(self) -> list[Update]:
        """Bring every row on by a round; without memory for that the longest text ends, without weights to read all."""
        failed, released = self._grow(), False
        while self.active:
            lengths = self._lengths()
            try:
                with telling(max(lengths)):
                    done = self._advance()
            except (OutOfMemoryError, FileError) as error:
                called = any(not entry.row.stateless for entry in self.active)  # a processor that keeps state
                if isinstance(error, FileError) or called or lengths != self._lengths():  # or tokens were kept already
                    return failed + [self._end_with_error(0, error) for _ in lengths]
                if released:
                    failed.append(self._end_with_error(lengths.index(max(lengths)), error))
            else:
                return failed + [self._add_round(*each) for each in done]
            self.session.release()
            released = True
        return failed

    def _grow(self) -> list[Update]:
        """Reserve the slots of the next round; while memory does not suffice, end the longest text."""
        failed: list[Update] = []
        while self.active and (error := self._make_room()) is not None:
            lengths = self._lengths()
            failed.append(self._end_with_error(lengths.index(max(lengths)), error))
        return failed

    def _make_room(self) -> OutOfMemoryError | None:
        """Double the cache, or enlarge it by `GROWTH`, if the next round needs that; return the error of failing."""
        held, error = self.session.slots, None
        needs = [(length + self.window, entry.most) for length, entry in zip(self._lengths(), self.active, strict=True)]
        if max(needs)[0] <= held:
            return None
        for least, more in (2 * held, 0), (0, GROWTH):
            slots = max(min(max(least, need + more), most) for need, most in needs)
            try:
                with telling(slots):
                    self.session.reserve(len(self.active), slots)
                    return None
            except OutOfMemoryError as short:
                error = short
            self.session.release()
        return error

    def _lengths(self) -> list[int]:
        return [len(entry.row.tokens) for entry in self.active]

    def _advance(self) -> list[tuple[_Entry, Round | None]]:
        began, rows = perf_counter(), [entry.row for entry in self.active]
        probe_if_due(self.session, rows, self.plan)
        rounds = next_round(self.session, rows, self.plan)
        _check_watches(self.active)
        seconds = perf_counter() - began
        pairs = list(zip(self.active, rounds, strict=True))
        for entry, _ in pairs:
            entry.seconds += seconds
        return pairs

    def _add_round(self, entry: _Entry, done: Round | None) -> Update:
        """Add a round to a text, up to where the text ends; a text that has ended frees its row."""
        if entry.row.error is not None or done is None:
            assert entry.row.error is not None
            return self._end_with_error(self.active.index(entry), entry.row.error)
        ending = entry.ending
        shown = len(ending.text)
        try:
            used = done.until(ending.push(done.tokens))
        except Exception as error:  # a user's criterion may raise anything; only this text ends
            failure = (OutOfMemoryError if ran_out(error) else RequestError)(f"a stopping criterion failed: {error!r}")
            failure.__cause__ = error
            return self._end_with_error(self.active.index(entry), failure)
        entry.rounds.append(used)
        if not ending.stopped and entry.row.room:
            return Update(entry.ticket, ending.text[shown:], used)
        ending.finish()
        completion = self._completed(entry)
        self._close(self.active.index(entry))
        return Update(entry.ticket, ending.text[shown:], used, completion)

    def _completed(self, entry: _Entry) -> Completion:
        rounds, ending = entry.rounds, entry.ending
        touched, kept = self.session.touched(self.active.index(entry))
        sampled = entry.text.request.sampling.temperature > 0
        read = touched, self.correction, self._lossless(sampled), kept, self.drafted, self.draft_bits
        basis = Basis(count_parameters(self.model), *read)
        return Completion(
            ending.text,
            tuple(token for r in rounds for token in r.tokens),
            "stop" if ending.stopped else "length",
            tuple(origin for r in rounds for origin in r.origins),
            tuple(logprob for r in rounds for logprob in r.logprobs),
            summarise(rounds, basis, entry.seconds),
            basis,
        )

    def _lossless(self, sampled: bool) -> bool:
        plain = self.correction is not None and self.correction.period == 1
        if not self.session.invariant and not (plain and self.rows == 1):
            return False
        whole = self.sparsity.keep == 1 and self.sparsity.threshold is None and not self.sparsity.draft_bits
        if self.correction is None:
            return whole
        # the likeliest branch of a whole draft need not be the greedy one, and a guess from the text is no draft's
        chain = self.correction.tree_width == 1 and not self.correction.draft_ngram
        return (whole and chain) or (self.correction.lossless(sampled) and (plain or not self.ruled))

    def _close_unread(self) -> None:
        """Drop the row of a prompt where memory ran out before its first token."""
        while len(self.session.methods) > len(self.active):
            self.session.close(len(self.session.methods) - 1)

    def _end_with_error(self, index: int, error: SiriusError) -> Update:
        """Drop a row, and return the update with its text's error."""
        ticket = self.active[index].ticket
        self._close(index)
        return Update(ticket, "", Round(()), error=error)

    def _close(self, index: int) -> None:
        self.session.close(index)
        self.active[index] = self.active[-1]
        self.active.pop()


def _check_watches(entries: Sequence[_Entry]) -> None:
    for entry in entries:
        if entry.watch is not None and entry.row.error is None:
            entry.row.error = entry.watch.failure()
