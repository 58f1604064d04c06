"""What tells whether a run that goes on finds the data it began with.

A file is known by its size and a digest of blocks spread evenly over it, so that terabytes take no longer than megabytes. A
corpus that was written anew shows in any case: its P.json holds a digest of all tokens, and is digested whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_conan.config import RunConfig

NUM_BLOCKS = 64
"""Blocks digested of a file; the first and the last are among them."""
BLOCK_BYTES = 64 << 10
DOCUMENT_SUFFIXES = (".bin", ".idx", ".json")
"""Files of a language-model source."""
PAIR_ARRAYS = (
    "query",
    "query_order",
    "positives",
    "positives_offsets",
    "negatives",
    "negatives_offsets",
    "corpus",
    "score",
    "label",
    "label_rows",
    "label_offsets",
)
"""Arrays that a pair source has besides; the last four by task."""

Fingerprints = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Config key of a source -> file name -> `bytes` and `sha256`; JSON."""


def data_fingerprints(config: RunConfig) -> dict[str, dict[str, dict[str, Any]]]:
    """Sizes and digests of all files that training reads, paths and times left out.

    Reads at most 4 MiB of a file.

    Args:
        config: its `data.sources` are looked at.

    Returns:
        Config key of the source -> file name -> `bytes` and `sha256`.
    """
    suffixes = [*DOCUMENT_SUFFIXES]
    if config.stage != "pretrain":
        suffixes += [f".{name}.npy" for name in PAIR_ARRAYS]
    found = {}
    for i, source in enumerate(config.data.sources):
        files = [source.prefix.with_name(source.prefix.name + suffix) for suffix in suffixes]
        found[f"data.sources.{i}"] = {file.name: file_fingerprint(file) for file in files if file.is_file()}
    return found


def file_fingerprint(file: Path) -> dict[str, Any]:
    """`bytes`, and `sha256` of `NUM_BLOCKS` blocks (of the whole file where that is no more)."""
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= NUM_BLOCKS * BLOCK_BYTES:
            digest.update(stream.read())
        else:
            for i in range(NUM_BLOCKS):
                stream.seek(i * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
                digest.update(stream.read(BLOCK_BYTES))
    return {"bytes": size, "sha256": digest.hexdigest()}


def check_same_data(saved: Fingerprints, now: Fingerprints) -> None:
    """Refuse to go on with other data than the run began with.

    Args:
        saved: `data_fingerprints` when the run began.
        now: the same now.

    Raises:
        ValueError: naming every source and file that differs, in what, and the remedy.
    """
    differences = []
    for source in sorted(saved.keys() | now.keys()):
        before, after = saved.get(source, {}), now.get(source, {})
        for file in sorted(before.keys() | after.keys()):
            difference = _difference(before.get(file), after.get(file))
            if difference:
                differences.append(f"{source}: {file} {difference}")
    if differences:
        raise ValueError(
            f"the data changed since the run began: {'; '.join(differences)}. Bring the old files back, or give another run_dir"
        )


def _difference(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str | None:
    if before is None:
        return "was not there then"
    if after is None:
        return "is gone"
    if before["bytes"] != after["bytes"]:
        return f"had {before['bytes']:,} bytes, now {after['bytes']:,}"
    return None if before["sha256"] == after["sha256"] else "has other content of the same size"
