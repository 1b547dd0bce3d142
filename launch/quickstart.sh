#!/usr/bin/env bash
# Distil SmolLM2-135M-Instruct into 8 of its 30 layers, on the GPUs that are there or on two CPU ranks:
#   bash launch/quickstart.sh [section.key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."

run() {
    echo "+ $*"
    "$@"
}

bash launch/setup_venv.sh train,deepspeed
. .venv/bin/activate

ranks="$(python -c 'import torch; print(torch.cuda.device_count() or 2)')"
cores="$(python -c 'import os; print(os.cpu_count() or 1)')"
threads=$((cores / ranks > 0 ? cores / ranks : 1))
# torchrun's own default is one thread per rank
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"
echo "+ export OMP_NUM_THREADS=$OMP_NUM_THREADS"

if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    # glibc returns large blocks to the kernel and faults their pages in anew each step; let it keep them
    export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_MAX_=0
    echo "+ export MALLOC_MMAP_THRESHOLD_=$MALLOC_MMAP_THRESHOLD_ MALLOC_TRIM_THRESHOLD_=$MALLOC_TRIM_THRESHOLD_ MALLOC_MMAP_MAX_=0"
fi

config=configs/smollm2_135m_to_8l_fsdp2.yaml
if [ "$ranks" -gt 2 ]; then # the recipe's step is one sequence for each of two ranks
    set -- "train.tokens_per_step=$((256 * ranks))" "$@"
fi
run kd-plugin validate "$config" "$@" # a mistake is told here, without the launcher's traceback
run torchrun --standalone --nproc-per-node "$ranks" launch/train_fsdp.py "$config" "$@"
