"""Every YAML of configs/ loads, fits the ranks it names, and its model builds with the parameters that the plan counts."""

import re
from pathlib import Path

import pytest
import torch
from gloo_pool import WorkerPool

from megatron_conan.config import check_config, load_config
from megatron_conan.config.load import read_tree
from megatron_conan.config.plan import count_parameters

ROOT = Path(__file__).resolve().parents[2]
DEMO_PROCESSES = 2
STAGE_FILES = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if path.stem in ("pretrain", "sft", "weak", "finetune")
)
NOT_STAGES = {"model.yaml", "questions.yaml"}
PUBLISHED_PARAMETERS = 1_499e6


def label(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


def world_size(path: Path) -> int:
    """The ranks that the file names in a comment; those of the demo otherwise."""
    named = re.search(r"^# World size: (\d+)", path.read_text(), re.MULTILINE)
    assert named or path.parent.name == "demo", f"{path} must say `# World size: N`"
    return int(named[1]) if named else DEMO_PROCESSES


def test_every_file_is_a_stage_or_a_known_fragment():
    others = [path for path in (ROOT / "configs").rglob("*.yaml") if path not in STAGE_FILES]
    assert {path.name for path in others} <= NOT_STAGES
    assert len(STAGE_FILES) >= 8


@pytest.mark.parametrize("path", STAGE_FILES, ids=label)
def test_it_loads_and_fits_its_ranks(path):
    config = load_config(path)
    check_config(config, world_size(path))
    assert config.stage == path.stem
    assert config.run_dir == Path("runs") / path.parent.name / path.stem
    if config.checkpoint.init_from is not None:
        before = load_config(path.with_name(f"{config.checkpoint.init_from.name}.yaml"))
        assert before.run_dir == config.checkpoint.init_from
        assert before.model == config.model


@pytest.mark.parametrize("path", [p for p in STAGE_FILES if p.parent.name == "demo"], ids=label)
def test_the_demo_fits_its_tensor_parallel_layout_too(path):
    config = load_config(path, ["parallel.tensor=2", "train.micro_batch_size=32", "train.global_batch_size=32"])
    check_config(config, 2)


def num_parameters(path: Path) -> int:
    """Build the whole model without memory for its weights. Runs in a worker."""
    from megatron_conan.model.conan import ConanModel
    from megatron_conan.model.mask import SoftMask
    from megatron_conan.model.spec import transformer_config
    from megatron_conan.parallel.context import build_context

    config = load_config(path, ["parallel={}"])
    context = build_context(config.parallel, torch.device("cpu"))
    mask = SoftMask(config.soft_mask, config.train.steps, context.device)
    with torch.device("meta"):
        core = transformer_config(config, context.device)
        model = ConanModel(config, core, mask, "embedding" if config.is_contrastive else "lm")
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("path", STAGE_FILES, ids=label)
def test_its_model_builds(path: Path, workers: WorkerPool):
    (built,) = workers.run(num_parameters, 1, path)
    assert built == count_parameters(load_config(path).model)


def test_the_published_shape_has_the_published_parameters():
    for path in STAGE_FILES:
        if path.parent.name == "conan_1.4b":
            assert count_parameters(load_config(path).model) == pytest.approx(PUBLISHED_PARAMETERS, rel=0.01)


def test_published_numbers():
    """The recipe's table: learning rate, warm-up, weight decay; the soft mask in weak, hard negatives in finetune."""
    table = {"pretrain": (1e-4, 0.05), "sft": (2e-5, 0.02), "weak": (1e-4, 0.05), "finetune": (1e-4, 0.05)}
    configs = {stage: load_config(ROOT / f"configs/conan_1.4b/{stage}.yaml") for stage in table}
    for stage, (lr, warmup) in table.items():
        optimizer = configs[stage].optimizer
        assert (optimizer.lr, optimizer.warmup_fraction, optimizer.weight_decay) == (lr, warmup, 0.001)
        assert configs[stage].train.precision == "bf16"
    assert (configs["weak"].soft_mask.form, configs["weak"].soft_mask.schedule) == ("row", "linear")
    assert (configs["finetune"].soft_mask.schedule, configs["finetune"].soft_mask.alpha) == ("constant", 1.0)
    assert configs["finetune"].contrastive.num_hard_negatives == 7
    assert configs["finetune"].mining is not None
    model = read_tree(ROOT / "configs/conan_1.4b/model.yaml")["model"]
    shape = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "vocab_size")
    assert [model[key] for key in shape] == [8, 3584, 32, 8, 8192, 150000]
    assert model["max_seq_length"] == 32768
