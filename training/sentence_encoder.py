"""Bring your own sentence encoder: a local sentence-transformers or BGE folder becomes an `OnnxEmbedder` folder."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from onesearch.arrays import write_atomically
from onesearch.embedder import FORMAT_VERSION, OnnxEmbedder
from onesearch.errors import ConfigError

_POOLING = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}


class _Hidden(nn.Module):
    """The encoder with one tensor out; sentence encoders see a single segment, so token types are zeros."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden


def export_sentence_encoder(folder: Path, directory: Path, prefix: str = "") -> OnnxEmbedder:
    """Write `embedder.onnx`, `tokenizer.json` and `config.json` to `directory` and open them.

    Pooling and the longest input are read from `1_Pooling/config.json` and `sentence_bert_config.json` where
    present; else the first token and the model's own limit. `prefix` is put before every text, queries and items
    alike. Raises ConfigError when the folder is no encoder or pools in another way.
    """
    try:
        encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"sentence encoder {folder}: cannot be loaded: {error}") from error
    limit = _settings(folder / "sentence_bert_config.json").get("max_seq_length")
    config = {
        "kind": "onnx",
        "version": FORMAT_VERSION,
        "dim": encoder.config.hidden_size,
        "pooling": _pooling(folder),
        "max_length": int(limit or encoder.config.max_position_embeddings),
        "prefix": prefix,
    }
    directory.mkdir(parents=True, exist_ok=True)
    _export(_Hidden(encoder), directory / "embedder.onnx")
    write_atomically(directory / "tokenizer.json", tokenizer.backend_tokenizer.to_str().encode())
    write_atomically(directory / "config.json", json.dumps(config, indent=2).encode())
    return OnnxEmbedder(directory, config)


def _export(module: nn.Module, path: Path) -> None:
    ids = torch.ones(2, 8, dtype=torch.int64)
    axes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own internals
        torch.onnx.export(
            module.eval(),
            (ids, torch.ones_like(ids)),
            str(path),
            dynamo=True,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_shapes=(axes, axes),
            external_data=False,
            verbose=False,
        )


def _pooling(folder: Path) -> str:
    settings = _settings(folder / "1_Pooling" / "config.json")
    chosen = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    if not settings:
        return "cls"
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        raise ConfigError(f"sentence encoder {folder}: pooling {chosen}, expected one of {sorted(_POOLING)}")
    return _POOLING[chosen[0]]


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    settings = json.loads(path.read_bytes())
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: {type(settings).__name__}, expected an object")
    return settings
