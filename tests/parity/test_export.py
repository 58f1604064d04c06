"""An exported folder, read by the stock libraries alone, gives the vectors of a plain decoder with megatron's weights."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from plain_decoder import MAX_LENGTH, PlainModel

from megatron_conan.export.hf import export_sentence_transformer, verify_export
from megatron_conan.export.mapping import to_hf

TEXTS = [
    "fox",
    "",
    "the quick brown fox jumps",
    "def f(x):\n    return x",
    "Straße </s> 天气 🎉",
    "a  b ",
    " lead",
    "the lazy dog jumps over the quick brown fox and over the lazy dog again and again until the text is too long",
    "The quick brown fox jumps over the lazy dog",
]

# Runs in a process of its own (python -I), where importing megatron_conan or megatron fails.
STOCK_LOADER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_conan", "megatron"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocker())
try:
    import megatron_conan
except ImportError:
    pass
else:
    raise SystemExit("megatron_conan could be imported")
import json
from sentence_transformers import SentenceTransformer
folder, request = sys.argv[1:]
texts, batch_size = json.loads(request)
model = SentenceTransformer(folder, device="cpu")
ids = [model.tokenizer(t, truncation=True)["input_ids"] for t in texts]
print("RESULT" + json.dumps([ids, model.encode(texts, batch_size=batch_size).tolist()]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PlainModel:
    return PlainModel(tmp_path_factory.mktemp("model"))


def load_with_stock_libraries(folder: Path, texts: list[str], batch_size: int) -> tuple[list[list[int]], np.ndarray]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_LOADER, str(folder), json.dumps([texts, batch_size])],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ids, vectors = json.loads(done.stdout.split("RESULT")[1])
    return ids, np.array(vectors)


@pytest.mark.parametrize(("alpha", "pooling"), [(1.0, "mean"), (0.0, "last")])
def test_stock_libraries_give_the_decoders_vectors(
    model: PlainModel, tmp_path: Path, alpha: float, pooling: str
) -> None:
    """fp32 against fp64 over two layers: 1e-5 per component leaves room for rounding only."""
    reference = model.vectors(TEXTS, bool(alpha), pooling)
    report = export_sentence_transformer(
        model.weights,
        model.shape,
        model.settings(alpha=alpha, pooling=pooling),
        tmp_path / "export",
        verify_texts=TEXTS[:4],
        reference=reference[:4],
    )
    assert report.min_cosine > 0.999999
    ids, vectors = load_with_stock_libraries(tmp_path / "export", TEXTS, batch_size=4)
    assert ids == [model.tokens(text) for text in TEXTS]
    assert max(map(len, ids)) == MAX_LENGTH
    np.testing.assert_allclose(vectors, reference, atol=1e-5)
    # the reference itself tells the two directions apart, so the comparison means something
    other = model.vectors(TEXTS[-1:], not alpha, pooling)
    assert (other * reference[-1:]).sum() < 0.99


def test_all_four_combinations_verify(model: PlainModel, tmp_path: Path) -> None:
    for alpha, pooling in [(1.0, "last"), (0.0, "mean")]:
        report = export_sentence_transformer(
            model.weights,
            model.shape,
            model.settings(alpha=alpha, pooling=pooling),
            tmp_path / "export",
            verify_texts=TEXTS,
            reference=lambda texts, a=alpha, p=pooling: model.vectors(texts, bool(a), p),
        )
        assert report.min_cosine > 0.999999
        assert report.num_parameters == sum(tensor.numel() for tensor in to_hf(model.weights, model.shape).values())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_wrong_vectors_leave_nothing_behind(model: PlainModel, tmp_path: Path) -> None:
    causal = model.vectors(TEXTS, bidirectional=False)
    with pytest.raises(RuntimeError, match=r"does not give the trained model's vectors: cosine 0\.\d+"):
        export_sentence_transformer(
            model.weights, model.shape, model.settings(), tmp_path / "export", verify_texts=TEXTS, reference=causal
        )
    assert list(tmp_path.iterdir()) == []


def test_card_check_prompts_and_truncated_dimension(model: PlainModel, tmp_path: Path) -> None:
    """The card's one line runs as printed; a damaged folder is found out by it and by verify_export."""
    export_sentence_transformer(
        model.weights,
        model.shape,
        model.settings(truncate_dim=16),
        tmp_path / "export",
        verify_texts=TEXTS,
        reference=model.vectors,
    )
    record = json.loads((tmp_path / "export" / "verify.json").read_text())
    assert np.array(record["vectors"]).shape == (len(TEXTS), 16)
    assert (
        json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())["prompts"]["query"]
        == "query: "
    )
    assert verify_export(tmp_path / "export") > 0.999999
    card = (tmp_path / "export" / "README.md").read_text()
    command = re.search(r"^python -c .*$", card, re.MULTILINE)
    assert command
    line = command[0].replace("python", sys.executable, 1)
    printed = subprocess.run(
        line, shell=True, cwd=tmp_path / "export", capture_output=True, text=True, check=True
    ).stdout
    assert float(printed) > 0.99999
    config_file = tmp_path / "export" / "config.json"
    config_file.write_text(config_file.read_text().replace('"is_causal": false', '"is_causal": true'))
    with pytest.raises(RuntimeError, match="does not give the trained model's vectors"):
        verify_export(tmp_path / "export")


def test_what_stock_models_cannot_express_is_refused(model: PlainModel, tmp_path: Path) -> None:
    def export(**changes: object) -> None:
        export_sentence_transformer(
            model.weights,
            model.shape,
            model.settings(**changes),
            tmp_path / "export",
            verify_texts=TEXTS,
            reference=model.vectors,
        )

    with pytest.raises(ValueError, match=r"alpha=0.5: a stock Llama is causal"):
        export(alpha=0.5)
    with pytest.raises(ValueError, match=r"truncate_dim=41 must lie in 1 .. hidden_size=40"):
        export(truncate_dim=41)
    with pytest.raises(ValueError, match="pooling='max' must be one of"):
        export(pooling="max")
    with pytest.raises(ValueError, match="must be at least 2"):
        export(max_seq_length=1)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.txt").write_text("keep me")
    with pytest.raises(ValueError, match="is no earlier export"):
        export()
    assert (tmp_path / "export" / "thesis.txt").read_text() == "keep me"
    other = replace(model.shape, vocab_size=model.shape.vocab_size - 1)
    with pytest.raises(ValueError, match="differs from the"):
        export_sentence_transformer(
            model.weights, other, model.settings(), tmp_path / "other", verify_texts=TEXTS, reference=model.vectors
        )
