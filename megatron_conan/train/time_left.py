"""How long a run will take yet."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice

RECENT = 1000
"""Most steps that are looked back on."""


class TimeLeft:
    """Foretells a run's end by the steps of this start.

    A plain step takes the mean of the later half of them: what is slow at first (compilation, cold caches) fades soon. Minings
    ahead are counted, each at the mean of those so far (nothing, until there was one); checkpoints go on holding up training
    as they did. What else the first step of a start had to do won't come again.
    """

    def __init__(self, steps: int, minings: Sequence[int] = ()) -> None:
        """`steps` of the whole run; `minings`: after how many steps it is mined, ascending."""
        self._steps, self._minings = steps, minings
        self._step = steps
        self._num_steps = self._num_minings = 0
        self._mining = self._held_up = 0.0
        self._plain: deque[float] = deque(maxlen=RECENT)

    def note(self, step: int, seconds: float, rare: Mapping[str, float]) -> None:
        """Step `step` is done.

        Args:
            step: from 1.
            seconds: since the step before was done.
            rare: of them, those of mining, evaluation, checkpoint by their metrics' names.
        """
        self._step = step
        mining = 0.0
        if self._ahead(step - 1) > self._ahead(step):
            mining = rare.get("mining_seconds", 0.0)
            self._num_minings += 1
            self._mining += mining
        if self._num_steps:
            self._held_up += sum(rare.values()) - mining
        self._num_steps += 1
        self._plain.append(seconds - sum(rare.values()))

    def seconds(self) -> float:
        """From the step noted last to the end of the last one."""
        if not self._num_steps:
            return 0.0
        later = min(-(-self._num_steps // 2), len(self._plain))
        a_step = sum(islice(reversed(self._plain), later)) / later + self._held_up / self._num_steps
        a_mining = self._mining / max(self._num_minings, 1)
        return (self._steps - self._step) * a_step + self._ahead(self._step) * a_mining

    def _ahead(self, step: int) -> int:
        """Minings behind step `step`."""
        return len(self._minings) - bisect_left(self._minings, step)
