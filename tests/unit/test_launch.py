"""How a run is started: what SLURM's and torchrun's variables say of it, and the scripts in launch/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_conan.parallel.launch_check import check_launch

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("pretrain", "sft", "weak", "finetune")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"GROUP_WORLD_SIZE": "1"},
        {"SLURM_JOB_NUM_NODES": "1"},
        {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_NUM_NODES": "2", "GROUP_WORLD_SIZE": "2"},
        {"SLURM_JOB_NUM_NODES": "4", "SLURM_STEP_NUM_NODES": "2", "GROUP_WORLD_SIZE": "2"},
        {
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_STEP_NUM_NODES": "1",
            "GROUP_WORLD_SIZE": "1",
        },  # srun --nodes 1, on purpose
        {"GROUP_WORLD_SIZE": "3"},  # torchrun over several machines without SLURM
    ],
)
def test_what_may_start(environment: dict[str, str]) -> None:
    check_launch(environment)


@pytest.mark.parametrize(
    ("environment", "nodes"),
    [
        ({"SLURM_JOB_NUM_NODES": "2"}, 2),  # bash in the batch script
        ({"SLURM_NNODES": "3", "GROUP_WORLD_SIZE": "1"}, 3),
        ({"SLURM_JOB_NUM_NODES": "8", "SLURM_STEP_NUM_NODES": "4", "GROUP_WORLD_SIZE": "1"}, 4),
    ],
)
def test_one_node_of_several_is_refused_with_the_srun_line(environment: dict[str, str], nodes: int) -> None:
    with pytest.raises(ValueError, match=f"this job has {nodes} nodes") as told:
        check_launch({**environment, "SLURMD_NODENAME": "n7"})
    assert f"srun --nodes {nodes} --ntasks-per-node 1" in str(told.value)
    assert "--master-addr n7" in str(told.value)


@pytest.mark.parametrize("script", sorted((ROOT / "launch" / "slurm").iterdir()), ids=lambda path: path.name)
def test_scripts_are_valid_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("stage", STAGES)
def test_jobs_differ_in_the_stage_only(stage: str) -> None:
    text = (ROOT / "launch" / "slurm" / f"{stage}.sbatch").read_text()
    assert text.replace(stage, "pretrain") == (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text()


def test_a_script_can_ask_for_the_runs_folder(tmp_path: Path) -> None:
    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "megatron_conan.run_dir", "pretrain", "--config", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    found = ask("configs/demo/pretrain.yaml", f"run_dir={tmp_path / 'run'}")
    assert (found.returncode, found.stdout) == (0, f"{tmp_path / 'run'}\n")
    wrong = ask("configs/demo/pretrain.yaml", "train.stepz=3")
    assert wrong.returncode == 2
    assert wrong.stdout == ""
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("error: ")
    assert "train.steps" in line
