"""The one way a text becomes a model input: used by training, mining, evaluation and export alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def format_text(tokens: np.ndarray | Sequence[int], max_length: int, eos_id: int) -> np.ndarray:
    """Truncate to `max_length - 1` tokens and append EOS.

    Args:
        tokens: [s] raw token ids, without special tokens; may be empty.
        max_length: most tokens of the result, EOS included; at least 1.
        eos_id: id of the end-of-sequence token.

    Returns:
        [min(s, max_length - 1) + 1] int32.
    """
    if max_length < 1:
        raise ValueError(f"max_length={max_length} leaves no room for the EOS token; use at least 1")
    body = np.asarray(tokens, dtype=np.int32)[: max_length - 1]
    return np.append(body, np.int32(eos_id))
