"""The compiled library of the attention kernels, as far as it can be looked at without a GPU: `make kernels` builds it."""

import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_conan.kernels.soft_mask_attention import build, library, resources
from megatron_conan.kernels.soft_mask_attention.op import library_error

PTX, ELF = 1, 2


@pytest.fixture(scope="module", autouse=True)
def built_library() -> Path:
    if library.read_stamp(library.LIBRARY).get("sources") != library.source_digest(library.SOURCES):
        pytest.skip("the kernels aren't built from the sources that are here: run make kernels")
    return library.LIBRARY


def call_cuda(*operands: Any) -> Any:
    """The operator's CUDA implementation, whatever device the tensors are on."""
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return torch.ops.megatron_conan.soft_mask_attention.default.redispatch(key, *operands)


def operands(**changes: Any) -> list[Any]:
    """What the kernel takes, but for its device: q, k, v, alpha, lengths, cu_seqlens, max_length, form, scale."""
    heads = {"q": 4, "k": 2, "v": 2}
    rows = (7,) if changes.get("cu_seqlens") is not None else (2, 7)
    tensors: dict[str, Any] = {name: torch.zeros(*rows, n, 64, dtype=torch.bfloat16) for name, n in heads.items()}
    rest = {
        "alpha": torch.tensor(0.3),
        "lengths": None,
        "cu_seqlens": None,
        "max_length": 7,
        "form": "row",
        "scale": 0.125,
    }
    return list({**tensors, **rest, **changes}.values())


def test_it_loads():
    assert library_error() is None
    assert torch._C._dispatch_has_kernel_for_dispatch_key("megatron_conan::soft_mask_attention", "CUDA")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lengths": torch.tensor([7, 3], dtype=torch.int32)},
        {"cu_seqlens": torch.tensor([0, 2, 7], dtype=torch.int32)},
        {"alpha": torch.linspace(0, 1, 4), "form": "constant"},
        {"form": "column"},
    ],
)
def test_what_the_kernel_takes_passes_all_checks_but_that_of_the_device(changes):
    """Schema and compiled code agree on every argument."""
    assert library_error() is None
    with pytest.raises(RuntimeError, match="soft_mask_attention: q is not on a CUDA device"):
        call_cuda(*operands(**changes))


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16)


INT = torch.int32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 7, 4, 64)}, "q has dtype Float; the kernel is built for BFloat16 and Half: convert"),
        ({"k": bf16(2, 7, 2, 64).half()}, "k has dtype Half, q BFloat16: convert the one with .to()"),
        (
            {"q": bf16(14, 4, 64)},
            "q has shape [14, 4, 64]; without cu_seqlens it is [batch, sequence, heads, head dim]",
        ),
        ({"v": bf16(2, 6, 2, 64)}, "v has shape [2, 6, 2, 64], k [2, 7, 2, 64], q [2, 7, 4, 64]: k is as v"),
        ({"v": bf16(2, 7, 1, 64)}, "v has shape [2, 7, 1, 64], k [2, 7, 2, 64]"),
        (
            {"k": bf16(2, 7, 256).as_strided((2, 7, 2, 64), (7 * 256, 256, 113, 1))},
            "k has stride 113 in its heads dim; the kernel copies 16 bytes at a time and needs multiples of 8: call .cont",
        ),
        ({"k": bf16(2, 7, 64, 2).mT}, "k has stride 2 in its head dim; the kernel needs 1: call .contiguous()"),
        ({"v": bf16(2 * 7 * 2 * 64 + 1)[1:].view(2, 7, 2, 64)}, "v begins 2 bytes behind a multiple of 16"),
        (
            {"q": bf16(2, 7, 4, 96), "k": bf16(2, 7, 2, 96), "v": bf16(2, 7, 2, 96)},
            "head dim 96 is not built; built are 64, 112, 128",
        ),
        ({"q": bf16(2, 7, 3, 64)}, "q has 3 heads and k 2: the first must be a multiple of the second"),
        ({"alpha": torch.tensor(0.3).double()}, "alpha has dtype Double; the kernel reads Float"),
        (
            {"alpha": torch.linspace(0, 1, 4)},
            "alpha has shape [4]; it is one number or, in the constant form, one a head: 4",
        ),
        ({"lengths": torch.tensor([7, 3])}, "lengths has dtype Long; the kernel reads Int"),
        ({"lengths": torch.tensor([7, 3, 3], dtype=INT)}, "lengths has shape [3] for a batch of 2"),
        ({"lengths": torch.tensor([7, 0, 3, 0], dtype=INT)[::2]}, "lengths is not contiguous: call .contiguous()"),
        ({"cu_seqlens": torch.tensor(0, dtype=INT)}, "cu_seqlens has shape []; it is [sequences + 1]"),
        (
            {"cu_seqlens": torch.tensor([0, 7], dtype=INT), "lengths": torch.tensor([7], dtype=INT)},
            "lengths and cu_seqlens are both given",
        ),
        ({"form": "diagonal"}, "form diagonal is unknown; known are row, column, constant"),
        ({"scale": 0.0}, "scale is 0; it must be positive and finite"),
    ],
)
def test_what_would_read_wrong_memory_is_refused_in_words(changes, message):
    assert library_error() is None
    with pytest.raises(RuntimeError, match=re.escape(f"soft_mask_attention: {message}")):
        call_cuda(*operands(**changes))


def test_strides_of_dims_of_one_do_not_matter():
    assert library_error() is None
    one = bf16(1, 7, 1, 64).as_strided((1, 7, 1, 64), (3, 64, 5, 1))
    with pytest.raises(RuntimeError, match="q is not on a CUDA device"):
        call_cuda(*operands(q=one, k=one, v=one))


def fatbin_entries(data: bytes) -> Iterator[tuple[int, int]]:
    """Kind and architecture of all device code of a host binary, by the headers that the CUDA runtime reads."""
    for start in (match.start() for match in re.finditer(b"\x50\xed\x55\xba\x01\x00\x10\x00", data)):
        header, size = struct.unpack_from("<HQ", data, start + 6)
        place, end = start + header, start + header + size
        while place < end:
            kind, entry_header, entry_size = struct.unpack_from("<HxxIQ", data, place)
            (arch,) = struct.unpack_from("<I", data, place + 28)
            yield kind, arch
            place += entry_header + entry_size


def test_code_of_both_architectures_and_ptx_for_newer_ones_is_inside(built_library):
    found = list(fatbin_entries(built_library.read_bytes()))
    num_instances = len(build.ELEMENTS) * len(build.HEAD_DIMS)
    for code in ((ELF, 80), (ELF, 90), (PTX, 90)):
        assert found.count(code) == num_instances


def symbols(file: Path, *options: str) -> set[str]:
    """Names of a library's dynamic symbols, without versions."""
    listed = subprocess.run(["nm", "-D", *options, str(file)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in listed.splitlines()}


def test_it_needs_libtorch_and_the_c_libraries_alone(built_library):
    lines = subprocess.run(["readelf", "-d", str(built_library)], capture_output=True, text=True, check=True).stdout
    needed = {name.split(".")[0] for name in re.findall(r"NEEDED.*\[(.+)\]", lines)}
    assert needed <= {"libtorch", "libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64", "ld-linux-aarch64"}
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(built_library)], capture_output=True, text=True, check=True
    ).stdout
    # a version (name@GLIBC_2.2.5) marks what the system's libraries have; `w` is weak, of CUDA builds of torch only
    missing = {line.split()[-1] for line in listed.splitlines() if " U " in line and "@" not in line}
    assert missing <= symbols(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", "--defined-only")
    assert not {name for name in symbols(built_library) if name.startswith("cuda") or "cudart" in name}


def test_the_record_has_every_instance_and_no_spill():
    _, rows = resources.read_table(resources.RECORD.read_text(encoding="utf-8"))
    expected = {
        f"forward {element} d{head_dim} {form} {arch}"
        for element in build.ELEMENTS
        for head_dim in build.HEAD_DIMS
        for form in ("rows", "columns")
        for arch in build.ARCHITECTURES
    }
    assert {row.name for row in rows} == expected
    assert not resources.spills(rows)
    assert all(0 < row.registers <= 255 and 0 < row.shared <= 163 * 1024 for row in rows)


def test_importing_the_operator_does_not_load_it():
    code = (
        "import megatron_conan.kernels.soft_mask_attention.op, sys\n"
        "print('libsoft_mask_attention' in open('/proc/self/maps').read())\n"
    )
    said = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
