#!/usr/bin/env bash
# What has to be known of a GPU, on one device, in at most 19 minutes and the set-up: bash scripts/gpu_check.sh [--output FILE]
#
# Tests, speed and memory of training, sampling and encoding, then the demo, in order of worth; each part is written to
# docs/gpu/NAME.json when it is there. Without a GPU it measures the CPU at sizes that take hours: --parts tests,demo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
set_up_environment requirements-dev.txt
[[ -x $PYTHON ]] || exit 0 # DRY_RUN=1 has printed how it is made
exec "$PYTHON" scripts/gpu_check.py "$@"
