"""Every refusal across fields: what, the values, and the remedy; and that the remedy it names is accepted."""

from typing import Any

import pytest

from megatron_conan.config import check_config, data_parallel_size, parse_config
from megatron_conan.config.tree import RunConfig

BASE: dict[str, Any] = {
    "run_dir": "runs/x",
    "model": {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "vocab_size": 512,
        "max_seq_length": 64,
    },
    "tokenizer": {"model": "t.model"},
    "data": {"sources": [{"prefix": "a"}]},
    "train": {"steps": 10, "micro_batch_size": 4, "global_batch_size": 8},
    "optimizer": {"lr": 1e-3},
}


def build(stage: str, **changes: Any) -> RunConfig:
    """A config that fits two ranks, with `section__key=value` changes."""
    tree: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in BASE.items()}
    tree["stage"] = stage
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree.setdefault(section, {})[name] = value
    return parse_config(tree, origin="test")


@pytest.mark.parametrize("stage", ["pretrain", "sft", "weak", "finetune"])
def test_what_fits_is_accepted(stage):
    check_config(build(stage), 2)


def test_layouts_that_fit_are_accepted():
    check_config(build("pretrain", parallel__tensor=2, parallel__sequence=True, parallel__pipeline=2), 4)
    check_config(build("pretrain", parallel__pipeline=2, parallel__virtual_pipeline=2), 2)
    check_config(build("sft", train__micro_batch_size=1), 2)
    check_config(build("weak", parallel__tensor=2, soft_mask__form="learned", soft_mask__schedule="linear"), 4)
    check_config(build("finetune", contrastive__num_hard_negatives=2, mining__every=3, mining__pool_size=2), 2)
    check_config(build("pretrain", model__kv_channels=10, model__hidden_size=50), 2)


@pytest.mark.parametrize(
    ("stage", "changes", "world_size", "parts"),
    [
        ("pretrain", {"parallel__tensor": 2, "parallel__pipeline": 2}, 6,
         ["6 ranks", "parallel.tensor=2", "parallel.pipeline=2", "multiple of 4 processes"]),
        ("pretrain", {"parallel__sequence": True}, 2, ["parallel.sequence=true needs parallel.tensor > 1"]),
        ("pretrain", {"parallel__virtual_pipeline": 2}, 2,
         ["parallel.virtual_pipeline=2 needs parallel.pipeline > 1"]),
        ("pretrain", {"model__hidden_size": 66}, 2,
         ["model.hidden_size=66", "model.num_attention_heads=4", "give model.kv_channels"]),
        ("pretrain", {"model__kv_channels": 15}, 2, ["model.kv_channels=15 must be even"]),
        ("pretrain", {"model__hidden_size": 60}, 2, ["model.kv_channels=15 must be even"]),
        ("pretrain", {"model__num_query_groups": 3}, 2, ["model.num_attention_heads=4", "model.num_query_groups=3"]),
        ("pretrain", {"model__num_attention_heads": 2, "model__num_query_groups": 2, "parallel__tensor": 4}, 4,
         ["model.num_attention_heads=2 is not divisible by parallel.tensor=4"]),
        ("pretrain", {"parallel__tensor": 4}, 4, ["model.num_query_groups=2 is not divisible by parallel.tensor=4"]),
        ("pretrain", {"parallel__tensor": 2, "model__ffn_hidden_size": 97}, 4,
         ["model.ffn_hidden_size=97 is not divisible by parallel.tensor=2"]),
        ("pretrain", {"parallel__tensor": 2, "model__vocab_size": 511}, 4,
         ["model.vocab_size=511 is not divisible by parallel.tensor=2"]),
        ("pretrain", {"parallel__pipeline": 3}, 3, ["model.num_layers=4", "parallel.pipeline=3", "= 3"]),
        ("pretrain", {"parallel__pipeline": 2, "parallel__virtual_pipeline": 3}, 2,
         ["model.num_layers=4", "parallel.virtual_pipeline=3 = 6"]),
        ("pretrain", {"parallel__tensor": 2, "parallel__sequence": True, "data__seq_length": 63}, 2,
         ["data.seq_length=63 is not divisible by parallel.tensor=2"]),
        ("pretrain", {"data__seq_length": 65}, 2, ["data.seq_length=65 is longer than model.max_seq_length=64"]),
        ("weak", {"data__max_query_length": 65}, 2, ["data.max_query_length=65", "model.max_seq_length=64"]),
        ("weak", {"data__max_document_length": 65}, 2, ["data.max_document_length=65", "model.max_seq_length=64"]),
        ("pretrain", {"train__global_batch_size": 96, "train__micro_batch_size": 8}, 5,
         ["train.global_batch_size=96", "train.micro_batch_size=8 x dp=5 = 40", "use 80 or 120"]),
        ("pretrain", {"train__global_batch_size": 3}, 2, ["train.global_batch_size=3", "= 8; use 8"]),
        ("pretrain", {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "train__global_batch_size": 12}, 2,
         ["number of micro-batches (3)", "parallel.pipeline=2", "change train.global_batch_size"]),
        ("pretrain", {"mining__every": 5}, 2, ["section mining", "stage=pretrain", "remove it"]),
        ("sft", {"soft_mask__schedule": "linear"}, 2, ["stage=sft", "must stay causal", "remove the soft_mask section"]),
        ("pretrain", {"soft_mask__alpha": 1.0}, 2, ["stage=pretrain", "must stay causal"]),
        ("weak", {"parallel__pipeline": 2, "train__global_batch_size": 4}, 2,
         ["parallel.pipeline=2", "use parallel.pipeline=1"]),
        ("weak", {"train__global_batch_size": 16}, 2,
         ["one micro-batch a step", "train.global_batch_size=16", "train.micro_batch_size=4 x dp=2 = 8",
          "set train.micro_batch_size=8"]),
        ("finetune", {"soft_mask__form": "learned"}, 2, ["soft_mask.form=learned", "stage=weak only"]),
        ("finetune", {"mining__every": 5}, 2, ["contrastive.num_hard_negatives > 0", "remove the section"]),
        ("finetune", {"mining__every": 5, "mining__pool_size": 3, "contrastive__num_hard_negatives": 4}, 2,
         ["mining.pool_size=3", "contrastive.num_hard_negatives=4"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_remedy(stage, changes, world_size, parts):
    with pytest.raises(ValueError, match=r".") as error:
        check_config(build(stage, **changes), world_size)
    for part in parts:
        assert part in str(error.value)


def test_the_remedies_that_name_numbers_work():
    for size in (80, 120):
        check_config(build("pretrain", train__global_batch_size=size, train__micro_batch_size=8), 5)
    check_config(build("weak", train__global_batch_size=16, train__micro_batch_size=8), 2)


def test_data_parallel_size():
    assert data_parallel_size(build("pretrain", parallel__tensor=2, parallel__pipeline=2), 16) == 4
