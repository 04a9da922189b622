#!/usr/bin/env bash
# The table of the README: 200 problems of each task, any further options of `sirius demo` (--keep 0.5) as arguments.
# Appends a line to records/demo.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
rows=$(mktemp)
trap 'rm -f "$rows"' EXIT
command="sirius demo --problems 200 --seed 0 --json $*"
.venv/bin/$command >"$rows"
ROWS=$rows RUN=$command COMMIT=$(git describe --always --dirty) .venv/bin/python - >>records/demo.jsonl <<'PYTHON'
import json, os, platform
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
facts = {
    "date": date.today().isoformat(),
    "commit": os.environ["COMMIT"],
    "machine": f"{len(names)} x {names[0]}" if names else platform.processor(),
    "threads": 1,  # the demo sets it
    "python": platform.python_version(),
    "torch": torch.__version__,
    "transformers": version("transformers"),
    "sirius": version("sirius-llm"),
    "command": os.environ["RUN"].strip(),
    "rows": json.loads(Path(os.environ["ROWS"]).read_text()),
}
print(json.dumps(facts))
PYTHON
