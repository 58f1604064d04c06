"""Configs: files, bases, overrides, messages that name the nearest key, round trip, and what a resumed run may change."""

from pathlib import Path

import pytest
import yaml

from megatron_conan.config import RunConfig, dump_config, load_config, parse_config, resume_differences
from megatron_conan.config.load import read_tree

MODEL = """
model: {num_layers: 2, hidden_size: 64, num_attention_heads: 4, num_query_groups: 2, ffn_hidden_size: 96, vocab_size: 512,
        max_seq_length: 64}
tokenizer: {model: t.model}
"""
STAGE = """
base: model.yaml
stage: finetune
run_dir: runs/x
data: {sources: [{prefix: a}, {prefix: b, weight: 2}]}
train: {steps: 10, micro_batch_size: 4, global_batch_size: 4}
optimizer: {lr: 1.0e-3}
mining: {every: 5}
contrastive: {num_hard_negatives: 1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A stage's file with its base beside it."""
    (tmp_path / "model.yaml").write_text(MODEL)
    path = tmp_path / "stage.yaml"
    path.write_text(STAGE)
    return path


def test_file_with_base_loads_with_defaults(file):
    config = load_config(file)
    assert config.model.num_layers == 2
    assert config.model.head_dim == 16
    assert config.data.sources[1].weight == 2.0
    assert config.parallel.tensor == 1
    assert config.seq_length == config.max_query_length == config.max_document_length == 64
    assert config.is_contrastive


def test_later_bases_win_over_earlier_ones_and_the_file_over_all(file):
    folder = file.parent
    (folder / "a.yaml").write_text("train: {seed: 1, log_every: 2}\noptimizer: {lr: 1.0, beta1: 0.5}\n")
    (folder / "b.yaml").write_text("base: c.yaml\ntrain: {seed: 3}\n")
    (folder / "c.yaml").write_text("train: {seed: 4, precision: bf16}\n")
    file.write_text(STAGE.replace("base: model.yaml", "base: [model.yaml, a.yaml, b.yaml]"))
    config = load_config(file)
    assert (config.train.seed, config.train.log_every, config.train.precision) == (3, 2, "bf16")
    assert (config.optimizer.lr, config.optimizer.beta1) == (1e-3, 0.5)


@pytest.mark.parametrize(
    ("word", "read", "value"),
    [
        ("train.steps=20", lambda c: c.train.steps, 20),
        ("optimizer.lr=1e-3", lambda c: c.optimizer.lr, 1e-3),
        ("optimizer.lr=2.5E-4", lambda c: c.optimizer.lr, 2.5e-4),
        ("parallel.sequence=true", lambda c: c.parallel.sequence, True),
        ("mining=null", lambda c: c.mining, None),
        ("checkpoint.init_from=runs/a=b", lambda c: c.checkpoint.init_from, Path("runs/a=b")),
        ("run_dir=runs/y", lambda c: c.run_dir, Path("runs/y")),
        ("data.sources=[{prefix: z}]", lambda c: [str(s.prefix) for s in c.data.sources], ["z"]),
        ("evaluation.data=e", lambda c: str(c.evaluation.data), "e"),
    ],
)
def test_overrides_win_over_the_file(file, word, read, value):
    assert read(load_config(file, [word])) == value


def test_override_into_a_section_that_was_set_to_null(file):
    config = load_config(file, ["mining=null", "mining.every=7"])
    assert config.mining is not None
    assert config.mining.every == 7
    assert config.mining.pool_size == 32


def test_the_last_of_two_overrides_wins(file):
    assert load_config(file, ["train.steps=1", "train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("train.stps=3", "unknown key train.stps; did you mean train.steps?"),
        ("optimiser.lr=3", "unknown key optimiser; did you mean optimizer?"),
        ("mining.evry=3", "unknown key mining.evry; did you mean mining.every?"),
        ("data.sources=[{prefix: a, wieght: 1}]", "did you mean data.sources.0.weight?"),
        ("train.steps=many", "train.steps='many'"),
        ("train.steps=1.5", "train.steps=1.5"),
        ("train.steps=0", "train.steps=0: Input should be greater than 0"),
        ("stage=pretraining", "'pretrain', 'sft', 'weak' or 'finetune'"),
        ("soft_mask.alpha=1.5", "soft_mask.alpha=1.5: Input should be less than or equal to 1"),
        ("data.sources=[]", "data.sources="),
        ("data.source_temperature=0", "data.source_temperature=0: Input should be greater than 0"),
        ("data.sources=[{prefix: a, batch_size: 0}]", "batch_size=0: Input should be greater than 0"),
        ("pooling.mode=max", "'mean', 'weighted_mean' or 'last'"),
        ("contrastive.in_batch_negatives=[docs]", "'documents', 'queries' or 'same_side'"),
        ("contrastive.matryoshka_dims=[]", "contrastive.matryoshka_dims="),
        ("contrastive.task_weights.sst=1", "did you mean contrastive.task_weights.sts?"),
        ("contrastive.batch_balance.scored_batch=3", "did you mean contrastive.batch_balance.scored_batch_size?"),
        ("train.micro_batch_token=9", "did you mean train.micro_batch_tokens?"),
        ("train.steps", "an override is written section.key=value, for example train.steps=20"),
        ("=3", "an override is written section.key=value"),
        ("train.steps.x=3", "'steps' is not a section"),
        ("train.steps=[1", "the value is not valid YAML"),
    ],
)
def test_a_wrong_override_is_explained(file, word, message):
    with pytest.raises(ValueError, match=r".") as error:
        load_config(file, [word])
    assert message in str(error.value)


def test_all_problems_come_in_one_message_with_the_file(file):
    file.write_text(STAGE.replace("steps: 10, ", "stepps: 10, ").replace("run_dir: runs/x\n", ""))
    with pytest.raises(ValueError, match=r".") as error:
        load_config(file)
    message = str(error.value)
    assert message.startswith(str(file))
    assert "train.steps is required and missing" in message
    assert "unknown key train.stepps; did you mean train.steps?" in message
    assert "run_dir is required and missing" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n", "a mapping of sections is expected"), ("a: [1\n", "not valid YAML"), ("", "a mapping of sections")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_missing_files_are_named(tmp_path, file):
    with pytest.raises(ValueError, match=r"nothing\.yaml does not exist"):
        load_config(tmp_path / "nothing.yaml")
    (tmp_path / "model.yaml").unlink()
    with pytest.raises(ValueError, match=r"model\.yaml does not exist"):
        load_config(file)


def test_dumped_text_gives_the_config_back(file):
    for words in ([], ["mining=null", "optimizer.lr=1e-7", "evaluation.data=e", "model.kv_channels=8"]):
        config = load_config(file, words)
        assert parse_config(yaml.safe_load(dump_config(config)), origin="dump") == config


def test_a_config_cannot_be_changed(file):
    with pytest.raises(ValueError, match="frozen"):
        load_config(file).train.steps = 3  # type: ignore[misc]


def differences(file: Path, *words: str) -> list[str]:
    return resume_differences(load_config(file), load_config(file, words))


@pytest.mark.parametrize(
    "word",
    [
        "parallel.tensor=2",
        "parallel.sequence=true",
        "parallel.distributed_optimizer=true",
        "train.micro_batch_size=2",
        "train.micro_batch_tokens=512",
        "train.steps=20",
        "checkpoint.every=3",
        "checkpoint.init_from=runs/z",
        "attention.backend=reference",
        "run_dir=runs/moved",
    ],
)
def test_what_may_differ_on_resume(file, word):
    assert load_config(file) != load_config(file, [word])
    assert differences(file, word) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("train.global_batch_size=8", "train.global_batch_size: 4 -> 8"),
        ("train.seed=2", "train.seed: 1234 -> 2"),
        ("train.precision=bf16", "train.precision: 'fp32' -> 'bf16'"),
        ("optimizer.lr=0.1", "optimizer.lr: 0.001 -> 0.1"),
        ("model.num_layers=4", "model.num_layers: 2 -> 4"),
        ("tokenizer.model=u.model", "tokenizer.model: 't.model' -> 'u.model'"),
        ("soft_mask.form=column", "soft_mask.form: 'row' -> 'column'"),
        ("contrastive.temperature=0.5", "contrastive.temperature: 0.02 -> 0.5"),
        ("contrastive.task_weights.sts=2", "contrastive.task_weights.sts: 1.0 -> 2.0"),
        ('prompts.query="find\\n"', "prompts.query: None -> 'find\\n'"),
        ("pooling.projection_dim=8", "pooling.projection_dim: None -> 8"),
        ("mining.every=6", "mining.every: 5 -> 6"),
        ("stage=weak", "stage: 'finetune' -> 'weak'"),
    ],
)
def test_what_must_not_differ_on_resume(file, word, line):
    assert differences(file, word) == [line]


def test_a_section_that_comes_or_goes_is_a_difference(file):
    assert any(line.startswith("mining") for line in differences(file, "mining=null"))
    assert any(line.startswith("evaluation") for line in differences(file, "evaluation.data=e"))
    assert any(line.startswith("data.sources") for line in differences(file, "data.sources=[{prefix: a}]"))


def test_a_difference_within_a_list_of_sections_is_named(file):
    """Not the whole list twice: the source and its field; a source that came or went; numbers stay in their list."""
    two = load_config(file, ["data.sources=[{prefix: a, weight: 1}, {prefix: b, weight: 2}]", "mining={at: [0, 5]}"])

    def against(*words: str) -> list[str]:
        sources = "data.sources=[{prefix: a, weight: 1}, {prefix: b, weight: 2}]"
        return resume_differences(two, load_config(file, [sources, "mining={at: [0, 5]}", *words]))

    assert against("data.sources.1.weight=3") == ["data.sources.1.weight: 2.0 -> 3.0"]
    assert against("data.sources=[{prefix: a, weight: 1}]") == [
        "data.sources.1: {'prefix': 'b', 'weight': 2.0} -> None"
    ]
    assert against("mining.at=[0, 6]") == ["mining.at: [0, 5] -> [0, 6]"]
    assert against("contrastive.matryoshka_dims=[8]") == ["contrastive.matryoshka_dims: None -> [8]"]
    (line,) = against("evaluation={data: e}")
    assert line == "evaluation: None -> {'data': 'e', 'at_start': False, 'max_tokens': 16384}"


def test_every_field_is_documented():
    def walk(model: type) -> list[str]:
        missing = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            if not field.description:
                missing.append(f"{model.__name__}.{name}")
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                missing += walk(field.annotation)
        return missing

    assert walk(RunConfig) == []


def test_bases_and_files_that_cannot_be_read(tmp_path: Path) -> None:
    """A cycle, a number, a folder, bytes that are no text: one line each, no traceback."""
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    (tmp_path / "number.yaml").write_text("base: 3\n")
    (tmp_path / "bytes.yaml").write_bytes(b"run_dir: \xff\xfe\n")
    for name, said in (("a", "leads back"), ("number", "base=3"), ("bytes", "can't be read")):
        with pytest.raises(ValueError, match=said):
            read_tree(tmp_path / f"{name}.yaml")
    with pytest.raises(ValueError, match="can't be read"):
        read_tree(tmp_path)
