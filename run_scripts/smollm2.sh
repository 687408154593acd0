#!/usr/bin/env bash
# The circuits of SmolLM2-135M in RESULTS.md: prune, measure at every size, draw.
#
#   run_scripts/smollm2.sh                      # model from the hub; some hours on a CPU
#   run_scripts/smollm2.sh path/to/model.gguf   # model from a file
#   run_scripts/smollm2.sh path/to/model.gguf model.dtype=bfloat16   # faster with AVX512-BF16
#
# Runs are written to runs/smollm2/. Finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
edgeprune=.venv/bin/edgeprune
model=()
[ $# = 0 ] || model=("model.path=$1" "${@:2}")

circuit() { # arguments: name of the run, experiment, settings
  local run=runs/smollm2/$1
  [ -e "$run/circuit.json" ] && return
  "$edgeprune" prune "experiment=smollm2/$2" "${model[@]}" "run_dir=$run" resume=auto "${@:3}"
}

for seed in 0 1 2; do
  circuit "ioi-$seed" ioi "seed=$seed"
done
long=(task.train=6400 task.validation=50)
circuit ioi-800 ioi "${long[@]}" trainer.steps=800 trainer.learning_rate=0.15
circuit induction_list-800 induction_list "${long[@]}" trainer.steps=800 trainer.learning_rate=0.15
circuit ioi-1600 ioi "${long[@]}" trainer.steps=1600 trainer.learning_rate=0.075 trainer.batch_size=4
circuit gendered_pronoun-800 gendered_pronoun trainer.steps=800 trainer.learning_rate=0.15 \
  trainer.batch_size=4 task.validation=50
.venv/bin/python run_scripts/curves.py runs/smollm2/gendered_pronoun-800.png 150 \
  "800 steps of 4 pairs=runs/smollm2/gendered_pronoun-800"
for task in greater_than gendered_pronoun induction_list; do
  circuit "$task-0" "$task"
  .venv/bin/python run_scripts/curves.py "runs/smollm2/$task.png" 150 "one seed=runs/smollm2/$task-0"
done
.venv/bin/python run_scripts/curves.py runs/smollm2/induction_list-800.png 150 \
  "800 steps of 8 pairs=runs/smollm2/induction_list-800"
.venv/bin/python run_scripts/curves.py data/curves_smollm2.png 150 \
  "400 steps of 8 pairs, three seeds=runs/smollm2/ioi-0,runs/smollm2/ioi-1,runs/smollm2/ioi-2" \
  "800 steps of 8 pairs=runs/smollm2/ioi-800" \
  "1,600 steps of 4 pairs=runs/smollm2/ioi-1600" attribution
for run in ioi-2 greater_than-0; do
  "$edgeprune" export "runs/smollm2/$run" sparsity=0.98
  "$edgeprune" evaluate "runs/smollm2/$run" head_permuted=3
done
"$edgeprune" heads runs/smollm2/ioi-2
"$edgeprune" draw runs/smollm2/ioi-2 num_edges=100 output=runs/smollm2/strongest
