"""Decoding over the toy model: nothing here needs transformers."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Toy, begin, slow
from sirius.core import Mode, Round
from sirius.decoding import accept, studies
from sirius.decoding.accept import accept_own
from sirius.decoding.loop import Plan, Row, next_round
from sirius.decoding.period import Period
from sirius.decoding.sampling import Noise
from sirius.errors import ModelError, RequestError

PROMPT = [3, 1, 4]
WIDTHS = [1, 2, 3, 4, 8]


def make_row(prompt: list[int], new_tokens: int, plan: Plan, **options) -> Row:
    window = (plan.period.now - 1) * plan.width
    return Row(list(prompt), new_tokens, len(prompt) + new_tokens + window, **options)


def plan_of(period: int = 1, width: int = 1, **options) -> Plan:
    return Plan(Period(period), width=width, temperature=0.6, **options)


def decode(toy: Toy, row: Row, plan: Plan) -> list[Round]:
    """Run a row alone until its budget is used up."""
    rounds = [begin(toy, row)]
    while row.room and row.error is None:
        rounds += next_round(toy, [row], plan)
    return rounds


def together(toy: Toy, plan: Plan, rows: list[Row], joins: Callable[[], bool] = lambda: True) -> None:
    """Run rows side by side; one that has ended is closed, and a waiting one joins whenever `joins` says so."""
    waiting, active = list(rows), []
    while waiting or active:
        if waiting and (not active or joins()):
            active.append(waiting.pop())
            begin(toy, active[-1])
        else:
            next_round(toy, active, plan)
        for row in [row for row in active if row.error or not row.room]:
            index = active.index(row)
            toy.close(index)
            active[index] = active[-1]
            active.pop()


def dense_greedy(prompt: list[int], new_tokens: int, process: Callable | None = None) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        scores = Toy().scores(tokens, Mode.DENSE)
        scores = process(torch.tensor([tokens]), scores[None])[0] if process else scores
        tokens.append(int(scores.argmax()))
    return tokens[len(prompt) :]


def run(toy: Toy, plan: Plan, prompt: list[int] = PROMPT, new_tokens: int = 60, **options) -> list[Round]:
    return decode(toy, make_row(prompt, new_tokens, plan, **options), plan)


def text(rounds: list[Round]) -> list[int]:
    return [token for r in rounds for token in r.tokens]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0], ids=["perfect", "usual", "hopeless"])
@pytest.mark.parametrize("period", [1, 2, 5, 16, slow(40)])
def test_the_draft_changes_speed_never_text(period, noise, width):
    assert text(run(Toy(noise), plan_of(period, width))) == dense_greedy(PROMPT, 60)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.integers(0, 10), min_size=1, max_size=6),
    st.integers(1, 50),
    st.integers(1, 20),
    st.sampled_from(WIDTHS),
    st.sampled_from([0.0, 1e-3, 0.1]),
    st.floats(0, 1),
)
def test_the_budget_is_met_to_the_token(prompt, new_tokens, period, width, prune, noise):
    rounds = run(Toy(noise), plan_of(period, width, prune=prune), prompt, new_tokens)
    assert text(rounds) == dense_greedy(prompt, new_tokens)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 10), min_size=1, max_size=9), st.integers(1, 40)), min_size=1, max_size=8
    ),
    st.integers(1, 12),
    st.sampled_from(WIDTHS),
    st.floats(0, 1),
    st.data(),
)
def test_rows_that_join_and_leave_at_any_time_keep_their_text(texts, period, width, noise, data):
    toy, plan = Toy(noise), plan_of(period, width)
    rows = [make_row(prompt, budget, plan) for prompt, budget in texts]
    together(toy, plan, rows, joins=lambda: data.draw(st.booleans()))
    for (prompt, budget), row in zip(texts, rows, strict=True):
        assert row.tokens[len(prompt) :] == dense_greedy(prompt, budget)


def test_a_correction_read_at_the_wrong_node_is_caught(monkeypatch):
    """The reference's mistake: on a rejection the scores are taken from the rejected node, not from its parent."""
    right = accept.longest_branches

    def wrong(check, passed):
        found = right(check, passed)
        rejected = (found.tip & ~found.kept).int().argmax(1)  # the first of them, 0 where there is none
        at = torch.where(rejected > 0, rejected, found.end)
        return found._replace(next=check.choice.gather(1, at[:, None])[:, 0])

    monkeypatch.setattr(accept, "longest_branches", wrong)
    for width in WIDTHS:
        assert text(run(Toy(0.3), plan_of(6, width))) != dense_greedy(PROMPT, 60)


def test_a_perfect_draft_is_always_accepted():
    windows = run(Toy(noise=0.0), plan_of(5), new_tokens=1 + 3 * 5)[1:]
    assert [w.accepted for w in windows] == [4, 4, 4]
    assert all(w.origins == ("draft",) * 4 + ("bonus",) for w in windows)


@pytest.mark.parametrize("width", WIDTHS)
def test_after_each_round_a_row_holds_all_but_its_newest_token_written_by_the_full_model(width):
    toy, plan = Toy(noise=0.5), plan_of(6, width)
    row = make_row(PROMPT, 50, plan)
    begin(toy, row)
    while row.room:
        next_round(toy, [row], plan)
        assert [token for token, _ in toy.held[0]] == row.tokens[:-1]
        assert Mode.SPARSE not in {mode for _, mode in toy.held[0]}


@pytest.mark.parametrize("width", WIDTHS)
def test_a_draft_takes_at_most_width_places_a_level(width):
    toy, most = Toy(noise=0.5), 0
    read = toy.read

    def watched(tokens, mode, window):
        nonlocal most
        most = max(most, window.first + tokens.shape[1])
        return read(tokens, mode, window)

    toy.read = watched
    run(toy, plan_of(9, width))
    assert most == 1 + 8 * width


def test_a_draft_goes_no_further_than_an_end_of_text():
    free = dense_greedy(PROMPT, 30)
    end = free[4]
    windows = run(Toy(noise=0.0), plan_of(10, ends=frozenset({end})), new_tokens=30)[1:]
    assert all(end not in w.draft[:-1] for w in windows)
    assert windows[0].draft == tuple(free[1 : free.index(end, 1) + 1])


def test_branches_that_end_leave_the_others_to_go_on():
    ends = frozenset({2, 5})
    windows = run(Toy(noise=0.2), plan_of(8, 4, ends=ends))[1:]
    assert all(not ends & set(w.draft[:-1]) for w in windows)
    assert max(w.steps for w in windows) == 7


def test_a_tree_holds_every_guess_of_the_chain_where_it_keeps_enough_branches():
    chain, tree = (run(Toy(noise=0.3), plan_of(8, width)) for width in (1, 8))
    assert len(tree) <= len(chain)


@pytest.mark.parametrize("ends", [slow(frozenset()), frozenset({2, 5})], ids=["none", "two"])
def test_a_tree_is_no_shorter_than_the_chain_where_texts_may_end(ends):
    """Over texts of one length that go on after an end of text, so that windows alone differ."""

    def windows(width):
        prompts = [[seed, 1, 4] for seed in range(3)]
        return sum(len(run(Toy(0.3), plan_of(8, width, ends=ends), p, new_tokens=120)) - 1 for p in prompts)

    chain = windows(1)
    assert windows(4) <= chain and windows(8) <= chain


def test_no_branch_goes_on_where_the_text_has_more_likely_ended_than_not():
    free = dense_greedy(PROMPT, 30)
    end = free[4]
    plan = Plan(Period(10), ends=frozenset({end}), width=4, temperature=0.05)  # the greedy branch is all but certain
    assert run(Toy(noise=0.0), plan, new_tokens=30)[1].steps == free.index(end, 1)


def test_pruned_branches_cost_no_places():
    def places(prune):
        toy, total = Toy(noise=0.3), 0
        read = toy.read

        def watched(tokens, mode, window):
            nonlocal total
            total += tokens.shape[1]
            return read(tokens, mode, window)

        toy.read = watched
        run(toy, plan_of(8, 8, prune=prune))
        return total

    assert places(0.3) < 0.8 * places(0.0)


def test_a_sparse_verifier_decodes_with_the_sparse_model_alone():
    toy = Toy(noise=1.0)
    rounds = run(toy, plan_of(verifier=Mode.SPARSE), new_tokens=20)
    tokens = PROMPT + text(rounds)
    want = [int(toy.scores(tokens[:n], Mode.SPARSE).argmax()) for n in range(len(PROMPT) + 1, len(tokens))]
    assert text(rounds)[1:] == want


def forbid_repeats(tokens, scores):
    return scores.scatter(1, tokens[:, -3:], -float("inf"))


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("period", [1, 4, 9])
def test_a_processor_sees_every_prefix_of_both_models(period, width):
    rounds = run(Toy(noise=0.4), plan_of(period, width), new_tokens=40, process=forbid_repeats)
    assert text(rounds) == dense_greedy(PROMPT, 40, forbid_repeats)


def test_a_processor_acts_on_the_draft_so_that_a_perfect_one_passes_whole():
    windows = run(Toy(noise=0.0), plan_of(5), new_tokens=1 + 3 * 5, process=forbid_repeats)[1:]
    assert [w.accepted for w in windows] == [4, 4, 4]


def test_noise_acts_on_the_draft_so_that_a_perfect_one_passes_whole():
    windows = run(Toy(noise=0.0), plan_of(5), new_tokens=1 + 3 * 5, noise=Noise(5))[1:]
    assert [w.accepted for w in windows] == [4, 4, 4]


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("interleave", [True, False])
def test_the_automatic_period_is_shown_what_was_kept_and_how_many_drafts_fell_short(width, interleave):
    learnt = []
    plan = plan_of(6, width)
    plan = plan if interleave else studies.without_interleave(plan)
    plan.period.learn = learnt.append
    windows = run(Toy(noise=0.3), plan, new_tokens=80)[1:]
    assert [m.kept for m in learnt] == [w.accepted for w in windows]
    assert [m.rejected for m in learnt] == [int(w.accepted < w.steps) for w in windows]
    assert {m.rejected for m in learnt} == {0, 1}


@pytest.mark.parametrize("width", [1, 4])
def test_scores_logits_and_logprobs_are_those_of_the_full_model_token_by_token(width):
    rounds = run(Toy(noise=0.5), plan_of(5, width), new_tokens=30, process=forbid_repeats, keep_scores=True)
    tokens = PROMPT + text(rounds)
    prefixes = [tokens[:n] for n in range(len(PROMPT), len(tokens))]
    logits = torch.stack([Toy().scores(prefix, Mode.DENSE) for prefix in prefixes])
    scores = torch.cat(
        [forbid_repeats(torch.tensor([p]), line[None]) for p, line in zip(prefixes, logits, strict=True)]
    )
    assert torch.equal(torch.cat([r.logits for r in rounds]), logits)
    assert torch.equal(torch.cat([r.scores for r in rounds]), scores)
    want = logits.log_softmax(-1)[range(30), tokens[len(PROMPT) :]]
    torch.testing.assert_close(torch.tensor([p for r in rounds for p in r.logprobs]), want)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("period", [2, 7])
def test_a_seeded_sample_is_the_same_with_and_without_a_draft(period, width):
    want = text(run(Toy(), plan_of(), noise=Noise(5)))
    got = text(run(Toy(noise=0.3), plan_of(period, width), noise=Noise(5)))
    assert got == want != dense_greedy(PROMPT, 60)


def test_a_row_whose_processor_breaks_ends_alone():
    def breaks(tokens, scores):
        if tokens.shape[1] > 12:
            raise KeyError("no such token")
        return scores

    toy, plan = Toy(0.3), plan_of(4, 2)
    rows = [make_row([7, 8], 40, plan), make_row(PROMPT, 40, plan, process=breaks), make_row([9], 40, plan)]
    together(toy, plan, rows)
    assert isinstance(rows[1].error, RequestError) and "no such token" in str(rows[1].error)
    assert rows[1].tokens[3:] == dense_greedy(PROMPT, len(rows[1].tokens) - 3)
    for row, prompt in ((rows[0], [7, 8]), (rows[2], [9])):
        assert row.tokens[len(prompt) :] == dense_greedy(prompt, 40)


def test_without_the_rewrite_the_drafts_own_entries_stay():
    toy, plan = Toy(noise=0.3), studies.without_rewrite(plan_of(5))
    row = make_row(PROMPT, 40, plan)
    begin(toy, row)
    while row.room:
        next_round(toy, [row], plan)
    assert Mode.SPARSE in {mode for _, mode in toy.held[0]}


def test_without_interleaving_a_draft_that_passes_gets_no_bonus():
    rounds = run(Toy(noise=0.2), studies.without_interleave(plan_of(4)), new_tokens=40)
    assert "bonus" not in {origin for r in rounds for origin in r.origins}
    assert all(r.accepted == len(r.tokens) for r in rounds[1:] if "correction" not in r.origins and r.draft)
    assert text(rounds) == dense_greedy(PROMPT, 40)


def test_without_rollback_every_guess_stays():
    rounds = run(Toy(noise=0.9), studies.without_rollback(plan_of(4)), new_tokens=41)[1:]
    assert all(r.accepted == len(r.draft) for r in rounds)
    assert text(rounds) != dense_greedy(PROMPT, 40)


@pytest.mark.parametrize("where", ["prompt", "later"])
def test_scores_that_are_not_numbers_end_the_row_with_an_error_of_ours(where):
    toy, row = Toy(), make_row(PROMPT, 9, plan_of())
    right = toy.scores
    bad = torch.full((11,), float("nan"))
    toy.scores = lambda tokens, mode: bad if where == "prompt" or len(tokens) > 6 else right(tokens, mode)
    assert decode(toy, row, plan_of())[-1] is None
    assert isinstance(row.error, ModelError)


def test_the_rule_decides_what_is_kept():
    def nothing(check):
        return torch.zeros_like(accept_own(check))

    windows = run(Toy(noise=0.0), plan_of(5, rule=nothing), new_tokens=12)[1:]
    assert [len(w.tokens) for w in windows] == [1] * 11
