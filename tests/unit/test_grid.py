"""Grids: every combination once, choices on other items, and one clear line for a bad file."""

import pytest

from sirius.errors import ConfigError, FileError
from sirius.evaluation.grid import Grid, read_grid, study_names
from sirius.evaluation.suite import OWN, check_tasks, task_manager


def grid(*grids, **options) -> Grid:
    return Grid(("gsm8k",), grids, **options)


def labels(found: Grid) -> list[str]:
    return [each.label() for each in found.fixed("gsm8k")]


def test_a_grid_is_every_combination_once():
    found = grid({"sparsity": ["coarse", "fine", "coarse"], "keep": [0.3, 0.5], "correct": False})
    assert labels(found) == ["coarse 0.3", "coarse 0.5", "fine 0.3", "fine 0.5"]


def test_the_full_model_is_one_setting_beside_others():
    assert labels(grid({"sparsity": ["none", "fine"], "keep": [0.3, 0.5], "correct": False})) == [
        "full",
        "fine 0.3",
        "fine 0.5",
    ]


def test_the_papers_preset_is_that_of_the_task_and_what_stands_beside_it_wins():
    found = Grid(("gsm8k", "csqa_cot"), ({"sparsity": "coarse", "preset": "paper", "period": 8},))
    assert found.fixed("gsm8k")[0].label() == "coarse 0.5, threshold 0.1, K 8, w 8"
    assert found.fixed("csqa_cot")[0].label() == "coarse 0.4, threshold 0.05, K 8, w 8"


def test_the_papers_preset_without_correction_keeps_the_neurons_of_the_task():
    found = Grid(("gsm8k", "csqa_cot"), ({"sparsity": "coarse", "preset": "paper", "correct": False},))
    assert [found.fixed(task)[0].label() for task in found.tasks] == ["coarse 0.5", "coarse 0.4"]


def test_the_papers_preset_beside_a_lossless_rule_has_no_threshold():
    found = Grid(("gsm8k",), ({"sparsity": "coarse", "preset": "paper", "accept": "argmax"},))
    assert found.fixed("gsm8k")[0].label() == "coarse 0.5, argmax, K 16, w 8"


def test_a_methods_second_name_is_the_same_setting():
    first, second = (grid({"sparsity": name, "preset": "paper"}) for name in ("coarse", "griffin"))
    assert first.fixed("gsm8k") == second.fixed("gsm8k")
    assert labels(second) == ["coarse 0.5, threshold 0.1, K 16, w 8"]


def test_values_to_choose_among_are_no_settings_of_their_own():
    found = grid(
        {"sparsity": ["coarse", "fine"], "preset": "paper", "tree_width": {"choose": [1, 4]}}, limit=5, validation=5
    )
    assert labels(found) == []
    assert [len(options) for _, options in found.choices("gsm8k")] == [2, 2]


def test_every_study_of_ours_is_a_grid_of_tasks_that_there_are():
    for name in study_names():
        found = read_grid(name, {"limit": 10})
        manager = task_manager(OWN, found.tasks)
        assert all(found.fixed(task) for task in found.tasks)
        check_tasks(found.tasks, None, manager)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: []\ngrids: [{sparsity: none}]", "at least one"),
        ("tasks: [gsm8k]", "grids is a list"),
        ("tasks: [gsm8k]\ngrids: [{spar: coarse}]", "a grid has no spar"),
        ("tasks: [gsm8k]\ngrids: [{keep: []}]", "empty list"),
        ("tasks: [gsm8k]\ngrids: [{keep: 7}]", "keep is the fraction"),
        ("tasks: [gsm8k]\ngrids: [{sparsity: finest}]", "finest"),
        ("tasks: [gsm8k]\ngrids: [{accept: always}]", "always"),
        ("tasks: [gsm8k]\ngrids: [{sparsity: fine, refresh: 0.2}]", "nothing to refresh"),
        ("tasks: [gsm8k]\ngrids: [{sparsity: coarse, sparsity_threshold: 0.1}]", "knows no threshold"),
        ("tasks: [gsm8k]\ngrids: [{sparsity: coarse, per_branch: true}]", "none per branch"),
        ("tasks: [gsm8k]\ngrids: [{keep: {choose: [0.1, 0.2]}}]", "set limit"),
        ("tasks: [gsm8k]\ngrids: [{keep: {choose: [0.1]}}]\nlimit: 1\nvalidation: 1", "at least two"),
        ("tasks: gsm8k\ngrids: [{sparsity: none}]", "tasks and grids are lists"),
        ("tasks: [gsm8k]\ngrids: [{sparsity: none}]\nlimits: 3", "has limits"),
        ("tasks: [gsm8k]\ngrids: [{sparsity: none}]\nlimit: 0", "limit is a whole number"),
        ("- 1", "must be a mapping"),
        ("tasks: [gsm8k]\ngrids: [{accept: threshold}]", "depends on the speed of the machine"),
        ("tasks: [gsm8k]\ngrids: [{sparsity: coarse, shared_set: true}]", "depend on those decoded beside it"),
    ],
)
def test_a_bad_grid_is_told_in_one_line(tmp_path, text, said):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_grid(str(path), {})


def test_a_grid_that_is_not_there_names_our_studies():
    with pytest.raises(FileError, match="table2"):
        read_grid("table3", {})


def test_a_file_that_is_no_yaml_is_told_in_one_line(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("tasks: [gsm8k\n")
    with pytest.raises(FileError, match=r"cannot read .*grid.yaml: .*expected") as raised:
        read_grid(str(path), {})
    assert "\n" not in str(raised.value)
