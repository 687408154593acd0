#!/usr/bin/env bash
# CodeLlama-13B on Boolean expressions, prompted with an instruction and with examples, and what the
# two circuits share, as in Bhaskar et al. 2024.
#
#     bash run_scripts/boolean_expressions.sh              # takes hours on a GPU with 80 GB
#     bash run_scripts/boolean_expressions.sh rehearsal    # takes minutes, with the embedded model
#
# Further arguments are passed to `edgeprune prune`, such as trainer.steps=100. Stopped runs are
# continued.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

family=codellama/ runs=runs/boolean_expressions
if [ "${1:-}" = rehearsal ]; then
  family="" runs=runs/boolean_expressions-rehearsal
  shift
fi
for form in instruction few_shot; do
  edgeprune prune experiment="${family}boolean_expressions_$form" run_dir="$runs/$form" \
    resume=auto "$@"
  edgeprune evaluate "$runs/$form"
done
edgeprune compare "$runs/instruction" "$runs/few_shot" output="$runs/comparison"
for form in instruction few_shot; do # evaluate the shared circuit on the prompts of each form
  edgeprune evaluate "$runs/comparison/intersection" task="boolean_expressions_$form" \
    task.path="$runs/$form/data.jsonl" output="$runs/comparison/intersection-$form.json"
done
edgeprune draw "$runs/comparison/intersection"
edgeprune report "$runs"
