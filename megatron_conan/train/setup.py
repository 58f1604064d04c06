"""What a stage is built from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_conan.config import RunConfig
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.parallel.context import ParallelContext


@dataclass(frozen=True)
class Setup:
    """Config, this rank's place, and the tokenizer."""

    config: RunConfig
    context: ParallelContext
    tokenizer: Tokenizer
