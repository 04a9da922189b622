"""Writes what a grid of settings decodes: token ids and figures, so that two checkouts can be compared line by line.

    python runs/texts.py before.jsonl      in the one checkout
    python runs/texts.py after.jsonl       in the other, on the same machine
    python runs/texts.py after.jsonl --against before.jsonl

The models are the tests' tiny random ones of each family, and the embedded one. A change that is to move no token
moves no line. Times are left out.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from conftest import FAMILIES, VOCABULARY, tiny_model
from sirius import CorrectionConfig, Engine, SamplingConfig, SparsityConfig
from sirius.demo.embedded import FOLDER

TIMES = "seconds", "tokens_per_second"
SPARSITIES = {
    "coarse": SparsityConfig("coarse", 0.4),
    "coarse shared": SparsityConfig("coarse", 0.4, shared_set=True),
    "coarse refreshed": SparsityConfig("coarse", 0.4, refresh=0.2),
    "fine": SparsityConfig("fine", 0.4),
    "fine per branch": SparsityConfig("fine", 0.4, per_branch=True),
    "fine threshold": SparsityConfig("fine", threshold=0.3),
    "none": SparsityConfig("none"),
}
CORRECTIONS = {
    "alone": None,
    "chain": CorrectionConfig(5),
    "tree": CorrectionConfig(4, tree_width=3),
    "paper": CorrectionConfig.paper(period=6),
    "typical tree": CorrectionConfig(4, "typical", tree_width=2, prune=0.1),
    "kept drafts": CorrectionConfig(4, "threshold", ablate=("rewrite",)),
    "no interleave": CorrectionConfig(4, "threshold", ablate=("interleave", "rollback")),
}
SAMPLINGS = {"greedy": SamplingConfig(), "sampled": SamplingConfig(0.8, top_p=0.95, seed=11, repetition_penalty=1.1)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def settings() -> Iterator[tuple[str, str, str, str, int]]:
    """Yield dtype, sparsity, correction, sampling and rows of each case of a family, twenty of them."""
    for (sparsity, correction), place in zip(product(SPARSITIES, CORRECTIONS), range(10**6), strict=False):
        if place % 5 < 2:
            dtype = list(DTYPES)[place % 2]
            yield dtype, sparsity, correction, list(SAMPLINGS)[place // 5 % 2], (1, 3)[place // 2 % 2]


def cases() -> Iterator[tuple[str, Engine, tuple[str, str, str, str, int], list[list[int]]]]:
    """Yield each case's model, setting and prompts."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 17, 9)]
    for family in FAMILIES:
        for setting in settings():
            engine = Engine(tiny_model(family, DTYPES[setting[0]], eos_token_id=None))
            yield family, engine, setting, prompts
    for dtype in DTYPES:
        engine = Engine.load(FOLDER, dtype=dtype, device="cpu")
        texts = [list(engine.encode(text)) for text in ("12+7=", "3*4+5=", "81-9=")]
        for setting in settings():
            if setting[0] == dtype:
                yield "embedded", engine, setting, texts


def main() -> None:
    """Write the file, or compare it with another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--against", type=Path, help="compare with this file; nothing is decoded")
    given = parser.parse_args()
    if given.against is not None:
        compare(given.file, given.against)
        return
    torch.set_num_threads(1)
    with given.file.open("w", encoding="utf-8") as file:
        for family, engine, setting, prompts in cases():
            _, sparsity, correction, sampling, rows = setting
            options: dict[str, Any] = {"sparsity": SPARSITIES[sparsity], "correction": CORRECTIONS[correction]}
            options |= {"sampling": SAMPLINGS[sampling], "max_new_tokens": 24}
            done = dict(engine.generate_many(prompts, batch_size=rows, **options))
            texts = [done[index] for index in range(len(prompts))]
            figures = [{k: v for k, v in asdict(t.stats).items() if k not in TIMES} for t in texts]
            tokens = [t.token_ids for t in texts]
            file.write(json.dumps({"case": [family, *setting], "tokens": tokens, "stats": figures}) + "\n")


def compare(file: Path, against: Path) -> None:
    """Print how many cases differ, and which."""
    new, old = ([json.loads(line) for line in path.read_text().splitlines()] for path in (file, against))
    pairs = list(zip(new, old, strict=True))
    moved = [a["case"] for a, b in pairs if a["case"] != b["case"] or a["tokens"] != b["tokens"]]
    figures = [a["case"] for a, b in pairs if not all(map(_same, a["stats"], b["stats"]))]
    print(f"tokens: {len(moved)} of {len(pairs)} cases differ", *moved[:10], sep="\n  ")
    print(f"figures: {len(figures)} of {len(pairs)} cases differ", *figures[:10], sep="\n  ")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Tell whether the figures that both have are equal."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


if __name__ == "__main__":
    main()
