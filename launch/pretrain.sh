#!/usr/bin/env bash
# Stage pretrain. Valid bash and valid Python: `bash launch/pretrain.sh ...` starts torchrun on this machine, and
# `torchrun --nproc-per-node N launch/pretrain.sh --config FILE [section.key=value ...]` runs the Python half in every process.
''':'
source "$(dirname -- "${BASH_SOURCE[0]}")/_run.sh"
_conan_run "${BASH_SOURCE[0]}" "$@"
exit
'''
import sys

from megatron_conan.main import main

if __name__ == "__main__":
    sys.exit(main("pretrain", sys.argv[1:]))
