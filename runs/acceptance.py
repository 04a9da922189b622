"""Acceptance and speed on real models and questions; adds a line for each model to records/real.jsonl.

python runs/acceptance.py [MODEL ...]   names of models/ (see runs/models.py) or folders; default: the small ones

Each setting decodes every prompt, in turns, so that whatever else the machine does slows all of them alike. Speed wants
an idle machine. Every combination of --draft, --keep, --accept, --period, --tree-width, --confidence and --ngram is a
setting, beside full decoding. A draft is none, int4, int8, coarse, fine, or two of them as in int4+coarse. --theirs
times transformers' generate and its prompt lookup on the same questions first. The line is written anew after each
question, so a run that is cut off keeps those it finished.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, cast

import torch
from models import DEFAULTS, MODELS
from prompts import DATA, FILES, as_prompt, questions
from record import append

from sirius import Completion, CorrectionConfig, Engine, SparsityConfig, prepare, restore
from sirius.benchmark.facts import facts
from sirius.cli.terminal import quieten
from sirius.errors import SiriusError
from sirius.model.quantized import make_twin
from sirius.stats import combine

RECORD = Path(__file__).parents[1] / "records" / "real.jsonl"
WARM = 8  # tokens of each setting that are not counted


@dataclass
class Setting:
    """A way to decode, and what came of it so far."""

    sparsity: SparsityConfig
    correction: CorrectionConfig | None
    done: list[Completion] = field(default_factory=list)
    twin: object = None  # the rounded weights that its draft reads

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
        pairs = [(whole.stats, mine.stats) for whole, mine in zip(full.done, self.done, strict=True)]
        ratios = [whole.tokens_per_second / mine.tokens_per_second for whole, mine in pairs]
        return {
            "sparsity": self.sparsity.method,
            "draft_bits": stats.draft_bits,
            "keep": None if rule is None else self.sparsity.keep,
            "accept": rule and rule.accept,
            "period": rule and rule.period,
            "tree_width": rule and rule.tree_width,
            "draft_confidence": rule and rule.draft_confidence,
            "draft_ngram": rule and rule.draft_ngram,
            "texts": len(self.done),
            "tokens": stats.tokens,
            "aal": stats.aal and round(stats.aal, 3),
            "chance": round(stats.accepted / judged, 4) if judged else None,
            "density": round(stats.density, 4),
            "effective_density": round(stats.effective_density, 4),
            "drafted": stats.drafted,
            "mb_per_token": round(stats.bytes_per_token / 1e6, 1),
            "tokens_per_second": round(stats.tokens_per_second, 2),
            "time_over_full": round(median(ratios), 3),
            "lossless": stats.lossless,
        }


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Yield full decoding, and then every combination that was asked for."""
    yield Setting(SparsityConfig("none"), None)
    rules = (options.accept, options.period, options.tree_width, options.confidence, options.ngram)
    for draft, keep in product(options.draft, options.keep):
        parts = draft.split("+")
        bits = next((int(part.removeprefix("int")) for part in parts if part.startswith("int")), 0)
        method = next((part for part in parts if not part.startswith("int")), "none")
        for accept, period, width, confidence, ngram in product(*rules):
            rule = CorrectionConfig(period, accept, tree_width=width, draft_confidence=confidence, draft_ngram=ngram)
            yield Setting(SparsityConfig(method, keep if method != "none" else 0.5, draft_bits=bits), rule)


def theirs(engine: Engine, asked: Sequence[str], tokens: int) -> dict[str, list[float]]:
    """Return the seconds per token of transformers' generate on each question, plain and with its prompt lookup."""
    restore(engine.model)
    ways: dict[str, dict[str, object]] = {"transformers": {}, "transformers, lookup": {"prompt_lookup_num_tokens": 10}}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for question in asked:
        ids = torch.tensor([engine.encode(as_prompt(engine, question))])
        for name, options in ways.items():
            began = perf_counter()
            with torch.inference_mode():
                out = cast("Any", engine.model).generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **options
                )
            found[name].append((perf_counter() - began) / (out.shape[1] - ids.shape[1]))
    prepare(engine.model)
    return found


def measure(name: str, options: argparse.Namespace) -> Iterator[list[dict[str, object]]]:
    """Yield the rows of a model after each question: each setting, over the questions of each task so far."""
    folder = MODELS / name
    engine = Engine.load(folder if folder.is_dir() else name, dtype=options.dtype, device=options.device)
    dtype = str(engine.model.dtype).removeprefix("torch.")
    finished: list[dict[str, object]] = []
    for task in options.task:
        asked = questions(task, options.prompts, options.data)
        other = theirs(engine, asked, options.tokens) if options.theirs else {}
        ways = list(settings(options))
        for way in ways:
            way.twin = make_twin(engine.model, way.sparsity, way.correction)  # held, or each turn would make it anew
            way.run(engine, asked[0], WARM)
        for number, question in enumerate(asked, start=1):
            print(f"{name}, {task}: question {number} of {len(asked)}", file=sys.stderr, flush=True)
            for way in ways:
                way.done.append(way.run(engine, question, options.tokens))
            known = {"model": Path(name).name, "dtype": dtype, "task": task}
            rows = [{**known, **row} for row in (*(way.row(ways[0]) for way in ways), *peer_rows(other, ways[0]))]
            yield [*finished, *rows]
        finished += rows


def peer_rows(other: dict[str, list[float]], full: Setting) -> Iterator[dict[str, object]]:
    """Yield the time of each way of transformers over full decoding, on the questions that this has decoded."""
    for peer, seconds in other.items():
        ratios = [mine * done.stats.tokens / done.stats.seconds for mine, done in zip(seconds, full.done, strict=False)]
        yield {"peer": peer, "texts": len(ratios), "time_over_full": round(median(ratios), 3)}


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
    parser.add_argument("--draft", nargs="+", default=["coarse", "fine", "int8", "int4"])
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5])
    parser.add_argument("--accept", nargs="+", default=["lossless"])
    parser.add_argument("--period", nargs="+", type=period, default=[16, "auto"])
    parser.add_argument("--tree-width", nargs="+", type=int, default=[1])
    parser.add_argument("--confidence", nargs="+", type=float, default=[0.0])
    parser.add_argument("--ngram", nargs="+", type=int, default=[0])
    parser.add_argument("--theirs", action="store_true", help="time transformers too")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the tasks' files")
    parser.add_argument("--output", type=Path, default=RECORD)
    return parser.parse_args()


def main() -> None:
    """Measure every model, and keep each one's line of the record up to date."""
    options = parse()
    quieten()
    torch.set_num_threads(options.threads)
    known = facts(" ".join(["python", "runs/acceptance.py", *sys.argv[1:]]), options.threads)
    asked = {"prompts": options.prompts, "max_new_tokens": options.tokens}
    try:
        for name in options.models:
            rows, line = [], ""
            try:
                for rows in measure(name, options):
                    line = append(options.output, {**known, **asked}, rows, line)
            finally:
                for row in rows:
                    print(row)
    except SiriusError as error:
        sys.exit(f"error: {error}; models are fetched by python runs/models.py {' '.join(options.models)}")


if __name__ == "__main__":
    main()
