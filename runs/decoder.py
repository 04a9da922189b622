"""Studies of the decoder on the embedded model; each appends a line to records/decoder.jsonl.

python runs/decoder.py trees       AAL of chain and tree at the same K
python runs/decoder.py batches     tokens per second by batch size
python runs/decoder.py rows        coarse: one set of neurons for a batch, or one for each row
python runs/decoder.py refresh     coarse: the share that a checked window gets in the prompt's statistic
python runs/decoder.py sampling    AAL of sampled drafts
python runs/decoder.py coupling    how often a sampled guess stands: by shared noise, and by rejection sampling
python runs/decoder.py rules       rules of acceptance, and the ablations
python runs/decoder.py auto        period "auto" against fixed ones

--problems 200 --seed 0 --threads 1 are the defaults. Settings take turns chunk by chunk, so that whatever else the
machine does slows all of them alike.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path
from time import perf_counter

import torch
from record import append

from sirius import Completion, CorrectionConfig, Engine, SamplingConfig, SparsityConfig
from sirius.benchmark.facts import facts
from sirius.core import Mode
from sirius.decoding.tree import Tree
from sirius.demo.embedded import FOLDER
from sirius.demo.problems import few_shot, final_answer
from sirius.demo.showcase import NEW_TOKENS
from sirius.model.prepare import prepare
from sirius.runtime.session import Session
from sirius.sparsity import create

CHUNK = 40  # problems before the next setting has its turn
GREEDY = SamplingConfig()


@dataclass
class Setting:
    """A way to decode, and what came of it so far."""

    facts: dict[str, object]
    sparsity: SparsityConfig
    correction: CorrectionConfig | None
    sampling: SamplingConfig = GREEDY
    batch: int = 8
    tasks: tuple[str, ...] = ("reasoning",)
    timed: bool = False  # whether speed is what the study asks for; it wants an idle machine
    right: int = 0
    seconds: float = 0.0
    done: list[Completion] = field(default_factory=list)

    def run(self, engine: Engine, chunk: range, seed: int) -> None:
        """Decode a chunk of problems of every task, turn about."""
        asked = [few_shot(task, "test", seed, index) for index in chunk for task in self.tasks]
        messages = [message for message, _ in asked]
        options = {"sparsity": self.sparsity, "correction": self.correction, "sampling": self.sampling}
        budget = min(NEW_TOKENS, *(engine.room(message) for message in messages))
        began = perf_counter()
        many = engine.generate_many(messages, batch_size=self.batch, max_new_tokens=budget, **options)
        results = list(many)
        self.seconds += perf_counter() - began
        for index, done in results:
            assert isinstance(done, Completion)
            self.right += final_answer(done.text) == asked[index][1].final
            self.done.append(done)

    def row(self) -> dict[str, object]:
        """Return the figures over all problems so far: `tokens_per_second` is the whole batch's, prompts included."""
        stats = [done.stats for done in self.done]
        share, tokens = self.right / len(stats), sum(s.tokens for s in stats)
        windows = sum(s.rounds for s in stats)
        return {
            **self.facts,
            "texts": len(stats),
            "accuracy": round(share, 4),
            "stderr": round(sqrt(share * (1 - share) / len(stats)), 4),
            "aal": round((tokens - len(stats)) / windows, 3),
            "windows": windows,
            "corrections": sum(s.corrections for s in stats),
            "effective_density": round(
                sum(s.effective_density * (s.tokens - 1) for s in stats) / (tokens - len(stats)), 4
            ),
            **({"tokens_per_second": round(tokens / self.seconds, 1)} if self.timed else {}),
            "lossless": all(s.lossless for s in stats),
        }


def coarse(keep: float, **options: object) -> SparsityConfig:
    return SparsityConfig("coarse", keep, **options)  # type: ignore[arg-type] - it checks


def trees() -> Iterator[Setting]:
    fine = SparsityConfig("fine", 0.01)
    methods = {
        "coarse": (coarse(0.4), ("argmax", "threshold")),
        "fine": (fine, ("argmax",)),
        "fine, per branch": (replace(fine, per_branch=True), ("argmax",)),
    }
    for name, (sparsity, accepts) in methods.items():
        for accept in accepts:
            for width in (1, 4, 8):
                facts = {"sparsity": name, "keep": sparsity.keep, "accept": accept, "tree_width": width, "period": 16}
                yield Setting(facts, sparsity, CorrectionConfig(16, accept, tree_width=width))


def batches() -> Iterator[Setting]:
    for name, sparsity in (("coarse", coarse(0.4)), ("none", SparsityConfig("none"))):
        for batch in (1, 2, 4, 8, 16):
            facts = {"sparsity": name, "accept": "argmax", "batch": batch}
            yield Setting(facts, sparsity, CorrectionConfig(16), batch=batch, timed=True)


def rows() -> Iterator[Setting]:
    for tasks in (("reasoning",), ("reasoning", "understanding")):
        for keep in (0.3, 0.4, 0.5):
            for correction in (CorrectionConfig(16), None):
                for shared_set in (True, False):
                    facts = {"tasks": " + ".join(tasks), "keep": keep, "shared_set": shared_set, "batch": 8}
                    facts["accept"] = correction.accept if correction else None
                    yield Setting(facts, coarse(keep, shared_set=shared_set), correction, tasks=tasks, timed=True)


def refresh() -> Iterator[Setting]:
    for keep in (0.2, 0.3, 0.4):
        for threshold in (1e-8, 0.1):
            for share in (0.0, 0.05, 0.2, 0.5):
                facts = {"keep": keep, "threshold": threshold, "refresh": share}
                rule = CorrectionConfig.paper(threshold=threshold)
                yield Setting(facts, coarse(keep, refresh=share), rule)


def sampling() -> Iterator[Setting]:
    for temperature in (0.5, 1.0):
        for width in (1, 4):
            facts = {"temperature": temperature, "accept": "sampling", "keep": 0.3, "tree_width": width}
            rule = CorrectionConfig(16, tree_width=width)
            yield Setting(facts, coarse(0.3), rule, SamplingConfig(temperature, seed=0))


def rules() -> Iterator[Setting]:
    settings: list[dict[str, object]] = [
        {"accept": accept} for accept in ("argmax", "threshold", "relative", "typical")
    ]
    settings += [{"accept": "threshold", "ablate": (what,)} for what in ("rewrite", "interleave", "rollback")]
    for options in settings:
        facts = {"keep": 0.3, **options}
        yield Setting(facts, coarse(0.3), CorrectionConfig(16, **options))  # type: ignore[arg-type] - it checks


def auto() -> Iterator[Setting]:
    for keep in (0.2, 0.4):
        for period in (1, 4, 8, 16, 32, "auto"):
            facts = {"keep": keep, "period": period, "batch": 1}
            rule = CorrectionConfig(period)  # type: ignore[arg-type] - it checks
            yield Setting(facts, coarse(keep), rule, batch=1, timed=True)


def coupling(engine: Engine, problems: int, seed: int) -> list[dict[str, object]]:
    """Return the chance that a sampled guess stands, averaged over the places of texts that the full model sampled.

    p and q are the full and the sparse model's distributions at a place, both after the full model's K/V. Rejection
    sampling keeps a guess with probability sum min(p, q). Two argmaxes over the same Gumbel noise agree on x with
    probability 1 / sum_y max(p_y / p_x, q_y / q_x).
    """
    mlps = prepare(engine.model)
    neurons = tuple(mlp.size for mlp in mlps)
    lines: list[dict[str, object]] = []
    for keep in (0.3, 0.4):
        for temperature in (0.5, 1.0):
            sums = torch.zeros(3, dtype=torch.float64)
            for index in range(problems):
                prompt = engine.encode(few_shot("reasoning", "test", seed, index)[0])
                budget = min(NEW_TOKENS, engine.room(prompt))
                sampled = SamplingConfig(temperature, seed=index)
                text = engine.generate(prompt, max_new_tokens=budget, sparsity="none", sampling=sampled).token_ids
                session = Session(engine.model, mlps, lambda: create(coarse(keep), neurons))  # noqa: B023 - used at once
                session.open(torch.tensor(prompt), len(prompt) + budget)
                for token in text[:-1]:
                    window, newest = Tree.root(torch.tensor([token])).window(), torch.tensor([[token]])
                    q, p = (session.read(newest, m, window)[0, 0].double() for m in (Mode.SPARSE, Mode.DENSE))
                    session.keep(torch.tensor([[0]]), torch.tensor([1]))
                    sums += _agreement(p.div(temperature).softmax(0), q.div(temperature).softmax(0))
            places, rejection, shared = sums.tolist()
            facts = {"keep": keep, "temperature": temperature, "texts": problems, "places": int(places)}
            lines.append(
                {**facts, "rejection": round(rejection / places, 4), "shared_noise": round(shared / places, 4)}
            )
    return lines


def _agreement(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(p.dtype).tiny
    ratios = torch.maximum(p / p.clamp_min(tiny)[:, None], q / q.clamp_min(tiny)[:, None])  # [x, y]
    both = 1 / ratios.sum(1)
    return torch.stack([torch.ones_like(both[0]), torch.minimum(p, q).sum(), both[(p > 0) & (q > 0)].sum()])


STUDIES = {study.__name__: study for study in (trees, batches, rows, refresh, sampling, rules, auto)}


def compare(engine: Engine, settings: list[Setting], problems: int, seed: int) -> list[dict[str, object]]:
    """Run every setting over the problems, in turns, and return their figures."""
    chunk = CHUNK if max(setting.batch for setting in settings) > 1 else 1
    for begin in range(0, problems, chunk):
        for setting in settings:
            setting.run(engine, range(begin, min(begin + chunk, problems)), seed)
    return [setting.row() for setting in settings]


def main() -> None:
    """Run a study and add it to the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, coupling.__name__])
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = facts(" ".join(["python", "runs/decoder.py", *sys.argv[1:]]), options.threads)
    engine = Engine.load(FOLDER)
    if options.study == coupling.__name__:
        lines = coupling(engine, options.problems, options.seed)
    else:
        lines = compare(engine, list(STUDIES[options.study]()), options.problems, options.seed)
    for line in lines:
        print(line)
    append(Path(__file__).parents[1] / "records" / "decoder.jsonl", known, lines)


if __name__ == "__main__":
    main()
