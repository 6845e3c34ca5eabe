#!/usr/bin/env bash
# Everything that only a CUDA machine can tell, into one report: bench/gpu_check.sh [FOLDER] [PART ...]
#
# FOLDER (bench/results by default) gets gpu_check.txt, the rows gpu.jsonl and the profiler's table gpu_profile.txt. Without a
# PART all run, the most telling first, each bounded in time, 25 minutes at most together. Nothing needs to be installed but torch
# and triton; what needs more (pytest, MONAI, CuPy, compute-sanitizer) is left out, and the report says so. A copy without its
# git history names its commit in BENCH_COMMIT. Exit status 1 if any part failed or there is no CUDA device.

set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-python3}

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "gpu_check: no CUDA device (or no torch) for $PYTHON; nothing was checked." >&2
    exit 1
fi

out=${1:-bench/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
[ $# -gt 0 ] && shift
parts=("$@")
[ $# -eq 0 ] && parts=(machine small step tests races stages labelling entries memcheck racecheck initcheck)
report=$out/gpu_check.txt rows=$out/gpu.jsonl
summary=() failed=0

say() { echo "$@" | tee -a "$report"; }

# part NAME SECONDS COMMAND...: run it within its time, into the report.
part() {
    local name=$1 seconds=$2 start=$SECONDS status verdict
    shift 2
    say "=== $name: $*"
    timeout --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$report"
    status=${PIPESTATUS[0]}
    case $status in
        0) verdict=passed ;;
        124 | 137) verdict="out of time ($seconds s)" failed=1 ;;
        *) verdict="FAILED (status $status)" failed=1 ;;
    esac
    summary+=("$name: $verdict, $((SECONDS - start)) s")
    say "=== $name: $verdict"
}

skip() {
    summary+=("$1: NOT RUN, $2")
    say "=== $1: NOT RUN, $2"
}

have() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

sanitizer() {
    local tool=$1
    shift
    if ! command -v compute-sanitizer >/dev/null; then
        skip "$tool" "compute-sanitizer is not installed"
        return
    fi
    # Without torch's cache every tensor is an allocation of its own, so that a step beyond its end is seen.
    part "$tool" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$@" "$PYTHON" -m bench.gpu_small --quick
}

describe() {
    "$PYTHON" - <<'PY'
import torch
from bench import measure

for key, value in measure.surroundings(torch.device("cuda")).items():
    print(f"{key}: {value}")
PY
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,utilization.gpu --format=csv || true
}
export -f describe
export PYTHON

say "gpu_check, $(date -u +%Y-%m-%dT%H:%M:%SZ): ${parts[*]}"
have monai || say "MONAI is not installed: the yardstick is its DiceLoss restated ('plain Dice'), its criteria are left out."
for name in "${parts[@]}"; do
    case $name in
        machine) part machine 30 bash -c describe ;;
        small) part small 120 "$PYTHON" -m bench.gpu_small ;;
        step) part step 120 "$PYTHON" -m bench.run --device cuda --entry step --out "$rows" ;;
        tests)
            if have pytest; then
                part tests 330 "$PYTHON" -m pytest tests -q -p no:cacheprovider --continue-on-collection-errors --maxfail 50
            else
                skip tests "pytest is not installed"
            fi
            ;;
        races) part races 150 "$PYTHON" -m bench.gpu_races --repeats 200 --seconds 110 ;;
        stages)
            part stages 60 "$PYTHON" -m bench.stages --device cuda --out "$rows" --profile "$out/gpu_profile.txt"
            ;;
        labelling) part labelling 150 "$PYTHON" -m bench.run --device cuda --entry labelling --seconds 0.3 --out "$rows" ;;
        entries)
            part entries 150 "$PYTHON" -m bench.run --device cuda --seconds 0.3 --out "$rows" \
                --entry scaling --entry instance_terms --entry determinism --entry memory --entry reference
            ;;
        memcheck) sanitizer memcheck ;;
        # Hazards in shared memory; races between blocks are what the part "races" looks for.
        racecheck) sanitizer racecheck ;;
        initcheck) sanitizer initcheck ;;
        *) skip "$name" "there is no such part" ; failed=1 ;;
    esac
done

say "=== summary"
for line in "${summary[@]}"; do say "$line"; done
exit "$failed"
