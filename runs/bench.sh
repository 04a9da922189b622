#!/bin/sh
# Adds lines to records/decode.jsonl and records/kernels.jsonl: run it on an idle machine, from a clean checkout, with
# `pip install '.[peer]'` in its environment.
set -e
cd "$(dirname "$0")/.."
decode=$(mktemp) kernels=$(mktemp)  # added at the end: until then the checkout is clean
.venv/bin/sirius bench decode --shape llama-3.2-1b --peer llama.cpp --device cpu --threads 2 --json > "$decode"
.venv/bin/sirius bench kernels --threads 1 --device cpu --json > "$kernels"
cat "$decode" >> records/decode.jsonl
cat "$kernels" >> records/kernels.jsonl
