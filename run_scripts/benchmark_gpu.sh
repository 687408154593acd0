#!/usr/bin/env bash
# Run all benchmarks that need a GPU, in less than ten minutes: run_scripts/benchmark_gpu.sh [folder]
# Needs one GPU with at least 80 GB. Weights are random; nothing is downloaded. Uses .venv, or
# python3 if the torch in .venv finds no GPU; edgeprune need not be installed. Fails if a benchmark
# fails.
set -uo pipefail
out=${1:-benchmark_gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."

python=
for candidate in .venv/bin/python python3; do
    if "$candidate" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "neither .venv nor python3 has a torch that sees a GPU; install torch for CUDA and the" >&2
    echo "dependencies of this project (pip install .), and run this again" >&2
    exit 1
fi
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/gpu.csv"
memory=$("$python" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory // 10**9)')

failed=()
measure() { # arguments: name, options of benchmark.py
    local name=$1 left=$((570 - SECONDS))
    shift
    echo "== $name: $*"
    ((left > 5)) && timeout "$left" "$python" run_scripts/benchmark.py --device cuda \
        --output "$out/$name.json" "$@" || failed+=("$name")
}

step="--dtype bfloat16 --batch-size 32" # the most important measurements come first
for fused in "" --fused; do
    measure "gpt2-graph$fused" $step --shape gpt2 --length 64 --repetitions 20 $fused \
        --engines ours ours_kept ours_graph stock --compare-float32
done
large="$step --length 72 --repetitions 3"
for fused in "" --fused; do
    measure "codellama-13b$fused" $large --shape codellama-13b --micro-batch-size 8 \
        --recompute $fused --engines ours stock
done
measure codellama-13b-stored $large --shape codellama-13b --engines ours \
    --micro-batch-size $((memory > 120 ? 8 : 4))
measure llama-8b $large --shape llama-8b --micro-batch-size 16 --recompute --engines ours stock
measure llama-8b-stored $large --shape llama-8b --engines ours \
    --micro-batch-size $((memory > 90 ? 16 : 8))
measure growth --growth --dtype bfloat16 --repetitions 10
measure gpt2-graph-sliced $step --shape gpt2 --micro-batch-size 8 --length 64 --repetitions 20 \
    --engines ours_kept ours_graph stock
measure gpt2-float32 --shape gpt2 --dtype float32 --batch-size 32 --length 64 --repetitions 10 \
    --engines ours_kept ours_graph stock
measure gpt2-naive --shape gpt2 --dtype bfloat16 --batch-size 8 --length 32 --repetitions 3
echo "$SECONDS s; results in $out"
if ((${#failed[@]})); then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
