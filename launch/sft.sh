#!/usr/bin/env bash
# Stage sft. Valid bash and valid Python: `bash launch/sft.sh ...` starts torchrun on this machine, and
# `torchrun --nproc-per-node N launch/sft.sh --config FILE [section.key=value ...]` runs the Python half in every process.
''':'
source "$(dirname -- "${BASH_SOURCE[0]}")/_run.sh"
_conan_run "${BASH_SOURCE[0]}" "$@"
exit
'''
import sys

from megatron_conan.main import main

if __name__ == "__main__":
    sys.exit(main("sft", sys.argv[1:]))
