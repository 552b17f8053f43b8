#!/usr/bin/env bash
# All that a machine with a GPU can say of megalm, into one folder: the kernels' tests, the benchmarks, whole runs.
#
#   benchmarks/gpu.sh [PART ...]     of: tests loss training peers attention runs (default: all, in this order)
#
# OUT      folder of the results (default: runs/gpu): NAME.log as printed, NAME.jsonl as JSON lines
# MINUTES  of the training benchmark, and of the comparison (default: 8 and 3)
# OPTIONS  of every benchmark (default: --quick; set it to nothing for figures that are published)
# WHEELS   folder of wheels to install first, beside the torch that is here, where no package index can be reached
# PYTHON   default: python3
#
# Each part is tried whatever became of the one before; the exit code is the number of those that failed. A part that is
# killed leaves what it had measured.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-runs/gpu}
python=${PYTHON:-python3}
read -ra options <<< "${OPTIONS---quick}"
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$out"

if [[ -n ${WHEELS:-} ]]; then
  site=$(mktemp -d)
  "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 1
  PYTHONPATH=$PYTHONPATH:$site
fi

run() {
  local part=$1
  shift
  echo "== $part"
  "$@" 2>&1 | tee "$out/$part.log" || failed=$((failed + 1))
}

failed=0
for part in "${@:-tests loss training peers attention runs}"; do
  for name in $part; do
    case $name in
      tests) run tests "$python" -m pytest -q -m gpu -n 6 tests/gpu/test_kernels.py ;;
      loss) run loss "$python" benchmarks/gpu_cross_entropy.py --output "$out/loss.jsonl" "${options[@]}" ;;
      attention) run attention "$python" benchmarks/gpu_attention.py --output "$out/attention.jsonl" "${options[@]}" ;;
      training)
        run training "$python" benchmarks/gpu_training.py --output "$out/training.jsonl" \
          --minutes "${MINUTES:-8}" "${options[@]}"
        ;;
      peers)
        run peers "$python" benchmarks/gpu_peers.py --output "$out/peers.jsonl" --minutes "${MINUTES:-3}" "${options[@]}"
        ;;
      runs) run runs "$python" -m pytest -q -m gpu -n 3 tests/gpu/test_one_gpu.py ;;
      *)
        echo "error: $name is no part: name some of tests, loss, training, peers, attention, runs" >&2
        exit 2
        ;;
    esac
  done
done
exit "$failed"
