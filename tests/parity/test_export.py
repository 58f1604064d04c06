"""An exported folder, read by the stock libraries alone, gives the vectors of a plain decoder with megatron's weights."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from torch.nn.functional import rms_norm, silu

from megatron_conan.export.hf import ExportSettings, export_sentence_transformer, verify_export
from megatron_conan.export.mapping import EMBEDDING, ModelShape, iterate_rules, to_hf

MAX_LENGTH = 24
CORPUS = ["The quick brown fox jumps over the lazy dog.", "def read(path):\n    return open(path).read()",
          "Ein schöner Tag in München", "今天天气很好", "Numbers 0123456789, and    runs of    spaces\tand tabs"]
TEXTS = ["fox", "", "the quick brown fox jumps", "def f(x):\n    return x", "Straße </s> 天气 🎉", "a  b ", " lead",
         "the lazy dog jumps over the quick brown fox and over the lazy dog again and again until the text is too long",
         "The quick brown fox jumps over the lazy dog"]

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


def make_weights(shape: ModelShape, padding_rows: int) -> dict[str, torch.Tensor]:
    """Random fp64 weights under megatron names, wide enough that position and direction matter to the vectors."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for rule in iterate_rules(shape.num_layers):
        size = rule.shape(shape)
        drawn = torch.randn(size, generator=generator, dtype=torch.float64)
        weights[rule.megatron] = 1 + 0.2 * drawn if len(size) == 1 else 2.5 * drawn / math.sqrt(size[-1])
    padding = torch.full((padding_rows, shape.hidden_size), 5.0, dtype=torch.float64)
    weights[EMBEDDING] = torch.cat([weights[EMBEDDING], padding])
    return weights


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """NeoX rotary embedding of [s, n, d]: dimension i turns together with i + d/2."""
    s, _, d = x.shape
    angle = torch.arange(s, dtype=torch.float64)[:, None] * base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = x[..., :d // 2], x[..., d // 2:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


def attend(x: torch.Tensor, qkv: torch.Tensor, shape: ModelShape, bidirectional: bool) -> torch.Tensor:
    """Attention of one sequence [s, h] -> [s, n * d], one head at a time, straight from the rows of linear_qkv."""
    d, groups = shape.kv_channels, shape.num_query_groups
    per_group = shape.num_attention_heads // groups
    mixed = (x @ qkv.T).reshape(len(x), groups, per_group + 2, d)
    mask = torch.zeros(len(x), len(x), dtype=torch.float64)
    if not bidirectional:
        mask = mask.masked_fill(torch.ones_like(mask, dtype=torch.bool).triu(1), -math.inf)
    heads = []
    for group in range(groups):
        key = rotate(mixed[:, group, per_group:per_group + 1], shape.rotary_base)[:, 0]
        value = mixed[:, group, per_group + 1]
        for head in range(per_group):
            query = rotate(mixed[:, group, head:head + 1], shape.rotary_base)[:, 0]
            heads.append((query @ key.T / math.sqrt(d) + mask).softmax(dim=-1) @ value)
    return torch.cat(heads, dim=-1)


def embed(ids: list[int], weights: dict[str, torch.Tensor], shape: ModelShape, bidirectional: bool,
          pooling: str) -> np.ndarray:
    """One sequence through a plain pre-norm decoder in fp64, pooled and normalised -> [h]."""
    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return rms_norm(x, (shape.hidden_size,), weights[name], shape.norm_epsilon)

    x = weights[EMBEDDING][torch.tensor(ids)]
    for layer in range(shape.num_layers):
        name = f"decoder.layers.{layer}."
        attended = attend(norm(x, name + "input_layernorm.weight"), weights[name + "self_attention.linear_qkv.weight"],
                          shape, bidirectional)
        x = x + attended @ weights[name + "self_attention.linear_proj.weight"].T
        hidden = norm(x, name + "pre_mlp_layernorm.weight") @ weights[name + "mlp.linear_fc1.weight"].T
        gate, up = hidden[:, :shape.ffn_hidden_size], hidden[:, shape.ffn_hidden_size:]
        x = x + (silu(gate) * up) @ weights[name + "mlp.linear_fc2.weight"].T
    x = norm(x, "decoder.final_layernorm.weight")
    pooled = x[-1] if pooling == "last" else x.mean(dim=0)
    return (pooled / pooled.norm()).numpy()


class Setup:
    """A tokenizer, a model shape with random weights, and the plain decoder's vectors of texts."""

    def __init__(self, folder: Path) -> None:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_prefix=str(folder / "bpe"), model_type="bpe", vocab_size=400,
            hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3, normalization_rule_name="identity",
            add_dummy_prefix=False, remove_extra_whitespaces=False, byte_fallback=True, split_digits=True,
            minloglevel=2)
        self.tokenizer_path = folder / "bpe.model"
        self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(self.tokenizer_path))
        self.shape = ModelShape(num_layers=2, hidden_size=40, num_attention_heads=4, num_query_groups=2, kv_channels=12,
                                ffn_hidden_size=56, vocab_size=self.pieces.vocab_size(), rotary_base=500.0,
                                norm_epsilon=1e-4)
        self.weights = make_weights(self.shape, padding_rows=13)

    def settings(self, **changes: object) -> ExportSettings:
        settings = ExportSettings(tokenizer_path=self.tokenizer_path, alpha=1.0, pooling="mean",
                                  max_seq_length=MAX_LENGTH, prompts={"query": "query: ", "document": ""})
        return replace(settings, **changes)  # type: ignore[arg-type]

    def tokens(self, text: str) -> list[int]:
        """The rule of training: cut to max_length - 1 tokens, then EOS."""
        return [*self.pieces.encode(text)[:MAX_LENGTH - 1], self.pieces.eos_id()]

    def vectors(self, texts: list[str], bidirectional: bool = True, pooling: str = "mean") -> np.ndarray:
        return np.stack([embed(self.tokens(text), self.weights, self.shape, bidirectional, pooling) for text in texts])


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("model"))


def load_with_stock_libraries(folder: Path, texts: list[str], batch_size: int) -> tuple[list[list[int]], np.ndarray]:
    done = subprocess.run([sys.executable, "-I", "-c", STOCK_LOADER, str(folder), json.dumps([texts, batch_size])],
                          capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    ids, vectors = json.loads(done.stdout.split("RESULT")[1])
    return ids, np.array(vectors)


@pytest.mark.parametrize(("alpha", "pooling"), [(1.0, "mean"), (0.0, "last")])
def test_stock_libraries_give_the_decoders_vectors(setup: Setup, tmp_path: Path, alpha: float, pooling: str) -> None:
    """fp32 against fp64 over two layers: 1e-5 per component leaves room for rounding only."""
    reference = setup.vectors(TEXTS, bool(alpha), pooling)
    report = export_sentence_transformer(
        setup.weights, setup.shape, setup.settings(alpha=alpha, pooling=pooling), tmp_path / "export",
        verify_texts=TEXTS[:4], reference=reference[:4])
    assert report.min_cosine > 0.999999
    ids, vectors = load_with_stock_libraries(tmp_path / "export", TEXTS, batch_size=4)
    assert ids == [setup.tokens(text) for text in TEXTS]
    assert max(map(len, ids)) == MAX_LENGTH
    np.testing.assert_allclose(vectors, reference, atol=1e-5)
    # the reference itself tells the two directions apart, so the comparison means something
    other = setup.vectors(TEXTS[-1:], not alpha, pooling)
    assert (other * reference[-1:]).sum() < 0.99


def test_all_four_combinations_verify(setup: Setup, tmp_path: Path) -> None:
    for alpha, pooling in [(1.0, "last"), (0.0, "mean")]:
        report = export_sentence_transformer(
            setup.weights, setup.shape, setup.settings(alpha=alpha, pooling=pooling), tmp_path / "export",
            verify_texts=TEXTS, reference=lambda texts, a=alpha, p=pooling: setup.vectors(texts, bool(a), p))
        assert report.min_cosine > 0.999999
        assert report.num_parameters == sum(tensor.numel() for tensor in to_hf(setup.weights, setup.shape).values())
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_wrong_vectors_leave_nothing_behind(setup: Setup, tmp_path: Path) -> None:
    causal = setup.vectors(TEXTS, bidirectional=False)
    with pytest.raises(RuntimeError, match=r"does not give the trained model's vectors: cosine 0\.\d+"):
        export_sentence_transformer(setup.weights, setup.shape, setup.settings(), tmp_path / "export",
                                    verify_texts=TEXTS, reference=causal)
    assert list(tmp_path.iterdir()) == []


def test_card_check_prompts_and_truncated_dimension(setup: Setup, tmp_path: Path) -> None:
    """The card's one line runs as printed; a damaged folder is found out by it and by verify_export."""
    export_sentence_transformer(setup.weights, setup.shape, setup.settings(truncate_dim=16), tmp_path / "export",
                                verify_texts=TEXTS, reference=setup.vectors)
    record = json.loads((tmp_path / "export" / "verify.json").read_text())
    assert np.array(record["vectors"]).shape == (len(TEXTS), 16)
    assert json.loads((tmp_path / "export" / "config_sentence_transformers.json").read_text())["prompts"]["query"] == "query: "
    assert verify_export(tmp_path / "export") > 0.999999
    card = (tmp_path / "export" / "README.md").read_text()
    command = re.search(r"^python -c .*$", card, re.MULTILINE)
    assert command
    line = command[0].replace("python", sys.executable, 1)
    printed = subprocess.run(line, shell=True, cwd=tmp_path / "export", capture_output=True, text=True, check=True).stdout
    assert float(printed) > 0.99999
    config_file = tmp_path / "export" / "config.json"
    config_file.write_text(config_file.read_text().replace('"is_causal": false', '"is_causal": true'))
    with pytest.raises(RuntimeError, match="does not give the trained model's vectors"):
        verify_export(tmp_path / "export")


def test_what_stock_models_cannot_express_is_refused(setup: Setup, tmp_path: Path) -> None:
    def export(**changes: object) -> None:
        export_sentence_transformer(setup.weights, setup.shape, setup.settings(**changes), tmp_path / "export",
                                    verify_texts=TEXTS, reference=setup.vectors)

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
    other = replace(setup.shape, vocab_size=setup.shape.vocab_size - 1)
    with pytest.raises(ValueError, match="differs from the"):
        export_sentence_transformer(setup.weights, other, setup.settings(), tmp_path / "other", verify_texts=TEXTS,
                                    reference=setup.vectors)
