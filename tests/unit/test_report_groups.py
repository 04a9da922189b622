"""Which results of sweeps a report puts side by side."""

from pathlib import Path

import pytest

from made_cells import MODEL, oracle, record, studies, write
from sirius.report.build import build
from sirius.report.cells import load_cells
from sirius.report.compare import ModelCells, by_model, vary
from sirius.report.labels import differing, pieces, told_apart, variant_labels
from sirius.report.markdown import markdown

PAPER = {"sparsity": "coarse", "preset": "paper"}


def cells_of(folder: Path, *records: dict) -> ModelCells:
    [found] = by_model(load_cells([write(folder, *records)]))
    return found


def values(cells: ModelCells, name: str) -> list[list]:
    return [line.values for line in cells.lines if line.name == name]


def test_cells_that_differ_in_one_option_are_a_line_in_the_order_of_its_values(tmp_path):
    given = [record(**PAPER, period=period) for period in (16, 4, 8)] + [record(**PAPER, period=4, tree_width=2)]
    cells = cells_of(tmp_path, *given)
    assert values(cells, "period") == [[4, 8, 16]]
    assert values(cells, "tree_width") == [[1, 2]]
    assert {line.name for line in cells.lines} == {"period", "tree_width"}


def test_methods_and_tasks_are_lines_of_their_own(tmp_path):
    given = [
        record(task, sparsity=method, preset="paper", threshold=bar)
        for task in ("gsm8k", "csqa_cot")
        for method in ("coarse", "fine")
        for bar in (0.01, 0.3)
    ]
    assert values(cells_of(tmp_path, *given), "threshold") == [[0.01, 0.3]] * 4


def test_other_items_or_another_prompt_are_never_compared(tmp_path):
    given = [record(), record(**PAPER, period=4), record(**PAPER, period=8, items=20)]
    given.append(record(**PAPER, period=16, changes={"chat": True}))
    cells = cells_of(tmp_path, *given)
    assert cells.lines == []
    assert [len(cells.of(variant)) for variant in cells.variants] == [1, 2, 1]
    assert [cells.difference(cell) is None for cell in cells.cells if cell.corrected] == [True, False, True]
    labels = variant_labels(cells.variants)
    assert sorted(labels.values()) == [
        "gsm8k, 20 items, no chat template",
        "gsm8k, 80 items, chat template",
        "gsm8k, 80 items, no chat template",
    ]


def test_equal_numbers_of_other_items_have_names_that_differ(tmp_path):
    moved = record()
    for sample in moved["samples"]:
        sample["id"] += 1000
    cells = cells_of(tmp_path, record(), moved)
    assert list(variant_labels(cells.variants).values()) == ["gsm8k", "gsm8k #2"]


def test_equal_numbers_of_other_problems_are_never_compared(tmp_path):
    given = [record(changes={"problems": "one"}), record(**PAPER, changes={"problems": "another"})]
    cells = cells_of(tmp_path, *given)
    assert [cells.difference(cell) is None for cell in cells.cells if cell.corrected] == [True]
    same = cells_of(tmp_path / "same", *(record(**each, changes={"problems": "one"}) for each in ({}, PAPER)))
    assert [same.difference(cell) is None for cell in same.cells if cell.corrected] == [False]


def test_of_two_results_of_one_day_the_later_one_is_shown(tmp_path):
    given = [record(changes={"time": time, "commit": time}) for time in ("09:00:00", "17:30:00", "12:00:00")]
    [cell] = cells_of(tmp_path, *given).cells
    assert cell.origins["commit"] == "17:30:00"


def test_the_aal_without_the_interleaved_token_has_no_error_from_accepted_guesses(tmp_path):
    given = [record(**PAPER), record(**PAPER, ablate=["interleave"])]
    errors = {cell.ablated: cell.stats.advance.stderr for cell in cells_of(tmp_path, *given).cells}
    assert errors[()] > 0 and errors["interleave",] is None


def test_the_oracle_is_told_from_a_sweep_of_the_threshold(tmp_path):
    given = [oracle("coarse", bar) for bar in (0.0, 0.1)] + [record(**PAPER, threshold=bar) for bar in (0.1, 0.3)]
    lines = cells_of(tmp_path, *given).lines
    assert {(line.name, line.oracle): line.values for line in lines} == {
        ("threshold", False): [0.1, 0.3],
        ("threshold", True): [0.0, 0.1],
    }


def test_thresholds_stand_in_their_order(tmp_path):
    cells = cells_of(tmp_path, *(record(**PAPER, threshold=bar) for bar in (0.9, 0.1, 0.5)))
    assert values(cells, "threshold") == [[0.1, 0.5, 0.9]]


def test_parts_left_out_stand_beside_the_whole_correction(tmp_path):
    ablated = [record(**PAPER, ablate=part) for part in ("rewrite", "rollback")]
    [group] = cells_of(tmp_path, record(), record(**PAPER), record(**PAPER, tree_width=4), *ablated).components()
    shown = [(cell.ablated, cell.setting["tree_width"]) for cell in group]
    assert shown == [((), 1), ((), 4), (("rewrite",), 1), (("rollback",), 1)]
    assert not by_model(load_cells([write(tmp_path / "b", *(oracle("coarse", bar) for bar in (0.1, 0.5)))]))[
        0
    ].components()


def test_the_cells_in_which_sweeps_cross_stand_for_a_method_with_every_width(tmp_path):
    given = [record(**PAPER, threshold=bar) for bar in (0.05, 0.1, 0.3)]
    given += [record(**PAPER, period=8), record(**PAPER, tree_width=4)]
    cells = cells_of(tmp_path, *given)
    main = cells.main(cells.variants[0], "coarse")
    shown = [(cell.setting["threshold"], cell.setting["period"], cell.setting["tree_width"]) for cell in main]
    assert shown == [(0.1, 16, 1), (0.1, 16, 4)]


def test_a_setting_that_was_decoded_twice_counts_once_and_stays_chosen(tmp_path):
    chosen = record(**PAPER, changes={"choice": "best of tree_width"})
    write(tmp_path / "a", chosen)
    write(tmp_path / "b", record(**PAPER, changes={"date": "2026-12-01"}))
    [cells] = by_model(load_cells([tmp_path / "a", tmp_path / "b"]))
    [cell] = cells.cells
    assert cell.choice == "best of tree_width"
    assert cell.origins["date"] == "2026-12-01"


def test_validation_items_only_name_the_choice(tmp_path):
    [cells] = by_model(load_cells([write(tmp_path, *studies())]))
    assert all(cell.split == "test" for cell in cells.cells)
    chosen = next(cell for cell in cells.cells if cell.choice and cell.setting["sparsity"] == "coarse")
    assert [cell.setting["tree_width"] for cell in cells.options(chosen)] == [1, 4, 8]


def test_models_are_kept_apart_and_one_that_is_not_tested_is_left_out(tmp_path):
    other, third = {**MODEL, "dtype": "torch.float32"}, {**MODEL, "revision": "v2"}
    untested = record(**PAPER, split="validation", changes={"model": third})
    write(tmp_path, record(), record(changes={"model": other}), untested)
    assert [each.model["dtype"] for each in by_model(load_cells([tmp_path]))] == ["torch.bfloat16", "torch.float32"]


def test_understanding_comes_before_reasoning(tmp_path):
    cells = cells_of(tmp_path, record("gsm8k"), record("a_task_of_neither_kind"), record("truthfulqa_gen"))
    assert [each.task for each in cells.variants] == ["truthfulqa_gen", "gsm8k", "a_task_of_neither_kind"]


def test_labels_say_what_differs(tmp_path):
    cells = cells_of(tmp_path, record(**PAPER, prune=0.1), record(**PAPER), record(sparsity="fine", period=4))
    assert differing(cells.cells) == ["prune"]
    settings = [pieces(cell.setting, ["period"], differing(cells.cells)) for cell in cells.cells]
    labels, common = told_apart(settings)
    drafted = "coarse 0.5, threshold 0.1"
    assert labels == [f"{drafted}, prune 0", f"{drafted}, prune 0.1", "fine 0.5, lossless, prune 0"]
    assert common == "w 1"


@pytest.mark.parametrize("name", ["sparsity", "correct"])
def test_options_that_a_cell_lacks_make_no_line(tmp_path, name):
    cells = cells_of(tmp_path, record(), record(**PAPER))
    assert vary(cells.cells, name) == []


def test_a_draft_of_fewer_bits_is_not_taken_for_the_full_model(tmp_path):
    given = [record(), *(record(draft_bits=bits, period=8) for bits in (4, 8, "auto")), record(**PAPER)]
    given += [record(sparsity="coarse", draft_bits=4, correct=False), record(sparsity="coarse", correct=False)]
    given.append(record(sparsity="none", draft_ngram=3, period=8))
    cells = cells_of(tmp_path, *given)
    [variant] = cells.variants
    full = cells.full(variant)
    assert full and pieces(full.setting) == ["full"] and sum(cell.full for cell in cells.cells) == 1
    rule = ["lossless", "K 8", "w 1"]
    assert {tuple(pieces(cell.setting)) for cell in cells.cells if cell.setting.get("period") == 8} == {
        *(("every neuron", bits, *rule) for bits in ("4 bits", "8 bits", "bits auto")),
        ("no draft model", *rule, "ngram 3"),
    }
    assert values(cells, "draft_bits") == [[4, 8, "auto"]]
    [paper] = [cell for cell in cells.cells if cell.setting.get("accept") == "threshold"]
    alone = cells.alone(paper)
    assert alone and "draft_bits" not in alone.setting
    assert "every neuron: the full model" in markdown(build([tmp_path]))
