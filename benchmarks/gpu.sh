#!/usr/bin/env bash
# Everything that only a GPU can tell, in ten minutes: the tests marked gpu, then the benchmarks for one, most telling
# first. Each has a limit of its own, and one that fails or runs past it stops no other; what was printed and measured
# goes to a folder as it comes. The last line says which failed, and so does the exit status.
#
#     benchmarks/gpu.sh [FOLDER]        or `make gpu`; FOLDER is gpu-results
#
# PYTHON names another interpreter than .venv's, with torch for CUDA and this checkout of Onward installed. DEVICE=cpu tries
# the script where there is no GPU: the tests are skipped then, the larger benchmarks stopped, and times say nothing.
set -uo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../gpu-results}")
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
mkdir -p "$folder"
graphs=$([ "$device" = cpu ] || echo --cuda-graphs)
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
failed=()

run() {  # NAME SECONDS COMMAND …
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "== $name: $*"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$folder/$name.txt" | tail -n "${LINES_SHOWN:-40}" \
    || failed+=("$name")
  echo "== $name: $((SECONDS - started)) s"
}

"$python" -c 'import onward, os, sys; here = os.path.realpath
sys.exit(here(os.path.dirname(os.path.dirname(onward.__file__))) != here("."))' || {
  echo "benchmarks/gpu.sh: '$python' has no Onward of this checkout: $python -m pip install -e . there." >&2
  exit 2
}
[ "$device" = cpu ] || "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || {
  echo "benchmarks/gpu.sh: '$python' has no torch that sees a GPU. PYTHON=… names another." >&2
  exit 2
}
bench() {  # NAME SECONDS ARGUMENTS …
  run "$1" "$2" "$python" "benchmarks/$1.py" --device "$device" "${@:3}" --json "$folder/$1.json"
}

run tests 200 "$python" -m pytest -m gpu -n 8 -v -p no:cacheprovider
bench cuda_graphs 120 --rounds "${ROUNDS:-10}" --inductor --models mlp "mlp of 12 layers" resnet5 resnet9
bench streams 120 --copies 100 500 --rounds "${ROUNDS:-5}"
bench packed_gradients 60 --rounds "${ROUNDS:-5}"
bench step 60 --repeats "${ROUNDS:-5}" --copies 16
run train 60 "$python" -m onward train --model resnet5 --data digits --device "$device" --compare-bp $graphs
if ((${#failed[@]})); then
  echo "Failed or ran past its time: ${failed[*]}. What they printed is in $folder."
  exit 1
fi
echo "All done; results are in $folder."
