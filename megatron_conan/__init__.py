"""megatron_conan: train text-embedding language models from scratch on a GPU cluster (Conan-embedding-v2)."""

__version__ = "0.1.0"
