#!/usr/bin/env bash
# The table of the README: 200 problems of each task, any further options of `sirius demo` (--keep 0.5) as arguments.
# Appends a line to records/demo.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
command="sirius demo --problems 200 --seed 0 --json $*"
.venv/bin/$command | .venv/bin/python runs/record.py records/demo.jsonl "${command% }" 1 # the demo sets one thread
