"""Compiles the kernels into libsoft_mask_attention.so, beside this file: `make kernels`.

One object for each instance, for sm_80 and sm_90 and as PTX for newer chips. What hasn't changed isn't compiled again, and a
build that fails leaves the library that was there. Needs nvcc, and no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_conan.kernels.soft_mask_attention import resources
from megatron_conan.kernels.soft_mask_attention.library import (
    HERE,
    LIBRARY,
    SOURCES,
    digest,
    read_json,
    read_stamp,
    source_digest,
    stamp_file,
    write_json,
)

CHECKOUT = HERE.parents[1]
OBJECTS = CHECKOUT / "build" / "kernels" if (CHECKOUT / "setup.py").exists() else HERE / "objects"
DEFAULT_TOOLKIT = Path("/usr/local/cuda")
ELEMENTS = ("bf16", "fp16")
"""In the order of Element in csrc/params.h."""
HEAD_DIMS = (64, 112, 128)
ARCHITECTURES = ("sm_80", "sm_90")
GENCODE = (
    *("-gencode", "arch=compute_80,code=sm_80"),
    *("-gencode", "arch=compute_90,code=[sm_90,compute_90]"),
)
COMPILE = ("-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
"""The oldest torch that the library must load in: 2.11."""


class BuildError(Exception):
    """The message is all that the user needs."""


@dataclass(frozen=True)
class Compiler:
    """nvcc."""

    path: Path
    version: str
    """As in 13.0.88."""

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


@dataclass(frozen=True)
class Unit:
    """One object file."""

    name: str
    sources: tuple[str, ...]
    """Patterns in the folder of sources; the first is what is compiled."""
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Compiled:
    """An object file and what nvcc said."""

    path: Path
    output: str


def units(torch_folder: Path) -> list[Unit]:
    """All objects of the library, the longest to compile first."""
    kernels = [
        Unit(
            f"forward {element} d{head_dim}",
            ("forward.cu", "*.cuh", "*.h"),
            (*COMPILE, *GENCODE, "-Xptxas", "-v", f"-DINSTANCE_ELEMENT={element}", f"-DINSTANCE_HEAD_DIM={head_dim}"),
        )
        for head_dim in sorted(HEAD_DIMS, reverse=True)
        for element in ELEMENTS
    ]
    op = Unit("op", ("op.cpp", "*.h"), (*COMPILE, STABLE_ABI, "-isystem", str(torch_folder / "include")))
    return [op, *kernels]


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME or CUDA_PATH, on PATH, or where the toolkit is by default."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    on_path = shutil.which("nvcc")
    candidates = [*(Path(home) / "bin" / "nvcc" for home in homes), *([Path(on_path)] if on_path else [])]
    return next((path for path in [*candidates, DEFAULT_TOOLKIT / "bin" / "nvcc"] if path.is_file()), None)


def compiler() -> Compiler:
    """Raises BuildError where there is none."""
    path = find_nvcc()
    if path is None:
        raise BuildError(
            f"no nvcc in $CUDA_HOME/bin, $CUDA_PATH/bin, on PATH or in {DEFAULT_TOOLKIT}/bin: install the CUDA toolkit "
            f"({torch.version.cuda or '12.4 or newer'}), or set CUDA_HOME to it"
        )
    said = subprocess.run([str(path), "--version"], capture_output=True, text=True, check=False)
    version = re.search(r"release \d+\.\d+, V(\d+\.\d+\.\d+)", said.stdout)
    if not version:
        raise BuildError(f"{path} --version fails: {(said.stderr or said.stdout).strip()}")
    return Compiler(path, version[1])


def driver_version() -> str | None:
    """The newest CUDA that this machine's driver can run, as in 13.0; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value == 0:
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"


def check_versions(nvcc: Compiler, torch_cuda: str | None, driver: str | None) -> None:
    """nvcc's CUDA must be of torch's major version, and no newer than the driver's."""
    if torch_cuda and int(torch_cuda.split(".")[0]) != nvcc.major:
        raise BuildError(
            f"nvcc is of CUDA {nvcc.version} and torch {torch.__version__} of CUDA {torch_cuda}: set CUDA_HOME to a toolkit of "
            f"CUDA {torch_cuda.split('.')[0]}, or install a torch built for CUDA {nvcc.major}"
        )
    if driver and int(driver.split(".")[0]) < nvcc.major:
        raise BuildError(
            f"nvcc is of CUDA {nvcc.version} and the driver runs up to CUDA {driver}: update the driver, or set CUDA_HOME to a "
            f"toolkit of CUDA {driver.split('.')[0]}"
        )


def stamp(nvcc_version: str) -> dict[str, str]:
    """What a library is built from; kept beside it."""
    flags = [word for unit in units(Path()) for word in (unit.name, *unit.flags)]
    return {
        "sources": source_digest(SOURCES),
        "flags": digest(*flags, *link_flags(Path())),
        "nvcc": nvcc_version,
        "torch": torch.__version__,
    }


def run(command: Sequence[str], what: str) -> str:
    """Runs a command among the sources. Returns what it said; raises BuildError with that."""
    result = subprocess.run(
        command, cwd=SOURCES, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode:
        raise BuildError(f"{what} fails (exit status {result.returncode}):\n{result.stdout.rstrip()}")
    return result.stdout


def compile_unit(unit: Unit, nvcc: Compiler, objects: Path) -> tuple[Compiled, bool]:
    """Compiles, unless the object is there from the same sources, flags and nvcc. Returns whether it did, too."""
    path = objects / f"{unit.name.replace(' ', '_')}.o"
    note = path.with_suffix(".json")
    versions = (nvcc.version, torch.__version__ if unit.name == "op" else "")
    key = digest(source_digest(SOURCES, unit.sources), *unit.flags, *versions)
    noted = read_json(note)
    if path.exists() and noted.get("key") == key:
        return Compiled(path, noted["output"]), False
    note.unlink(missing_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.o")
    try:
        output = run(
            [str(nvcc.path), *unit.flags, "-c", unit.sources[0], "-o", str(temporary)], f"compiling {unit.name}"
        )
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(note, {"key": key, "output": output})
    return Compiled(path, output), True


def compile_all(nvcc: Compiler, torch_folder: Path, objects: Path) -> list[Compiled]:
    """As many at a time as there are cores."""
    objects.mkdir(parents=True, exist_ok=True)
    todo = units(torch_folder)
    start = time.monotonic()
    done: list[Compiled] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = {pool.submit(compile_unit, unit, nvcc, objects): unit for unit in todo}
        try:
            for future in as_completed(futures):
                compiled, fresh = future.result()
                done.append(compiled)
                seconds = time.monotonic() - start
                left = seconds / len(done) * (len(todo) - len(done))
                how = "compiled" if fresh else "unchanged"
                print(
                    f"[{len(done)}/{len(todo)}] {futures[future].name:18} {how:9} {seconds:5.1f} s, about {left:.0f} s left",
                    flush=True,
                )
                if "warning" in compiled.output:
                    print(compiled.output.rstrip())
        except BuildError:
            pool.shutdown(cancel_futures=True)
            raise
    return done


def link_flags(torch_folder: Path) -> list[str]:
    """The CUDA runtime is linked in and its symbols stay inside: torch has its own, maybe of another version."""
    linker = ("--no-as-needed", "--exclude-libs=ALL")
    options = [word for option in linker for word in ("-Xlinker", option)]
    return ["-shared", "-cudart", "static", "-Xcompiler", "-fPIC", *options, f"-L{torch_folder / 'lib'}", "-ltorch"]


def load_and_ask(library: Path) -> dict[str, int]:
    """Loads the library in another process, beside torch. Returns the dynamic shared memory of every instance."""
    asked = {
        f"forward {element} d{head_dim}": (index, head_dim)
        for index, element in enumerate(ELEMENTS)
        for head_dim in HEAD_DIMS
    }
    code = (
        "import ctypes, sys, json, torch\n"
        "library = ctypes.CDLL(sys.argv[1])\n"
        "asked = json.loads(sys.argv[2])\n"
        "print(json.dumps({name: library.soft_mask_forward_shared_bytes(*x) for name, x in asked.items()}))\n"
    )
    answer = run([sys.executable, "-P", "-c", code, str(library), json.dumps(asked)], "loading the library")
    found: dict[str, int] = json.loads(answer.splitlines()[-1])
    return found


def check_resources(rows: list[resources.Resources], nvcc: Compiler, update: bool) -> None:
    """Against the record, or into it. Raises BuildError for spills, and for more than is recorded."""
    if update:
        if errors := resources.spills(rows):
            raise BuildError("\n".join(errors))
        resources.RECORD.write_text(resources.write_table(rows, nvcc.version), encoding="utf-8")
        print(f"recorded in {resources.RECORD.name}")
        return
    record = resources.RECORD.read_text(encoding="utf-8") if resources.RECORD.exists() else ""
    errors, remarks = resources.compare(rows, nvcc.version, record)
    for remark in remarks:
        print(f"note: {remark}")
    if errors:
        raise BuildError("\n".join([*errors, resources.write_table(rows, nvcc.version)]))


def build(update_resources: bool = False, library: Path = LIBRARY, objects: Path = OBJECTS) -> None:
    """Builds what has changed. Raises BuildError; then the library that was there is still there."""
    nvcc = compiler()
    driver = driver_version()
    torch_folder = Path(torch.__file__).resolve().parent
    print(f"nvcc {nvcc.version}, {nvcc.path}")
    print(f"torch {torch.__version__}, built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'CPUs only'}")
    print(f"driver for CUDA up to {driver}" if driver else "no driver found: the library is built but can't run here")
    check_versions(nvcc, torch.version.cuda, driver)
    wanted = stamp(nvcc.version)
    if read_stamp(library) == wanted and not update_resources:
        print(f"{library.name} is up to date")
        return
    start = time.monotonic()
    compiled = compile_all(nvcc, torch_folder, objects)
    temporary = library.with_suffix(f".{os.getpid()}.so")
    try:
        files = [str(part.path) for part in compiled]
        run([str(nvcc.path), *files, *link_flags(torch_folder), "-o", str(temporary)], "linking")
        dynamic = load_and_ask(temporary)
        rows = [row for part in compiled for row in resources.parse_ptxas(part.output)]
        check_resources(resources.add_dynamic_shared(rows, dynamic), nvcc, update_resources)
        stamp_file(library).unlink(missing_ok=True)
        temporary.replace(library)
    finally:
        temporary.unlink(missing_ok=True)
    write_json(stamp_file(library), wanted)
    print(f"{library.name}: {library.stat().st_size / 2**20:.1f} MiB in {time.monotonic() - start:.0f} s")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the soft-mask attention kernels.")
    parser.add_argument(
        "--update-resources",
        action="store_true",
        help="record the kernels' registers and shared memory as they are now",
    )
    options = parser.parse_args(arguments)
    try:
        build(options.update_resources)
    except (BuildError, OSError) as error:  # OSError: a full disk, a checkout that can't be written
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
