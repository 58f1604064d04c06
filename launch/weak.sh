#!/usr/bin/env bash
# Stage weak. Valid bash and valid Python: `bash launch/weak.sh ...` starts torchrun on this machine, and
# `torchrun --nproc-per-node N launch/weak.sh --config FILE [section.key=value ...]` runs the Python half in every process.
''':'
source "$(dirname -- "${BASH_SOURCE[0]}")/_run.sh"
_conan_run "${BASH_SOURCE[0]}" "$@"
exit
'''
import sys

from megatron_conan.main import main

if __name__ == "__main__":
    sys.exit(main("weak", sys.argv[1:]))
