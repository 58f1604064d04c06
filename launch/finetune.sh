#!/usr/bin/env bash
# Stage finetune. Valid bash and valid Python: `bash launch/finetune.sh ...` starts torchrun on this machine, and
# `torchrun --nproc-per-node N launch/finetune.sh --config FILE [section.key=value ...]` runs the Python half in every process.
''':'
source "$(dirname -- "${BASH_SOURCE[0]}")/_run.sh"
_conan_run "${BASH_SOURCE[0]}" "$@"
exit
'''
import sys

from megatron_conan.main import main

if __name__ == "__main__":
    sys.exit(main("finetune", sys.argv[1:]))
