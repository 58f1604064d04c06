#!/usr/bin/env bash
# Submits all stages of the recipe, each to start when the one before has finished:
#     launch/slurm/chain.sh [--configs configs/conan_1.4b] [sbatch options ...]
# as in `launch/slurm/chain.sh --nodes 2 --time 24:00:00 --partition gpu`. Prints the jobs' numbers. Call it in the checkout.
set -euo pipefail
configs=configs/conan_1.4b
if [[ "${1:-}" = --configs ]]; then
  configs="${2:?--configs needs a folder}"
  shift 2
fi
dependency=()
for stage in pretrain sft weak finetune; do
  if [[ ! -e "$configs/$stage.yaml" ]]; then
    echo "error: $configs/$stage.yaml does not exist; name the folder of the configs with --configs" >&2
    exit 2
  fi
done
for stage in pretrain sft weak finetune; do
  job="$(sbatch --parsable ${dependency[@]+"${dependency[@]}"} "$@" "launch/slurm/$stage.sbatch" --config "$configs/$stage.yaml")"
  job="${job%%;*}"
  echo "$stage $job"
  # a job that can never start is removed, instead of waiting forever
  dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
done
