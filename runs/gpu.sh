#!/usr/bin/env bash
# Adds lines to records/gpu.jsonl: run it on an idle GPU of 48 GB or more, from a clean checkout.
#   ceiling, full, coarse, fine, corrected chain and tree (15 guesses of 4 branches: 61 nodes) at 1k context, plain and
#   compiled; kernels by density and batch; the embedded model at its own acceptance.
set -euo pipefail
cd "$(dirname "$0")/.."
sirius=.venv/bin/sirius record=$(mktemp)  # added at the end: until then the checkout is clean
SIRIUS_TEST_GPU=0 .venv/bin/python -m pytest -q tests/unit/test_gpu_kernels.py tests/integration/test_gpu_route.py
for compile in "" --compile; do
  $sirius bench decode --device cuda --shape llama-3-8b --context 1024 --tokens 256 --cycles 5 $compile --json >> "$record"
done
$sirius bench kernels --device cuda --neurons 14336 --hidden 4096 --json >> "$record"
$sirius bench growth --device cuda --shape llama-3-8b --output growth.unfinished.json --json >> "$record"
rm growth.unfinished.json
command="sirius demo --problems 200 --seed 0 --device cuda --json"
.venv/bin/$command | .venv/bin/python runs/record.py "$record" "$command" 1
cat "$record" >> records/gpu.jsonl
