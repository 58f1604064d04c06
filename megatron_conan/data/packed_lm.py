"""Documents packed into sequences of constant length for causal pretraining, by megatron-core's datasets.

A sample is `seq_length + 1` tokens of the documents behind one another, in shuffled order; attention and positions run on
across documents. Sample i does not depend on how many samples are asked for, so a run can be resumed with other steps.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_conan.data.batch import LMBatch
from megatron_conan.data.binarize import DOCUMENT_FORMAT
from megatron_conan.data.indexed_files import bin_path, idx_path
from megatron_conan.data.tokenizer import Tokenizer

COMPLETE = "complete"
"""File that marks an index cache as whole: megatron-core would read one that a killed run left half-written."""


@dataclasses.dataclass
class PackedConfig(GPTDatasetConfig):
    """megatron-core's settings, and where the indices of the single corpora are kept."""

    index_cache: str | None = None
    """Folder of `path_to_cache` for each corpus. The blend has its own setting: it can't use a cache without a
    process group (megatron-core 0.16.1, blended_dataset.py asks for the rank unconditionally)."""


class MegatronTokenizerView:
    """What megatron-core's datasets ask of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.vocab_size = tokenizer.size
        self.eod = self.eos = tokenizer.eos_id
        self.pad = tokenizer.pad_id
        self.unique_identifiers = OrderedDict(sha256=tokenizer.sha256)


class EndlessGPTDataset(GPTDataset):
    """GPTDataset packed once and repeated in another order each epoch.

    megatron-core's own repetition shuffles documents over all epochs of the requested size, so that asking for more
    samples changes the earlier ones. Here sample i is a function of seed and corpus alone.
    """

    def __init__(
        self,
        indexed_dataset: IndexedDataset,
        dataset_path: str,
        indexed_indices: np.ndarray,
        num_samples: int,
        index_split: Split,
        config: PackedConfig,
    ) -> None:
        corpus_config = copy.copy(config)
        corpus_config.path_to_cache = config.index_cache
        super().__init__(indexed_dataset, dataset_path, indexed_indices, None, index_split, corpus_config)
        self.epoch_size: int = super().__len__()
        self.requested = num_samples

    def __len__(self) -> int:
        return max(self.requested, self.epoch_size)

    def __getitem__(self, idx: int) -> dict[str, torch.Tensor]:
        epoch, position = divmod(int(idx), self.epoch_size)
        multiplier, shift = _epoch_order(self.epoch_size, self.config.random_seed, epoch)
        sample: dict[str, torch.Tensor] = super().__getitem__((multiplier * position + shift) % self.epoch_size)
        return sample


@lru_cache(maxsize=64)
def _epoch_order(epoch_size: int, seed: int, epoch: int) -> tuple[int, int]:
    """(a, b) of the order i -> (a i + b) mod epoch_size, a permutation, laid over the shuffled samples of the epoch.

    It needs no memory, whatever the size; the randomness is in megatron-core's shuffle beneath it.
    """
    if epoch == 0:
        return 1, 0
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    multiplier = 0
    while math.gcd(multiplier, epoch_size) != 1:
        multiplier = int(generator.integers(1, epoch_size + 1))
    return multiplier, int(generator.integers(epoch_size))


def samples_per_epoch(prefixes: Sequence[str | Path], *, seq_length: int, tokenizer: Tokenizer) -> list[int]:
    """Samples of `seq_length` tokens that each corpus holds. Raises ValueError as `build_lm_dataset`."""
    summaries = _read_summaries([Path(prefix) for prefix in prefixes], tokenizer, seq_length)
    return [(summary["tokens"] - 1) // seq_length for summary in summaries]


def samples_by_source(dataset: torch.utils.data.Dataset, num_sources: int, start: int, end: int) -> np.ndarray:
    """[num_sources] how many of the samples `start` to `end` of a dataset of `build_lm_dataset` come from each source."""
    if num_sources == 1:
        return np.array([end - start])
    return np.bincount(dataset.dataset_index[start:end], minlength=num_sources)  # type: ignore[attr-defined]


def build_lm_dataset(
    prefixes: Sequence[str | Path],
    weights: Sequence[float],
    *,
    seq_length: int,
    num_samples: int,
    seed: int,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
) -> torch.utils.data.Dataset:
    """Blend tokenised corpora into one dataset of packed samples; nothing is held out.

    With torch.distributed initialised all ranks of the world must call: rank 0 builds the index files, the others read
    them, so `cache_dir` must be the same folder for all, and no two runs at a time may share it.

    Args:
        prefixes: `--output-prefix` of data_tools/preprocess.py, one a corpus.
        weights: share of each corpus in the samples, up to a common factor.
        seq_length: tokens of a sample.
        num_samples: samples that will be asked for; a corpus is repeated as often as needed.
        seed: of the shuffling.
        tokenizer: the one the corpora were written with.
        cache_dir: folder for megatron-core's index files.

    Returns:
        A map dataset; `lm_batch` makes batches of it.

    Raises:
        ValueError: a corpus is missing, too short for one sample, or of another tokenizer; bad weights or sizes.
    """
    paths = [Path(prefix) for prefix in prefixes]
    _check_request(paths, weights, seq_length, num_samples)
    summaries = _read_summaries(paths, tokenizer, seq_length)
    total = float(sum(weights))
    shares = [weight / total for weight in weights]
    is_distributed = torch.distributed.is_initialized()
    cache = Path(cache_dir) / _cache_key(summaries, shares, seq_length, num_samples, seed)
    is_builder = not is_distributed or torch.distributed.get_rank() == 0
    if is_builder and cache.exists() and not (cache / COMPLETE).exists():
        shutil.rmtree(cache)
    config = PackedConfig(
        random_seed=seed,
        sequence_length=seq_length,
        # a blend of one corpus is that corpus: megatron-core then skips the blending index
        blend=([str(path) for path in paths], shares if len(paths) > 1 else None),
        split="1,0,0",
        path_to_cache=str(cache) if is_distributed else None,
        index_cache=str(cache),
        tokenizer=MegatronTokenizerView(tokenizer),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(EndlessGPTDataset, [num_samples, 0, 0], lambda: True, config)
    dataset = builder.build()[Split.train.value]
    if is_builder:
        (cache / COMPLETE).touch()
    return dataset


def lm_batch(dataset: torch.utils.data.Dataset, indices: np.ndarray) -> LMBatch:
    """Batch of packed samples.

    Args:
        dataset: of `build_lm_dataset`.
        indices: [b] sample numbers.

    Returns:
        LMBatch with tokens [b, seq_length]; every label counts.
    """
    samples: list[dict[str, Any]] = [dataset[int(index)] for index in indices]
    tokens = torch.stack([sample["tokens"] for sample in samples])
    return LMBatch(
        tokens=tokens,
        labels=torch.stack([sample["labels"] for sample in samples]),
        loss_mask=torch.stack([sample["loss_mask"] for sample in samples]).float(),
        lengths=torch.full((len(samples),), tokens.shape[1], dtype=torch.int64),
    )


def _check_request(paths: Sequence[Path], weights: Sequence[float], seq_length: int, num_samples: int) -> None:
    if not paths:
        raise ValueError("no corpus is given; name at least one --output-prefix of data_tools/preprocess.py")
    if len(weights) != len(paths) or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights={list(weights)} must be {len(paths)} positive numbers, one a corpus")
    if len(set(paths)) < len(paths):
        raise ValueError(f"a corpus is named twice in {', '.join(map(str, paths))}; add its weights up instead")
    if seq_length < 1 or num_samples < 1:
        raise ValueError(f"seq_length={seq_length} and num_samples={num_samples} must be at least 1")


def _preprocess_command(prefix: Path, tokenizer: Tokenizer) -> str:
    return (
        f"python data_tools/preprocess.py --input F [F ...] --tokenizer-model {tokenizer.path} "
        f"--output-prefix {prefix} --append-eod"
    )


def _summary_path(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def _read_summaries(paths: Sequence[Path], tokenizer: Tokenizer, seq_length: int) -> list[dict[str, Any]]:
    """P.json of every corpus, after checking that the corpora fit tokenizer and sequence length."""
    missing = [path for path in paths if not all(file(path).is_file() for file in (bin_path, idx_path, _summary_path))]
    if missing:
        commands = "".join(f"\n  {_preprocess_command(path, tokenizer)}" for path in missing)
        raise ValueError(
            f"no tokenised corpus (.bin, .idx and .json) at {', '.join(map(str, missing))}; make it with:{commands}"
        )
    summaries = []
    for path in paths:
        summary = json.loads(_summary_path(path).read_text(encoding="utf-8"))
        command = _preprocess_command(path, tokenizer)
        if summary.get("format") != DOCUMENT_FORMAT:
            raise ValueError(
                f"{_summary_path(path)} describes {summary.get('format')!r}, not {DOCUMENT_FORMAT!r}; make a corpus "
                f"with: {command}"
            )
        if summary["tokenizer_sha256"] != tokenizer.sha256:
            raise ValueError(
                f"{path} was written with the tokenizer of sha256 {summary['tokenizer_sha256']} (size "
                f"{summary['tokenizer_size']}), but {tokenizer.path} has {tokenizer.sha256} (size {tokenizer.size}); "
                f"use that tokenizer, or write the corpus again: {command}"
            )
        if summary["tokens"] < seq_length + 1:
            raise ValueError(
                f"{path} has {summary['tokens']} tokens, less than one sample of seq_length + 1 = {seq_length + 1}; "
                f"use a shorter seq_length, or more text: {command}"
            )
        summaries.append(summary)
    return summaries


def _cache_key(
    summaries: Sequence[dict[str, Any]], shares: Sequence[float], seq_length: int, num_samples: int, seed: int
) -> str:
    """Folder name of the indices; it names the tokens too, so that a corpus written anew gets new indices."""
    digests = [[summary["tokens_sha256"], summary["documents"]] for summary in summaries]
    parts = [digests, list(shares), seq_length, num_samples, seed]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
