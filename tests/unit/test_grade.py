"""Grades of worked answers: right, wrong, missing and malformed ones."""

import pytest

from sirius.evaluation import grade

RIGHT, WRONG, MISSING = (1.0, 1.0), (0.0, 1.0), (0.0, 0.0)


def scores(found: dict[str, float]) -> tuple[float, float]:
    return found["exact_match"], found["answered"]


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" It melts. So the answer is (B).", RIGHT),
        (" It melts. So the answer is B.", RIGHT),
        (" It melts. So the answer is b", RIGHT),
        (" THE ANSWER IS: **(B)** ice", RIGHT),
        (" So the answer is (B). Or the answer is (C).", RIGHT),
        (" To see what the answer is, count. So the answer is (B).", RIGHT),
        (" So the answer is (C).", WRONG),
        (" So the answer is a stool.", MISSING),
        (" So the answer is a.", WRONG),
        (" So the answer is B because it is cold.", RIGHT),
        (" So the answer is A balloon.", MISSING),
        (" So the answer is A.", WRONG),
        (" So the answer is B.C. of course.", MISSING),
        (" So the answer is both.", MISSING),
        (" So the answer is", MISSING),
        (" So the answer is\nB", MISSING),
        (" It is B.", MISSING),
        ("", MISSING),
    ],
)
def test_a_letter_counts_only_after_the_phrase(text, want):
    assert scores(grade.grade_letter({"answer": "B"}, [text])) == want


@pytest.mark.parametrize("letter", "ABH")
@pytest.mark.parametrize(
    "said", ["{}", "**{}**.", '"{}"', "{} (17).", "{} - 17", "{}!", "{} = 17", "{} because it is.", "{}.Yes"]
)
def test_every_letter_is_read_alike(letter, said):
    text = f" So the answer is {said.format(letter)}"
    assert scores(grade.grade_letter({"answer": letter}, [text])) == RIGHT


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" So the answer is yes.", RIGHT),
        (' So the answer is "Yes"', RIGHT),
        (" So the answer is no.", WRONG),
        (" So the answer is yesterday.", MISSING),
        (" So the answer is plausible.", MISSING),
        (" Yes.", MISSING),
        ("", MISSING),
    ],
)
def test_a_word_counts_only_after_the_phrase(text, want):
    assert scores(grade.grade_word({"answer": "yes"}, [text])) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" So the answer is 05/01/2021.", RIGHT),
        (" So the answer is 5/1/2021.", RIGHT),
        (" So the answer is 01/05/2021.", WRONG),
        (" So the answer is 05/01/21.", MISSING),
        (" So the answer is May 1, 2021.", MISSING),
        (" 05/01/2021", MISSING),
    ],
)
def test_a_date_counts_with_leading_zeros_or_without(text, want):
    assert scores(grade.grade_date({"answer": "05/01/2021"}, [text])) == want


def test_a_summary_that_is_the_highlights_scores_one_and_an_empty_one_zero():
    doc = {"highlights": "The bridge is open again .\nTrains run as before ."}
    assert grade.grade_summary(doc, [doc["highlights"]]) == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    assert grade.grade_summary(doc, [""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (" The red one.\nQ: next", (1.0, 1.0)),
        (" red", (0.0, 2 / 3)),
        (" blue", (0.0, 0.0)),
        ("", (0.0, 0.0)),
    ],
)
def test_an_answer_about_a_passage_counts_by_its_words(text, want):
    found = grade.grade_passage({"answers_of_people": ["the red one"]}, [text])
    assert (found["em"], found["f1"]) == pytest.approx(want)


def test_of_several_answers_each_is_left_out_in_turn():
    assert grade.grade_passage({"answers_of_people": ["Ada", "the keeper"]}, ["Ada"]) == {"em": 0.5, "f1": 0.5}
    assert grade.grade_passage({"answers_of_people": ["Ada", "the keeper", "ada."]}, ["Ada"])["em"] == 1.0
