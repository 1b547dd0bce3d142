#!/usr/bin/env bash
# Install everything into .venv and run the tests:   bash launch/test.sh [--torch VERSION] [--torchao] [pytest arguments]
# Without arguments, all but the slow ones; those are `bash launch/test.sh -m slow`. `--torch 2.11.0` runs them on
# another torch than that of constraints.txt, in a virtual environment of its own. `--torchao` runs the files with tests
# that need torchao, the slow ones too; everything else runs without it.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = "--torch" ]; then
    export TORCH="${2:?--torch needs a version, such as 2.11.0}"
    shift 2
fi
bash launch/setup_venv.sh train,deepspeed,dev
venv=".venv${TORCH:+-torch-$TORCH}"
. "$venv/bin/activate"

# Several test processes share the cores
export OMP_NUM_THREADS=1
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "+ python -m pytest -m gpu"
    python -m pytest -m gpu
fi
# All others are about ranks on a CPU, also where there is a GPU
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
if [ "${1:-}" = "--torchao" ]; then
    shift
    mapfile -t files < <(grep -rl --include='*.py' 'importorskip("torchao")' tests)
    export PYTHONPATH="$PWD/$venv/torchao${PYTHONPATH:+:$PYTHONPATH}"
    set -- "${files[@]}" "$@"
fi
[ $# -gt 0 ] || set -- -m "not slow"
echo "+ python -m pytest $*"
exec python -m pytest "$@"
