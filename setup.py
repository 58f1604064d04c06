"""Packaging. `kernels/` is installed as `megatron_conan.kernels`: a top-level `kernels` would shadow Hugging Face's package."""

from pathlib import Path

from setuptools import Distribution, setup

HERE = Path(__file__).parent
PACKAGES = [
    "megatron_conan",
    *(".".join(p.parent.relative_to(HERE).parts) for p in sorted((HERE / "megatron_conan").glob("*/__init__.py"))),
]
KERNELS = [
    ".".join(("megatron_conan", *p.parent.relative_to(HERE).parts))
    for p in sorted((HERE / "kernels").rglob("__init__.py"))
]
LIBRARY = "libsoft_mask_attention"
KERNEL_FILES = {
    "megatron_conan.kernels.soft_mask_attention": ["csrc/*", "resources.txt", f"{LIBRARY}.so", f"{LIBRARY}.json"],
    "megatron_conan.kernels.soft_mask_attention.emulate": ["*.h", "*.cpp"],
}
"""Sources, and the library where it is built: `make kernels`."""
BUILT = (HERE / "kernels" / "soft_mask_attention" / f"{LIBRARY}.so").exists()


class BuiltDistribution(Distribution):
    """A wheel with the compiled library is of one platform."""

    def has_ext_modules(self) -> bool:
        return BUILT


setup(
    name="megatron_conan",
    version="0.1.0",
    description="Train text-embedding language models from scratch on a GPU cluster (Conan-embedding-v2)",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=PACKAGES + KERNELS,
    package_dir={"megatron_conan.kernels": "kernels"},
    package_data=KERNEL_FILES,
    distclass=BuiltDistribution,
    install_requires=[
        "torch>=2.11",
        "megatron-core==0.16.1",
        "numpy>=1.26",
        "sentencepiece>=0.2",
        "pydantic>=2.7",
        "pyyaml>=6",
        "tensorboard>=2.16",
        "psutil>=5.9",  # megatron-core's checkpointing hangs without it and does not declare it
        "tqdm>=4.66",
        "mteb>=2.26,<3",
        "pyarrow>=15",  # parquet and zstd
        "sentence-transformers>=5",
        "transformers>=5",  # older versions silently ignore `is_causal=False` in a Llama config
        "safetensors>=0.4",
        "bm25s>=0.3",
        "PyStemmer>=2.2",
    ],
    extras_require={
        "cpu": ["faiss-cpu>=1.12"],
        "gpu": ["faiss-gpu>=1.12", "transformer-engine[pytorch]==2.11.0"],
        "dev": ["pytest>=8", "hypothesis>=6", "ruff>=0.12", "mypy>=1.11", "types-PyYAML"],
    },
    entry_points={"console_scripts": ["conan = megatron_conan.cli:main"]},
)
