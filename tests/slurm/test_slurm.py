"""Stages as jobs of a real SLURM with two nodes on this machine: `make test-slurm`.

A job that is queued again, stopped before its time limit, or loses a node ends with the losses of
an undisturbed run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gloo_pool import WorkerPool
from layouts import deterministic, tiny_config, train_run

from megatron_conan.config import dump_config

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = Path(__file__).with_name("cluster.sh")
STEPS = 400
"""Enough to be interrupted: a step takes about 50 ms."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Starts it, sets SLURM_CONF, and stops it."""
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("needs slurm-wlm and munge, and root: make test-slurm installs them")
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([str(CLUSTER), "start", str(folder)], check=True)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    yield folder
    subprocess.run([str(CLUSTER), "stop", str(folder)], check=True)
    del os.environ["SLURM_CONF"]


@pytest.fixture(scope="module")
def expected(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Lines of metrics of the run that nothing happens to, on two ranks without SLURM."""
    config = _config(tiny_data, tmp_path_factory.mktemp("whole") / "run")
    workers.run(train_run, 2, config)
    return _metrics(config.run_dir)


def _config(files: dict[str, Path], run: Path, **more: Any) -> Any:
    train = {"steps": STEPS, "micro_batch_size": 4, "global_batch_size": 64}
    return tiny_config("pretrain", files, run, train=train, checkpoint={"every": 20, "asynchronous": False}, **more)


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [deterministic(json.loads(line)) for line in lines]


class Job:
    """A submitted job."""

    def __init__(
        self, files: dict[str, Path], folder: Path, *options: str, words: Sequence[str] = (), **variables: str
    ) -> None:
        self.run, self.output = folder / "run", folder / "slurm.out"
        config = folder / "pretrain.yaml"
        config.write_text(dump_config(_config(files, self.run)))
        command = ["sbatch", "--parsable", "--nodes=2", f"--output={self.output}", *options]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "NPROC": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            **variables,
        }
        script = [str(ROOT / "launch/slurm/pretrain.sbatch"), "--config", str(config), *words]
        told = subprocess.run(
            [*command, *script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        self.number = told.stdout.strip().split(";")[0]

    def told(self) -> str:
        """The job's output so far."""
        return self.output.read_text() if self.output.exists() else ""

    def show(self) -> dict[str, str]:
        """What SLURM says of it."""
        text = subprocess.run(
            ["scontrol", "show", "job", self.number], capture_output=True, text=True, check=True
        ).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait_for_step(self, step: int, seconds: float = 180.0) -> None:
        """Until the run has made this step."""
        self._wait(lambda: any(line["step"] >= step for line in _metrics(self.run)), seconds, f"step {step}")

    def wait_for_end(self, seconds: float = 600.0) -> None:
        """Until the job is completed; a job that fails is an error."""
        self._wait(
            lambda: self.show()["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), seconds, "its end"
        )
        assert self.show()["JobState"] == "COMPLETED", self.told()

    def _wait(self, reached: Any, seconds: float, what: str) -> None:
        until = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < until, f"{what} not reached in {seconds:g} s\n{self.show()}\n{self.told()}"
            time.sleep(0.3)


def _slurm(*words: str) -> None:
    subprocess.run(["scontrol", *words], check=True)


def _assert_whole(job: Job, expected: list[dict[str, Any]]) -> None:
    """Every step once, bitwise the same."""
    assert [line["step"] for line in _metrics(job.run)] == list(range(1, STEPS + 1))
    assert _metrics(job.run) == expected


def test_a_job_on_two_nodes(cluster: Path, expected: list, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """Also options for srun, as of a container, and another folder for the logs."""
    said, logs = tmp_path / "said", tmp_path / "logs"
    job = Job(tiny_data, tmp_path, CONAN_SRUN=f"--error={said} --input=none", CONAN_LOGS=str(logs))
    job.wait_for_end()
    _assert_whole(job, expected)
    assert f"pretrain {STEPS}/{STEPS}" in said.read_text()
    files = sorted(str(file.relative_to(logs)) for file in logs.rglob("stderr.log"))
    assert [name.split("/")[1] for name in files] == ["node_0", "node_1"]


def test_a_wrong_config_ends_the_job_in_one_line(cluster: Path, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    job = Job(tiny_data, tmp_path, words=["train.stepz=3"])
    job._wait(lambda: job.show()["JobState"] == "FAILED", 60, "its end")
    assert job.show()["ExitCode"] == "2:0"
    (line,) = (line for line in job.told().splitlines() if line.startswith("error: "))
    assert "train.steps" in line


def test_a_job_that_is_queued_again(cluster: Path, expected: list, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    job = Job(tiny_data, tmp_path)
    job.wait_for_step(60)
    _slurm("requeue", job.number)
    job.wait_for_end()
    assert job.show()["Restarts"] == "1"
    assert "going on from step" in job.told()
    _assert_whole(job, expected)


def test_a_job_before_its_time_limit(cluster: Path, expected: list, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """SLURM counts time limits in minutes, and sends the signal up to a minute early: it comes some seconds after the start."""
    job = Job(tiny_data, tmp_path, "--time=2", "--signal=B:USR1@110")
    job.wait_for_end(600)
    told = job.told()
    assert int(job.show()["Restarts"]) >= 1, told
    assert "stopped on request after step" in told
    assert "stopped before its time limit, queued again" in told
    assert "going on from step" in told
    _assert_whole(job, expected)


def test_a_job_whose_step_does_not_end_before_its_time_limit(
    cluster: Path, expected: list, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    """As in a long mining: ranks that stand still after the signal are given up, and the job is queued again all the same."""
    job = Job(tiny_data, tmp_path, CONAN_LATE="3")
    job.wait_for_step(60)
    subprocess.run(["pkill", "-STOP", "-f", f"python -u launch/pretrain.sh --config {tmp_path}"], check=True)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job.number], check=True)
    job.wait_for_end()
    assert "not stopped 3 s after its signal, queued again" in job.told()
    assert job.show()["Restarts"] == "1"
    _assert_whole(job, expected)


def test_a_node_that_is_lost(cluster: Path, expected: list, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    job = Job(tiny_data, tmp_path)
    job.wait_for_step(60)
    _slurm("update", "nodename=n2", "state=down", "reason=test")
    job._wait(lambda: job.show()["JobState"] == "PENDING", 60, "the queue")
    _slurm("update", "nodename=n2", "state=resume")
    job.wait_for_end()
    assert job.show()["Restarts"] == "1"
    _assert_whole(job, expected)


def test_a_users_stop_ends_the_job_unfinished(cluster: Path, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    job = Job(tiny_data, tmp_path)
    job.wait_for_step(30)
    (job.run / "STOP").touch()
    job._wait(lambda: job.show()["JobState"] == "FAILED", 60, "its end")
    assert job.show()["ExitCode"] == "3:0"
    assert "stopped on request; the same sbatch goes on" in job.told()


def test_torchrun_on_one_node_of_two_names_srun(cluster: Path, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    config = tmp_path / "pretrain.yaml"
    config.write_text(dump_config(_config(tiny_data, tmp_path / "run")))
    line = f"bash launch/pretrain.sh --config {config}"
    found = subprocess.run(
        ["salloc", "--nodes=2", "--quiet", "bash", "-c", line],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert found.returncode != 0
    assert "error: this job has 2 nodes, but torchrun runs on 1 of them" in found.stderr
    assert "srun --nodes 2 --ntasks-per-node 1" in found.stderr


def test_the_chain_waits_for_each_stage(cluster: Path, tmp_path: Path) -> None:
    for stage in ("pretrain", "sft", "weak", "finetune"):
        (tmp_path / f"{stage}.yaml").write_text("")
    options = ["--configs", str(tmp_path), "--hold", "--output=/dev/null"]
    told = subprocess.run(
        [str(ROOT / "launch/slurm/chain.sh"), *options], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    jobs = [line.split() for line in told.splitlines()]
    assert [stage for stage, _ in jobs] == ["pretrain", "sft", "weak", "finetune"]
    for (_, before), (stage, number) in pairwise(jobs):
        shown = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True).stdout
        assert f"JobName=conan-{stage}" in shown
        assert f"Dependency=afterok:{before}" in shown
    subprocess.run(["scancel", *(number for _, number in jobs)], check=True)
