#!/usr/bin/env bash
# Runs the tests with every dependency at the lowest version that pyproject.toml allows.
#   scripts/lower_bounds.sh [PYTHON] [pytest arguments]
# torch is taken as it is when the interpreter's folder .venv-low has one: its lowest version has no CPU build on PyPI
# and pulls in gigabytes of CUDA packages, so this is no part of `make test`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${1:-python3}"
[[ $# -gt 0 ]] && shift
venv="${KEEL_LOW_VENV:-.keel/low}"
[[ -x "$venv/bin/python" ]] || "$python" -m venv "$venv"

mapfile -t pins < <("$venv/bin/python" - <<'PY'
import re, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
for line in {*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)}:
    name, _, version = line.partition(">=")
    if re.match(r"keel\b", name) or not version:
        continue
    print(f"{name}=={version}")
PY
)
if "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    pins=("${pins[@]/torch==*/}")
fi
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check ${pins[@]} setuptools
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
"$venv/bin/python" -m pip list --format freeze | grep -E '^(torch|lightning|omegaconf|fsspec|s3fs|numpy|zarr|xarray|google-crc32c|rich|matplotlib|pyyaml|PyYAML)=='
"$venv/bin/python" -m pytest --deselect tests/test_lint.py "$@"
