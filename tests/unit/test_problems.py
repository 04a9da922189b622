import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sirius.demo.problems import MOST, TASKS, few_shot, final_answer, make_problem

SUM = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}


def reasoning(index: int):
    return make_problem("reasoning", "train", 0, index)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(0, 10**9))
def test_every_sum_of_a_worked_answer_is_right(index):
    problem = reasoning(index)
    sums = SUM.findall(problem.answer)
    assert 2 <= len(sums) <= 5
    for left, sign, right, result in sums:
        assert COMPUTE[sign](int(left), int(right)) == int(result) <= MOST
        assert sign != "/" or int(left) % int(right) == 0
    assert sums[-1][3] == problem.final == final_answer(problem.answer)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(0, 10**9))
def test_a_worked_answer_starts_from_the_story_and_carries_its_value_on(index):
    problem = reasoning(index)
    known = set(map(int, re.findall(r"\d+", problem.question)))
    for left, _, right, result in SUM.findall(problem.answer):
        assert {int(left), int(right)} <= known | {2, 3}, "a number out of nowhere"
        known.add(int(result))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.integers(0, 10**9))
def test_an_understanding_answer_stands_in_the_passage_and_only_once(index):
    problem = make_problem("understanding", "train", 0, index)
    passage = problem.question.rpartition(". ")[0]
    fact = re.search(r"says that (.*?)\. The", problem.answer)
    assert fact and passage.split(". ").count(fact[1]) == 1
    assert problem.final in fact[1] and final_answer(problem.answer) == problem.final


@pytest.mark.parametrize("task", TASKS)
def test_a_problem_is_a_function_of_its_numbers(task):
    assert make_problem(task, "test", 3, 14) == make_problem(task, "test", 3, 14)
    others = [make_problem(task, "train", 3, 14), make_problem(task, "test", 4, 14), make_problem(task, "test", 3, 15)]
    assert make_problem(task, "test", 3, 14) not in others


@pytest.mark.parametrize("task", TASKS)
def test_streams_hardly_repeat_and_test_shares_none_with_training(task):
    train = {make_problem(task, "train", 0, i).question for i in range(3000)}
    test = {make_problem(task, "test", 0, i).question for i in range(300)}
    assert len(train) > 2990 and not train & test


def test_a_few_shot_prompt_shows_solved_problems_and_asks_another():
    messages, asked = few_shot("reasoning", "test", 0, 5, shots=2)
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"] == asked.question
    assert all(final_answer(m["content"]) for m in messages if m["role"] == "assistant")
    assert asked.question not in [m["content"] for m in messages[:-1]]


def test_no_two_few_shot_prompts_share_a_problem():
    shown = [m["content"] for i in range(50) for m in few_shot("reasoning", "test", 0, i)[0] if m["role"] == "user"]
    assert len(set(shown)) == len(shown) == 150


@pytest.mark.parametrize(
    ("text", "answer"),
    [("So 3. The answer is 12.", "12"), ("The answer is red.\nThe answer is blue.", "blue"), ("12.", None), ("", None)],
)
def test_an_answer_is_only_what_is_called_one(text, answer):
    assert final_answer(text) == answer


def test_unknown_tasks_and_splits_are_refused():
    with pytest.raises(ValueError, match="'poetry'"):
        make_problem("poetry", "train", 0, 0)
