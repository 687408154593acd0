#!/usr/bin/env bash
# The circuits of the embedded model in README.md: five tasks with three seeds each, and a report.
#
#   run_scripts/embedded.sh        # about 20 minutes on two CPU cores
#
# Runs are written to runs/embedded/. Finished runs are not repeated.
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
