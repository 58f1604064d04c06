"""What a compiled kernel takes of a multiprocessor: ptxas's report as a table, and that table against the recorded one.

A spill or a stack frame means registers in memory inside the loop over the keys, which costs a fraction of the speed and
changes no result: nothing but this table would show it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

RECORD = Path(__file__).with_name("resources.txt")
TYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16"}
"""Mangled element types."""
REMEDY = "if that is meant, record it with --update-resources"
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class Resources:
    """One kernel's on one architecture."""

    kernel: str
    arch: str
    registers: int
    """Of a thread."""
    shared: int
    """Bytes of a block, static and dynamic."""
    barriers: int
    stack: int
    """Bytes of a thread."""
    spill_stores: int
    """Bytes of a thread."""
    spill_loads: int
    """Bytes of a thread."""

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.arch}"


def kernel_name(mangled: str) -> str:
    """`forward bf16 d128 rows` for forward_kernel<__nv_bfloat16, 128, false>; an unknown name stays as it is."""
    found = re.search(r"\d([a-z_]+)_kernelI(13__nv_bfloat16|6__half)Li(\d+)E(?:Lb([01])E)?", mangled)
    if not found:
        return mangled
    name, element, head_dim, column = found.groups()
    form = {None: "", "0": " rows", "1": " columns"}[column]
    return f"{name} {TYPES[element]} d{head_dim}{form}"


def parse_ptxas(output: str) -> list[Resources]:
    """Every kernel that `nvcc -Xptxas -v` reports on, with the functions that it calls; `shared` is what is static."""
    found: list[Resources] = []
    for line in output.splitlines():
        if entry := ENTRY.search(line):
            found.append(Resources(kernel_name(entry[1]), entry[2], 0, 0, 0, 0, 0, 0))
        elif found and (memory := MEMORY.search(line)):
            stack, stores, loads = (int(x) for x in memory.groups())
            last = found[-1]
            found[-1] = replace(
                last,
                stack=last.stack + stack,
                spill_stores=last.spill_stores + stores,
                spill_loads=last.spill_loads + loads,
            )
        elif found and (used := USED.search(line)):
            shared, barriers = (re.search(pattern, line) for pattern in (r"(\d+) bytes smem", r"used (\d+) barriers"))
            found[-1] = replace(
                found[-1],
                registers=int(used[1]),
                shared=int(shared[1]) if shared else 0,
                barriers=int(barriers[1]) if barriers else 0,
            )
    return found


def in_order(rows: Iterable[Resources]) -> list[Resources]:
    """By architecture, then by name with numbers as numbers."""
    return sorted(rows, key=lambda row: (row.arch, [(len(word), word) for word in row.kernel.split()]))


def write_table(rows: Iterable[Resources], nvcc_version: str) -> str:
    """The text of the record."""
    titles = [field.name for field in fields(Resources)]
    cells = [titles, *([str(cell) for cell in astuple(row)] for row in in_order(rows))]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    text = [
        f"# nvcc {nvcc_version}. Registers, bytes of stack and of spills are a thread's; bytes of shared memory a block's.",
        "# Every build checks it. To record: python -P -m megatron_conan.kernels.soft_mask_attention.build --update-resources",
    ]
    for line in cells:
        aligned = [
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(aligned).rstrip())
    return "\n".join(text) + "\n"


def read_table(text: str) -> tuple[str, list[Resources]]:
    """nvcc's version and the rows of a record."""
    version = re.search(r"^# nvcc (\S+?)\. ", text)
    lines = [re.split(r" {2,}", line) for line in text.splitlines() if line and not line.startswith("#")]
    return version[1] if version else "unknown", [
        Resources(line[0], line[1], *map(int, line[2:])) for line in lines[1:]
    ]


def add_dynamic_shared(rows: Iterable[Resources], dynamic: Mapping[str, int]) -> list[Resources]:
    """Adds each instance's dynamic shared memory; keys begin a kernel's name, `forward bf16 d128`."""
    return [replace(row, shared=row.shared + dynamic[" ".join(row.kernel.split()[:3])]) for row in rows]


def spills(rows: Iterable[Resources]) -> list[str]:
    """A line for every kernel that keeps registers in memory."""
    return [
        f"{row.name} keeps registers in memory: {row.stack} bytes of stack, {row.spill_stores} bytes of spill stores and "
        f"{row.spill_loads} of spill loads; it needs fewer than {row.registers} registers at a time"
        for row in in_order(rows)
        if row.stack or row.spill_stores or row.spill_loads
    ]


def compare(rows: list[Resources], nvcc_version: str, record: str) -> tuple[list[str], list[str]]:
    """Rows against the recorded ones.

    Returns:
        What fails the build, and what is only worth saying. Registers are nvcc's choice: another version of it may take more.
    """
    recorded_version, recorded = read_table(record)
    before = {row.name: row for row in recorded}
    errors, remarks = spills(rows), []
    if missing := sorted(set(before) - {row.name for row in rows}):
        errors.append(f"recorded but not built: {', '.join(missing)}; {REMEDY}")
    if not before:
        errors.append(f"nothing is recorded; {REMEDY}")
    elif new := [row.name for row in in_order(rows) if row.name not in before]:
        errors.append(f"built but not recorded: {', '.join(new)}; {REMEDY}")
    for row in in_order(rows):
        old = before.get(row.name, row)
        if row.shared > old.shared:
            errors.append(f"{row.name} takes {row.shared} bytes of shared memory, recorded {old.shared}; {REMEDY}")
        if row.registers > old.registers and nvcc_version == recorded_version:
            errors.append(f"{row.name} takes {row.registers} registers, recorded {old.registers}; {REMEDY}")
        elif row.registers != old.registers:
            remarks.append(
                f"{row.name} takes {row.registers} registers, recorded with nvcc {recorded_version}: {old.registers}"
            )
        if row.shared < old.shared:
            remarks.append(f"{row.name} takes {row.shared} bytes of shared memory, recorded {old.shared}")
    return errors, remarks
