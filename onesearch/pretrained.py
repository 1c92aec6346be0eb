"""Starting from a local `transformers` folder: its tokenizer with our tokens appended, its weights with rows added."""

from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer

from onesearch.errors import ConfigError
from onesearch.model import OneSearchModel
from onesearch.model_config import BackboneName, ModelConfig
from onesearch.sequence import CONTROL_TOKENS, UID_TOKEN, Renderer, add_sid_tokens
from onesearch.sid import SidSpec

# What each network's own configuration calls our shape, and what it must agree on because the shape cannot say it.
_SHAPES: dict[BackboneName, dict[str, str]] = {
    "bart": {
        "d_model": "d_model",
        "encoder_layers": "encoder_layers",
        "decoder_layers": "decoder_layers",
        "heads": "encoder_attention_heads",
        "ffn": "encoder_ffn_dim",
        "max_positions": "max_position_embeddings",
    },
    "gpt2": {"d_model": "n_embd", "decoder_layers": "n_layer", "heads": "n_head", "max_positions": "n_positions"},
    "qwen3": {
        "d_model": "hidden_size",
        "decoder_layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "ffn": "intermediate_size",
        "max_positions": "max_position_embeddings",
    },
}
_AGREED: dict[BackboneName, tuple[str, ...]] = {
    "bart": ("decoder_attention_heads", "decoder_ffn_dim", "activation_function", "scale_embedding"),
    "gpt2": (
        *("activation_function", "layer_norm_epsilon", "scale_attn_weights"),
        *("scale_attn_by_inverse_layer_idx", "add_cross_attention", "tie_word_embeddings"),
    ),
    "qwen3": (
        *("hidden_act", "rms_norm_eps", "rope_parameters", "attention_bias", "layer_types"),
        "tie_word_embeddings",
    ),
}
_CONTROL = (*CONTROL_TOKENS, UID_TOKEN)


def extended_tokenizer(folder: Path, spec: SidSpec) -> Tokenizer:
    """The tokenizer of a folder with control tokens (not split, not special) and SID tokens appended.

    Raises ConfigError when the folder has no fast tokenizer.
    """
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"checkpoint {folder}: no tokenizer that can be read ({error})") from error
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in _CONTROL])
    add_sid_tokens(tokenizer, spec)
    return tokenizer


def from_pretrained(folder: Path, renderer: Renderer, dropout: float = 0.1) -> OneSearchModel:
    """The weights of a saved BART, GPT-2 or Qwen3 with rows added for control and SID tokens.

    The renderer's tokenizer must be the checkpoint's own with tokens appended (`extended_tokenizer`): old rows keep
    their meaning. New rows start at the mean of the old ones plus noise (spec §3.7). Raises ConfigError, listing
    every fault, for a checkpoint that this code would not compute as `transformers` does.
    """
    try:
        source = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"checkpoint {folder}: cannot be read ({error})") from error
    config = _config(folder, source, renderer, dropout)
    model = OneSearchModel(config)
    own = model.backbone.config
    faults = [
        f"{key} is {getattr(source, key)!r}, expected {getattr(own, key)!r}"
        for key in _AGREED[config.backbone]
        if getattr(source, key) != getattr(own, key)
    ]
    first_added = _first_added(folder, renderer)
    if source.vocab_size < first_added:
        faults.append(f"has {source.vocab_size} tokens, the tokenizer {first_added} before the added ones")
    faults += _foreign_tokens(folder, source.vocab_size, renderer, first_added)
    if faults:
        raise ConfigError(f"checkpoint {folder}: {'; '.join(faults)}")
    network = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    old: Tensor = network.get_input_embeddings().weight.data
    kept = old[:first_added]
    noise = old.std() * torch.randn(config.vocab_size - first_added, config.d_model)
    rows = torch.cat([kept, kept.mean(0) + noise])
    model.backbone.load_state_dict(
        {
            name: rows if tensor.data_ptr() == old.data_ptr() else tensor
            for name, tensor in network.state_dict().items()
        }
    )
    return model


def _config(folder: Path, source: Any, renderer: Renderer, dropout: float) -> ModelConfig:
    backbone = source.model_type
    if backbone not in _SHAPES:
        known = ", ".join(get_args(BackboneName))
        raise ConfigError(f"checkpoint {folder}: model_type is {backbone!r}, expected one of {known}")
    shape: dict[str, Any] = {ours: getattr(source, theirs) for ours, theirs in _SHAPES[backbone].items()}
    if backbone == "gpt2":
        shape["ffn"] = source.n_inner or 4 * source.n_embd
    if backbone == "qwen3":
        shape["rope_theta"] = float(source.rope_parameters["rope_theta"])
    return ModelConfig.for_renderer(renderer, backbone=backbone, dropout=dropout, **shape)


def _first_added(folder: Path, renderer: Renderer) -> int:
    """Where rows begin that the checkpoint does not know: behind its own tokenizer, which may hold trained SID tokens.

    Without tokenizer files: where the tail of control and SID tokens begins.
    """
    saved = folder / "tokenizer.json"
    if saved.exists():
        return 1 + max(Tokenizer.from_file(str(saved)).get_vocab(with_added_tokens=True).values())
    ours = {renderer.tokenizer.token_to_id(token) for token in _CONTROL}
    first = renderer.sids.first_id
    while first - 1 in ours:
        first -= 1
    return first


def _foreign_tokens(folder: Path, rows: int, renderer: Renderer, first_added: int) -> list[str]:
    """Why the renderer's tokenizer is not the folder's with tokens appended; without tokenizer files sizes decide."""
    saved = folder / "tokenizer.json"
    if not saved.exists():
        return [] if rows == first_added else [f"has {rows} tokens, expected the tokenizer's {first_added}"]
    known = Tokenizer.from_file(str(saved)).get_vocab(with_added_tokens=True)
    moved = [token for token, number in known.items() if renderer.tokenizer.token_to_id(token) != number]
    return [f"{len(moved)} of its tokens are others in the tokenizer, {min(moved)!r} for one"] if moved else []
