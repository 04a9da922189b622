"""How the demo looks on a terminal."""

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.rule import Rule
from rich.text import Text

from sirius.core import Round
from sirius.demo.oracle import Point
from sirius.demo.problems import TASKS, few_shot
from sirius.demo.showcase import NEW_TOKENS, DemoFigures, DemoSetting
from sirius.engine import Engine
from sirius.table import Figures

LEGEND = """\
Correction has the paper's setting: windows of 16 tokens, guesses of probability 0.1 or more stay (lossy).
keep: share of the neurons the draft keeps (fine reads its whole gate besides). AAL: tokens per check, at most 16.
density: share of the weights a draft token reads; effective: share read per token, checks included.
tok/s is of this tiny model, where Python takes the time, not memory; density is what counts at size.
"""
LOOKED_AT = 30  # problems, for one with a correction to show
KEPT, REJECTED, CORRECTED, FULL = "green", "red strike", "bold yellow", "cyan"


def table(rows: Sequence[DemoFigures]) -> RenderableType:
    """Return the rows as one table a task."""
    return Group(*(_table(task, [row for row in rows if row.task == task]) for task in TASKS), Text(LEGEND, "dim"))


def example(engine: Engine, settings: Sequence[DemoSetting], seed: int) -> RenderableType:
    """Return one reasoning problem decoded by the first corrected method, every token marked by where it came from.

    It is the first problem of the seed that needed a correction, or the first of all.
    """
    setting = next(s for s in settings if s.correction)
    for index in range(LOOKED_AT):
        question, rounds = _decoded(engine, setting, seed, index)
        if any(_rejected(step) for step in rounds):
            break
    else:
        question, rounds = _decoded(engine, setting, seed, 0)
    legend = Text.assemble(
        ("drafted and kept", KEPT), "  ", ("[rejected]", REJECTED), "  ", ("correction", CORRECTED), "  ",
        ("the full model's own", FULL),
    )  # fmt: skip
    heading = f"one problem, {setting.name}, a line for each round"
    return Group(_Heading(heading), Text(question), Text(), *(_marked(engine, step) for step in rounds), legend)


def curve(points: Sequence[Point]) -> RenderableType:
    """Return the oracle study's points as a table."""
    shown = Figures(title=f"reasoning, {points[0].problems} problems", title_style="", padding=0)
    for name in ("replaced if less likely than", "accuracy", "tokens replaced"):
        shown.add_column(name, justify="right", no_wrap=True)
    for point in points:
        shown.add_row(f"{point.threshold:g}", f"{point.accuracy:.3f} ± {point.stderr:.3f}", f"{point.replaced:.1%}")
    return shown


class _Heading:
    """A heading in a rule, or without one where a terminal is too narrow for that."""

    def __init__(self, words: str) -> None:
        self.words = words

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width >= len(self.words) + 4
        yield Rule(self.words, align="left") if room else Text(self.words)


def _table(task: str, rows: Sequence[DemoFigures]) -> Figures:
    shown = Figures(title=f"{task} ({rows[0].problems} problems)", padding=0)
    shown.add_column("setting", no_wrap=True)
    for name in ("keep", "accuracy", "AAL", "density", "effective", "tok/s", "text"):
        shown.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(
            row.setting,
            "" if row.keep is None else f"{row.keep:g}",
            f"{row.accuracy:.3f} ± {row.stderr:.3f}",
            "" if row.aal is None else f"{row.aal:.2f}",
            f"{row.density:.3f}",
            f"{row.effective_density:.3f}",
            f"{row.tokens_per_second:.0f}",
            "lossless" if row.lossless else "lossy",
        )
    return shown


def _marked(engine: Engine, step: Round) -> Text:
    """Return a round's tokens: kept guesses, rejected ones, and what the full model wrote in their place."""
    kept, own, rejected = step.tokens[: step.accepted], step.tokens[step.accepted :], _rejected(step)
    line = Text()
    line.append(engine.decode(kept), KEPT)
    if rejected:
        line.append(f"[{engine.decode(rejected)}]", REJECTED)  # brackets for a terminal without colours
    line.append(engine.decode(own), CORRECTED if rejected else FULL)
    return line


def _decoded(engine: Engine, setting: DemoSetting, seed: int, index: int) -> tuple[str, list[Round]]:
    messages, problem = few_shot("reasoning", "test", seed, index)
    budget = min(NEW_TOKENS, engine.room(messages))
    updates = engine.stream(messages, max_new_tokens=budget, sparsity=setting.sparsity, correction=setting.correction)
    return problem.question, [update.round for update in updates]


def _rejected(step: Round) -> tuple[int, ...]:
    return () if step.cut else step.draft[step.accepted :]
