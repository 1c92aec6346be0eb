"""A random model small enough for unit tests, with a real byte-level tokenizer and renderer."""

import numpy as np
import torch

from onesearch.model import OneSearchModel
from onesearch.model_config import ModelConfig
from onesearch.sequence import Fields, Prompt, Renderer, SequenceConfig
from onesearch.sid import SidSpec
from training.tokenizer import train_tokenizer

SIZES = (7, 5, 4, 3, 6)
HISTORY_DIM = 8


PROMPTS = SequenceConfig()


def tiny_renderer(config: SequenceConfig = PROMPTS) -> Renderer:
    spec = SidSpec(SIZES)
    tokenizer = train_tokenizer(["red shoes", "blue bag"], 1000, spec, config.control_tokens())
    return Renderer(tokenizer, spec, config, HISTORY_DIM)


SHAPES = {
    "bart": dict(encoder_layers=1, heads=2),
    "gpt2": dict(heads=2),
    "qwen3": dict(
        decoder_layers=1, heads=4, kv_heads=2, head_dim=16
    ),  # heads together are wider than the model, as in Qwen3-0.6B
}


def tiny_model(
    renderer: Renderer, seed: int = 0, backbone: str = "bart", history: str = "gates"
) -> OneSearchModel:
    """Weights large enough that every part of the network moves the logits."""
    torch.manual_seed(seed)
    shape = dict(backbone=backbone, d_model=32, ffn=64, history=history) | SHAPES[backbone]
    model = OneSearchModel(ModelConfig.for_renderer(renderer, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_prompt(renderer: Renderer, query: str = "red shoes", seed: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)
    sizes = renderer.sids.spec.sizes
    codes = rng.integers(0, sizes, (3, len(sizes))).astype(np.uint16)
    history = rng.normal(size=renderer.history_shape).astype(np.float32)
    values = Fields(
        query=query, query_sid=codes[0], recent_sids=codes[1:], history=history, recent_queries=("blue bag",)
    )
    return renderer.prompt("search", values)
