"""What a report looks like as Markdown and as HTML: every text as it is, every name once, nothing from elsewhere."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from made_cells import CHANCE, MODEL, record, studies, write
from sirius.report import published
from sirius.report.build import build
from sirius.report.document import Chapter, Column, Facts, Part, Report, Rows, Table
from sirius.report.markdown import escape, markdown
from sirius.report.page import page

ODD = '<b> & "x" $y$ | `z` *a* _b_'
VOID = {"meta", "br"}


class Checked(HTMLParser):
    """Collects the ids, and refuses elements that are closed in another order than they were opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.open += [] if tag in VOID else [tag]
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Report:
    return build([write(tmp_path_factory.mktemp("whole"), *studies())])


@pytest.fixture(scope="module")
def shown(whole) -> str:
    return page(whole)


def test_a_page_is_well_formed_and_needs_nothing_else(shown):
    checked = Checked()
    checked.feed(shown)
    assert checked.open == []
    assert len(checked.ids) == len(set(checked.ids))
    assert {link[1:] for link in checked.links} <= set(checked.ids)
    assert all(link.startswith("#") for link in checked.links)
    assert "<script" not in shown
    assert "@import" not in shown
    assert set(re.findall(r"url\((.)", shown)) <= {"#"}


def test_every_plot_can_be_read_without_seeing_it(shown):
    plots = re.findall(r'<figure><div role="img" aria-label="([^"]+)">\s*(<svg.*?</svg>)', shown, re.DOTALL)
    assert len(plots) == shown.count("<svg") == shown.count("<figcaption>") > 8
    for alt, svg in plots:
        assert "table" in alt
        ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    assert '<html lang="en">' in shown
    assert shown.count("<table>") == shown.count("<caption ")


def test_plots_take_their_colours_from_the_page(shown):
    assert "prefers-color-scheme: dark" in shown
    assert "@media print" in shown
    for svg in re.findall(r"<svg.*?</svg>", shown, re.DOTALL):
        rest = re.sub(r"var\(--series-\d, #\w+\)", "", svg)
        assert not re.findall(r"(?:fill|stroke): #", rest)


def test_the_same_results_are_the_same_page(whole, shown):
    assert page(whole) == shown


def test_texts_are_shown_as_they_are(tmp_path):
    odd = {"model": {**MODEL, "model": ODD}, "machine": ODD, "command": ODD, "choice": ODD}
    method = {"sparsity": "coarse", "preset": "paper"}
    made = [record("a$<i>$task", **method, threshold=bar, changes=odd) for bar in (0.1, 0.3)]
    report = build([write(tmp_path, *made)])
    shown = page(report)
    assert "<b>" not in shown
    assert "<i>" not in shown
    assert "&lt;b&gt; &amp; &quot;x&quot;" in shown
    assert "a$&lt;i&gt;$task" in shown


def test_markdown_escapes_what_would_change_a_table():
    table = Table(ODD, [Column(ODD, text=True), Column("n")], [Rows([[ODD, "-"]], ODD)], [ODD])
    text = markdown(Report(ODD, [], [Chapter("c", [Part("p", [table, Facts([("run", [ODD])], frozenset({"run"}))])])]))
    row = next(line for line in text.splitlines() if line.endswith("| - |"))
    assert row == f"| {escape(ODD)} | - |"
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert f"- run: `` {ODD} ``" in text
    assert escape("two\nlines") == "two lines"


def test_rows_of_markdown_are_as_long_as_their_heading(whole):
    lengths = []
    for line in markdown(whole).splitlines():
        count = len(re.findall(r"(?<!\\)\|", line))
        lengths.append(count)
        if count and len(lengths) > 1 and lengths[-2]:
            assert count == lengths[-2], line


def test_results_that_are_missing_are_dashes(tmp_path):
    alone = {"sparsity": "coarse", "correct": False}
    text = markdown(build([write(tmp_path, record("coqa"), record("coqa", **alone), record("gsm8k", **alone))]))
    row = next(line for line in text.splitlines() if line.startswith("| full |"))
    assert re.fullmatch(r"\| full \| \d\.\d{3} ± \d\.\d{3} \| - \|", row)
    difference = next(line for line in text.splitlines() if "difference to full |" in line and "alone" in line)
    assert difference.endswith("| - |")


def test_parts_stand_only_where_there_are_results(tmp_path):
    titles = [part.title for part in build([write(tmp_path, record())]).chapters[0].parts]
    assert titles == ["What was run"]


def test_all_parts_are_there(whole):
    assert [part.title for part in whole.chapters[0].parts] == [
        "What was run",
        "Understanding against reasoning",
        "Sparsity and correction",
        "Threshold",
        "Period K",
        "Tree width w",
        "Fraction of neurons kept",
        "Parts of the correction",
        "Oracle: how few tokens must be replaced",
        "How far windows go",
    ]


def test_figures_of_cells_are_shown_with_their_errors(tmp_path):
    made = record("truthfulqa_gen", sparsity="fine", preset="paper")
    text = markdown(build([write(tmp_path, made)]))
    score, stats = made["metrics"][made["metric"]], made["stats"]
    [row] = [line for line in text.splitlines() if line.startswith("| fine 0.5, threshold 0.1")]
    parts = [part.strip() for part in row.split("|")[1:-1]]
    assert parts[1] == f"{score['value']:.3f} ± {score['stderr']:.3f}"
    assert parts[2] == "-"
    assert parts[3].startswith(f"{stats['aal']:.2f} ± ") and parts[3].endswith(" / 16")
    assert parts[4:8] == [
        f"{stats['accepted'] / stats['drafted']:.3f}",
        f"{stats['density']:.3f}",
        f"{stats['effective_density']:.3f}",
        f"{(15 * stats['density'] + 1) / stats['aal']:.3f}",
    ]
    assert parts[9] == "lossy"
    assert f"| {CHANCE['truthfulqa_gen']:.3f} |" in text


def test_how_a_setting_was_chosen_is_said(whole):
    text = markdown(whole)
    assert "was chosen as the best of w 1; w 4; w 8 on 20 validation items" in text
    assert text.count("(chosen)") == 2


def test_a_threshold_above_one_half_is_lossless(whole):
    rows = [line for line in markdown(whole).splitlines() if line.startswith("| 0.7 |")]
    assert [row.endswith("| lossless |") for row in rows] == [True, True]


def test_published_lines_follow_the_papers_formula():
    """Effective density from the printed density of two lines of Table 2, as the paper works it out."""
    first = published.TABLE_2["gsm8k", "coarse"][0]
    assert (15 * 0.65 + 1) / first.aal == pytest.approx(first.effective_density, abs=1e-3)
    shorter = published.TABLE_2["csqa_cot", "coarse"][4]
    assert (11 * 0.61 + 1) / shorter.aal == pytest.approx(shorter.effective_density, abs=1e-3)
    assert all(line.aal <= line.period for lines in published.TABLE_2.values() for line in lines)


def test_beside_published_lines_aal_and_density_are_counted_as_there(tmp_path):
    given = [record("gsm8k"), *(record("gsm8k", sparsity="coarse", preset="paper", tree_width=w) for w in (1, 8))]
    stats = {each["setting"].get("tree_width"): each["stats"] for each in given}
    assert stats[8]["aal"] != stats[8]["aal_complete"]
    lines = [line for line in markdown(build([write(tmp_path, *given)])).splitlines() if line.startswith("| ours:")]
    rows = {int(cells[5]): cells for cells in ([each.strip() for each in line.split("|")] for line in lines)}
    for width, aal in ((1, stats[1]["aal"]), (8, stats[8]["aal_complete"])):
        assert rows[width][6] == f"{aal:.2f} / 16"
        assert rows[width][7] == f"{(15 * stats[width]['density'] + 1) / aal:.3f}"
