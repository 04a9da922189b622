"""How the demo looks on a terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sirius.core import Round
from sirius.demo.problems import TASKS, few_shot
from sirius.demo.showcase import NEW_TOKENS, Row, Setting
from sirius.engine import Engine

KEPT, REJECTED, CORRECTED, FULL = "green", "red strike", "bold yellow", "cyan"


def table(rows: Sequence[Row]) -> RenderableType:
    """Return the rows as one table a task."""
    return Group(*(_table(task, [row for row in rows if row.task == task]) for task in TASKS))


def example(engine: Engine, settings: Sequence[Setting], seed: int) -> RenderableType:
    """Return one reasoning problem decoded by the corrected coarse method, every token marked by where it came from."""
    setting = next(s for s in settings if s.correction)
    messages, problem = few_shot("reasoning", "test", seed, 0)
    budget = min(NEW_TOKENS, engine.room(messages))
    updates = engine.stream(messages, max_new_tokens=budget, sparsity=setting.sparsity, correction=setting.correction)
    lines = [_marked(engine, update.round) for update in updates]
    legend = Text.assemble(
        ("drafted and kept", KEPT), "  ", ("rejected", REJECTED), "  ", ("correction", CORRECTED), "  ",
        ("the full model's own", FULL),
    )  # fmt: skip
    return Group(
        Rule("one problem, a line for each round", align="left"), Text(problem.question), Text(), *lines, legend
    )


def _table(task: str, rows: Sequence[Row]) -> Table:
    shown = Table(
        title=f"{task} ({rows[0].problems} problems)",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=0,
    )
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
    kept, own = step.tokens[: step.accepted], step.tokens[step.accepted :]
    rejected = () if step.cut else step.draft[step.accepted :]
    line = Text()
    for tokens, style in ((kept, KEPT), (rejected, REJECTED), (own, CORRECTED if rejected else FULL)):
        line.append(engine.decode(tokens), style)
    return line
