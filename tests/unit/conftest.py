"""A small tokenizer that tests of one run share."""

import pytest
from sample_texts import DOCUMENTS

from megatron_conan.data.tokenizer import Tokenizer
from megatron_conan.data.tokenizer_training import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real tokenizer, 600 pieces, trained on the sample texts."""
    path = tmp_path_factory.mktemp("tokenizer") / "sample.model"
    path.write_bytes(train_tokenizer(DOCUMENTS, 600))
    return Tokenizer(path)
