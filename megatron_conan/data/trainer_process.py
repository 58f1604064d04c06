"""Training the tokenizer in a process of its own, whose messages become a progress line.

SentencePiece's trainer holds the interpreter for hours at a large vocabulary and tells how far it is only on stderr.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_conan.data.command_line import Progress
from megatron_conan.data.tokenizer_training import train_tokenizer

_MERGES = re.compile(r"Added: .*\bsize=(\d+)")
FAILED = 3


def train_on_file(sample: Path, model: Path, vocab_size: int, settings: dict[str, Any]) -> None:
    """Train on the lines of a file, with a progress line.

    Args:
        sample: lines of `tokenizer_sampling.write_sample`.
        model: is written.
        vocab_size: number of pieces.
        settings: further arguments of `train_tokenizer`.

    Raises:
        ValueError: the text doesn't support the vocabulary; or the process was killed.
    """
    request = json.dumps([str(sample), str(model), vocab_size, settings])
    command = [sys.executable, "-P", "-m", __name__, request]
    progress = Progress("training", vocab_size, "pieces")
    # what is not progress is kept for an error
    other: list[str] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace") as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := _MERGES.search(line):
                    done = int(found[1]) - progress.done
                    progress.advance(max(done, 0), max(done, 0))
                else:
                    other = [*other[-20:], line]
        except BaseException:
            process.kill()
            raise
    if process.returncode == FAILED:
        raise ValueError(other[-1].strip())
    if process.returncode:
        reason = (
            "killed, often for lack of memory" if process.returncode < 0 else f"ended with code {process.returncode}"
        )
        raise ValueError(f"SentencePiece's trainer was {reason}; give it less text (--sample-characters). {other[-1:]}")
    progress.advance(vocab_size - progress.done, vocab_size - progress.counted)
    progress.finish()


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            yield line.removesuffix("\n")


def _main(request: str) -> int:
    sample, model, vocab_size, settings = json.loads(request)
    try:
        content = train_tokenizer(_lines(Path(sample)), vocab_size, is_silent=False, **settings)
    except ValueError as error:
        print(f"\n{' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return FAILED
    Path(model).write_bytes(content)
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1]))
