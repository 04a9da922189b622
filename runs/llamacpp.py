"""llama.cpp on trained weights beside full decoding and the default draft; adds a line to records/real.jsonl.

python runs/llamacpp.py MODEL FILE.gguf   a name of models/ and the GGUF file that it was made of

llama.cpp makes its own files of BF16, Q8_0 and Q4_0 of that file first. The last two are other weights, so their texts
are not the model's. Each question is decoded by all in turns. Needs pip install 'sirius-llm[peer]'.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from acceptance import RECORD, Setting
from models import MODELS
from prompts import DATA, as_prompt, questions
from record import append

from sirius import CorrectionConfig, Engine, SparsityConfig
from sirius.benchmark.extras import need
from sirius.benchmark.facts import facts
from sirius.benchmark.peer import open_file
from sirius.cli.terminal import quieten
from sirius.core import DRAFT

SLOTS = 2048  # tokens of a prompt and its text
FORMATS = {"BF16": 32, "Q8_0": 7, "Q4_0": 2}  # llama.cpp's numbers of them


def make_file(source: Path, target: Path, number: int) -> Path:
    """Write the weights of a GGUF file in another format; return the new file."""
    api = need("llama_cpp", "peer", "runs/llamacpp.py")
    api.llama_log_set(silent := api.llama_log_callback(lambda *_: None), None)
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = number, True
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        sys.exit(f"error: llama.cpp cannot write {source} as {target.name}")
    del silent
    return target


def main() -> None:
    """Measure a model and add the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--data", type=Path, default=DATA)
    options = parser.parse_args()
    quieten()
    torch.set_num_threads(options.threads)
    command = f"python runs/llamacpp.py {options.model} {options.file.name} --prompts {options.prompts}"
    known = facts(f"{command} --tokens {options.tokens} --threads {options.threads}", options.threads)
    engine = Engine.load(MODELS / options.model)
    asked = questions("gsm8k", options.prompts, options.data)
    full, draft = Setting(SparsityConfig("none"), None), Setting(DRAFT, CorrectionConfig())
    seconds: dict[str, list[float]] = {name: [] for name in FORMATS}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        files = {name: make_file(options.file, Path(folder, f"{name}.gguf"), n) for name, n in FORMATS.items()}
        opened = {name: open_file(path, SLOTS, options.threads, wide=False) for name, path in files.items()}
        peers = {name: stack.enter_context(each) for name, each in opened.items()}
        for way in (full, draft):
            way.run(engine, asked[0], 8)
        for number, question in enumerate(asked, start=1):
            print(f"{options.model}: question {number} of {len(asked)}", file=sys.stderr, flush=True)
            ids = engine.encode(as_prompt(engine, question))
            for way in (full, draft):
                way.done.append(way.run(engine, question, options.tokens))
            for name, peer in peers.items():
                began = perf_counter()
                peer.turn(list(ids), options.tokens)
                seconds[name].append((perf_counter() - began) / options.tokens)
        features = next(iter(peers.values())).features
    rows: list[dict[str, object]] = [way.row(full) for way in (full, draft)]
    for name, each in seconds.items():
        ratios = [mine * done.stats.tokens_per_second for mine, done in zip(each, full.done, strict=True)]
        rows.append({"peer": f"llama.cpp {name}", "texts": len(ratios), "time_over_full": round(median(ratios), 3)})
    told = {"model": options.model, "dtype": str(engine.model.dtype).removeprefix("torch."), "task": "gsm8k"}
    append(RECORD, {**known, "llama.cpp": features}, [{**told, **row} for row in rows])
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
