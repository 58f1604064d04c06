"""A rank that dies takes the others down within seconds; one that hangs is named, and ends the run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from layouts import tiny_config

from megatron_conan.config import dump_config

DRIVER = Path(__file__).with_name("hindered_stage.py")
MINING = {
    "mining": {"every": 4, "pool_size": 8, "window": 40},
    "contrastive": {"temperature": 0.05, "num_hard_negatives": 2},
    "soft_mask": {"schedule": "constant", "alpha": 1.0},
}
FULL = pytest.mark.full


def _launch(
    stage: str,
    how: str,
    place: str,
    ranks: int,
    files: dict[str, Path],
    folder: Path,
    seconds: float = 120.0,
    **more: Any,
) -> tuple[int, str, float]:
    """Exit status, what was told, and seconds from the blow to the end."""
    train = {"steps": 200, "micro_batch_size": 2, "global_batch_size": 8}
    sections = {"train": train, **(MINING if stage == "finetune" else {}), **more}
    config = folder / "config.yaml"
    config.write_text(dump_config(tiny_config(stage, files, folder / "run", **sections)))
    command = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(DRIVER)]
    told_to = folder / "told"
    with told_to.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command, stage, how, place, "--config", str(config)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        metrics, struck_at = folder / "run" / "metrics.jsonl", 0.0
        last = int(place.split("@")[1]) - 1
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < seconds:
            if not struck_at and metrics.exists() and f'"step": {last},' in metrics.read_text():
                struck_at = time.monotonic()
            time.sleep(0.05)
        ended = time.monotonic()
        left = subprocess.run(
            ["pgrep", "-s", str(process.pid)], capture_output=True, text=True, check=False
        ).stdout.split()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"not ended after {seconds:g} s\n{told_to.read_text()}")
    assert not left, "processes are left"
    assert struck_at, told_to.read_text()
    return process.returncode, told_to.read_text(), ended - struck_at


@pytest.mark.parametrize(
    ("stage", "ranks", "place", "parallel"),
    [
        ("pretrain", 2, "1@3", {"tensor": 2}),
        pytest.param("pretrain", 2, "0@3", {}, marks=FULL),
        pytest.param("finetune", 2, "1@6", {"pipeline": 2}, marks=FULL),
        pytest.param("finetune", 4, "2@6", {"tensor": 2}, marks=FULL),
    ],
)
def test_a_killed_rank_takes_the_others_down(
    stage: str, ranks: int, place: str, parallel: dict[str, Any], tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    status, told, seconds = _launch(stage, "kill", place, ranks, tiny_data, tmp_path, parallel=parallel)
    assert status != 0
    assert seconds < 15, told
    assert "Signal 9 (SIGKILL)" in told
    assert told.count("Traceback (most recent call last)") == 1, told  # torchrun's own, whose last words name the rank
    assert "fails:" not in told
    assert told.count("ends: ") <= ranks - 1  # they lost a connection, or were ended by torchrun


@pytest.mark.full
@pytest.mark.parametrize("place", ["0@3", "1@3"])
def test_an_error_of_the_program_shows_its_traceback_once(
    place: str, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    status, told, seconds = _launch("pretrain", "raise", place, 2, tiny_data, tmp_path, parallel={"tensor": 2})
    assert status != 0
    assert seconds < 15, told
    assert told.count("fails:") == 1, told
    assert told.count("Traceback (most recent call last)") == 2, told  # the second is torchrun's own
    assert f"rank {place[0]} fails:" in told
    assert "KeyError: 'what nobody thought of'" in told


@pytest.mark.full
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_rank_that_hangs_in_its_data_is_named_with_its_stack(
    stage: str, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    watchdog = {"report_seconds": 3, "abort_seconds": 6}
    status, told, seconds = _launch(stage, "sleep", "1@6", 2, tiny_data, tmp_path, watchdog=watchdog)
    assert status != 0
    assert 5 < seconds < 25, told
    line = next(line for line in told.splitlines() if "no progress for" in line)
    assert re.search(r"in phase data of step 6: rank 1 \(.*\); in phase forward_backward of step 6: rank 0", line), told
    assert told.count("is here:") == 1
    stack = told[told.index("rank 1 is here:") :]
    assert "time.sleep(SLEEP_SECONDS)" in stack
    assert "watchdog.abort_seconds" in told


@pytest.mark.full
@pytest.mark.parametrize("place", ["0@3", "1@3"])
def test_a_stopped_process_is_named(place: str, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    """By rank 1 if it is rank 0, which judges else."""
    watchdog = {"report_seconds": 10, "abort_seconds": 13}
    status, told, _ = _launch("pretrain", "stop", place, 2, tiny_data, tmp_path, watchdog=watchdog)
    assert status != 0
    assert re.search(rf"no progress for \d+ s: rank {place[0]} \(.*\) gives no sign of life", told), told
    assert re.search(r"no progress for \d+ s \(watchdog.abort_seconds\)", told), told
