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

TOKENS = {"train__micro_batch_size": None, "train__micro_batch_tokens": 64}
TWO_NEGATIVES = {"mining__every": 5, "contrastive__num_hard_negatives": 2}
AT = {"contrastive__num_hard_negatives": 2}


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


@pytest.mark.parametrize("stage", ["weak", "finetune"])
def test_contrastive_batches_may_be_cut_anyhow(stage):
    """Several micro-batches, by rows or by tokens; pipelines, also interleaved with a number that isn't whole rounds."""
    pipeline = {"parallel__pipeline": 2}
    interleaved = {**pipeline, "parallel__virtual_pipeline": 2}
    for layout, world_size in (({}, 2), (pipeline, 2), (interleaved, 2), ({"parallel__tensor": 2, **pipeline}, 8)):
        for size in (8, 16, 24):
            check_config(build(stage, train__global_batch_size=size, **layout), world_size)
            check_config(build(stage, train__global_batch_size=size + 1, **layout, **TOKENS), world_size)
    check_config(build(stage, train__global_batch_size=3, **TOKENS), 4)  # a rank may have no row


def test_losses_that_fit_are_accepted():
    """The checks of losses are about contrastive stages only."""
    own = {"contrastive__in_batch_negatives": [], "contrastive__num_hard_negatives": 1}
    check_config(build("finetune", **own), 2)
    every = ["documents", "queries", "same_side"]
    check_config(build("weak", contrastive__in_batch_negatives=every), 2)
    sizes = {"contrastive__matryoshka_dims": [16, 64], "contrastive__matryoshka_weights": [1.0, 0.5]}
    check_config(build("weak", **sizes), 2)
    check_config(build("weak", **{**sizes, "contrastive__matryoshka_dims": [8, 80]}, pooling__projection_dim=80), 2)
    check_config(build("pretrain", contrastive__matryoshka_dims=[999]), 2)


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
        ("sft", {"data__sources": [{"prefix": "a", "batch_size": 8}]}, 2,
         ["batch_size of a is for the contrastive stages", "set train.global_batch_size"]),
        ("pretrain", {"mining__every": 5}, 2, ["section mining", "stage=pretrain", "remove it"]),
        ("sft", {"soft_mask__schedule": "linear"}, 2, ["stage=sft", "must stay causal", "remove the soft_mask section"]),
        ("pretrain", {"soft_mask__alpha": 1.0}, 2, ["stage=pretrain", "must stay causal"]),
        ("pretrain", {"optimizer__min_lr": 2e-3}, 2, ["optimizer.min_lr=0.002", "lr=0.001", "decoupled_lr=None"]),
        ("pretrain", {"optimizer__min_lr": 1e-4, "optimizer__decoupled_lr": 1e-5}, 2,
         ["optimizer.min_lr=0.0001", "decoupled_lr=1e-05"]),
        ("weak", {"train__global_batch_size": 12}, 2,
         ["train.global_batch_size=12", "train.micro_batch_size=4 x dp=2 = 8", "use 8 or 16"]),
        ("pretrain", {"train__micro_batch_tokens": 64}, 2,
         ["train.micro_batch_tokens=64", "contrastive stages", "stage=pretrain", "set train.micro_batch_size"]),
        ("sft", {"train__micro_batch_size": None}, 2, ["train.micro_batch_size is required and missing"]),
        ("weak", {"train__micro_batch_size": None}, 2,
         ["train.micro_batch_size or train.micro_batch_tokens is required and missing"]),
        ("weak", {"train__micro_batch_tokens": 64}, 2,
         ["train.micro_batch_size=4 and train.micro_batch_tokens=64 exclude each other; give one"]),
        ("weak", {**TOKENS, "train__micro_batch_tokens": 47, "data__max_query_length": 32, "data__max_document_length": 48},
         2, ["train.micro_batch_tokens=47 is below one text of 48 tokens", "data.max_document_length", "raise it"]),
        ("weak", {**TOKENS, "train__micro_batch_tokens": 63}, 2, ["below one text of 64 tokens"]),
        ("pretrain", {"pooling__projection_dim": 8}, 2, ["pooling.projection_dim", "stage=pretrain", "remove it"]),
        ("weak", {**TWO_NEGATIVES, "mining__skip_top": 9, "mining__window": 9}, 2,
         ["mining.window=9 leaves nothing after mining.skip_top=9; widen the window"]),
        ("weak", {**TWO_NEGATIVES, "mining__max_tokens": 63}, 2,
         ["mining.max_tokens=63 is below one text of 64 tokens; use at least 64"]),
        ("weak", {**TWO_NEGATIVES, "mining__every": None}, 2, ["give mining.every or mining.at"]),
        ("weak", {**TWO_NEGATIVES, "mining__at": [0]}, 2, ["mining.every=5 and mining.at=[0] exclude each other; give one"]),
        ("weak", {**AT, "mining__at": [3, 0]}, 2, ["mining.at=[3, 0] must hold rising numbers of steps"]),
        ("weak", {**AT, "mining__at": [0, 0]}, 2, ["mining.at=[0, 0] must hold rising numbers of steps"]),
        ("weak", {**AT, "mining__at": []}, 2, ["mining.at=[] must hold rising numbers of steps"]),
        ("weak", {**AT, "mining__at": [0, 10], "train__steps": 10}, 2,
         ["mining.at=[0, 10] goes beyond train.steps=10: no step would use that mining"]),
        ("weak", {**TWO_NEGATIVES, "mining__margin": 1.5}, 2, ["mining.margin=1.5 must be a share", "margin_kind=absolute"]),
        ("weak", {**TWO_NEGATIVES, "mining__margin": -0.1, "mining__margin_kind": "absolute"}, 2, ["mining.margin=-0.1"]),
        ("weak", {**TWO_NEGATIVES, "mining__rule": "v1", "mining__pool_size": 11}, 2,
         ["mining.pool_size=11 holds no replacement", "mining.rule_offset=10", "contrastive.num_hard_negatives=2"]),
        ("weak", {"contrastive__matryoshka_dims": [16, 64], "contrastive__matryoshka_weights": [1.0]}, 2,
         ["contrastive.matryoshka_weights=[1.0]", "one weight for each", "contrastive.matryoshka_dims=[16, 64]"]),
        ("weak", {"contrastive__matryoshka_weights": [1.0]}, 2, ["contrastive.matryoshka_dims=None"]),
        ("weak", {"contrastive__matryoshka_dims": [16, 65]}, 2,
         ["contrastive.matryoshka_dims=[16, 65] must be distinct sizes of at most 64", "model.hidden_size"]),
        ("weak", {"contrastive__matryoshka_dims": [16, 32], "pooling__projection_dim": 24}, 2,
         ["of at most 24", "pooling.projection_dim"]),
        ("finetune", {"contrastive__matryoshka_dims": [16, 32, 16]}, 2, ["contrastive.matryoshka_dims=[16, 32, 16]"]),
        ("weak", {"contrastive__in_batch_negatives": ["queries", "queries"]}, 2,
         ["contrastive.in_batch_negatives=['queries', 'queries'] names one twice; each counts once"]),
        ("weak", {"contrastive__in_batch_negatives": []}, 2,
         ["contrastive.in_batch_negatives=[] with contrastive.num_hard_negatives=0", "set one of them"]),
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
    for size in (8, 16):
        check_config(build("weak", train__global_batch_size=size), 2)
    check_config(build("weak", **TOKENS), 2)
    check_config(build("weak", **TWO_NEGATIVES, mining__max_tokens=64), 2)
    check_config(build("weak", **TWO_NEGATIVES, mining__margin=1.5, mining__margin_kind="absolute"), 2)
    check_config(build("weak", **TWO_NEGATIVES, mining__rule="v1", mining__pool_size=12), 2)


def test_when_mining_is_due():
    every = build("weak", **TWO_NEGATIVES).mining
    assert [done for done in range(12) if every.is_due(done)] == [0, 5, 10]
    assert (every.count(10), every.count(11)) == (2, 3)
    at = build("weak", **AT, mining__at=[2, 7]).mining
    assert [done for done in range(12) if at.is_due(done)] == [2, 7]
    assert at.count(8) == 2


def test_data_parallel_size():
    assert data_parallel_size(build("pretrain", parallel__tensor=2, parallel__pipeline=2), 16) == 4
