#!/usr/bin/env bash
# Creates .venv with torch, the project (editable) and what its tests need. A second call takes well under a second:
# a stamp named after the content of pyproject.toml and of this script says that the work is done.
#   PYTHON=/path/to/python   the interpreter to use (3.11 to 3.13; found by itself otherwise)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

TORCH="torch==2.13.0"
stamp=".venv/.keel-setup-$(cat pyproject.toml scripts/setup.sh | sha256sum | cut -c1-16)"
if [[ -f "$stamp" ]]; then exit 0; fi

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        supported "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 to 3.13"
        echo "$PYTHON"; return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then command -v "$candidate"; return; fi
    done
    fail "no Python 3.11 to 3.13 found; install one, or name it: PYTHON=/path/to/python make setup"
}

can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }

python="$(find_python)"
if ! can_make_venv "$python"; then
    # Debian ships venv's pip in a package of its own.
    [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null \
        || fail "$python lacks the venv module; as root: apt-get install python3-venv"
    package="$("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    say "installing $package"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$package" >/dev/null
    can_make_venv "$python" || fail "$python still lacks the venv module after installing $package"
fi

if [[ ! -x .venv/bin/python ]] || ! supported .venv/bin/python; then
    say "creating .venv with $("$python" --version)"
    "$python" -m venv --clear .venv
fi
say "installing $TORCH (once; it is large)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check "$TORCH"
say "installing keel and its test tools"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
# What the parametrisations are held against. Its requirement of torchvision, which it never imports, would bring another torch.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps 'mup>=1.0'

# What some tests run besides Python: command:package. Without root those tests say what they lack.
lacking=()
for need in ip:iproute2 sbatch:slurm-wlm munge:munge; do
    command -v "${need%%:*}" >/dev/null || lacking+=("${need##*:}")
done
if (( ${#lacking[@]} )); then
    if [[ "$(id -u)" == 0 ]] && command -v apt-get >/dev/null; then
        say "installing ${lacking[*]}"
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${lacking[@]}" >/dev/null \
            || say "could not install ${lacking[*]}; the tests that need it will say so"
    else
        say "some tests need ${lacking[*]}; as root: apt-get install ${lacking[*]}"
    fi
fi

rm -f .venv/.keel-setup-*
touch "$stamp"
say "done: .venv/bin/keel --help"
