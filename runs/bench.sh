#!/bin/sh
# Adds lines to records/decode.jsonl and records/kernels.jsonl: run it on an idle machine, from a clean checkout.
set -e
cd "$(dirname "$0")/.."
for threads in 1 2; do
  .venv/bin/sirius bench decode --shape llama-3.2-1b --threads $threads --json >> records/decode.jsonl
done
.venv/bin/sirius bench kernels --threads 1 --json >> records/kernels.jsonl
