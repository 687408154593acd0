#!/usr/bin/env bash
# A published experiment on GPT-2 small (Bhaskar et al. 2024): a sweep over its target sparsities,
# with the published settings; an evaluation of each run; and a report that shows the frontier.
#
#   run_scripts/gpt2.sh ioi                       # or ioi_t1, greater_than, gendered_pronoun
#   run_scripts/gpt2.sh ioi seed=0,1,2            # further settings apply to every run
#
# Runs are written to runs/gpt2/TASK. A stopped sweep continues where it was
# when the script is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

case "${1:-}" in
  ioi | ioi_t1) targets=0.94,0.96,0.98,1.0,1.02,1.05,1.1 ;;
  greater_than) targets=0.95,0.97,0.99,1.0,1.02,1.05,1.1 ;;
  gendered_pronoun) targets=0.93,0.95,0.97,1.0,1.05,1.1,1.2,1.4 ;;
  *) sed -n '2,9p' "$0"; exit 2 ;;
esac
task=$1 runs=runs/gpt2/$1
shift
# No size is requested: a threshold is found by binary search, as published.
edgeprune prune "experiment=gpt2/$task" sparsity=null "trainer.target_sparsity=$targets" \
  "run_dir=$runs/target-\${trainer.target_sparsity}-seed-\${seed}" resume=auto "$@" --multirun
for run in "$runs"/target-*; do
  edgeprune evaluate "$run"
done
edgeprune report "$runs"
