#!/usr/bin/env bash
# The circuits of SmolLM2-135M in RESULTS.md: prune, evaluate with head-permuted circuits, draw.
#
#   run_scripts/smollm2.sh                      # model from the hub; about 1.5 hours on a CPU
#   run_scripts/smollm2.sh path/to/model.gguf   # model from a file
#
# Runs are written to runs/smollm2/. Finished runs are not repeated.
set -euo pipefail
cd "$(dirname "$0")/.."
edgeprune=.venv/bin/edgeprune
model=()
[ $# = 0 ] || model=("model.path=$1")

circuit() { # arguments: name of the run, experiment, settings
  local run=runs/smollm2/$1
  [ -e "$run/evaluation-test.json" ] && return
  "$edgeprune" prune "experiment=smollm2/$2" "${model[@]}" "run_dir=$run" resume=auto "${@:3}"
  "$edgeprune" evaluate "$run" head_permuted=5
  "$edgeprune" draw "$run"
}

circuit ioi-95 ioi
circuit ioi-98 ioi sparsity=0.98
circuit greater_than-95 greater_than
circuit gendered_pronoun-95 gendered_pronoun
circuit induction_list-95 induction_list
"$edgeprune" draw runs/smollm2/ioi-98 num_edges=150 output=runs/smollm2/strongest
.venv/bin/python run_scripts/ioi_heads.py runs/smollm2/ioi-98
