#!/usr/bin/env bash
# The circuits of the included compiled transformers, under both ablations and with five seeds each,
# compared with the true edges. Takes a few minutes.
#
#     run_scripts/tracr.sh                # further arguments are passed to `edgeprune prune`
#
# Runs are written to runs/tracr/. Earlier runs there are replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"

is_true() { # arguments: program, key of its true edges, run
  python - "$@" <<'END'
import json, sys
program, key, run = sys.argv[1:]
true = json.load(open(f"data/tracr_models/{program}/ground_truth_edges.json"))[key]
found = json.load(open(f"{run}/edges.json"))
print(f"{run}: {len(found)} edges,", "true" if sorted(found) == sorted(true) else "NOT TRUE")
END
}

for program in reverse xproportion neighbours brackets; do
  for seed in 0 1 2 3 4; do
    for ablation in zero interchange; do
      run=runs/tracr/$program-$ablation-$seed
      edgeprune prune "experiment=tracr/$program" "ablation=$ablation" "seed=$seed" \
        "run_dir=$run" overwrite=true "$@" >/dev/null
      key=edges
      [ "$ablation" = zero ] || key=edges_patching
      is_true "$program" "$key" "$run"
    done
  done
done
