"""Trains the byte-level BPE tokenizer: any script is representable, so no query is ever unreadable."""

from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from onesearch.sequence import CONTROL_TOKENS, add_sid_tokens
from onesearch.sid import SidSpec
from onesearch.text import normalise


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, spec: SidSpec, control: Sequence[str] = CONTROL_TOKENS
) -> Tokenizer:
    """Control tokens first, then BPE of the normalised texts, then the SID tokens of `spec`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((normalise(text) for text in texts), trainer)
    add_sid_tokens(tokenizer, spec)
    return tokenizer
