#!/usr/bin/env bash
# All GPU figures in one bounded command, on a machine that may have no network:
#
#   bash benchmarks/gpu.sh --wheels                       # where there is a network: fill .whl/ for Python 3.12
#   bash benchmarks/gpu.sh --minutes 7 --out results      # on the GPU machine; arguments go to benchmarks/gpu.py
#
# The wheels go into a folder of their own, which ends with the run: torch, triton and what else is installed stay.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
wheels=$root/.whl
python=$(command -v python3 || command -v python) || { echo "gpu.sh: no python3 in PATH" >&2; exit 2; }

fill_wheels() {
    local platforms=() glibc
    for glibc in 39 36 35 34 31 28 27 26 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    for glibc in 2014 2010 1; do platforms+=(--platform "manylinux${glibc}_x86_64"); done
    rm -rf "$wheels"
    mkdir -p "$wheels"
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --constraint "$root/constraints.txt" --requirement "$root/benchmarks/gpu_wheels.txt" \
        --dest "$wheels"
    du -ch --apparent-size "$wheels"/*.whl | sed "s|$root/||"
}

if [[ ${1:-} == --wheels ]]; then
    fill_wheels
    exit
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" > /dev/null; then
    echo "gpu.sh: installing $(ls "$wheels" | wc -l) wheels of .whl/ into a temporary folder"
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl ||
        echo "gpu.sh: the wheels were not installed, see above; going on with what is here" >&2
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}:$site" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$python" "$root/benchmarks/gpu.py" "$@"
