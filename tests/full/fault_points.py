"""What can happen to a run, at named points of it. Nothing of the product is changed but that it happens there.

POINT@STEP  what happens
backward    rank 1 is killed in the backward pass of the step
update      rank 0 is killed in the optimizer's step: parameters are updated, nothing after it is done
half        all ranks are killed, with the checkpoint of the step half written by the processes beside them
agent       the same, and torchrun is killed before them
files       all ranks are killed when all files of the checkpoint of the step are written, before it has its name
unnamed     all ranks are killed when it has its name, but `latest` names the one before
disk        the disk is full but for some room when the checkpoint of the step is written
tables      the same, with less room
full        the disk is full from the step on
stop        STOP appears in the step
slow        STOP appears in the step after it, while the checkpoint of the step is being written
mining      STOP appears in the mining before the step
term        torchrun gets SIGTERM in the step
usr1        rank 1 gets SIGUSR1 in the step
int         Ctrl-C in the step: SIGINT to torchrun's process group

All signals are SIGKILL where nothing else is said.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_conan.train import checkpoint_files, checkpoint_saving, loop, mining_hook
from megatron_conan.train.checkpoint_files import checkpoint_name
from megatron_conan.train.checkpoint_saving import Checkpointer
from megatron_conan.train.stopping import StopRequest, stop_file

DEADLINE = 60.0
"""Seconds until what must come has come."""
ROOM = {"disk": 100_000, "tables": 30_000, "full": 0}
"""Bytes left where the disk is full: for the tables of negatives, but not for the tensors; for some arrays of the tables."""


def wait_for(what: str, is_there: Callable[[], bool]) -> None:
    """Wait until `is_there`; the process ends if it doesn't come."""
    deadline = time.monotonic() + DEADLINE
    while not is_there():
        if time.monotonic() > deadline:
            sys.exit(f"waited {DEADLINE:g} s in vain for {what}")
        time.sleep(0.01)


def kill_before(owner: Any, name: str, die: Callable[[], None], reached: Callable[..., bool]) -> None:
    """At the first call of owner.name for which `reached` holds `die` comes instead."""
    real = getattr(owner, name)

    def armed(*args: Any, **kwargs: Any) -> Any:
        if reached(*args, **kwargs):
            die()
        return real(*args, **kwargs)

    setattr(owner, name, armed)


class Fault:
    """One thing that happens to this process, or that it does to all."""

    def __init__(self, point: str, folder: Path) -> None:
        """`folder` takes notes of all ranks' processes."""
        self.point, _, number = point.partition("@")
        self.step = int(number or 0)
        self.folder, self.rank = folder, int(os.environ["RANK"])
        (folder / f"pid_{self.rank}").write_text(str(os.getpid()))
        (folder / f"reached_{self.rank}").unlink(missing_ok=True)
        self.checkpointer: Checkpointer
        self.request: StopRequest
        fault = self

        class Followed(Checkpointer):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                fault.checkpointer = self

        class FollowedRequest(StopRequest):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                fault.request = self

        loop.Checkpointer, loop.StopRequest = Followed, FollowedRequest  # type: ignore[misc]
        if self.point in ("half", "agent", "slow"):
            self._arm_writer()

    def arm(self, trainer: Any) -> None:
        """Once the run is in memory."""
        name = checkpoint_name(self.step)
        if self.point == "backward" and self.rank == 1:
            parameter = next(p for n, p in trainer.chunks[0].named_parameters() if "layers" in n)
            parameter.register_hook(lambda _: self.die() if trainer.phases.step == self.step else None)
        if self.point == "update" and self.rank == 0:
            from torch.optim.optimizer import register_optimizer_step_post_hook

            register_optimizer_step_post_hook(lambda *_: self.die() if trainer.phases.step == self.step else None)
        if self.point == "files" and self.rank == 0:
            kill_before(checkpoint_saving, "commit", self.kill_all, lambda folder, *_: folder.name == name)
        if self.point == "unnamed" and self.rank == 0:

            def names(file: Path, text: str) -> bool:
                return (file.name, text) == ("latest", f"{name}\n")

            kill_before(checkpoint_files, "write_atomically", self.kill_all, names)
        if self.point == "mining" and self.rank == 1:

            def mines(*_: Any, step: int, **__: Any) -> bool:
                return step == self.step - 1

            kill_before(mining_hook, "remine", lambda: self.touch_stop(trainer), mines)

    def begin(self, trainer: Any, step: int) -> None:
        """Before the data of a step are drawn, on all ranks."""
        halved = self.point in ("half", "agent", "slow") and step == self.step + 1
        if halved:
            self._while_written(trainer)
        else:  # tiny steps are faster than any disk: the last checkpoint gets its name after this step
            wait_for("the checkpoint", self.checkpointer.is_written)
        if step != self.step:
            return
        if self.point in ROOM and self.rank == 0:
            self._fill_disk(trainer.setup.config.run_dir, ROOM[self.point])
        if self.point == "stop" and self.rank == 1:
            self.touch_stop(trainer)
        if self.point == "usr1" and self.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.point in ("term", "int") and self.rank == 0:
            agent = os.getppid()
            if self.point == "term":
                os.kill(agent, signal.SIGTERM)
            else:
                os.killpg(os.getpgid(agent), signal.SIGINT)
            wait_for("the signal", lambda: self.request.signalled_at is not None)

    def die(self) -> None:
        """Kill this process."""
        self._tell("dies")
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_all(self) -> None:
        """Kill all ranks, and before them torchrun if it is its turn."""
        self._tell("kills all")
        if self.point == "agent":
            os.kill(os.getppid(), signal.SIGKILL)
        for file in self.folder.glob("pid_*"):
            if file.name != f"pid_{self.rank}":
                os.kill(int(file.read_text()), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def touch_stop(self, trainer: Any) -> None:
        """As `touch RUN/STOP` does."""
        stop_file(trainer.setup.config.run_dir).touch()
        self._tell("touches STOP")

    def _tell(self, what: str) -> None:
        print(f"rank {self.rank} {what} at {self.point}@{self.step}", file=sys.stderr, flush=True)

    def _arm_writer(self) -> None:
        """Have this rank's writing process stop in the middle of its file (fault_writer.py)."""
        real = subprocess.Popen
        action = "wait" if self.point == "slow" else "halve"
        arguments = (action, checkpoint_name(self.step), str(self.folder / f"reached_{self.rank}"))
        here = str(Path(__file__).parent)
        armed = f"import sys; sys.path.append({here!r}); import fault_writer; fault_writer.arm{arguments}; "

        def popen(command: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(command, list) and any("checkpoint_worker" in str(part) for part in command):
                command = [armed + part if "checkpoint_worker" in part else part for part in command]
            return real(command, *args, **kwargs)

        subprocess.Popen = popen  # type: ignore[assignment, misc]

    def _while_written(self, trainer: Any) -> None:
        """The checkpoint is in the middle of being written."""
        mark = self.folder / f"reached_{self.rank}"
        wait_for("the writing", lambda: self.checkpointer.is_written() or mark.exists())
        mark.touch()  # a rank that has nothing to write
        wait_for("the other rank", lambda: len(list(self.folder.glob("reached_*"))) == 2)
        if self.point == "slow":
            if self.rank == 0:
                assert not self.checkpointer.is_written()
                self.touch_stop(trainer)
                threading.Timer(1.0, (self.folder / "released").touch).start()  # the run stops meanwhile
        elif self.rank == 0:
            self.kill_all()
        else:
            wait_for("its end", lambda: False)

    def _fill_disk(self, folder: Path, room: int) -> None:
        state = os.statvfs(folder)
        ballast = folder.parent / f"ballast_{self.point}"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - room)
        self._tell("fills the disk")
