"""The watchdog of real ranks: one that is slow in its data, a judge that falls silent, a store that does not answer."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from gloo_pool import WorkerPool
from layouts import build_test_trainer, tiny_config

from megatron_conan.config import RunConfig
from megatron_conan.config.operation import WatchdogConfig


def _slow_run(config: RunConfig, slow: int, seconds: float) -> str:
    """What is told of a run in which a rank's data come late in every step."""
    from megatron_conan.train import loop

    with contextlib.redirect_stderr(io.StringIO()) as told:
        trainer = build_test_trainer(config)
        if dist.get_rank() == slow:
            data = trainer.parts.data
            draw = data.batch

            def batch(step: int) -> Any:
                time.sleep(seconds)
                return draw(step)

            data.batch = batch
        loop.train(trainer)
    return told.getvalue()


def test_a_slow_rank_is_named_once(workers: WorkerPool, tiny_data: dict[str, Path], tmp_path: Path) -> None:
    train = {"steps": 14, "micro_batch_size": 2, "global_batch_size": 4}
    config = tiny_config("pretrain", tiny_data, tmp_path, train=train, watchdog={"report_seconds": 2})
    told = workers.run(_slow_run, 2, config, 1, 0.4)
    lines = [line for line in told[0].splitlines() if line.startswith("warning: ")]
    assert len(lines) == 1, lines  # though there were two windows
    pattern = r"warning: rank 1 \(.*\) is slow: the others waited for it in \d+% of the last 2 s, mostly in phase data"
    assert re.fullmatch(pattern, lines[0]), lines
    assert "is slow" not in told[1]


def _silent_judge(seconds: float) -> dict[str, Any]:
    """Nothing gets done, and rank 0's watchdog stands still for `seconds` from the start, then goes on."""
    from megatron_conan.train import watchdog
    from megatron_conan.train.phases import Phases

    rank, left, judges = dist.get_rank(), [], []
    context: Any = SimpleNamespace(rank=rank, world_size=dist.get_world_size())
    settings = WatchdogConfig(report_seconds=2.5, abort_seconds=4.0)
    with (
        contextlib.redirect_stderr(io.StringIO()) as told,
        mock.patch.multiple(watchdog, SILENT_SECONDS=2.0, TURN_SECONDS=2.0, _leave=left.append),
    ):
        dog = watchdog.Watchdog(Phases(step=3, phase="forward_backward"), settings, context)
        dist.barrier()
        end = time.monotonic() + seconds + 1.0
        if rank == 0:
            look = dog._look

            def late_look() -> None:
                time.sleep(max(0.0, end - 1.0 - time.monotonic()))
                look()

            dog._look = late_look  # type: ignore[method-assign]
        with dog:
            while time.monotonic() < end:
                time.sleep(0.1)
                judges.append(dog._word.judge)
    return {"told": told.getvalue(), "left": left, "judges": judges}


def test_another_rank_judges_when_rank_0_is_silent(workers: WorkerPool) -> None:
    ranks = workers.run(_silent_judge, 3, 5.5)
    lines = [line for line in ranks[1]["told"].splitlines() if line.startswith("warning: no progress for")]
    assert len(lines) == 1, ranks
    assert re.search(
        r"rank 0 \(.*\) gives no sign of life .*; in phase forward_backward of step 3: rank 1 \(.*\), rank 2", lines[0]
    )
    for result in ranks[1:]:
        assert "is here:" in result["told"]
        assert "(watchdog.abort_seconds)" in result["left"][0]
    assert "no progress" not in ranks[2]["told"] + ranks[0]["told"]
    assert set(ranks[2]["judges"]) == {0, 1}
    assert ranks[0]["judges"][-1] == 1  # rank 0 goes on, and leaves it at that


FROZEN_HOST = """
import os, signal, sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch.distributed as dist
from megatron_conan.config.operation import WatchdogConfig
from megatron_conan.train.phases import Phases
from megatron_conan.train.watchdog import Watchdog

rank = int(sys.argv[2])
store = dist.FileStore(sys.argv[1], 2)
if rank == 0:
    tcp = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
    store.set("port", str(tcp.port))
else:
    tcp = dist.TCPStore("127.0.0.1", int(store.get("port")), None, False)
dist.init_process_group("gloo", store=tcp, rank=rank, world_size=2, timeout=timedelta(minutes=30))
with Watchdog(Phases(), WatchdogConfig(report_seconds=1, abort_seconds=3), SimpleNamespace(rank=rank, world_size=2)):
    dist.barrier()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
"""


@pytest.mark.full
def test_a_rank_ends_when_the_stores_host_is_frozen(tmp_path: Path) -> None:
    """Without torchrun the store is in rank 0's process; its calls then never return."""
    command = [sys.executable, "-P", "-c", FROZEN_HOST, str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    host = subprocess.Popen([*command, "0"], env=environment)
    try:
        rank_1 = subprocess.run(
            [*command, "1"], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        host.send_signal(signal.SIGKILL)
        host.wait()
    assert rank_1.returncode == 1
    what = r"the process group's store has not answered for \d s: its host is gone, or hangs"
    assert re.search(f"warning: {what}\n(.*\n)*rank 1 ends: {what}\n", rank_1.stderr), rank_1.stderr
