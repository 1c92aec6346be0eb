"""A local sentence encoder exported to ONNX gives the vectors torch gives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from onesearch.embedder import OnnxEmbedder, open_embedder
from onesearch.errors import BundleError, ConfigError
from training.sentence_encoder import export_sentence_encoder

TEXTS = ["red shoes", "a much longer text about red shoes and a lamp with a very long tail", "", "Lamp"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def tiny_encoder(folder: Path) -> tuple[BertModel, PreTrainedTokenizerFast]:
    """A random two-layer BERT with a character vocabulary, saved as sentence-transformers does."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz"])}
    vocab |= {f"##{c}": len(vocab) + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz")}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=len(vocab), max_position_embeddings=32, **sizes)).eval()
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return model, fast


def torch_vectors(model: BertModel, tokenizer: PreTrainedTokenizerFast, pooling: str) -> np.ndarray:
    rows = []
    for text in TEXTS:
        inputs = tokenizer(text.lower(), return_tensors="pt", truncation=True, max_length=32)
        with torch.no_grad():
            hidden = model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[0]
        rows.append(hidden[0] if pooling == "cls" else hidden.mean(dim=0))
    return torch.nn.functional.normalize(torch.stack(rows)).numpy()


@pytest.mark.slow
def test_an_exported_encoder_gives_the_vectors_of_torch(tmp_path: Path) -> None:
    model, tokenizer = tiny_encoder(tmp_path / "source")
    embedder = export_sentence_encoder(tmp_path / "source", tmp_path / "embedder")
    assert (embedder.dim, embedder.embed([]).shape) == (16, (0, 16))
    np.testing.assert_allclose(embedder.embed(TEXTS), torch_vectors(model, tokenizer, "cls"), atol=1e-5)
    np.testing.assert_allclose(embedder.embed(TEXTS[3:]), embedder.embed(TEXTS)[3:], atol=1e-5)

    config = json.loads((tmp_path / "embedder" / "config.json").read_text())
    mean = OnnxEmbedder(tmp_path / "embedder", config | {"pooling": "mean"})
    np.testing.assert_allclose(mean.embed(TEXTS), torch_vectors(model, tokenizer, "mean"), atol=1e-5)
    mean.save(tmp_path / "copy")
    np.testing.assert_array_equal(open_embedder(tmp_path / "copy").embed(TEXTS), mean.embed(TEXTS))

    (tmp_path / "copy" / "embedder.onnx").write_bytes(b"junk")
    with pytest.raises(BundleError, match="damaged"):
        open_embedder(tmp_path / "copy")


def test_all_faults_of_an_encoder_folder_are_listed(tmp_path: Path) -> None:
    config = {"kind": "onnx", "version": 1, "dim": 0, "pooling": "max", "max_length": 8, "prefix": ""}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BundleError) as raised:
        open_embedder(tmp_path)
    assert [fault.split(":")[0] for fault in raised.value.faults] == [
        "dim",
        "pooling",
        "embedder.onnx",
        "tokenizer.json",
    ]


def test_another_pooling_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be loaded"):
        export_sentence_encoder(tmp_path, tmp_path / "out")
    tiny_encoder(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens"):
        export_sentence_encoder(tmp_path, tmp_path / "out")
