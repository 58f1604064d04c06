"""The typed configuration tree: declared in `tree`, read and written by `load`, checked across fields by `checks`."""

from megatron_conan.config.checks import check_config, data_parallel_size
from megatron_conan.config.load import dump_config, load_config, parse_config, resume_differences
from megatron_conan.config.tree import RunConfig

__all__ = [
    "RunConfig",
    "check_config",
    "data_parallel_size",
    "dump_config",
    "load_config",
    "parse_config",
    "resume_differences",
]
