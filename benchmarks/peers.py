"""The engines a user could pick instead for the decode benchmark: transformers' `generate` and CTranslate2.

Both get our weights as a plain `BartForConditionalGeneration`, the same prompt, 512 beams, five new tokens and one
thread pool of the same size.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from onesearch.model import OneSearchModel

Allowed = Callable[[int, torch.Tensor], list[int]]


def as_bart(model: OneSearchModel) -> BartForConditionalGeneration:
    """Our weights as the class every engine knows; the head bias becomes `final_logits_bias`."""
    more = {
        "tie_word_embeddings": True,
        "normalize_before": False,
        "normalize_embedding": True,
    }  # CTranslate2 asks
    ours: Any = model.backbone
    config = BartConfig.from_dict(ours.config.to_dict() | more)
    bart = BartForConditionalGeneration(config)
    bart.model.load_state_dict(ours.state_dict())
    bart.final_logits_bias.copy_(model.head_bias.detach()[None])
    bart.tie_weights()
    return bart.eval()


def hf_search(
    bart: BartForConditionalGeneration, ids: torch.Tensor, width: int, top_n: int, levels: int, allowed: Allowed
) -> Callable[[], torch.Tensor]:
    """`generate` with `prefix_allowed_tokens_fn`: returns a call that gives top_n sequences of token ids [top_n, L]."""

    @torch.inference_mode()
    def search() -> torch.Tensor:
        found = bart.generate(
            ids[None],
            attention_mask=torch.ones_like(ids)[None],
            num_beams=width,
            num_return_sequences=top_n,
            max_new_tokens=levels,
            min_new_tokens=levels,
            prefix_allowed_tokens_fn=allowed,
            do_sample=False,
            length_penalty=0.0,
        )
        tokens: torch.Tensor = found[:, 1:]
        return tokens

    return search


def convert_for_ctranslate2(bart: BartForConditionalGeneration, folder: Path) -> Path:
    """A CTranslate2 model inside `folder`; token i is named `i`, because the converter insists on a tokenizer."""
    from ctranslate2.converters import TransformersConverter

    config = bart.config
    names = {str(i): i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(names, unk_token=str(config.pad_token_id)))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    kinds = {"pad": config.pad_token_id, "bos": config.bos_token_id, "eos": config.eos_token_id, "unk": 1}
    special = {f"{kind}_token": str(token) for kind, token in kinds.items()}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "checkpoint")
    bart.save_pretrained(folder / "checkpoint")
    TransformersConverter(str(folder / "checkpoint")).convert(str(folder / "converted"))
    return folder / "converted"


def ct2_search(
    folder: Path, compute_type: str, ids: Sequence[int], width: int, top_n: int, levels: int, threads: int
) -> Callable[[], object]:
    """CTranslate2 on a converted folder, unconstrained: its best case, for it has no per-beam constraint."""
    import ctranslate2

    translator = ctranslate2.Translator(
        str(folder), device="cpu", compute_type=compute_type, inter_threads=1, intra_threads=threads
    )
    prompt = [str(i) for i in ids]

    def search() -> object:
        return translator.translate_batch(
            [prompt],
            beam_size=width,
            num_hypotheses=top_n,
            max_decoding_length=levels,
            min_decoding_length=levels,
            length_penalty=0,
            return_scores=True,
        )[0]

    return search
