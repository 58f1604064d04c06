"""Packed pretraining data: real tokens, next-token labels, blending, caching, every rank alike, clear refusals."""

import json

import numpy as np
import pytest
import torch
from gloo_pool import WorkerPool
from sample_texts import DOCUMENTS

from megatron_conan.data.binarize import preprocess_documents
from megatron_conan.data.packed_lm import COMPLETE, build_lm_dataset, lm_batch
from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer

SEQ_LENGTH = 32


def write_corpus(folder, name, texts, tokenizer):
    source = folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    preprocess_documents([source], tokenizer.path, folder / name, append_eod=True)
    return folder / name


@pytest.fixture
def corpora(tmp_path, tokenizer):
    letters = write_corpus(tmp_path, "letters", ["", *(f"{text} " * 3 for text in DOCUMENTS), ""], tokenizer)
    digits = write_corpus(tmp_path, "digits", [f"{i:07d}" * 9 for i in range(20)], tokenizer)
    return letters, digits


def build(prefixes, weights, tokenizer, cache_dir, num_samples=60, seed=7, seq_length=SEQ_LENGTH):
    return build_lm_dataset(
        prefixes,
        weights,
        seq_length=seq_length,
        num_samples=num_samples,
        seed=seed,
        tokenizer=tokenizer,
        cache_dir=cache_dir,
    )


def samples_of(dataset, count):
    batch = lm_batch(dataset, np.arange(count))
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == (count, SEQ_LENGTH)
    return batch


def test_an_epoch_holds_the_documents_and_labels_follow_tokens(tmp_path, tokenizer, corpora):
    dataset = build([corpora[0]], [1.0], tokenizer, tmp_path / "cache")
    batch = samples_of(dataset, dataset.epoch_size)
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.loss_mask.min() == 1.0
    assert batch.loss_mask.dtype == torch.float32
    assert batch.lengths.tolist() == [SEQ_LENGTH] * dataset.epoch_size
    texts = ["", *(f"{text} " * 3 for text in DOCUMENTS), ""]
    num_tokens = sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert dataset.epoch_size == (num_tokens - 1) // SEQ_LENGTH
    # samples, put in the order of the packed stream, are documents one behind the other
    order = np.argsort(np.asarray(dataset.shuffle_index))
    stream = batch.tokens[torch.from_numpy(order)].flatten().tolist()
    stream.append(int(batch.labels[int(order[-1]), -1]))
    ends = [i for i, token in enumerate(stream) if token == tokenizer.eos_id]
    documents = [tokenizer.decode(stream[a + 1 : b]) for a, b in zip([-1, *ends[:-1]], ends, strict=True)]
    assert set(documents) <= set(texts)
    assert len(documents) >= len(texts) - 2  # the last one may lie in the dropped tail


def test_sample_i_is_the_same_however_many_are_asked_for(tmp_path, tokenizer, corpora):
    few = build(corpora, [0.25, 0.75], tokenizer, tmp_path / "cache", num_samples=40)
    many = build(corpora, [1, 3], tokenizer, tmp_path / "cache", num_samples=500)
    assert torch.equal(samples_of(few, 40).tokens, samples_of(many, 40).tokens)
    single_few = build([corpora[1]], [2.0], tokenizer, tmp_path / "cache", num_samples=3)
    single_many = build([corpora[1]], [2.0], tokenizer, tmp_path / "cache", num_samples=300)
    assert torch.equal(samples_of(single_few, 3).tokens, samples_of(single_many, 3).tokens)


def test_epochs_repeat_all_samples_in_another_order(tmp_path, tokenizer, corpora):
    dataset = build([corpora[1]], [1.0], tokenizer, tmp_path / "cache", num_samples=300)
    size = dataset.epoch_size
    epochs = samples_of(dataset, 3 * size).tokens.reshape(3, size, SEQ_LENGTH).tolist()
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other_seed = build([corpora[1]], [1.0], tokenizer, tmp_path / "cache", num_samples=300, seed=8)
    assert samples_of(other_seed, size).tokens.tolist() != epochs[0]


def test_blend_keeps_the_weights(tmp_path, tokenizer, corpora):
    dataset = build(corpora, [3.0, 1.0], tokenizer, tmp_path / "cache", num_samples=200)
    batch = samples_of(dataset, 200)
    digit_ids = torch.tensor([tokenizer.encode(digit)[0] for digit in "0123456789"])
    from_digits = torch.isin(batch.tokens, digit_ids).float().mean(dim=1) > 0.8
    assert abs(int(from_digits.sum()) - 50) <= 1


def load_on_rank(prefixes, weights, model_path, cache_dir):
    dataset = build(prefixes, weights, Tokenizer(model_path), cache_dir)
    return lm_batch(dataset, np.arange(60)).tokens.tolist()


@pytest.mark.parametrize("num_corpora", [1, 2])
def test_ranks_read_what_one_process_reads(tmp_path, tokenizer, corpora, workers: WorkerPool, num_corpora):
    prefixes, weights = corpora[:num_corpora], [2.0, 1.0][:num_corpora]
    alone = samples_of(build(prefixes, weights, tokenizer, tmp_path / "alone"), 60).tokens.tolist()
    results = workers.run(load_on_rank, 2, prefixes, weights, tokenizer.path, tmp_path / "shared")
    assert results[0] == results[1] == alone


def test_a_half_written_cache_and_a_changed_corpus_are_noticed(tmp_path, tokenizer, corpora):
    cache_dir = tmp_path / "cache"
    before = samples_of(build(corpora, [1, 1], tokenizer, cache_dir), 30).tokens
    (folder,) = cache_dir.iterdir()
    (folder / COMPLETE).unlink()
    for index in folder.glob("*.npy"):
        index.write_bytes(index.read_bytes()[:50])
    assert torch.equal(samples_of(build(corpora, [1, 1], tokenizer, cache_dir), 30).tokens, before)
    write_corpus(tmp_path, "digits", [f"{i:03d}" * 50 for i in range(3)], tokenizer)
    assert not torch.equal(samples_of(build(corpora, [1, 1], tokenizer, cache_dir), 30).tokens, before)
    assert len(list(cache_dir.iterdir())) == 2


def test_missing_corpora_name_the_commands(tmp_path, tokenizer, corpora):
    with pytest.raises(ValueError, match="no tokenised corpus") as error:
        build([tmp_path / "a", corpora[0], tmp_path / "b"], [1, 1, 1], tokenizer, tmp_path / "cache")
    for name in "ab":
        command = (
            f"python data_tools/preprocess.py --input F [F ...] --tokenizer-model {tokenizer.path} "
            f"--output-prefix {tmp_path / name} --append-eod"
        )
        assert command in str(error.value)
    corpora[0].with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="no tokenised corpus"):
        build([corpora[0]], [1.0], tokenizer, tmp_path / "cache")


def test_other_mistakes_are_explained(tmp_path, tokenizer, corpora):
    cache = tmp_path / "cache"
    (tmp_path / "other.model").write_bytes(train_tokenizer(DOCUMENTS, 500))
    other = Tokenizer(tmp_path / "other.model")
    with pytest.raises(ValueError, match="or write the corpus again: python") as error:
        build(corpora, [1, 1], other, cache)
    assert tokenizer.sha256 in str(error.value)
    assert other.sha256 in str(error.value)
    with pytest.raises(ValueError, match=r"has \d+ tokens, less than one sample of seq_length \+ 1 = 9001"):
        build(corpora, [1, 1], tokenizer, cache, seq_length=9000)
    with pytest.raises(ValueError, match="must be 2 positive numbers"):
        build(corpora, [1, 0], tokenizer, cache)
    with pytest.raises(ValueError, match="named twice"):
        build([corpora[0], corpora[0]], [1, 1], tokenizer, cache)
    with pytest.raises(ValueError, match="no corpus is given"):
        build([], [], tokenizer, cache)
    with pytest.raises(ValueError, match="num_samples=0 must be at least 1"):
        build(corpora, [1, 1], tokenizer, cache, num_samples=0)
