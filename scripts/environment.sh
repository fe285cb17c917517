# shellcheck shell=bash
# Sourced from the repo root by train_flowtok.sh, scripts/test.sh and .ci/run; not to be executed.
#
#   set_up_environment requirements.txt    sets PYTHON to a Python that has these requirements
#   run COMMAND ...                        echoes a command, then runs it (DRY_RUN=1: only echoes it)
#
# An active virtual environment (venv or conda) is used as it is: what it lacks is named, and nothing is installed into
# it. Otherwise .venv in the repo root is made, and what it lacks is installed. Interrupted: run again.

run() {
    local words
    printf -v words ' %q' "$@"
    echo "+$words"
    [[ ${DRY_RUN:-0} != 0 ]] || "$@"
}

set_up_environment() { # REQUIREMENTS
    local active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}} missing
    PYTHON=${active:-.venv}/bin/python
    missing=$(list_missing "$1")
    [[ -n $missing ]] || return 0
    if [[ -n $active ]]; then
        echo "error: the active environment $active lacks $missing; install it: $PYTHON -m pip install -r $1" \
            "(or deactivate the environment: then .venv is made in this folder and used)" >&2
        exit 2
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: Python >= 3.10 is needed, python3 is $(python3 --version 2>&1)" >&2
        exit 2
    fi
    (
        if command -v flock >/dev/null; then flock 9; fi # machines that share this folder take turns; macOS has no flock
        [[ -n $(list_missing "$1") ]] || exit 0
        "$PYTHON" -m pip --version >/dev/null 2>&1 || run python3 -m venv --clear .venv
        run "$PYTHON" -m pip install -r "$1"
    ) 9>.venv.lock
}

list_missing() { # REQUIREMENTS -> those that PYTHON lacks, comma-separated
    [[ -x $PYTHON ]] || { echo "$PYTHON"; return; }
    "$PYTHON" - "$1" <<'EOF'
import re
import sys
from importlib.metadata import PackageNotFoundError, version


def read(path):
    for line in open(path):
        if line.startswith("-r "):
            yield from read(line.split()[1])
        elif match := re.match(r"([\w-]+)>=([\d.]+)", line):
            yield match.groups()


def numbers(text):  # 2.6.0a0+cu126 -> [2, 6, 0]
    return [int(number) for number in re.match(r"[\d.]*\d", text).group().split(".")]


missing = []
for name, wanted in read(sys.argv[1]):
    try:
        if numbers(version(name)) < numbers(wanted):
            missing.append(f"{name}>={wanted}")
    except PackageNotFoundError:
        missing.append(name)
print(", ".join(missing))
EOF
}
