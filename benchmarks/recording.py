"""What benchmarks share: time and memory of calls, tables, and a JSON record that says where it was made."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
"""A line of a table: column -> value."""
PACKAGES = ("torch", "megatron-core", "sentence-transformers", "transformers", "numpy")


def least_cpu_seconds(calls: dict[str, Callable[[], object]], repetitions: int) -> dict[str, float]:
    """CPU-seconds of each call's fastest run. The calls take turns, so that a busy machine disturbs all of them alike."""
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in range(repetitions):
        for name, call in calls.items():
            started = time.process_time()
            call()
            seconds[name] = min(seconds[name], time.process_time() - started)
    return seconds


def gemm_flops_per_second(size: int = 1024, repetitions: int = 10) -> float:
    """fp32 operations a CPU-second of one product of two [size, size] matrices, with as many threads as torch has."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / least_cpu_seconds({"mm": lambda: a @ b}, repetitions)["mm"]


def memory_growth(call: Callable[[], object], keeping: bool) -> dict[str, float]:
    """By how much a call raises this process's resident memory at most (`mb`), and its `cpu_seconds`. Linux with glibc.

    Args:
        keeping: let the allocator keep what is freed, as it does by default. Otherwise it gives back all of 1 MB or more at
            once: the figure is then what was alive, and varies little, but the call takes longer.
    """
    libc = ctypes.CDLL(None)
    if not keeping:
        libc.mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD
    gc.collect()
    libc.malloc_trim(0)  # what was freed before would hide what the call takes
    before, started = _status_mb("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    call()
    return {"mb": _status_mb("VmHWM") - before, "cpu_seconds": time.process_time() - started}


def in_fresh_process(seconds: float, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, or as text why it returns nothing within some seconds."""
    spawning = multiprocessing.get_context("spawn")
    receiver, sender = spawning.Pipe(duplex=False)
    process = spawning.Process(target=_send_result, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return f"not done after {seconds:g} s"
        result = receiver.recv()
        process.join(timeout=30)
        return result
    except EOFError:
        process.join()
        return f"exit code {process.exitcode}" + (" (killed: out of memory?)" if process.exitcode == -9 else "")
    finally:
        process.kill()
        process.join()


def surroundings() -> dict[str, Any]:
    """Date, machine, versions and commit of a measurement."""
    processors = [
        line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": processors[0] if processors else platform.processor() or platform.machine(),
            "cores": len(processors) or None,
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "commit": _commit(),
    }


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of rows with the same keys."""
    if not rows:
        return "(no rows)"
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[_cell(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_table(title: str, rows: Sequence[Row]) -> None:
    """A table under its title, on stdout."""
    print(f"\n## {title}\n\n{table(rows)}", flush=True)


def write_record(path: Path, settings: dict[str, Any], tables: dict[str, list[Row]]) -> None:
    """Write a measurement: its surroundings, settings and tables by name; paths in the checkout from its root on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {**surroundings(), "settings": settings, "tables": tables}
    text = json.dumps(record, indent=2, ensure_ascii=False, default=str)
    root = Path(__file__).resolve().parents[1]
    path.write_text(text.replace(f"{root}/", "") + "\n", encoding="utf-8")


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    sender.send(function(*arguments))


def _status_mb(field: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process in MB (10^6 bytes)."""
    values = dict(line.split(":", 1) for line in _lines(Path("/proc/self/status")))
    return int(values[field].split()[0]) * 1024 / 1e6


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+" if files differ from it; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        command = ["git", *arguments]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit + ("+" if git("status", "--porcelain", "--untracked-files=no") else "") if commit else None


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
