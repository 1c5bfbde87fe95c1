#!/usr/bin/env bash
# Everything on one GPU, in an order that gives most when it is cut off: checks, tests, ceilings, the step, the rest.
#
#     benchmarks/gpu/run.sh [--results DIR] [--archive FILE.tar.gz] [--minutes N] [STAGE…]
#
# Results are DIR/gpu-*.json (benchmarks/results), each case written as soon as it is measured. A second call does what
# is missing or failed; STAGE names what to do alone. --archive keeps one file with all results up to date, for machines
# whose disk goes away. --minutes starts no case after N minutes; one that has started may take 3 more.
set -uo pipefail
cd "$(dirname "$0")/../.."
results=benchmarks/results archive="" minutes=100000 stages=()
all=(check tests ceilings step_3b decode encoder memory data_wait moe long-tests)
while [ $# -gt 0 ]; do
    case $1 in
        --results) results=$2 && shift 2 ;;
        --archive) archive=$2 && shift 2 ;;
        --minutes) minutes=$2 && shift 2 ;;
        -*) sed -n '2,8s/^# \{0,1\}//p' "$0" && exit 2 ;;
        *) stages+=("$1") && shift ;;
    esac
done
[ ${#stages[@]} -gt 0 ] || stages=("${all[@]}")
python=${PYTHON:-$([ -x .venv/bin/python ] && [ -z "${PYTHONPATH:-}" ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$results"

failed=()
for stage in "${stages[@]}"; do
    left=$((minutes * 60 - SECONDS))
    if [ $left -le 0 ]; then
        echo "=== ${minutes} minutes are over; left: $stage and what comes after it"
        failed+=("$stage: not started")
        break
    fi
    echo "=== $stage [${SECONDS} s]"
    case $stage in
        tests) command=(benchmarks/gpu/tests.py) ;;
        long-tests) command=(benchmarks/gpu/tests.py --long) ;;
        *) command=("benchmarks/gpu/$stage.py") ;;
    esac
    "$python" "${command[@]}" --results "$results" --stop-after $left 2>&1 | tee -a "$results/gpu-run.log" || failed+=("$stage")
    if [ -n "$archive" ]; then
        tar -czf "$archive.part" -C "$results" $(cd "$results" && ls -d gpu-*) && mv "$archive.part" "$archive"
    fi
done
echo "=== done in ${SECONDS} s; ${#failed[@]} stages with something failed or left: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
