"""What a stage is built from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_conan.config import RunConfig
from megatron_conan.data.format import Formatter
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.parallel.context import ParallelContext


@dataclass(frozen=True)
class Setup:
    """Config, this rank's place, and the tokenizer."""

    config: RunConfig
    context: ParallelContext
    tokenizer: Tokenizer

    @cached_property
    def formatter(self) -> Formatter:
        """The one way this run's texts become model inputs."""
        return Formatter.of_run(self.config, self.tokenizer)
