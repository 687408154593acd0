#!/usr/bin/env bash
# The circuits of the embedded model in README.md: five tasks, three seeds, and a report of them all.
#
#   run_scripts/embedded.sh        # about 20 minutes on two CPU cores
#
# Runs go to runs/embedded/; what is there already is not run again.
set -euo pipefail
cd "$(dirname "$0")/.."
edgeprune=.venv/bin/edgeprune

for task in ioi ioi_t1 greater_than gendered_pronoun induction; do
  for seed in 0 1 2; do
    run=runs/embedded/$task-$seed
    [ -e "$run/evaluation-test.json" ] && continue
    "$edgeprune" prune "experiment=$task" "seed=$seed" "run_dir=$run" resume=auto
    "$edgeprune" evaluate "$run" head_permuted=5
  done
done
"$edgeprune" report runs/embedded
