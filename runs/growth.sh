#!/usr/bin/env bash
# Adds a line to records/growth.jsonl: run it on an idle machine, from a clean checkout. Options of `sirius bench growth` may
# follow. An interrupted run is gone on with: its points are in growth.unfinished.json.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/sirius bench growth --shape llama-3.2-1b "$@" --output growth.unfinished.json --json >> records/growth.jsonl
rm growth.unfinished.json
