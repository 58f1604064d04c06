"""Builds the kernels' device source for the host, with g++."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

KERNEL = Path(__file__).resolve().parents[1]
CACHE = KERNEL.parents[1] / "build" / "emulation"
# Without -ffp-contract=off g++ would fuse multiply and add where the host can, and results would depend on the host. Nothing
# here depends on it otherwise (no -march). -fno-gnu-unique: else all libraries of a process would share one emulated machine.
FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off")


def build_library(source: Path, definitions: Sequence[str] = (), *, kernel: Path = KERNEL) -> Path:
    """Compiles one file that includes the emulated device.cuh; builds are kept under build/emulation/ by their content.

    Args:
        source: the file.
        definitions: macros, each NAME=VALUE.
        kernel: the folder of csrc/ and emulate/, whose headers the file finds by their names.

    Returns:
        The shared library.

    Raises:
        RuntimeError: without g++, or with the compiler's messages.
    """
    arguments = [*FLAGS, *(f"-D{definition}" for definition in definitions)]
    folders = [kernel / "csrc", kernel / "emulate"]
    content = hashlib.sha256(repr(arguments).encode())
    for path in (source, *(path for folder in folders for path in sorted(folder.iterdir()) if path.is_file())):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    library = CACHE / content.hexdigest()[:24] / f"{source.stem}.so"
    if library.exists():
        return library
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError(
            "emulating the kernels needs g++ (C++17), which is not on PATH: install it (apt install g++)"
        )
    library.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(descriptor)
    try:
        includes = [f"-I{folder}" for folder in folders]
        command = [compiler, *arguments, *includes, str(source), "-o", unfinished]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"g++ does not compile {source}:\n{done.stderr}")
        Path(unfinished).replace(library)  # at once: others may be building the same
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return library


def load_library(source: Path, definitions: Sequence[str] = (), *, kernel: Path = KERNEL) -> ctypes.CDLL:
    """`build_library`, loaded. A library holds one emulated machine: don't call it from two threads at a time."""
    return ctypes.CDLL(str(build_library(source, definitions, kernel=kernel)))
