#!/usr/bin/env bash
# All benchmarks that need a GPU, in some minutes: run_scripts/benchmark_gpu.sh [folder]
# One GPU of 80 GB or more; weights are random, nothing is downloaded.
set -euo pipefail
PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
out=${1:-benchmark_gpu}
mkdir -p "$out"

measure() { # name, then settings
    local name=$1
    shift
    timeout 180 edgeprune benchmark device=cuda output="$out/$name.json" "$@" || echo "$name failed" >&2
}

measure gpt2 shape=gpt2 dtype=bfloat16 batch_size=32 length=64 repetitions=20 \
    engines=[ours,ours_kept,stock] compare_float32=true
measure gpt2-graph shape=gpt2 dtype=bfloat16 batch_size=32 length=64 repetitions=20 \
    engines=[ours_kept,ours_graph,stock]
measure gpt2-graph-sliced shape=gpt2 dtype=bfloat16 batch_size=32 micro_batch_size=8 length=64 \
    repetitions=20 engines=[ours_kept,ours_graph,stock]
measure gpt2-float32 shape=gpt2 dtype=float32 batch_size=32 length=64 repetitions=10 \
    engines=[ours_kept,ours_graph,stock]
measure gpt2-naive shape=gpt2 dtype=bfloat16 batch_size=8 length=32 repetitions=3
measure codellama-13b shape=codellama-13b dtype=bfloat16 batch_size=32 micro_batch_size=8 \
    length=72 repetitions=3 recompute=true engines=[ours,stock]
measure codellama-13b-stored shape=codellama-13b dtype=bfloat16 batch_size=32 micro_batch_size=4 \
    length=72 repetitions=3 engines=[ours]
measure llama-8b shape=llama-8b dtype=bfloat16 batch_size=32 micro_batch_size=16 \
    length=72 repetitions=3 recompute=true engines=[ours,stock]
measure growth growth=true dtype=bfloat16 repetitions=10
nvidia-smi --query-gpu=name,memory.total --format=csv > "$out/gpu.csv"
