# Sourced by the bash half of launch/STAGE.sh: starts the same file under torchrun, on one machine.
# NPROC: processes (default: the GPUs there are, else 1).
_conan_run() {
  local script="$1"
  shift
  local gpus=0
  if command -v nvidia-smi > /dev/null 2>&1; then gpus="$(nvidia-smi --list-gpus | wc -l)"; fi
  local processes="${NPROC:-$((gpus > 0 ? gpus : 1))}"
  local torchrun="torchrun"
  local venv
  venv="$(cd -- "$(dirname -- "$script")/.." && pwd)/.venv/bin/torchrun"
  if [[ -x "$venv" ]]; then torchrun="$venv"; fi
  exec "$torchrun" --standalone --nproc-per-node "$processes" "$script" "$@"
}
