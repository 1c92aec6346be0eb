"""A random model small enough for unit tests, with a real byte-level tokenizer and renderer."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from onesearch.model import ModelConfig, OneSearchModel
from onesearch.sequence import CONTROL_TOKENS, Fields, Prompt, Renderer, SequenceConfig, add_sid_tokens
from onesearch.sid import SidSpec

SIZES = (7, 5, 4, 3, 6)
HISTORY_DIM = 8


def tiny_renderer() -> Renderer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["red shoes", "blue bag"], trainer)
    spec = SidSpec(SIZES)
    add_sid_tokens(tokenizer, spec)
    return Renderer(tokenizer, spec, SequenceConfig(), HISTORY_DIM)


def tiny_model(renderer: Renderer, seed: int = 0) -> OneSearchModel:
    """Weights large enough that every part of the network moves the logits."""
    torch.manual_seed(seed)
    model = OneSearchModel(ModelConfig.for_renderer(renderer, d_model=32, heads=2, ffn=64)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tiny_prompt(renderer: Renderer, query: str = "red shoes", seed: int = 0) -> Prompt:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, SIZES, (3, len(SIZES))).astype(np.uint16)
    history = rng.normal(size=(3, HISTORY_DIM)).astype(np.float32)
    values = Fields(
        query=query, query_sid=codes[0], recent_sids=codes[1:], history=history, recent_queries=("blue bag",)
    )
    return renderer.prompt("search", values)
