# Sourced by launch/slurm/STAGE.sbatch: one stage of the recipe as a SLURM job that stops in time, and goes on when it is started again.
#
# One torchrun a node. Environment: CONAN_ROOT (the checkout; else where sbatch was called), NPROC (processes a node; else its GPUs, else 1),
# CONAN_LOGS (folder of the ranks' output; else RUN/logs), CONAN_LATE (see below; less than --signal is early), CONAN_SRUN (more options for srun, as those of a container).

_conan_late() {
  sleep "$1"
  echo "job $SLURM_JOB_ID: not stopped $1 s after its signal, queued again; it goes on from the last checkpoint"
  scontrol requeue "$SLURM_JOB_ID"
}

_conan_job() {
  set -uo pipefail
  local stage="$1" python=python3 run logs head port
  shift
  if [[ -x .venv/bin/python ]]; then python="$PWD/.venv/bin/python"; fi
  local -a srun_options
  read -ra srun_options <<< "${CONAN_SRUN:-}"
  # what is wrong with the config shows here, on one node
  run="$(srun --nodes=1 --ntasks=1 ${srun_options[@]+"${srun_options[@]}"} "$python" -P -m megatron_conan.run_dir "$stage" "$@")" || return 2
  logs="${CONAN_LOGS:-$run/logs}/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
  mkdir -p "$logs" || return 1
  head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
  if [[ -n "${MASTER_ADDR:-}" ]]; then head="$MASTER_ADDR"; fi
  port="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
  echo "job $SLURM_JOB_ID: stage $stage on $SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), run $run, logs of ranks in $logs"

  local asked="" late=""
  # USR1: some minutes before the time limit (--signal). TERM: scontrol requeue, preemption, scancel, which kill after KillWait.
  # A step that doesn't end in CONAN_LATE seconds after USR1 (a mining, say) is given up: the job is queued again before its limit.
  trap 'asked=limit; touch "$run/STOP"; _conan_late "${CONAN_LATE:-230}" & late=$!' USR1
  trap 'asked="${asked:-term}"; touch "$run/STOP"' TERM

  # shellcheck disable=SC2016  # expanded on each node
  srun --kill-on-bad-exit=1 --ntasks-per-node=1 ${srun_options[@]+"${srun_options[@]}"} bash -c '
    gpus=0
    if command -v nvidia-smi > /dev/null 2>&1; then gpus="$(nvidia-smi --list-gpus | wc -l)"; fi
    exec "$0" -P -m torch.distributed.run --nnodes "$SLURM_JOB_NUM_NODES" --node-rank "$SLURM_NODEID" \
      --nproc-per-node "${NPROC:-$((gpus > 0 ? gpus : 1))}" --master-addr "$1" --master-port "$2" \
      --log-dir "$3/node_$SLURM_NODEID" --redirects 3 --tee 3 "${@:4}"' \
    "$python" "$head" "$port" "$logs" "launch/$stage.sh" "$@" &
  local srun=$! status
  wait "$srun" # a trap ends it
  while kill -0 "$srun" 2> /dev/null; do wait "$srun"; done
  wait "$srun"
  status=$?
  if [[ -n "$late" ]]; then kill "$late" 2> /dev/null; fi

  if [[ $status = 0 && ! -e "$run/STOP" ]]; then return 0; fi
  if [[ $status = 0 && $asked = limit ]]; then
    echo "job $SLURM_JOB_ID: stopped before its time limit, queued again"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # until SLURM ends this job: an exit would end it for good
    return 1
  fi
  if [[ $status = 0 ]]; then
    echo "job $SLURM_JOB_ID: stopped on request; the same sbatch goes on" >&2
    return 3 # not finished: jobs that depend on this one must not start
  fi
  return "$status"
}
