"""Growth at toy size: points go along their axes, figures follow from one another, and nothing measured is lost."""

import json
from dataclasses import replace

import pytest
import torch

from conftest import check_integrity, tiny_config, tiny_model
from sirius.benchmark import extras, growth
from sirius.benchmark.decode import Times
from sirius.benchmark.growth import CORRECTED, FULL, PLAIN, SPARSE, Point, Workload, along, make_points
from sirius.engine import Engine
from sirius.errors import ConfigError
from sirius.offload.plan import acceptance

pytestmark = pytest.mark.integration

SMALL = ("--dtype", "float32", "--device", "cpu", "--cycles", 1)
AXES = ("--context", 20, "--context", 9, "--batch", 1, "--batch", 3, "--period", 4, "--period", 2, "--tree-width", 1)
ALL = (*SMALL, *AXES, "--tree-width", 2, "--keep", 0.5, "--keep", 0.2)
ONE = (*SMALL, *AXES, "--axis", "batch")
BASE = Point(20, 1, 4, 1, 0.5)


@pytest.fixture(scope="module")
def shape(tmp_path_factory) -> str:
    """The configuration of a tiny Llama, as one file for all, which a record names."""
    folder = tmp_path_factory.mktemp("shape")
    tiny_config("llama").save_pretrained(folder)
    return str(folder / "config.json")


@pytest.fixture(scope="module")
def written() -> list[tuple[str, str]]:
    """What was printed and written of one axis, once it is measured."""
    return []


@pytest.fixture
def measured(bench, shape, tmp_path, written):
    """Return a record of one axis, and a file of this test's own that holds it."""
    path = tmp_path / "growth.json"
    if not written:
        code, out, _ = bench("growth", "--shape", shape, *ONE, "--output", path, "--json")
        assert code == 0
        written.append((out, path.read_text()))
    printed, record = written[0]
    path.write_text(record)
    return json.loads(printed), path


def test_a_record_has_every_point_with_figures_that_fit_together(bench, shape):
    code, out, _ = bench("growth", "--shape", shape, *ALL, "--json")
    assert code == 0
    record = json.loads(out)
    workload, rows = growth.read_rows(record)
    assert workload.base == BASE
    changes = ({}, {"context": 9}, {"batch": 3}, {"period": 2}, {"tree_width": 2}, {"keep": 0.2})
    assert [row.point for row in rows] == [replace(BASE, **change) for change in changes]
    for row in rows:
        assert min(row.full_ms, row.plain_ratio, row.sparse_ms, row.draft_ms, row.check_ms) > 0
        assert row.break_even == pytest.approx(row.window_ms / row.full_ms, rel=0.01)
        if row.break_even > row.point.period:
            assert row.acceptance is None
        else:
            assert row.acceptance == pytest.approx(acceptance(max(row.break_even, 1), row.point.period), abs=0.01)
    assert {"machine", "commit", "torch", "threads", "kernels", "command", "ceiling"} <= record.keys()


def test_an_advance_that_no_window_has_cannot_pay():
    point = replace(BASE, period=4)
    times = {name: Times(rounds=[1.0, 2.0, 3.0]) for name in (FULL, PLAIN, SPARSE)}
    times[CORRECTED] = Times(rounds=[6.0, 6.0], drafts=[3.0, 3.0], checks=[2.0, 2.0])
    row = growth.make_row(point, times)
    assert (row.full_ms, row.plain_ratio, row.break_even) == (2000, 1, 3)
    assert (row.draft_ms, row.check_ms, row.rest_ms) == (1000, 2000, 1000)
    assert row.acceptance == pytest.approx(acceptance(3, 4), abs=1e-4)
    times[CORRECTED].rounds = [8.1, 8.1]
    assert growth.make_row(point, times).acceptance is None


def test_points_differ_from_the_base_on_one_axis_and_are_measured_once():
    values = {"context": [8, 16], "batch": [2, 1, 2], "period": [4], "tree_width": [1], "keep": [0.5, 0.5]}
    base = Point(8, 2, 4, 1, 0.5)
    assert make_points(values, values) == [base, replace(base, context=16), replace(base, batch=1)]
    assert make_points(values, ["batch"]) == [base, replace(base, batch=1)]


@pytest.mark.parametrize("rows", [1, 3])
def test_every_slot_holds_what_was_really_read(rows):
    """A context is filled with a short prompt's keys and values, none of them the zeros of fresh memory."""
    point = Point(20, rows, 4, 1, 0.5)
    engine, workload = Engine(tiny_model("llama")), Workload(point, "coarse", 2)
    setting = growth.make_settings(point, "coarse")[-1]
    batch = growth.open_filled(engine, setting, point, workload, Times())
    cache = batch.session.cache
    check_integrity(cache)
    assert (cache.lengths[:rows] >= point.context).all()
    for layer in cache.slot_layers:
        for store in layer.stores:
            assert store[:rows, : point.context].abs().amax((2, 3)).min() > 0
            assert torch.equal(store[:rows, 8:16], store[:rows, :8])


def test_a_point_of_trees_and_rows_has_whole_windows_alone():
    point = Point(12, 2, 4, 2, 0.5)
    row = growth.measure(tiny_model("llama"), point, Workload(point, "fine", 3))
    assert row.point == point and row.window_ms > 0


def test_what_was_measured_is_gone_on_with(bench, shape, measured, monkeypatch):
    record, path = measured
    unfinished = {**record, "rows": record["rows"][:1]}
    path.write_text(json.dumps(unfinished) + "\n")
    asked = []
    original = growth.measure
    monkeypatch.setattr(
        growth, "measure", lambda model, point, workload: asked.append(point) or original(model, point, workload)
    )
    code, out, _ = bench("growth", "--shape", shape, *ONE, "--output", path, "--json")
    again = json.loads(out)
    assert code == 0 and asked == [replace(BASE, batch=3)]
    assert again["rows"][0] == record["rows"][0] and again["ceiling"] == record["ceiling"]
    assert json.loads(path.read_text()) == again


def test_an_interrupted_run_leaves_its_points(bench, shape, tmp_path, monkeypatch):
    path, original = tmp_path / "growth.json", growth.measure

    def measure(model, point, workload):
        if point.batch == 3:
            raise KeyboardInterrupt
        return original(model, point, workload)

    monkeypatch.setattr(growth, "measure", measure)
    code, _, err = bench("growth", "--shape", shape, *ONE, "--output", path)
    assert code == 130 and "what was finished is saved" in err
    assert [row["point"]["batch"] for row in json.loads(path.read_text())["rows"]] == [1]


def test_a_record_of_other_options_is_not_gone_on_with(bench, shape, measured):
    _, path = measured
    code, _, err = bench("growth", "--shape", shape, *ONE, "--seed", 1, "--output", path)
    assert code == 2 and "another measurement (seed)" in err


def test_a_record_is_shown_again_without_measuring(bench, shape, measured, monkeypatch):
    record, path = measured
    monkeypatch.delattr(growth, "measure")
    code, out, _ = bench("growth", "--from", path)
    assert code == 0 and "batch 3" in out and "context 20" in out and "\N{HORIZONTAL ELLIPSIS}" not in out
    path.write_text('{"an": "earlier one"}\n' + json.dumps(record) + "\n")
    code, out, _ = bench("growth", "--from", path, "--json")
    assert code == 0 and json.loads(out) == record


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_break_even_lines_are_drawn(bench, measured, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    _, path = measured
    drawn = tmp_path / f"growth{suffix}"
    code, _, _ = bench("growth", "--from", path, "--plot", drawn)
    assert code == 0
    assert drawn.read_bytes().startswith(b"<?xml" if suffix == ".svg" else b"\x89PNG")


def test_without_matplotlib_the_way_to_install_it_is_told_before_measuring(bench, shape, monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(extras, "import_module", missing)
    code, _, err = bench("growth", "--shape", shape, *ONE, "--plot", tmp_path / "growth.svg")
    assert code == 2 and "pip install 'sirius-llm[plot]'" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--axis", "depth"), "--axis is one of context, batch, period, tree_width, keep; got depth"),
        (("--context", 600), "pass the model's limit of 512; lower --context to at most"),
        (("--cycles", 400), "pass the model's limit of 512; lower --cycles"),
        (("--keep", 1.5), "keep is the fraction"),
        (("--sparsity", "none"), "--sparsity none drafts nothing"),
        (("--plot", "growth.pdf"), "--plot writes .svg or .png; got growth.pdf"),
        (("--from", "nowhere.json"), "nowhere.json"),
    ],
)
def test_a_wrong_option_of_growth_is_one_line(bench, shape, options, says):
    code, out, err = bench("growth", "--shape", shape, *SMALL, *options)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and says in err and len(err.splitlines()) == 1


def test_the_help_names_the_defaults(bench):
    code, out, _ = bench("growth", "--help")
    assert code == 0
    for values in growth.VALUES.values():
        assert f"[default: {' '.join(f'{value:g}' for value in values)}]" in " ".join(out.split())


@pytest.mark.parametrize("content", ["", "[]", "not json", '{"rows": []}', '{"workload": {"base": {}}, "rows": []}'])
def test_what_is_no_record_of_growth_is_refused(bench, tmp_path, content):
    path = tmp_path / "record.json"
    path.write_text(content)
    code, out, err = bench("growth", "--from", path)
    assert code == 2 and out == "" and "record" in err


@pytest.mark.parametrize(
    "damage", [{"ceiling": None}, {"ceiling": {}}, {"rows": [{}]}, {"rows": None}], ids=lambda damage: str(damage)
)
def test_a_damaged_record_of_growth_is_refused(bench, measured, tmp_path, damage):
    record, path = measured
    path.write_text(json.dumps({**record, **damage}))
    code, out, err = bench("growth", "--from", path)
    assert code == 2 and out == "" and "record" in err and len(err.splitlines()) == 1


def test_a_figure_that_is_no_number_is_refused(bench, measured):
    record, path = measured
    path.write_text(json.dumps({**record, "rows": [{**record["rows"][0], "full_ms": "x"}]}))
    code, out, err = bench("growth", "--from", path)
    assert code == 2 and out == "" and "full_ms" in err


def test_one_point_makes_no_line(bench, measured, tmp_path):
    pytest.importorskip("matplotlib")
    record, path = measured
    path.write_text(json.dumps({**record, "rows": record["rows"][:1]}))
    code, _, err = bench("growth", "--from", path, "--plot", tmp_path / "growth.svg")
    assert code == 2 and "one point makes no line" in err


def test_the_rows_of_an_axis_are_in_its_order():
    row = growth.GrowthFigures(BASE, 1, 1, 1, 1, 1, 1, 1, 1, None)
    rows = [row, replace(row, point=replace(BASE, keep=0.2)), replace(row, point=replace(BASE, batch=3))]
    assert [each.point.keep for each in along(rows, BASE, "keep")] == [0.2, 0.5]
    with pytest.raises(ConfigError, match="drafts nothing"):
        Workload(BASE, "none", 1)
