"""Processors and criteria that are made for a batch, or keep state, see of it what transformers shows them."""

import logging

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import sirius
from conftest import tiny_model
from sirius.engine import Engine
from sirius.errors import RequestError
from sirius.hf import processors as module

pytestmark = pytest.mark.integration

NEW = 24
MASK = torch.tensor([[0, 0, 1, 1, 1], [1] * 5, [0, 1, 1, 1, 1]])
BATCH = {"input_ids": torch.tensor([[0, 0, 60, 22, 9], [5, 17, 93, 41, 8], [0, 7, 8, 9, 10]]), "attention_mask": MASK}
ALONE = {"input_ids": BATCH["input_ids"][1:2], "attention_mask": MASK[1:2]}
CHAIN, TREE, PLAIN, AUTO = {"period": 5}, {"period": 4, "tree_width": 3}, 1, "auto"


class Budget(LogitsProcessor):
    """Forces a token after so many calls, as a thinking budget does."""

    def __init__(self, calls: int = 9) -> None:
        self.left = calls

    def __call__(self, input_ids, scores):
        self.left -= 1
        return scores if self.left else torch.full_like(scores, -1e4).index_fill_(1, torch.tensor([77]), 0.0)


class Grammar(LogitsProcessor):
    """Takes each new token of each row once, call by call, and refuses anything else with an empty message."""

    def __init__(self, rows: int) -> None:
        self.taken = [[] for _ in range(rows)]
        self.begun = False

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(self.taken)
        if self.begun:
            for row, ids in zip(self.taken, input_ids.tolist(), strict=True):
                row.append(ids[-1])
                assert ids[-len(row) :] == row
        self.begun = True
        scores = scores.clone()
        for line, row in zip(scores, self.taken, strict=True):
            line[[len(row) % 7 + 20, *row[-3:]]] = -torch.inf
        return scores


class PerRow(LogitsProcessor):
    """Holds a number for each row of the batch, and no state."""

    def __init__(self, rows: int) -> None:
        self.banned = torch.arange(30, 30 + rows)

    def __call__(self, input_ids, scores):
        return scores.scatter(1, self.banned[:, None].expand(len(input_ids), 1), -torch.inf)


def both(inputs, correction, model=None, **options):
    """Return transformers' ids and ours; options are made anew for each."""
    model = model or tiny_model(eos_token_id=None)
    common = {"max_new_tokens": NEW, "do_sample": False}
    own = model.generate(**inputs, **common, **{name: make() for name, make in options.items()})
    made = {name: make() for name, make in options.items()}
    mine = model.generate(**inputs, **common, **made, custom_generate=sirius.decode, correction=correction)
    return own, mine


@pytest.mark.parametrize("correction", [CHAIN, TREE, PLAIN, AUTO], ids=["chain", "tree", "plain", "auto"])
@pytest.mark.parametrize("inputs", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("kind", ["budget", "grammar", "per row"])
def test_processors_with_state_or_rows_of_their_own_give_transformers_text(kind, inputs, correction):
    rows = len(inputs["input_ids"])
    make = {"budget": Budget, "grammar": lambda: Grammar(rows), "per row": lambda: PerRow(rows)}[kind]
    own, mine = both(inputs, correction, logits_processor=lambda: LogitsProcessorList([make()]))
    assert torch.equal(own, mine)


@pytest.mark.parametrize("correction", [CHAIN, PLAIN], ids=["chain", "plain"])
def test_rows_that_end_early_stay_before_a_processor_with_state(correction):
    free = tiny_model(eos_token_id=None)
    ended = free.generate(**BATCH, max_new_tokens=NEW, do_sample=False)[1, 5 + 4]
    model = tiny_model(eos_token_id=int(ended))

    own, mine = both(BATCH, correction, model, logits_processor=lambda: LogitsProcessorList([Budget(12), PerRow(3)]))
    assert torch.equal(own, mine)


def test_guidance_as_an_object_gives_transformers_text():
    model = tiny_model(eos_token_id=None)
    unconditional = torch.tensor([[60, 22]])

    def guidance():
        return LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model, unconditional)])

    own, mine = both(ALONE, CHAIN, model, logits_processor=guidance)
    assert torch.equal(own, mine)


class Latch(LogitsProcessor):
    """Acts from the first time on that it sees a text end in certain tokens, guessed ones too."""

    def __init__(self) -> None:
        self.on = False

    def __call__(self, input_ids, scores):
        self.on |= bool((input_ids[:, -1] % 4 == 1).any())
        return scores.flip(1) if self.on else scores


@pytest.mark.parametrize("inputs", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("correction", [CHAIN, TREE], ids=["chain", "tree"])
def test_state_that_no_trial_reaches_gives_the_right_text_or_an_error(inputs, correction):
    try:
        own, mine = both(inputs, correction, logits_processor=lambda: LogitsProcessorList([Latch()]))
    except RequestError as error:
        assert "correction=1" in str(error)
    else:
        assert torch.equal(own, mine)


class AcrossRows(LogitsProcessor):
    """Looks at the neighbours of each row, and keeps nothing."""

    def __call__(self, input_ids, scores):
        favoured = int(input_ids[:, -1].sum()) % scores.shape[1]
        return scores.index_add(1, torch.tensor([favoured]), torch.full((len(scores), 1), 4.0))


@pytest.mark.parametrize("correction", [CHAIN, TREE, PLAIN], ids=["chain", "tree", "plain"])
def test_a_processor_that_looks_at_neighbours_gives_transformers_text(correction):
    own, mine = both(BATCH, correction, logits_processor=lambda: LogitsProcessorList([AcrossRows()]))
    assert torch.equal(own, mine)


def test_that_nothing_is_drafted_is_told_with_its_reason(caplog):
    with caplog.at_level(logging.WARNING, "sirius"):
        both(BATCH, CHAIN, logits_processor=lambda: LogitsProcessorList([Budget()]))
    assert [r.getMessage() for r in caplog.records] == [
        "nothing is drafted, as a logits processor may keep state: calls change what it holds"
    ]


def test_a_failing_processor_is_named_with_its_exception_and_the_way_out():
    class Fails(LogitsProcessor):
        def __call__(self, input_ids, scores):
            raise AssertionError

    model = tiny_model()
    with pytest.raises(RequestError, match=r"AssertionError\(\); if it keeps state .* \(correction=1\)"):
        model.generate(
            **ALONE,
            max_new_tokens=NEW,
            custom_generate=sirius.decode,
            correction=CHAIN,
            logits_processor=LogitsProcessorList([Fails()]),
        )


@pytest.mark.parametrize("state", [Budget, lambda: Grammar(1)], ids=["budget", "grammar"])
def test_a_text_of_a_batch_whose_processor_keeps_state_is_its_own(state):
    engine = Engine(tiny_model(eos_token_id=None))
    prompt = ALONE["input_ids"][0].tolist()
    process = LogitsProcessorList([state()])
    want = engine.model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, logits_processor=process)
    text = engine.text(prompt, max_new_tokens=NEW)
    batch = engine.batch(rows=2, correction=5)
    plain = batch.add(engine.text([60, 22], max_new_tokens=NEW))
    stateful = batch.add(sirius.Text(text.request, text.make_ending, LogitsProcessorList([state()])))
    done = {}
    while batch.busy:
        done |= {update.ticket: update.completion for update in batch.step() if update.completion}
    assert list(done[stateful].token_ids) == want[0, len(prompt) :].tolist()
    assert done[plain].token_ids == engine.generate([60, 22], max_new_tokens=NEW).token_ids


def test_the_usual_processors_are_asked_about_each_line_once(monkeypatch):
    """A batch of B rows must not cost B lines for each row."""
    asked = []
    ask = module._ask
    monkeypatch.setattr(module, "_ask", lambda p, ids, scores: (asked.append(len(ids)), ask(p, ids, scores))[1])
    model = tiny_model(eos_token_id=None)
    options = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    own = model.generate(**BATCH, **options)
    assert torch.equal(own, model.generate(**BATCH, **options, custom_generate=sirius.decode, correction=1))
    assert sum(asked) == 3 * NEW


class AllDone(StoppingCriteria):
    """Keeps for each row whether it has been seen to end, and ends the batch when all have: made for a batch."""

    def __init__(self, rows: int, least: int) -> None:
        self.done, self.least, self.lengths = [False] * rows, least, []

    def __call__(self, input_ids, scores, **kwargs):
        self.lengths.append(input_ids.shape[1])
        for row, ids in enumerate(input_ids[:, 5:].tolist()):
            self.done[row] |= len(ids) >= self.least and ids[-1] % 3 == row % 3
        assert len(self.done) == len(input_ids)
        return False not in self.done


class EachRow(AllDone):
    """Ends each row when it has been seen to end."""

    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.tensor(self.done)


@pytest.mark.parametrize("kind", [AllDone, EachRow])
@pytest.mark.parametrize("least", [1, 10])
@pytest.mark.parametrize("inputs", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("end", [None, 123], ids=["no end", "an end"])
@pytest.mark.parametrize("correction", [CHAIN, TREE, PLAIN], ids=["chain", "tree", "plain"])
def test_criteria_made_for_a_batch_end_it_where_transformers_does(kind, least, inputs, end, correction):
    rows = len(inputs["input_ids"])
    made = []

    def make():
        made.append(kind(rows, least))
        return StoppingCriteriaList([made[-1]])

    own, mine = both(inputs, correction, tiny_model(eos_token_id=end), stopping_criteria=make)
    assert torch.equal(own, mine)
    assert made[0].lengths == made[1].lengths  # asked about each length once, in order


def test_figures_of_a_row_that_criteria_cut_back_are_those_of_what_is_left():
    model = tiny_model(eos_token_id=130)  # never comes
    out = model.generate(
        **BATCH,
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        stopping_criteria=StoppingCriteriaList([EachRow(3, 4)]),
        custom_generate=sirius.decode,
        correction=CHAIN,
    )
    pad = model.generation_config.pad_token_id
    lengths = [len(row) for row in out.sequences[:, 5:].tolist()]
    assert [each.tokens for each in out.stats] == [
        max(i + 1 for i, t in enumerate(row) if t != pad) for row in out.sequences[:, 5:].tolist()
    ]
    assert len(out.scores) == max(lengths)


def test_criteria_that_a_row_passes_after_its_budget_still_cut_it():
    """A quick row has its whole budget before a slow one comes to where the criteria end both."""

    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 5 + 3)

    own, mine = both(BATCH, CHAIN, stopping_criteria=lambda: StoppingCriteriaList([Third()]))
    assert torch.equal(own, mine) and mine.shape[1] == 8


def test_stop_strings_of_a_generation_config_end_a_text(tokenizer):
    model = tiny_model(eos_token_id=None)
    free = model.generate(**ALONE, max_new_tokens=NEW, do_sample=False)[0, 5:].tolist()
    stop = tokenizer.decode(free[6:8])
    options = {"max_new_tokens": NEW, "do_sample": False, "tokenizer": tokenizer}
    want = model.generate(**ALONE, **options, stop_strings=[stop])
    model.generation_config.stop_strings = [stop]
    assert torch.equal(sirius.generate(model, **ALONE, **options, correction=CHAIN), want)
    given = model._prepare_generation_config(None, max_new_tokens=NEW, do_sample=False, stop_strings=[stop])[0]
    model.generation_config.stop_strings = None
    ours = sirius.generate(model, **ALONE, generation_config=given, tokenizer=tokenizer, correction=CHAIN)
    assert torch.equal(ours, want) and want.shape[1] < 5 + NEW


@pytest.mark.parametrize("inputs", [ALONE, BATCH], ids=["alone", "batch"])
def test_a_failing_criterion_is_named(inputs):
    class Fails(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            raise KeyError("me")

    with pytest.raises(RequestError, match=r"stopping criterion failed: .*KeyError\(.*me"):
        tiny_model(eos_token_id=130).generate(
            **inputs,
            max_new_tokens=NEW,
            stopping_criteria=StoppingCriteriaList([Fails()]),
            custom_generate=sirius.decode,
        )


@pytest.mark.parametrize("inputs", [ALONE, BATCH], ids=["alone", "batch"])
@pytest.mark.parametrize("correction", [CHAIN, PLAIN], ids=["chain", "plain"])
def test_a_processor_that_writes_to_the_tokens_is_refused(inputs, correction):
    """transformers would go on with the tokens as they are then."""

    class Writes(LogitsProcessor):
        def __call__(self, input_ids, scores):
            input_ids[:, -1] = 1
            return scores

    with pytest.raises(RequestError, match="writes to the tokens"):
        tiny_model().generate(
            **inputs,
            max_new_tokens=NEW,
            logits_processor=LogitsProcessorList([Writes()]),
            custom_generate=sirius.decode,
            correction=correction,
        )
