# shellcheck shell=bash
# Sourced from the repo root by train_flowtok.sh, scripts/test.sh and .ci/run; not to be executed.
#
#   set_up_environment requirements.txt    sets PYTHON to a Python that has these requirements
#   run COMMAND ...                        echoes a command, then runs it (DRY_RUN=1: only echoes it)
#
# An active virtual environment (venv or conda) is used as it is: what it lacks is named, and nothing is installed into
# it. Otherwise .venv in the repo root is made, and filled whenever the requirements changed. Interrupted: run again.

run() {
    local words
    printf -v words ' %q' "$@"
    echo "+$words"
    [[ ${DRY_RUN:-0} != 0 ]] || "$@"
}

set_up_environment() {
    local requirements=$1 active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
    PYTHON=${active:-.venv}/bin/python
    [[ ${DRY_RUN:-0} == 0 ]] || return 0
    if [[ -n $active ]]; then
        check_active_environment "$requirements" "$active"
    else
        fill_own_environment "$requirements"
    fi
}

check_active_environment() {
    local requirements=$1 active=$2 lacking
    [[ -x $PYTHON ]] || { echo "The active environment $active has no bin/python: deactivate it." >&2; exit 2; }
    lacking=$("$PYTHON" - "$requirements" <<'EOF'
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def lacking(requirements):
    for line in Path(requirements).read_text().splitlines():
        if line.startswith("-r "):
            yield from lacking(line.split()[1])
        elif match := re.match(r"([\w-]+)>=([\d.]+)", line):
            name, wanted = match.groups()
            try:
                found = version(name)
            except PackageNotFoundError:
                yield name
                continue
            release = re.match(r"[\d.]*\d", found).group()  # 2.6.0a0+cu126 -> 2.6.0
            if [int(part) for part in release.split(".")] < [int(part) for part in wanted.split(".")]:
                yield f"{name}>={wanted} (it has {found})"


print(", ".join(lacking(sys.argv[1])))
EOF
    )
    [[ -z $lacking ]] && return
    {
        echo "The active environment $active lacks: $lacking"
        echo "Install what is missing:  $PYTHON -m pip install -r $requirements"
        echo "or deactivate it: then .venv in this folder is made and used."
    } >&2
    exit 2
}

fill_own_environment() {
    local requirements=$1 stamp=.venv/installed-$1.cksum wanted
    wanted=$(cat requirements*.txt | cksum)
    [[ -x $PYTHON && $(cat "$stamp" 2>/dev/null) == "$wanted" ]] && return
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "Python >= 3.10 is needed; python3 is $(python3 --version 2>&1 || echo missing)." >&2
        exit 2
    fi
    (
        if command -v flock >/dev/null; then flock 9; fi # machines that share this folder take turns; macOS has no flock
        [[ -x $PYTHON && $(cat "$stamp" 2>/dev/null) == "$wanted" ]] && exit
        "$PYTHON" -m pip --version >/dev/null 2>&1 || run python3 -m venv --clear .venv
        run "$PYTHON" -m pip install -r "$requirements"
        echo "$wanted" >"$stamp.tmp"
        mv "$stamp.tmp" "$stamp" # last: an interrupted installation leaves no stamp
    ) 9>.venv.lock
}
