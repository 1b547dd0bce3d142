#!/usr/bin/env bash
# Install everything into .venv and run the tests:   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/setup_venv.sh train,deepspeed,dev
. .venv/bin/activate

# Several test processes share the cores
export OMP_NUM_THREADS=1
if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    export DS_ACCELERATOR=cpu
fi
echo "+ python -m pytest $*"
exec python -m pytest "$@"
