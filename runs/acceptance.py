"""Acceptance and speed on real models and questions; appends a line for each model to records/real.jsonl.

python runs/acceptance.py [MODEL ...]   names of models/ (see runs/models.py) or folders; default: the small ones

Each setting decodes every prompt, in turns, so that whatever else the machine does slows all of them alike. Speed wants
an idle machine. Every combination of --sparsity, --keep, --accept, --period and --tree-width is a setting, beside full
decoding.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median

import torch
from models import DEFAULTS, MODELS
from prompts import DATA, FILES, as_prompt, questions
from record import append

from sirius import Completion, CorrectionConfig, Engine, SparsityConfig
from sirius.benchmark.facts import facts
from sirius.cli.terminal import quieten
from sirius.errors import SiriusError
from sirius.stats import combine

RECORD = Path(__file__).parents[1] / "records" / "real.jsonl"
WARM = 8  # tokens of each setting that are not counted


@dataclass
class Setting:
    """A way to decode, and what came of it so far."""

    sparsity: SparsityConfig
    correction: CorrectionConfig | None
    done: list[Completion] = field(default_factory=list)

    def run(self, engine: Engine, question: str, tokens: int) -> Completion:
        """Decode one question."""
        prompt = as_prompt(engine, question)
        return engine.generate(prompt, max_new_tokens=tokens, sparsity=self.sparsity, correction=self.correction)

    def row(self, full: "Setting") -> dict[str, object]:
        """Return the figures over all questions so far.

        chance          of a guess to stand, among those that the check came to: the accepted and the first refused ones
        time_over_full  median over the questions of seconds per token, over those of full decoding in the same turn
        """
        stats = combine([done.stats for done in self.done])
        judged = stats.accepted + stats.corrections
        rule = self.correction
        turns = [mine.stats.tokens_per_second for mine in self.done]
        ratios = [theirs.stats.tokens_per_second / mine for theirs, mine in zip(full.done, turns, strict=True)]
        return {
            "sparsity": self.sparsity.method,
            "keep": None if rule is None else self.sparsity.keep,
            "accept": rule and rule.accept,
            "period": rule and rule.period,
            "tree_width": rule and rule.tree_width,
            "texts": len(self.done),
            "tokens": stats.tokens,
            "aal": stats.aal and round(stats.aal, 3),
            "chance": round(stats.accepted / judged, 4) if judged else None,
            "density": round(stats.density, 4),
            "effective_density": round(stats.effective_density, 4),
            "drafted": stats.drafted,
            "tokens_per_second": round(stats.tokens_per_second, 2),
            "time_over_full": round(median(ratios), 3),
            "lossless": stats.lossless,
        }


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield full decoding, and then every combination that was asked for."""
    yield Setting(SparsityConfig("none"), None)
    asked = (options.sparsity, options.keep, options.accept, options.period, options.tree_width)
    for method, keep, accept, period, width in product(*asked):
        rule = CorrectionConfig(period=period, accept=accept, tree_width=width)
        yield Setting(SparsityConfig(method, keep), rule)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, object]]:
    """Return the rows of a model: each setting, over the questions of each task."""
    folder = MODELS / name
    engine = Engine.load(folder if folder.is_dir() else name, dtype=options.dtype, device=options.device)
    rows: list[dict[str, object]] = []
    for task in options.task:
        asked = questions(task, options.prompts, options.data)
        ways = list(settings(options))
        for way in ways:
            way.run(engine, asked[0], WARM)
        for number, question in enumerate(asked, start=1):
            print(f"{name}, {task}: question {number} of {len(asked)}", file=sys.stderr, flush=True)
            for way in ways:
                way.done.append(way.run(engine, question, options.tokens))
        dtype = str(engine.model.dtype).removeprefix("torch.")
        rows += [{"model": Path(name).name, "dtype": dtype, "task": task, **way.row(ways[0])} for way in ways]
    return rows


def period(text: str) -> int | str:
    """Return a period as it is typed: a number or auto."""
    return text if text == "auto" else int(text)


def parse() -> argparse.Namespace:
    """Return what was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(DEFAULTS), metavar="MODEL")
    parser.add_argument("--task", nargs="+", default=list(FILES), choices=FILES)
    parser.add_argument("--prompts", type=int, default=8, help="questions of each task")
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens of a text")
    parser.add_argument("--sparsity", nargs="+", default=["coarse", "fine"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5])
    parser.add_argument("--accept", nargs="+", default=["lossless"])
    parser.add_argument("--period", nargs="+", type=period, default=[16, "auto"])
    parser.add_argument("--tree-width", nargs="+", type=int, default=[1])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the tasks' files")
    parser.add_argument("--output", type=Path, default=RECORD)
    return parser.parse_args()


def main() -> None:
    """Measure every model, and add each one's line to the record as soon as it is there."""
    options = parse()
    quieten()
    torch.set_num_threads(options.threads)
    known = facts(" ".join(["python", "runs/acceptance.py", *sys.argv[1:]]), options.threads)
    asked = {"prompts": options.prompts, "max_new_tokens": options.tokens}
    try:
        for name in options.models:
            rows = measure(name, options)
            for row in rows:
                print(row)
            append(options.output, {**known, **asked}, rows)
    except SiriusError as error:
        sys.exit(f"error: {error}; models are fetched by python runs/models.py {' '.join(options.models)}")


if __name__ == "__main__":
    main()
