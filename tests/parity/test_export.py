"""An exported folder, read by the stock libraries alone, gives the vectors of a plain decoder with megatron's weights."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_decoder import MAX_LENGTH, PROMPTS, PlainModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from megatron_conan.evaluation.search import SearchIndex, build_search_index
from megatron_conan.export.hf import ExportReport, ExportSettings, export_sentence_transformer, verify_export
from megatron_conan.export.mapping import PROJECTION, to_hf

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
texts, prompt_name, batch_size = json.loads(request)
model = SentenceTransformer(folder, device="cpu")
ids = [model.tokenizer(model.prompts[prompt_name] + t, truncation=True)["input_ids"] for t in texts]
vectors = model.encode(texts, prompt_name=prompt_name, batch_size=batch_size)
print("RESULT" + json.dumps([ids, vectors.tolist()]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PlainModel:
    return PlainModel(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def projected(tmp_path_factory: pytest.TempPathFactory) -> PlainModel:
    return PlainModel(tmp_path_factory.mktemp("projected"), projection_dim=24)


def export(model: PlainModel, settings: ExportSettings, folder: Path, texts: list[str] = TEXTS) -> ExportReport:
    return export_sentence_transformer(
        model.weights, model.shape, settings, folder, verify_texts=texts, reference=model.reference(settings)
    )


def load_with_stock_libraries(
    folder: Path, texts: list[str], prompt_name: str, batch_size: int
) -> tuple[list[list[int]], np.ndarray]:
    done = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_LOADER, str(folder), json.dumps([texts, prompt_name, batch_size])],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ids, vectors = json.loads(done.stdout.split("RESULT")[1])
    return ids, np.array(vectors)


@pytest.mark.parametrize(
    ("alpha", "pooling", "prompt"), [(1.0, "mean", "document"), (0.0, "last", "query"), (1.0, "weighted_mean", "sts")]
)
def test_stock_libraries_give_the_decoders_vectors(
    projected: PlainModel, tmp_path: Path, alpha: float, pooling: str, prompt: str
) -> None:
    """fp32 against fp64 over two layers: 1e-5 per component leaves room for rounding only."""
    settings = projected.settings(alpha=alpha, pooling=pooling, include_prompt=False)
    assert export(projected, settings, tmp_path / "export", TEXTS[:4]).min_cosine > 0.999999
    reference = projected.vectors(TEXTS, settings, prompt)
    ids, vectors = load_with_stock_libraries(tmp_path / "export", TEXTS, prompt, batch_size=4)
    assert ids == [projected.tokens(text, PROMPTS[prompt]) for text in TEXTS]
    assert max(map(len, ids)) == MAX_LENGTH
    np.testing.assert_allclose(vectors, reference, atol=1e-5)
    # the reference itself tells the two directions apart, so the comparison means something
    other = projected.vectors(TEXTS[-1:], replace(settings, alpha=1 - alpha), prompt)
    assert (other * reference[-1:]).sum() < 0.99


@pytest.mark.parametrize("with_projection", [False, True])
@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last"])
def test_every_pooling_with_every_prompt(
    model: PlainModel, projected: PlainModel, tmp_path: Path, pooling: str, include_prompt: bool, with_projection: bool
) -> None:
    """Through all ways into sentence-transformers; 1e-5 as above."""
    source = projected if with_projection else model
    settings = source.settings(pooling=pooling, include_prompt=include_prompt)
    report = export(source, settings, tmp_path / "export")
    assert report.num_parameters == sum(
        tensor.numel()
        for name, tensor in to_hf({n: t for n, t in source.weights.items() if n != PROJECTION}, source.shape).items()
    ) + (24 * 40 if with_projection else 0)
    loaded = SentenceTransformer(str(tmp_path / "export"), device="cpu")
    assert [type(module).__name__ for module in loaded] == [
        "Transformer", "Pooling", *["Dense"] * with_projection, "Normalize"
    ]  # fmt: skip
    assert loaded.get_embedding_dimension() == (24 if with_projection else 40)
    found = {
        None: [loaded.encode(TEXTS)],
        "query": [loaded.encode_query(TEXTS), loaded.encode(TEXTS, prompt_name="query")],
        "document": [loaded.encode_document(TEXTS), loaded.encode(TEXTS, prompt_name="document")],
        "sts": [loaded.encode(TEXTS, prompt_name="sts"), loaded.encode(TEXTS, prompt=PROMPTS["sts"])],
    }
    for prompt, ways in found.items():
        expected = source.vectors(TEXTS, settings, prompt)
        for vectors in ways:
            np.testing.assert_allclose(vectors, expected, atol=1e-5, err_msg=str(prompt))
    # prompts matter, and so does leaving them out of a mean
    assert (found["query"][0] * found[None][0]).sum(1).max() < 0.999
    other = source.vectors(TEXTS, replace(settings, include_prompt=not include_prompt), "query")
    assert ((other * found["query"][0]).sum(1).max() < 0.9999) == (pooling != "last")


def test_the_folder_has_the_form_that_sentence_transformers_writes(projected: PlainModel, tmp_path: Path) -> None:
    """Its own save of the loaded model changes neither modules nor prompts nor the projection."""
    export(projected, projected.settings(prompts={"sts": "Same?\n"}, truncate_dim=8), tmp_path / "export")
    SentenceTransformer(str(tmp_path / "export"), device="cpu").save(str(tmp_path / "again"))

    def read(folder: str, name: str) -> object:
        return json.loads((tmp_path / folder / name).read_text())

    for folder in ("export", "again"):
        assert [row["path"] for row in read(folder, "modules.json")] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
        top = read(folder, "config_sentence_transformers.json")
        assert top["prompts"] == {"query": "", "document": "", "sts": "Same?\n"}
        assert top["truncate_dim"] == 8
    ours, theirs = read("export", "2_Dense/config.json"), read("again", "2_Dense/config.json")
    assert ours == {key: theirs[key] for key in ("in_features", "out_features", "bias", "activation_function")}
    own, other = (load_file(tmp_path / folder / "2_Dense" / "model.safetensors") for folder in ("export", "again"))
    assert own.keys() == other.keys() == {"linear.weight"}
    assert torch.equal(own["linear.weight"], other["linear.weight"])
    assert verify_export(tmp_path / "export") > 0.999999


def test_causal_and_bidirectional_verify(model: PlainModel, tmp_path: Path) -> None:
    for alpha in (1.0, 0.0):
        assert export(model, model.settings(alpha=alpha), tmp_path / "export").min_cosine > 0.999999
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("changes", [{"alpha": 0.0}, {"prompts": {**PROMPTS, "query": "seek:\n"}}])
def test_wrong_vectors_leave_nothing_behind(model: PlainModel, tmp_path: Path, changes: dict[str, object]) -> None:
    """Another direction of attention, and another prompt."""
    with pytest.raises(RuntimeError, match=r"does not give the trained model's vectors: cosine 0\.\d+"):
        export_sentence_transformer(
            model.weights,
            model.shape,
            model.settings(),
            tmp_path / "export",
            verify_texts=TEXTS,
            reference=model.reference(model.settings(**changes)),
        )
    assert list(tmp_path.iterdir()) == []


def run_card(folder: Path) -> tuple[str, float]:
    """The card, after running its Python block; what its check prints."""
    card = (folder / "README.md").read_text()
    usage = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    command = re.search(r"^python -c .*$", card, re.MULTILINE)
    assert usage
    assert command
    exec(usage[1].replace("PATH_OF_THIS_FOLDER", str(folder)), {})
    line = command[0].replace("python", sys.executable, 1)
    done = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, check=True)
    return card, float(done.stdout)


def test_card_check_prompts_and_truncated_dimension(projected: PlainModel, tmp_path: Path) -> None:
    """The card's one line runs as printed; a damaged folder is found out by it and by verify_export."""
    folder = tmp_path / "export"
    settings = projected.settings(
        truncate_dim=16, matryoshka_dims=[24, 16, 8], include_prompt=False, max_query_length=10
    )
    export(projected, settings, folder)
    record = json.loads((folder / "verify.json").read_text())
    assert np.array(record["vectors"]).shape == (len(TEXTS), 16)
    assert {name: np.array(rows).shape for name, rows in record["vectors_by_prompt"].items()} == {
        "query": (len(TEXTS), 16),
        "sts": (len(TEXTS), 16),
    }
    assert verify_export(folder) > 0.999999
    card, printed = run_card(folder)
    assert printed > 0.99999
    assert "| embedding dimension | 16, projected from 40 |" in card
    assert "| Matryoshka sizes | 8, 16, 24 (`SentenceTransformer(..., truncate_dim=SIZE)`) |" in card
    assert "| longest query | 10 tokens in training, but 24 here" in card
    assert r"- `query`: `'find:\n'`" in card
    assert "left out of pooling, which takes sentence-transformers 5.4 or newer" in card
    for name, old, new in [
        ("config.json", '"is_causal": false', '"is_causal": true'),
        ("1_Pooling/config.json", '"include_prompt": false', '"include_prompt": true'),
        ("config_sentence_transformers.json", "Same?  ", "Same? "),
    ]:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
        with pytest.raises(RuntimeError, match="does not give the trained model's vectors"):
            verify_export(folder)
        (folder / name).write_text(text)
    assert verify_export(folder) > 0.999999


def test_a_card_without_prompts(model: PlainModel, tmp_path: Path) -> None:
    export(model, model.settings(prompts={}, max_query_length=MAX_LENGTH), tmp_path / "export")
    card = (tmp_path / "export" / "README.md").read_text()
    assert 'model.encode(["a text", "another text"])' in card
    assert "The model was trained without prompts." in card
    assert "longest query" not in card
    assert "Matryoshka" not in card


def test_shorter_sizes_are_the_trained_vectors_cut(projected: PlainModel, tmp_path: Path) -> None:
    export(projected, projected.settings(matryoshka_dims=[8]), tmp_path / "export")
    loaded = SentenceTransformer(str(tmp_path / "export"), device="cpu", truncate_dim=8)
    cut = projected.vectors(TEXTS, prompt_name="query")[:, :8]
    vectors = loaded.encode_query(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(vectors, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=3e-5)


def test_search_puts_prompts_before_questions_and_documents(projected: PlainModel, tmp_path: Path) -> None:
    """The index keeps half precision: 1e-3 of a cosine."""
    settings = projected.settings(prompts={"query": "find:\n", "document": "code\n"}, include_prompt=False)
    export(projected, settings, tmp_path / "export")
    rows = [
        {"id": f"stdlib:{i}", "title": str(i), "file": "f.py", "line": i, "text": text, "code": text, "held_out": False}
        for i, text in enumerate(TEXTS)
    ]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_search_index(tmp_path / "export", tmp_path / "documents.jsonl", tmp_path / "search")
    documents = projected.vectors(TEXTS, settings, "document")
    np.testing.assert_allclose(np.load(tmp_path / "search" / "embeddings.npy"), documents, atol=1e-3)
    found = SearchIndex(tmp_path).search("open path", raw=True, k=len(TEXTS))
    expected = projected.vectors(["open path"], settings, "query") @ documents.T
    np.testing.assert_allclose([hit.score for hit in sorted(found, key=lambda hit: hit.line)], expected[0], atol=1e-3)


def test_what_stock_models_cannot_express_is_refused(model: PlainModel, tmp_path: Path) -> None:
    def refuse(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            export(model, model.settings(**changes), tmp_path / "export")

    refuse(r"alpha=0.5: a stock Llama is causal", alpha=0.5)
    refuse(r"truncate_dim=41 must lie in 1 .. embedding dim=40", truncate_dim=41)
    refuse("pooling='max' must be one of", pooling="max")
    refuse("must be at least 2", max_seq_length=1)
    refuse(r"prompts\.query='query: ' must end in a line break", prompts={"query": "query: "})
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "thesis.txt").write_text("keep me")
    refuse("is no earlier export")
    assert (tmp_path / "export" / "thesis.txt").read_text() == "keep me"
    for shape, message in [
        (replace(model.shape, vocab_size=model.shape.vocab_size - 1), "differs from the"),
        (replace(model.shape, projection_dim=40), r"projection.weight is missing; the model shape asks for \(40, 40\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_sentence_transformer(
                model.weights,
                shape,
                model.settings(),
                tmp_path / "other",
                verify_texts=TEXTS,
                reference=model.reference(model.settings()),
            )
