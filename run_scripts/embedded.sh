#!/usr/bin/env bash
# The circuits of the embedded model in README.md and RESULTS.md: five tasks with three seeds each,
# other numbers of steps and training prompts and the published method for ioi, and a report.
#
#   run_scripts/embedded.sh        # about an hour on two CPU cores
#
# Runs are written to runs/embedded*/. Finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
edgeprune=.venv/bin/edgeprune

run() { # arguments: run directory, settings
  [ -e "$1/circuit.json" ] && return
  "$edgeprune" prune "${@:2}" "run_dir=$1" resume=auto
}
three() { # arguments: path of runs without their seeds; prints them, separated by commas
  echo "$1-0,$1-1,$1-2"
}

for seed in 0 1 2; do
  for task in ioi ioi_t1 greater_than gendered_pronoun induction; do
    run "runs/embedded/$task-$seed" "experiment=$task" "seed=$seed"
  done
  for steps in 50 200 400; do
    run "runs/embedded-steps/$steps-$seed" experiment=ioi "seed=$seed" "trainer.steps=$steps" \
      "trainer.learning_rate=$(python3 -c "print(80 / $steps)")" "task.train=$((16 * steps))"
  done
  for prompts in 25 100 400; do
    run "runs/embedded-prompts/$prompts-$seed" experiment=ioi "seed=$seed" "task.train=$prompts"
  done
done
run runs/embedded-paper experiment=ioi trainer=paper sparsity=0.98 task.train=200
"$edgeprune" report runs/embedded
for task in ioi_t1 greater_than gendered_pronoun induction; do
  .venv/bin/python run_scripts/curves.py "runs/embedded/$task.png" 300 \
    "three seeds=$(three "runs/embedded/$task")"
done
for prompts in 25 100 400; do
  .venv/bin/python run_scripts/curves.py "runs/embedded-prompts/$prompts.png" 300 \
    "$prompts prompts=$(three "runs/embedded-prompts/$prompts")"
done
steps=()
for number in 50 200 400; do
  steps+=("$number steps=$(three "runs/embedded-steps/$number")")
done
.venv/bin/python run_scripts/curves.py data/curves_embedded.png 300 \
  "100 steps of 16 pairs, three seeds=$(three runs/embedded/ioi)" "${steps[@]}" \
  "trainer=paper for 98 %, 3,000 steps of 32 pairs=runs/embedded-paper" attribution
