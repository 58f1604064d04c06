"""Supervised fine-tuning: prompt and output in one sequence, the loss on the output alone."""

from __future__ import annotations

import numpy as np
import torch

from megatron_conan.data.batch import LMBatch
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.tokenizer import Tokenizer


class SFTDataset:
    """Rows of a PairStore of task sft as token sequences `prompt output EOS`.

    A row of more than `seq_length + 1` tokens is cut: the output keeps at least half of the room, and what the prompt
    has too much is cut at its end.

    Args:
        store: pair data of task sft.
        tokenizer: gives pad and EOS ids.
        seq_length: width of the batches, tokens.

    Raises:
        ValueError: the store is of another task, or seq_length is below 2.
    """

    def __init__(self, store: PairStore, tokenizer: Tokenizer, seq_length: int) -> None:
        if store.task != "sft":
            raise ValueError(
                f"{store.prefix} is of task {store.task!r}; this stage needs data_tools/preprocess_pairs.py --task sft"
            )
        if seq_length < 2:
            raise ValueError(f"seq_length={seq_length} has no room for prompt and output; use at least 2")
        self.store = store
        self.seq_length = seq_length
        self.pad_id = tokenizer.pad_id
        self.eos_id = tokenizer.eos_id

    def __len__(self) -> int:
        return self.store.num_rows

    def sequence(self, row: int) -> tuple[np.ndarray, int]:
        """One row.

        Returns:
            (token ids [at most seq_length + 1] int64, number of prompt tokens among them).
        """
        prompt = self.store.tokens(self.store.query(row))
        output = np.append(self.store.tokens(self.store.positives(row)[0]), np.int32(self.eos_id))
        room = self.seq_length + 1
        prompt = prompt[: max(room - len(output), room // 2)]
        return np.concatenate([prompt, output[: room - len(prompt)]]).astype(np.int64), len(prompt)


def sft_batch(dataset: SFTDataset, rows: np.ndarray) -> LMBatch:
    """Batch of some rows, right padded to the dataset's `seq_length`.

    Args:
        dataset: the rows.
        rows: [b] row numbers.

    Returns:
        LMBatch with tokens [b, seq_length]; loss_mask is 1 on labels of the output and its EOS.
    """
    shape = (len(rows), dataset.seq_length)
    tokens = np.full(shape, dataset.pad_id, dtype=np.int64)
    labels = np.full(shape, dataset.pad_id, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.float32)
    lengths = np.zeros(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        sequence, num_prompt = dataset.sequence(int(row))
        lengths[i] = count = len(sequence) - 1
        tokens[i, :count], labels[i, :count] = sequence[:-1], sequence[1:]
        # label j is token j + 1 of the sequence: the first label of the output is at num_prompt - 1
        loss_mask[i, max(num_prompt - 1, 0) : count] = 1
    return LMBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_mask=torch.from_numpy(loss_mask),
        lengths=torch.from_numpy(lengths),
    )
