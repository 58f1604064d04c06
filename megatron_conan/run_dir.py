"""Prints the run's folder of a stage's command line: `python -m megatron_conan.run_dir STAGE --config FILE [...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megatron_conan.config import load_config
from megatron_conan.main import parse_arguments


def main(stage: str, argv: Sequence[str]) -> int:
    """Exit status 2 with one line if the config is wrong."""
    try:
        file, overrides = parse_arguments(stage, argv)
        print(load_config(file, overrides).run_dir.absolute())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
