#!/usr/bin/env bash
# Install everything into .venv and run the tests:   bash launch/test.sh [pytest arguments]
# Without arguments, all but the slow ones; those are `bash launch/test.sh -m slow`.
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup_venv.sh train,deepspeed,dev
. .venv/bin/activate

# Several test processes share the cores
export OMP_NUM_THREADS=1
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "+ python -m pytest -m gpu"
    python -m pytest -m gpu
fi
# All others are about ranks on a CPU, also where there is a GPU
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES=
[ $# -gt 0 ] || set -- -m "not slow"
echo "+ python -m pytest $*"
exec python -m pytest "$@"
