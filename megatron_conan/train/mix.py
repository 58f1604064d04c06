"""The mix of a run: its sources as `data.blending` takes them, what is told of them, and what was taken."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from megatron_conan.config.tree import SourceConfig
from megatron_conan.data.blending import Blend, Source
from megatron_conan.data.sampler import SourceSchedule


def source_weights(sources: list[SourceConfig]) -> list[float] | None:
    """The sources' weights, or None if none is given. Raises ValueError if only some are."""
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        missing = [str(source.prefix) for source in sources if source.weight is None]
        raise ValueError(
            f"data.sources: {', '.join(missing)} gives no weight but others do; give all sources one, or none"
        )
    return weights or None


def blended(
    configs: Sequence[SourceConfig], weights: Sequence[float], num_samples: Sequence[int], batch_size: int = 1
) -> list[Source]:
    """Sources of a mix.

    Args:
        configs: of the sources.
        weights: [n] shares asked for, up to a common factor.
        num_samples: [n] sequences or rows in each.
        batch_size: samples of a draw, where a source has no batch size of its own.
    """
    return [
        Source(config.label, weight, size, config.batch_size or batch_size, config.max_epochs)
        for config, weight, size in zip(configs, weights, num_samples, strict=True)
    ]


def scheduled_samples(schedule: SourceSchedule, blend: Blend, step: int) -> dict[str, int]:
    """Samples by source in steps 1 .. step, of sources that take turns."""
    batches = schedule.batches_of(step).tolist()
    return {source.name: count * source.draw_size for source, count in zip(blend.sources, batches, strict=True)}


def tell_mix(blends: Sequence[Blend]) -> None:
    """Print what the run is going to take, where there is more than one source. Rank 0 only."""
    for blend in blends:
        if len(blend.sources) > 1:
            print("\n".join(blend.describe()), file=sys.stderr, flush=True)


def tell_realised(blends: Sequence[Blend], step: int, samples: Mapping[str, int]) -> None:
    """Print what it took. Rank 0 only."""
    for blend in blends:
        if len(blend.sources) > 1 and step:
            print(f"mix of {step} steps: {blend.realised(samples)}", file=sys.stderr, flush=True)
