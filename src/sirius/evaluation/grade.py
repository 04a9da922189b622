"""Grades of worked answers: what stands after "the answer is", compared as the task's kind of answer."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

PHRASES = [re.compile(rf"{words}:?[ \t]*", re.IGNORECASE) for words in ("so the answer is", "answer is")]
END = r"(?=[.,:;)]|\s*$)"
OTHER = r"[A-Za-z]|\.[A-Z]\b"  # it is a word, or "D.C."
ARTICLE = r"\s+(?!(?:because|since|as|is|or|and)\b)[A-Za-z]"
LETTER = re.compile(rf"\(([A-Ha-h])\)|([B-H](?!{OTHER})|A(?!{OTHER}|{ARTICLE}))|([a-h]){END}")
WORD = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
DATE = re.compile(r"\W*(\d{1,2})/(\d{1,2})/(\d{4})")


def answer_after(text: str) -> str | None:
    """Return what follows the first "so the answer is" or else "answer is", to the end of its line; None of neither."""
    found = next((match for phrase in PHRASES if (match := phrase.search(text))), None)
    return None if found is None else text[found.end() :].split("\n")[0]


def _letter(text: str) -> str | None:
    found = LETTER.match(text.lstrip(" \t*\"'"))
    return found and (found[1] or found[2] or found[3]).upper()


def _word(text: str) -> str | None:
    found = WORD.match(text)
    return found and found[1].lower()


def _date(text: str) -> str | None:
    found = DATE.match(text)
    return found and f"{int(found[1]):02}/{int(found[2]):02}/{found[3]}"


def _graded(read: Callable[[str], str | None], doc: dict[str, Any], text: str) -> dict[str, float]:
    said = answer_after(text)
    given = None if said is None else read(said)
    return {
        "exact_match": float(given is not None and given == read(doc["answer"])),
        "answered": float(given is not None),
    }


def grade_letter(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for the letter of the right choice, and whether any letter was given."""
    return _graded(_letter, doc, results[0])


def grade_word(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for the right one of yes and no, and whether one was given."""
    return _graded(_word, doc, results[0])


def grade_date(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for the right date as month/day/year, leading zeros or not, and whether a date was given."""
    return _graded(_date, doc, results[0])


def grade_demo(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 for the right answer to a problem of the embedded model, and whether any was given."""
    from sirius.demo.problems import final_answer

    given = final_answer(results[0])
    return {"exact_match": float(given == doc["answer"]), "answered": float(given is not None)}


def grade_summary(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the ROUGE F-measures, 0 to 1, of a summary against the highlights of its article."""
    from rouge_score.rouge_scorer import RougeScorer

    kinds = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}
    scores = RougeScorer(list(kinds.values()), use_stemmer=True).score(doc["highlights"], results[0].strip())
    return {name: scores[kind].fmeasure for name, kind in kinds.items()}


def grade_passage(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return exact match and F1 over words of an answer about a passage, 0 to 1.

    Where people gave several answers, each is left out in turn, and the best of the others counts. Source: CoQA
    (arXiv 1808.07042), section 5, after SQuAD's normalisation.
    """
    given, known = results[0].strip().split("\n")[0], doc["answers_of_people"]
    rounds = [known[:i] + known[i + 1 :] for i in range(len(known))] if len(known) > 1 else [known]
    exact = [max(float(_words(given) == _words(each)) for each in answers) for answers in rounds]
    overlap = [max(_f1(_words(given), _words(each)) for each in answers) for answers in rounds]
    return {"em": mean(exact), "f1": mean(overlap)}


def _words(text: str) -> list[str]:
    """Return the words of an answer, without punctuation and articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _f1(given: Sequence[str], known: Sequence[str]) -> float:
    if not given or not known:
        return float(given == known)
    common = (Counter(given) & Counter(known)).total()
    return 2 * common / (len(given) + len(known))
