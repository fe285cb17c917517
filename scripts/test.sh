#!/usr/bin/env bash
# Runs the tests on the CPU, without network: bash scripts/test.sh [pytest arguments]
#
#   bash scripts/test.sh -m 'not slow'              only the quick ones
#   bash scripts/test.sh -n 0 -k samplers --pdb     in one process (-n 0), to debug
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
set_up_environment requirements-dev.txt

# One thread for each of the two test processes: more would wait for each other. Each takes half of
# the files, so that what a file's tests share is made once; who is done first takes of the rest.
run env OMP_NUM_THREADS=1 WANDB_MODE=disabled HF_HUB_OFFLINE=1 MPLBACKEND=Agg \
  "$PYTHON" -m pytest -n 2 --dist worksteal "$@"
