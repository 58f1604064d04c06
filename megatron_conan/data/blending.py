"""How much of each source a run takes: shares by weight, within limits on how often a source is repeated.

A *draw* is what a source gives at a time: one sequence of a language-model source, one global batch of pairs or instructions.
Legend: `n` sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Source:
    """A source as the mix sees it."""

    name: str
    weight: float
    """Share of the draws that is asked for, up to a common factor."""
    num_samples: int
    """Sequences or rows in it."""
    draw_size: int = 1
    """Samples of one draw."""
    max_epochs: float | None = None
    """The run goes through it so often at most."""


@dataclass(frozen=True)
class Blend:
    """The mix of a run."""

    sources: list[Source]
    num_draws: int
    """Of the whole run."""
    weights: list[float]
    """[n] what is asked for, if no limit is reached; else the shares."""

    @property
    def shares(self) -> np.ndarray:
        """[n] share of the draws, summing to 1."""
        return np.array(self.weights) / sum(self.weights)

    def describe(self) -> list[str]:
        """A table: a line for the head and one for each source."""
        asked = np.array([source.weight for source in self.sources]) / sum(source.weight for source in self.sources)
        rows = [("source", "asked", "share", "samples in it", "samples taken", "epochs", "")]
        for source, wanted, share in zip(self.sources, asked, self.shares, strict=True):
            taken = share * self.num_draws * source.draw_size
            note = f"max_epochs={source.max_epochs:g} lowers it" if share < wanted * (1 - 1e-9) else ""
            cells = (f"{wanted:.1%}", f"{share:.1%}", f"{source.num_samples:,}", f"{taken:,.0f}")
            rows.append((source.name, *cells, f"{taken / source.num_samples:.2f}", note))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(
                cell.ljust(width) if i in (0, 6) else cell.rjust(width) for i, (cell, width) in enumerate(pairs)
            ).rstrip()
            for pairs in (list(zip(row, widths, strict=True)) for row in rows)
        ]

    def realised(self, samples: Mapping[str, int]) -> str:
        """What came out: share and epochs of each source, from its samples by name."""
        total = sum(samples[source.name] for source in self.sources)
        asked = sum(source.weight * source.draw_size for source in self.sources)
        return ", ".join(
            f"{source.name} {samples[source.name] / total:.1%} (asked {source.weight * source.draw_size / asked:.1%}, "
            f"{samples[source.name] / source.num_samples:.2f} epochs)"
            for source in self.sources
        )


def blend_sources(sources: Sequence[Source], num_draws: int) -> Blend:
    """Settle the shares of a run of `num_draws` draws.

    A source whose share would take it beyond its `max_epochs` gets what that allows; the others share the rest by weight.

    Raises:
        ValueError: all sources are limited, and together hold less than the run needs.
    """
    limits = np.array([_most_draws(source) for source in sources]) / num_draws
    asked = np.array([source.weight for source in sources], dtype=np.float64)
    asked = asked / asked.sum()
    if (asked <= limits).all():
        return Blend(list(sources), num_draws, [source.weight for source in sources])
    if limits.sum() < 1:
        shortest = ", ".join(f"{source.name} {source.num_samples:,} x {source.max_epochs:g}" for source in sources)
        raise ValueError(
            f"data.sources: with max_epochs the sources hold {limits.sum():.1%} of what the run takes (samples x epochs: "
            f"{shortest}); raise or remove max_epochs of one, or lower train.steps or train.global_batch_size"
        )
    return Blend(list(sources), num_draws, _fill(asked, limits).tolist())


def _most_draws(source: Source) -> float:
    return np.inf if source.max_epochs is None else source.max_epochs * source.num_samples / source.draw_size


def _fill(asked: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """[n] shares that sum to 1, in proportion to `asked` where that is within `limits`, else the limit."""
    is_full = np.zeros(len(asked), bool)
    while True:
        left = 1.0 - limits[is_full].sum()
        shares = np.where(is_full, limits, 0.0)
        shares[~is_full] = left * asked[~is_full] / asked[~is_full].sum()
        over = ~is_full & (shares > limits)
        if not over.any():
            return shares
        is_full |= over
        if is_full.all():  # the limits sum to 1, up to rounding
            return limits / limits.sum()


def mix_metrics(samples: Mapping[str, int]) -> dict[str, float]:
    """`mix/NAME`: share of each source among all samples so far; nothing for a single source."""
    total = sum(samples.values())
    if len(samples) < 2 or not total:
        return {}
    return {f"mix/{name}": count / total for name, count in samples.items()}
