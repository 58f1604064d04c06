"""Sections that say how a run is kept going and looked at; none of them changes what is trained.

Required fields have no default; one docstring a field, units included.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_conan.config.section import Positive, Section


class CheckpointConfig(Section):
    """What is kept, and where a stage starts from."""

    every: Positive | None = None
    """Steps between checkpoints; the last step is always saved."""
    keep_last: Positive = 2
    """Newest checkpoints kept."""
    keep_every: Positive | None = None
    """Checkpoints of steps that are multiples of this are kept for good."""
    asynchronous: bool = True
    """Training goes on while a process beside each rank writes the checkpoint (Linux; elsewhere training waits)."""
    init_from: Path | None = None
    """Run (or checkpoint) folder whose weights this stage starts from; random weights if not given."""


class WatchdogConfig(Section):
    """Finds the rank that the others wait for."""

    report_seconds: Annotated[float, Field(gt=0)] = 300.0
    """A run that has made no progress for this long tells which ranks are behind, what they do, and their stacks."""
    abort_seconds: Annotated[float, Field(gt=0)] = 1800.0
    """A run that has made no progress for this long is ended on all ranks."""


class ProfileConfig(Section):
    """A window of steps under torch.profiler; traces go to the run's folder `profile/`."""

    start: Positive
    """First step that is recorded; the one before warms the profiler up."""
    steps: Positive = 2
    """Steps that are recorded."""
    ranks: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]
    """Ranks that record."""
