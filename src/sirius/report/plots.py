"""Figures as SVG that takes its colours from the page around it. Needs matplotlib, which is an optional extra."""

import io
import re
from collections.abc import Sequence
from typing import Any

from sirius.benchmark.extras import need
from sirius.report.document import Bars, Figure, Panel
from sirius.report.estimate import Estimate

INK = "#1f2328"  # of axes and texts; the page's own colour in the SVG
COLOURS = ("#0b62a4", "#b3470b", "#1f7a4d", "#7b4ba8", "#8a6d00", "#b02a5b")  # told apart by colour-blind readers too
DARK = ("#6cb6ff", "#ff9d5c", "#57c98b", "#c9a2f2", "#e0c04a", "#ff8fb3")  # the same ones on a dark page
MARKERS = ("o", "s", "^", "D", "v", "P")
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (8, 3)))
LEVELS = (0, (2, 2)), (0, (7, 2))  # of lines that do not change along the axis
WIDTH, HEIGHT = 4.6, 3.2  # inches of a panel
LEGEND, BAR = 0.22, 0.34  # inches of a line of the legend and of a bar
ASIDE = 0.07  # of a tick's distance between curves whose error bars would hide each other
LONG_TICKS = 24  # characters of all tick labels above which they are turned
SETTINGS = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a name with dollars is no formula
    "svg.fonttype": "none",  # texts stay texts: they can be searched, and read aloud
    "svg.hashsalt": "sirius",  # the same figure is the same file
    "axes.prop_cycle": f"cycler('color', ['{INK}'])",  # of the ends of error bars at bars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}


def check_plots() -> None:
    """Raise ConfigError, telling how to install it, where there is no matplotlib."""
    need("matplotlib.figure", "plot", "a page with plots (--output)")


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element for a page of HTML.

    name  a prefix that no other figure of the page has
    """
    buffer = io.StringIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with need("matplotlib", "plot", "a plot").rc_context(SETTINGS):
        draw(figure).savefig(buffer, format="svg", transparent=True, metadata=none)
    return _inline(buffer.getvalue(), name)


def draw(figure: Figure) -> Any:
    """Return a figure as matplotlib's."""
    count = len(figure.panels)
    bars = [len(panel.bars) for panel in figure.panels if isinstance(panel, Bars)]
    legend = _legend(figure)
    rows = -(-len(legend) // 2)
    height = (0.9 + BAR * max(bars)) if bars else HEIGHT + LEGEND * rows
    drawn = need("matplotlib.figure", "plot", "a plot").Figure(figsize=(WIDTH * count, height), layout="constrained")
    axes = drawn.subplots(1, count, squeeze=False)[0]
    for one, panel in zip(axes, figure.panels, strict=True):
        _draw_bars(one, panel) if isinstance(panel, Bars) else _draw_curves(one, panel)
        one.set_title(panel.title)
    handles = {label: handle for one in axes for handle, label in zip(*one.get_legend_handles_labels(), strict=True)}
    if handles:
        drawn.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=2, frameon=False, handlelength=3
        )
    return drawn


def _legend(figure: Figure) -> set[str]:
    curves = [panel for panel in figure.panels if isinstance(panel, Panel)]
    return {each.label for panel in curves for each in [*panel.curves, *panel.levels]}


def _draw_curves(axes: Any, panel: Panel) -> None:
    for level in panel.levels:
        colour = INK if level.colour is None else COLOURS[level.colour % len(COLOURS)]
        value, error = level.value.value, level.value.stderr or 0.0
        style = ":" if level.label == "chance" else LEVELS[level.colour % 2] if level.colour is not None else "-"
        axes.axhline(value, color=colour, linewidth=1.2, linestyle=style, label=level.label)
        if error:
            axes.axhspan(value - error, value + error, color=colour, alpha=0.12, linewidth=0)
    for place, curve in enumerate(panel.curves):
        own = curve.colour % len(COLOURS)
        aside = 0.0 if panel.ticks is None else ASIDE * (place - (len(panel.curves) - 1) / 2)
        axes.errorbar(
            [point.x + aside for point in curve.points],
            [point.y.value for point in curve.points],
            yerr=_errors([point.y for point in curve.points]),
            color=COLOURS[own],
            marker="" if panel.steps else MARKERS[own],
            linestyle=STYLES[own],
            drawstyle="steps-mid" if panel.steps else "default",
            markersize=5,
            capsize=3,
            label=curve.label,
        )
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(axis="y", color=INK, alpha=0.15)
    if panel.share:
        axes.set_ylim(-0.03, 1.03)
    if panel.ticks is not None:
        turned = sum(map(len, panel.ticks)) > LONG_TICKS and len(panel.ticks) > 2
        axes.set_xticks(range(len(panel.ticks)), panel.ticks, **({"rotation": 30, "ha": "right"} if turned else {}))


def _draw_bars(axes: Any, panel: Bars) -> None:
    places = range(len(panel.bars))
    axes.barh(
        places,
        [bar.value.value for bar in panel.bars],
        xerr=_errors([bar.value for bar in panel.bars]),
        color=[INK if bar.colour is None else COLOURS[bar.colour % len(COLOURS)] for bar in panel.bars],
        alpha=0.75,
        ecolor=INK,
        capsize=3,
        height=0.6,
    )
    axes.set_yticks(places, [bar.label for bar in panel.bars])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(panel.x)
    axes.grid(axis="x", color=INK, alpha=0.15)


def _errors(values: Sequence[Estimate]) -> list[float]:
    return [value.stderr or 0.0 for value in values]


def _inline(text: str, name: str) -> str:
    """Return matplotlib's SVG as an element of a page: names of its own, and colours that the page sets."""
    element = text[text.index("<svg") :]
    element = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', _opening, element, count=1)
    element = element.replace("xlink:href", "href")
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'href="#', f'href="#{name}-', element)
    element = element.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    for place, colour in enumerate(COLOURS):
        element = element.replace(colour, f"var(--series-{place}, {colour})")
    for part in ("metadata", "style"):  # the style is the page's
        element = re.sub(rf"<{part}\b.*?</{part}>\s*", "", element, flags=re.DOTALL)
    return element


def _opening(found: "re.Match[str]") -> str:
    width, height = (float(each) for each in found[1].split('"')[1].split()[2:])
    return f'<svg {found[1]} width="{width * 4 / 3:.0f}" height="{height * 4 / 3:.0f}" aria-hidden="true">'
