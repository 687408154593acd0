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

curves() { # arguments: picture, legend=runs, ...
  .venv/bin/python run_scripts/curves.py "$1" 150 "${@:2}"
}
three() { # arguments: name of runs without their seeds; prints their paths, separated by commas
  echo "runs/smollm2/$1-0,runs/smollm2/$1-1,runs/smollm2/$1-2"
}

long=(task.train=6400 task.validation=50)
for seed in 0 1 2; do
  circuit "ioi-$seed" ioi "seed=$seed"
  circuit "ioi-1600-$seed" ioi "seed=$seed" "${long[@]}" trainer.steps=1600 \
    trainer.learning_rate=0.075 trainer.batch_size=4
  circuit "greater_than-$seed" greater_than "seed=$seed"
  circuit "gendered_pronoun-800-$seed" gendered_pronoun "seed=$seed" task.validation=50 \
    trainer.steps=800 trainer.learning_rate=0.15 trainer.batch_size=4
done
circuit ioi-800 ioi "${long[@]}" trainer.steps=800 trainer.learning_rate=0.15
circuit induction_list-800 induction_list "${long[@]}" trainer.steps=800 trainer.learning_rate=0.15
circuit gendered_pronoun-0 gendered_pronoun
circuit induction_list-0 induction_list
circuit ioi-200 ioi seed=2 task.train=200 task.validation=50
for name in greater_than gendered_pronoun-800; do
  curves "runs/smollm2/$name.png" "three seeds=$(three "$name")"
done
for name in gendered_pronoun-0 induction_list-0 induction_list-800 ioi-200; do
  curves "runs/smollm2/$name.png" "$name=runs/smollm2/$name"
done
curves data/curves_smollm2.png "400 steps of 8 pairs, three seeds=$(three ioi)" \
  "1,600 steps of 4 pairs, three seeds=$(three ioi-1600)" \
  "800 steps of 8 pairs=runs/smollm2/ioi-800" attribution
for run in ioi-2 greater_than-0; do
  "$edgeprune" export "runs/smollm2/$run" sparsity=0.98
  "$edgeprune" evaluate "runs/smollm2/$run" head_permuted=3
done
"$edgeprune" heads runs/smollm2/ioi-2
"$edgeprune" draw runs/smollm2/ioi-2 num_edges=100 output=runs/smollm2/strongest
