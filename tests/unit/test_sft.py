"""SFT sequences: prompt, output, EOS; only output and EOS count; long rows keep both ends of the bargain."""

import json

import numpy as np
import pytest
import torch

from megatron_conan.data.pair_files import preprocess_pairs
from megatron_conan.data.pairs import PairStore
from megatron_conan.data.sft import SFTDataset, sft_batch

ROWS = [
    {"instruction": "Translate to German.", "input": "the street", "output": "die Straße"},
    {"instruction": "Name a number.", "output": "seven"},
    {"instruction": "Say nothing of note. " * 20, "input": "", "output": "ok"},
    {"instruction": "Write much.", "output": "word and word " * 40},
    {"instruction": "Write much of much. " * 20, "input": None, "output": "word and word " * 40},
]


@pytest.fixture
def store(tmp_path, tokenizer):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    preprocess_pairs("sft", [source], tokenizer.path, tmp_path / "sft")
    return PairStore(tmp_path / "sft", tokenizer)


def test_loss_is_on_output_and_eos_alone(store, tokenizer):
    batch = sft_batch(SFTDataset(store, tokenizer, 128), np.array([1, 0]))
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (2, 128)
    expected = [("Name a number.\n\n", "seven"), ("Translate to German.\nthe street\n", "die Straße")]
    for i, (prompt, output) in enumerate(expected):
        sequence = tokenizer.encode(prompt) + tokenizer.encode(output) + [tokenizer.eos_id]
        count = len(sequence) - 1
        assert batch.lengths[i] == count
        assert batch.tokens[i, :count].tolist() == sequence[:-1]
        assert batch.labels[i, :count].tolist() == sequence[1:]
        assert batch.tokens[i, count:].eq(tokenizer.pad_id).all()
        counted = batch.labels[i][batch.loss_mask[i].bool()].tolist()
        assert counted == [*tokenizer.encode(output), tokenizer.eos_id]
        assert batch.loss_mask[i, count:].sum() == 0
    assert batch.loss_mask.dtype == torch.float32
    assert batch.tokens.dtype == batch.labels.dtype == batch.lengths.dtype == torch.int64


def test_long_rows_are_cut_where_it_hurts_least(store, tokenizer):
    dataset = SFTDataset(store, tokenizer, 31)
    prompt, output = ROWS[2]["instruction"] + "\n\n", [*tokenizer.encode("ok"), tokenizer.eos_id]
    sequence, num_prompt = dataset.sequence(2)
    assert sequence.tolist() == tokenizer.encode(prompt)[: 32 - len(output)] + output
    assert num_prompt == 32 - len(output)
    sequence, num_prompt = dataset.sequence(3)
    assert len(sequence) == 32
    assert sequence[:num_prompt].tolist() == tokenizer.encode("Write much.\n\n")[:16]
    sequence, num_prompt = dataset.sequence(4)
    assert (len(sequence), num_prompt) == (32, 16)
    assert sequence[16:].tolist() == tokenizer.encode(ROWS[4]["output"])[:16]
    batch = sft_batch(dataset, np.arange(5))
    assert (batch.loss_mask.sum(dim=1) > 0).all()
    assert batch.loss_mask[4].sum() == 16


def test_other_data_is_refused(tmp_path, store, tokenizer):
    source = tmp_path / "r.jsonl"
    source.write_text('{"query": "q", "positive": "p"}\n')
    preprocess_pairs("retrieval", [source], tokenizer.path, tmp_path / "r")
    with pytest.raises(ValueError, match=r"is of task 'retrieval'; this stage needs .* --task sft"):
        SFTDataset(PairStore(tmp_path / "r", tokenizer), tokenizer, 16)
    with pytest.raises(ValueError, match="seq_length=1 has no room"):
        SFTDataset(store, tokenizer, 1)
    assert len(SFTDataset(store, tokenizer, 16)) == 5
