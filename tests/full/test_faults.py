"""A run of every stage to which one fault after the other happens is the run to which nothing happened.

The same command is started again after each: torchrun with two ranks, checkpoints written in the background.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layouts import deterministic, tiny_config
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from megatron_conan.config import RunConfig, dump_config
from megatron_conan.mining.table import ARRAYS
from megatron_conan.train.checkpoint_files import find_damage

DRIVER = Path(__file__).with_name("faulty_stage.py")
SECONDS = 240.0
"""What a start may take."""
STEPS, EVERY = 24, 3
KILLED = r"Signal 9 \(SIGKILL\)"
SWAPS = {"low_score": 0.8, "drop_ratio": 1.001, "high_score": 1.1}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"parallel": {"distributed_optimizer": True}},
    "sft": {"parallel": {"pipeline": 2}},
    "weak": {"parallel": {"tensor": 2}, "soft_mask": {"form": "learned", "schedule": "linear"}},
    "finetune": {
        "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
        "soft_mask": {"schedule": "constant", "alpha": 1.0},
        # before steps 1, 11 and 21; nearly all steps in between replace something
        "mining": {"every": 10, "pool_size": 12, "window": 40, "margin": None, **SWAPS},
    },
}
"""What a run has beside the tiny config."""


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of the command, and what happens to it."""

    point: str
    """In fault_points.py."""
    begins: int
    """The step it must go on from: the last whole checkpoint's."""
    status: int
    """torchrun's exit status."""
    says: str
    """Pattern of what is said."""
    damage: str = ""
    """Done to the run's folder before it."""
    every: int = EVERY


def starts(stage: str) -> list[Start]:
    """What happens to a run, in order."""

    def stopped(step: int) -> str:
        return rf"stopped on request after step {step} of {STEPS}; the same command goes on\n"

    def full(what: str) -> str:
        room = r"\(0\.\d MiB are free there\)\. Make room, then start the same command again"
        return rf"error: {what} could not be written: .*(No space left on device|requested and \d+ written).* {room}"

    found = [
        Start("backward@2", 0, 1, KILLED),
        Start("update@5", 0, 1, KILLED),
        Start("half@6", 3, 1, KILLED),
        Start("files@6", 3, 1, KILLED),
        Start("unnamed@6", 3, 1, KILLED),
        Start("agent@9", 3, -9, "kills all at agent@9"),
        Start("disk@9", 6, 1, full(r"checkpoint \S*/step_00000009")),
        Start("full@11", 6, 1, full(r"\S*/metrics\.jsonl"), damage="latest", every=STEPS),
        Start("stop@8", 6, 0, stopped(8), damage="torn line"),
        Start("term@11", 6, 1, stopped(11), damage="flipped byte"),
        Start("usr1@15", 9, 0, stopped(15), damage="truncated"),
        Start("int@17", 12, 1, stopped(17), damage="missing"),
        Start("slow@18", 15, 0, stopped(19), damage="conan.json"),
        Start("stop@21", 18, 0, stopped(21), damage="SHA256SUMS"),
        Start("stop@24", 21, 0, "STOP at stop@24"),
    ]
    if stage == "finetune":
        found[7:7] = [
            Start("tables@9", 6, 1, full(r"\S*/negatives/step_00000009/pairs")),
            Start("full@10", 6, 1, full(r"\S*/negatives/mining\.jsonl"), every=STEPS),
        ]
        (mined,) = (i for i, start in enumerate(found) if start.point == "stop@21")
        found[mined] = dataclasses.replace(found[mined], point="mining@21")
    return found


FEW = [
    Start("update@5", 0, 1, KILLED),
    Start("half@6", 3, 1, KILLED),
    Start("never", 3, 0, f"{STEPS}/{STEPS}"),
]
"""Of one stage, in the quick tests: a rank killed in a step, and all in a checkpoint."""


class Run:
    """A run of a stage in a folder of its own, with a log of what its ranks draw beside it."""

    def __init__(self, stage: str, files: dict[str, Path], folder: Path, run_dir: Path) -> None:
        self.stage, self.files, self.folder, self.dir = stage, files, folder, run_dir

    def config(self, every: int = EVERY) -> RunConfig:
        lm = self.stage in ("pretrain", "sft")
        train = {"steps": STEPS, "micro_batch_size": 2 if lm else 4, "global_batch_size": 8}
        checkpoint = {"every": every, "keep_last": 2, "asynchronous": True}
        return tiny_config(self.stage, self.files, self.dir, train=train, checkpoint=checkpoint, **STAGES[self.stage])

    def start(self, point: str, every: int = EVERY) -> tuple[int, str]:
        """The command; torchrun's exit status and all that was told."""
        file = self.folder / "config.yaml"
        file.write_text(dump_config(self.config(every)), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with subprocess.Popen(
            [*command, str(DRIVER), self.stage, point, "--config", str(file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:  # to the end of file: no process of the run is left then
                told, _ = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                told, _ = process.communicate()
                raise AssertionError(f"{point}: not ended after {SECONDS:g} s\n{told}") from None
        return process.returncode, told

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of a file of the run, without what differs between two runs alike."""
        lines = (self.dir / name).read_text(encoding="utf-8").splitlines()
        return [deterministic(json.loads(line)) for line in lines]

    def checkpoints(self) -> list[Path]:
        """Those with their names, oldest first, up to `latest`."""
        folder = self.dir / "checkpoints"
        latest = (folder / "latest").read_text().strip() if (folder / "latest").exists() else ""
        return sorted(path for path in folder.glob("step_*") if path.name <= latest)

    def latest_step(self) -> int:
        """That `latest` names; 0 without one."""
        saved = self.checkpoints()
        return int(saved[-1].name.removeprefix("step_")) if saved else 0

    def drawn(self, rank: int) -> list[list[dict[str, Any]]]:
        """What a rank drew in every start that drew something."""
        file = self.folder / f"drawn_{rank}.jsonl"
        by_start: dict[int, list[dict[str, Any]]] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
            row = json.loads(line)
            by_start.setdefault(row.pop("start"), []).append(row)
        return list(by_start.values())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB in memory."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here (needs root)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _damage(run: Run, what: str) -> str:
    """Damage the run's last checkpoint, or what is beside it; returns what must be said of it."""
    folder = run.dir / "checkpoints"
    last = run.checkpoints()[-1]
    shard = max(last.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    if what == "latest":
        (folder / "latest").write_text("step_00000999\n")
        return ""
    if what == "torn line":
        with (run.dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"step": 7, "stage": "')
        return ""
    if what == "flipped byte":
        content[len(content) // 2] ^= 16
        shard.write_bytes(content)
    elif what == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif what == "missing":
        shard.unlink()
    else:
        shard = last / what
        shard.write_bytes(_half_of_lines(shard.read_bytes()))
    said = "is missing" if what == "missing" else "isn't listed" if what == "SHA256SUMS" else "is not what was written"
    return rf"warning: checkpoint {last.name} is damaged, {run.checkpoints()[-2].name} is used: .*{said}"


def _half_of_lines(content: bytes) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join(lines[: len(lines) // 2])


def _tensors(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by name."""
    dcp_to_torch_save(checkpoint, folder / "whole.pt")
    flat: dict[str, torch.Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                collect(part, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            flat[name] = value

    collect(torch.load(folder / "whole.pt", weights_only=False), "")
    return flat


def _assert_same(found: Run, expected: Run, folder: Path) -> None:
    """Metrics of all steps, minings, tables, weights and optimizer: bitwise."""
    assert found.lines("metrics.jsonl") == expected.lines("metrics.jsonl")
    assert [line["step"] for line in found.lines("metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [path.name for path in found.checkpoints()] == [path.name for path in expected.checkpoints()]
    for ours, theirs in zip(found.checkpoints(), expected.checkpoints(), strict=True):
        assert not find_damage(ours)
        tensors, wanted = _tensors(ours, folder), _tensors(theirs, folder)
        assert tensors.keys() == wanted.keys()
        assert any("exp_avg_sq" in name for name in wanted)
        for name, tensor in wanted.items():
            assert torch.equal(tensors[name], tensor), (ours.name, name)
        states = [json.loads((path / "conan.json").read_text()) for path in (ours, theirs)]
        assert states[0] == states[1]
        if found.stage == "finetune":
            tables = [run.dir / "negatives" / ours.name / "pairs" for run in (found, expected)]
            assert (tables[0] / "table.json").read_text() == (tables[1] / "table.json").read_text()
            for name in ARRAYS:
                arrays = [np.load(table / f"{name}.npy") for table in tables]
                assert arrays[0].tobytes() == arrays[1].tobytes(), name
    if found.stage == "finetune":
        minings = expected.lines("negatives/mining.jsonl")
        assert [line["step"] for line in minings] == [0, 10, 20]
        assert found.lines("negatives/mining.jsonl") == minings
        assert sum(line["negatives_replaced"] > 0 for line in expected.lines("metrics.jsonl")) > STEPS // 2


def _surviving(run: Run, rank: int) -> list[dict[str, Any]]:
    """What the steps drew that the run's end is made of: each start gives up what came after its successor's beginning."""
    kept: list[dict[str, Any]] = []
    for drawn in run.drawn(rank):
        kept = [line for line in kept if line["step"] < drawn[0]["step"]] + drawn
    return kept


@pytest.fixture(scope="module")
def uninterrupted(tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, stage: str) -> Run:
    folder = tmp_path_factory.mktemp(f"uninterrupted_{stage}")
    run = Run(stage, tiny_data, folder, folder / "run")
    status, told = run.start("never")
    assert status == 0, told
    return run


@pytest.mark.parametrize("stage", ["finetune"], scope="module")
def test_a_few_faults(stage: str, uninterrupted: Run, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    _suffer(FEW, Run(stage, tiny_data, tmp_path, tmp_path / stage), uninterrupted)


@pytest.mark.full
@pytest.mark.parametrize("stage", list(STAGES), scope="module")
def test_one_fault_after_the_other(
    stage: str, uninterrupted: Run, small_disk: Path, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    _suffer(starts(stage), Run(stage, tiny_data, tmp_path, small_disk / stage), uninterrupted)


def _suffer(faults: list[Start], run: Run, uninterrupted: Run) -> None:
    """Start the run again after each fault, and compare its end."""
    stage, disk = run.stage, run.dir.parent
    for start in faults:
        before = run.latest_step()
        said = _damage(run, start.damage) if start.damage else ""
        (run.dir / "STOP").touch() if run.dir.exists() else None  # the start removes it
        num_drawn = len(run.drawn(0))
        status, told = run.start(start.point, start.every)
        where = f"{stage} {start.point}: {told}"
        assert status == start.status, where
        assert re.search(start.says, told), where
        assert re.search(said, told), where
        going_on = re.findall(rf"^going on from step (\d+) of {STEPS}$", told, re.MULTILINE)
        assert going_on == ([str(start.begins)] if start.begins else []), where
        assert start.begins == before or said, where  # nothing is lost beyond the last checkpoint
        assert len(run.drawn(0)) == num_drawn + 1, where
        for rank in (0, 1):
            assert run.drawn(rank)[-1][0]["step"] == start.begins + 1, where
        if start.status == 0 or start.says.startswith("stopped"):
            assert not list((run.dir / "checkpoints").glob(".*")), where
        if start.point.startswith("disk"):
            assert not list((run.dir / "checkpoints").glob(".*")), where
            subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        for file in disk.glob("ballast_*"):
            if file.name != "ballast_disk":
                file.unlink()
        done = run.drawn(0)[-1][-1]["step"]
        print(
            f"| {start.damage or ''} | {start.point} | {stage} | {start.begins} | {done} | {before - start.begins} | {status} |"
        )
    _assert_same(run, uninterrupted, run.folder)
    for rank in (0, 1):
        (expected,) = uninterrupted.drawn(rank)
        assert [line["step"] for line in expected] == list(range(1, STEPS + 1))
        assert _surviving(run, rank) == expected
    assert not [path for path in run.dir.rglob("*") if path.name.endswith((".tmp", ".old"))]
