"""Costs at the edges, on the CPU; each study appends a line to records/edges.jsonl.

python runs/edges.py threads    full decoding by threads and OpenMP's spinning, on idle CPUs and beside a busy program
python runs/edges.py penalty    a repetition penalty in batches, over none: a tiny random model with a large vocabulary

`threads` needs a folder of models/ (--model, see runs/models.py). Turns of all settings follow each other, so that
whatever else the machine does slows all of them alike.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from models import MODELS
from record import append
from transformers import AutoModelForCausalLM, LlamaConfig

import sirius
from sirius import Engine
from sirius.benchmark.facts import facts

RECORDS = Path(__file__).parents[1] / "records" / "edges.jsonl"
SPINS = (None, "0", "100", "1000", "20000")  # GOMP_SPINCOUNT; None leaves OpenMP's own
BATCHES, VOCABULARY, TOKENS = (8, 16, 32), 128_256, 32
Row = dict[str, object]


def threads(options: argparse.Namespace) -> list[Row]:
    """Return tokens/s of full decoding; OpenMP reads how it spins once, so each setting is a process of its own."""
    found: dict[tuple[str | None, int, bool], list[float]] = {}
    for _ in range(options.turns):
        for spins in SPINS:
            for busy in (False, True):
                with _busy() if busy else _idle():
                    for count in range(1, torch.get_num_threads() + 1):
                        found.setdefault((spins, count, busy), []).append(_speed(options.model, spins, count))
    names = "spins", "threads", "beside_busy"
    return [{**dict(zip(names, key, strict=True)), "tokens_per_second": median(each)} for key, each in found.items()]


def _speed(model: str, spins: str | None, count: int) -> float:
    given = {} if spins is None else {"GOMP_SPINCOUNT": spins}
    command = [sys.executable, __file__, "speed", "--model", model, "--threads", str(count)]
    done = subprocess.run(command, env={**os.environ, **given}, capture_output=True, text=True, check=True)
    return float(done.stdout)


def speed(options: argparse.Namespace) -> float:
    """Return the tokens/s of one text after a first one."""
    torch.set_num_threads(options.threads)
    engine = Engine.load(MODELS / options.model)
    settings = {"max_new_tokens": 64, "correction": 1}
    first, second = (engine.generate("Once upon a time there was", **settings) for _ in range(2))
    assert first.token_ids == second.token_ids
    return second.stats.tokens_per_second


@contextmanager
def _busy() -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()


@contextmanager
def _idle() -> Iterator[None]:
    yield


def penalty(options: argparse.Namespace) -> list[Row]:
    """Return seconds of a batch with a penalty and without, ours (default period) and transformers'."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, eos_token_id=None, pad_token_id=0, **sizes)
    model = AutoModelForCausalLM.from_config(config).eval()
    rows: list[Row] = []
    for batch in BATCHES:
        ids = torch.randint(5, VOCABULARY, (batch, 24))
        seconds: dict[tuple[str, float], list[float]] = {}
        for turn in range(options.turns + 1):
            for value in (1.0, 1.05):
                texts = []
                for who, kwargs in {"sirius": {"custom_generate": sirius.decode}, "transformers": {}}.items():
                    began = perf_counter()
                    texts.append(_batch(model, ids, value, kwargs))
                    if turn:  # the first one makes ready
                        seconds.setdefault((who, value), []).append(perf_counter() - began)
                assert torch.equal(*texts), "the texts differ"
        for who in ("sirius", "transformers"):
            without, penalised = (median(seconds[who, value]) for value in (1.0, 1.05))
            figures = {"seconds": penalised, "seconds_without": without, "ratio": penalised / without}
            rows.append({"batch": batch, "decoder": who, **{name: round(each, 3) for name, each in figures.items()}})
    return rows


def _batch(model: torch.nn.Module, ids: torch.Tensor, value: float, kwargs: dict[str, object]) -> torch.Tensor:
    options = {"max_new_tokens": TOKENS, "do_sample": False, "repetition_penalty": value, **kwargs}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


def main() -> None:
    """Run a study and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["threads", "penalty", "speed"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    if options.study == "speed":
        sys.stdout.write(f"{speed(options)}\n")
        return
    torch.set_num_threads(options.threads)
    known = facts(" ".join(["python", "runs/edges.py", *sys.argv[1:]]), options.threads)
    rows = {"threads": threads, "penalty": penalty}[options.study](options)
    append(RECORDS, known, rows)
    for row in rows:
        sys.stdout.write(f"{row}\n")


if __name__ == "__main__":
    main()
