"""The network: a BART encoder-decoder over text, control and SID tokens. The only module that imports torch.

Training calls `OneSearchModel`; decoding calls `Prefill` and `Step`, which read the same weights and are also what
is exported, so the torch decoder and the ONNX graphs are one definition. Losses live in training.

Legend: B batch, S prompt tokens, T target tokens, L SID levels, V vocabulary, D model width, E history width,
K beams, P beams of the previous step, t steps taken, H codes of a level, h heads, d head width (D = h·d).
"""

import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BartConfig, BartModel

from onesearch.decode import StepFn
from onesearch.errors import BundleError, ConfigError
from onesearch.runtime import BeamSteps, Ids, Logits
from onesearch.sequence import Prompt, Renderer
from onesearch.sid import SidSpec, SidVocab

_MASKED = -1e9
_EMBEDDINGS = ("shared.weight", "embed_tokens.weight")
_POSITION_OFFSET = 2  # BART keeps two unused rows before position 0


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network and the token ids it must know; stored in the bundle as model.json."""

    vocab_size: int
    history_dim: int
    sid_sizes: tuple[int, ...]
    sid_first_id: int
    pad: int
    bos: int
    eos: int
    history_ids: tuple[int, ...]
    backbone: str = "bart"
    d_model: int = 128
    encoder_layers: int = 2
    decoder_layers: int = 2
    heads: int = 4
    ffn: int = 512
    dropout: float = 0.1
    max_positions: int = 128

    def __post_init__(self) -> None:
        if self.backbone != "bart":
            raise ConfigError(f"model.backbone: {self.backbone!r} is unknown, expected 'bart'")
        if self.d_model % self.heads:
            raise ConfigError(f"model.d_model: {self.d_model} is not a multiple of model.heads {self.heads}")
        if self.sid_first_id + sum(self.sid_sizes) > self.vocab_size:
            raise ConfigError(f"model.vocab_size: {self.vocab_size} cannot hold the SID tokens")

    @classmethod
    def for_renderer(cls, renderer: Renderer, **shape: Any) -> Self:
        """Ids and sizes of a renderer with the given shape (d_model, heads, …). Raises ConfigError."""
        unknown = sorted(set(shape) - {f.name for f in fields(cls)})
        if unknown:
            raise ConfigError(f"model: unknown key(s) {', '.join(unknown)}")
        config = cls(
            vocab_size=renderer.vocab_size,
            history_dim=renderer.history_dim,
            sid_sizes=renderer.sids.spec.sizes,
            sid_first_id=renderer.sids.first_id,
            pad=renderer.pad,
            bos=renderer.bos,
            eos=renderer.eos,
            history_ids=renderer.history_ids,
            **shape,
        )
        if config.max_positions < renderer.config.max_ids:
            raise ConfigError(
                f"model.max_positions: {config.max_positions} is below sequence.max_ids {renderer.config.max_ids}"
            )
        return config

    @cached_property
    def sids(self) -> SidVocab:
        """SID codes to token ids."""
        return SidVocab(SidSpec(self.sid_sizes), self.sid_first_id)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, raw: bytes) -> Self:
        """Reads `to_json`. Raises ConfigError for unknown or missing keys."""
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(raw).items()}
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"model: {error}") from error


class OneSearchModel(nn.Module):
    """BART with long-history vectors at placeholder tokens and one tied head (spec §3.6, §3.7)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # No dropout inside attention: it would force the slow attention kernel; residual dropout remains.
        self.bart = BartModel(
            BartConfig(
                vocab_size=config.vocab_size,
                d_model=config.d_model,
                encoder_layers=config.encoder_layers,
                decoder_layers=config.decoder_layers,
                encoder_attention_heads=config.heads,
                decoder_attention_heads=config.heads,
                encoder_ffn_dim=config.ffn,
                decoder_ffn_dim=config.ffn,
                dropout=config.dropout,
                max_position_embeddings=config.max_positions,
                pad_token_id=config.pad,
                bos_token_id=config.bos,
                eos_token_id=config.eos,
                decoder_start_token_id=config.bos,
                forced_eos_token_id=None,
            )
        )
        self.history = nn.Linear(config.history_dim, config.d_model, bias=False)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.history_ids: Tensor
        self.register_buffer("history_ids", torch.tensor(config.history_ids), persistent=False)

    @property
    def embedding(self) -> Tensor:
        """The shared embedding and head matrix, float32 [V, D]."""
        weight: Tensor = self.bart.shared.weight
        return weight

    def embed_prompt(self, ids: Tensor, history: Tensor) -> Tensor:
        """Token embeddings [B, S, D] of ids int64 [B, S]; placeholder l carries history [B, 3, E] vector l."""
        slots = (ids[..., None] == self.history_ids).to(history.dtype)
        embedded: Tensor = self.bart.shared(ids) + slots @ self.history(history)
        return embedded

    def encode(self, ids: Tensor, mask: Tensor, history: Tensor) -> Tensor:
        """Memory [B, S, D] of ids int64 [B, S], mask [B, S] (1 = token, 0 = padding), history [B, 3, E]."""
        output = self.bart.encoder(inputs_embeds=self.embed_prompt(ids, history), attention_mask=mask)
        memory: Tensor = output.last_hidden_state
        return memory

    def decode(self, memory: Tensor, mask: Tensor, target_ids: Tensor) -> Tensor:
        """Teacher forcing: hidden [B, T, D] that predict target_ids int64 [B, T]; position 0 reads only BOS.

        Position t of the result predicts target t, whatever the prompt's length, so the hidden states of two
        prompts (with and without keywords) align target by target (spec §4.4).
        """
        inputs = torch.cat([torch.full_like(target_ids[:, :1], self.config.bos), target_ids[:, :-1]], dim=1)
        output = self.bart.decoder(
            input_ids=inputs, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def sid_head(self, hidden: Tensor) -> list[Tensor]:
        """Per level t, logits [B, sizes[t]] of hidden [B, L, D]; only the codebook of the level is scored."""
        first, sizes = self.config.sid_first_id, self.config.sid_sizes
        weights = torch.split_with_sizes(self.embedding[first : first + sum(sizes)], sizes)
        biases = torch.split_with_sizes(self.head_bias[first : first + sum(sizes)], sizes)
        return [F.linear(hidden[:, t], weights[t], biases[t]) for t in range(hidden.shape[1])]

    def sid_logits(self, ids: Tensor, mask: Tensor, history: Tensor, target_ids: Tensor) -> list[Tensor]:
        """L tensors [B, sizes[t]] that predict the SID tokens target_ids int64 [B, L] under teacher forcing."""
        return self.sid_head(self.decode(self.encode(ids, mask, history), mask, target_ids))

    def text_logits(self, ids: Tensor, mask: Tensor, history: Tensor, target_ids: Tensor) -> Tensor:
        """[B, T, V] that predict the text tokens target_ids int64 [B, T]; pad at the end, the loss skips it."""
        hidden = self.decode(self.encode(ids, mask, history), mask, target_ids)
        return F.linear(hidden, self.embedding, self.head_bias)

    def save_weights(self, path: Path) -> None:
        """Write every parameter once, as safetensors; equal weights give equal bytes, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        save_file({name: parameter.detach() for name, parameter in self.named_parameters()}, partial)
        partial.replace(path)

    def load_weights(self, path: Path) -> None:
        """Read `save_weights`. Raises BundleError listing every missing, unknown or ill-shaped tensor."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BundleError(str(path), [f"cannot be read: {error}"]) from error
        own = dict(self.named_parameters())
        faults = [f"tensor {name!r}: is unknown" for name in tensors.keys() - own.keys()]
        faults += [f"tensor {name!r}: is missing" for name in own.keys() - tensors.keys()]
        faults += [
            f"tensor {name!r}: has shape {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own.keys() & tensors.keys()
            if tensors[name].shape != own[name].shape
        ]
        if faults:
            raise BundleError(str(path), sorted(faults))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def open_model(folder: Path) -> OneSearchModel:
    """The model of a bundle folder (model.json, weights.safetensors), in eval mode. Raises BundleError."""
    try:
        model = OneSearchModel(ModelConfig.from_json((folder / "model.json").read_bytes()))
    except (OSError, ValueError) as error:
        raise BundleError(str(folder), [f"model.json: {error}"]) from error
    model.load_weights(folder / "weights.safetensors")
    return model.eval()


def from_pretrained(folder: Path, renderer: Renderer, dropout: float = 0.1) -> OneSearchModel:
    """A saved BART checkpoint with rows added for control and SID tokens.

    The renderer's tokenizer must be the checkpoint's own with tokens appended: old rows keep their meaning.
    New rows start at the mean of the old ones plus noise (spec §3.7). Raises ConfigError for a foreign checkpoint.
    """
    bart = BartModel.from_pretrained(folder, local_files_only=True)
    source = bart.config
    shape = (source.encoder_attention_heads, source.encoder_ffn_dim, source.activation_function)
    if shape != (source.decoder_attention_heads, source.decoder_ffn_dim, "gelu") or source.scale_embedding:
        raise ConfigError(f"checkpoint {folder}: expected a BART with equal encoder and decoder layers and GELU")
    if source.vocab_size > renderer.vocab_size:
        raise ConfigError(
            f"checkpoint {folder}: has {source.vocab_size} tokens, expected at most the tokenizer's "
            f"{renderer.vocab_size}"
        )
    config = ModelConfig.for_renderer(
        renderer,
        d_model=source.d_model,
        encoder_layers=source.encoder_layers,
        decoder_layers=source.decoder_layers,
        heads=source.encoder_attention_heads,
        ffn=source.encoder_ffn_dim,
        dropout=dropout,
        max_positions=source.max_position_embeddings,
    )
    model = OneSearchModel(config)
    old = bart.shared.weight.data
    added = config.vocab_size - len(old)
    rows = torch.cat([old, old.mean(0) + source.init_std * torch.randn(added, config.d_model)])
    model.bart.load_state_dict(
        {name: rows if name.endswith(_EMBEDDINGS) else value for name, value in bart.state_dict().items()}
    )
    return model


def _heads(x: Tensor, heads: int) -> Tensor:
    """[N, D] → [h, N, d]."""
    return x.view(x.shape[0], heads, x.shape[1] // heads).transpose(0, 1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Queries [h, N, d], keys [h, d, S] already scaled, values [h, S, d], bias [S] → [N, D]."""
    weights = torch.softmax(queries @ keys + bias, dim=-1)
    return (weights @ values).transpose(0, 1).flatten(1)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer.final_layer_norm(x + layer.fc2(F.gelu(layer.fc1(x))))
    return output


class Prefill(nn.Module):
    """The once-per-request graph: the encoder at batch 1 and the cross-attention keys and values."""

    def __init__(self, model: OneSearchModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, history: Tensor) -> list[Tensor]:
        """ids, mask int64 [1, S], history float32 [1, 3, E] → context, float32.

        context[0] is the additive mask [S]; then per decoder layer keys [h, d, S], scaled by d^-½, and values
        [h, S, d].
        """
        encoder, decoder = self.model.bart.encoder, self.model.bart.decoder
        bias = (1 - mask[0].to(history.dtype)) * _MASKED
        positions = encoder.embed_positions.weight[_POSITION_OFFSET : _POSITION_OFFSET + ids.shape[1]]
        x = encoder.layernorm_embedding(self.model.embed_prompt(ids, history)[0] + positions)
        for layer in encoder.layers:
            attention = layer.self_attn
            queries, (keys, values) = _heads(attention.q_proj(x), attention.num_heads), _memory(attention, x)
            x = layer.self_attn_layer_norm(x + attention.out_proj(_attend(queries, keys, values, bias)))
            x = _feed_forward(layer, x)
        return [bias, *(tensor for layer in decoder.layers for tensor in _memory(layer.encoder_attn, x))]


def _memory(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What can be attended to: scaled keys [h, d, S] and values [h, S, d] of x [S, D]."""
    keys = _heads(attention.k_proj(x) * attention.scaling, attention.num_heads).transpose(1, 2)
    return keys, _heads(attention.v_proj(x), attention.num_heads)


class Step(nn.Module):
    """The once-per-level graph. Beams are the query positions of one sequence, so the context is never copied."""

    def __init__(self, model: OneSearchModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, parents: Tensor, head: Tensor, context: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One level further for K beams.

        tokens int64 [K] (BOS at level 0), parents int64 [K] rows of the previous step, head int64 [H] token ids
        to score, context from `Prefill`, state: per layer self-attention keys and values [t, P, D], time first so
        that appending is a plain concatenation. Returns logits [K, H] and the new state [t + 1, K, D].
        """
        decoder, embedding = self.model.bart.decoder, self.model.embedding
        position = decoder.embed_positions.weight[state[0].shape[0] + _POSITION_OFFSET]
        x = decoder.layernorm_embedding(embedding.index_select(0, tokens) + position)
        grown: list[Tensor] = []
        for i, layer in enumerate(decoder.layers):
            attention, cross = layer.self_attn, layer.encoder_attn
            keys = torch.cat([state[2 * i].index_select(1, parents), attention.k_proj(x)[None]])
            values = torch.cat([state[2 * i + 1].index_select(1, parents), attention.v_proj(x)[None]])
            grown += [keys, values]
            own = _attend_own(attention.q_proj(x) * attention.scaling, keys, values, attention.num_heads)
            x = layer.self_attn_layer_norm(x + attention.out_proj(own))
            queries = _heads(cross.q_proj(x), cross.num_heads)
            seen = _attend(queries, context[2 * i + 1], context[2 * i + 2], context[0])
            x = layer.encoder_attn_layer_norm(x + cross.out_proj(seen))
            x = _feed_forward(layer, x)
        rows, bias = embedding.index_select(0, head), self.model.head_bias.index_select(0, head)
        return F.linear(x, rows, bias), grown


def _attend_own(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Each beam over its own past: queries [K, D], keys and values [t, K, D] → [K, D].

    At most L keys a beam: products and sums beat thousands of tiny matrix products.
    """
    split = (*keys.shape[:2], heads, keys.shape[2] // heads)
    weights = torch.softmax((queries.view(split[1:]) * keys.view(split)).sum(-1), dim=0)
    return (weights[..., None] * values.view(split)).sum(0).flatten(1)


class TorchDecoder:
    """`Prefill` and `Step` run by torch: for rollouts, evaluation in training, and as the parity reference."""

    def __init__(self, model: OneSearchModel, renderer: Renderer) -> None:
        self._prefill, self._step = Prefill(model), Step(model)
        self._vocab, self._bos = renderer.sids, renderer.bos
        layers, width = model.config.decoder_layers, model.config.d_model
        self._empty = [torch.zeros(0, 1, width) for _ in range(2 * layers)]

    @torch.inference_mode()
    def start(self, prompt: Prompt) -> StepFn:
        """Read one prompt; the result scores the next level of its beams."""
        ids = torch.from_numpy(prompt.ids)[None]
        context = self._prefill(ids, torch.ones_like(ids), torch.from_numpy(prompt.history)[None])

        @torch.inference_mode()
        def run(tokens: Ids, parents: Ids, head: Ids, state: list[Tensor]) -> tuple[Logits, list[Tensor]]:
            inputs = (torch.from_numpy(array) for array in (tokens, parents, head))
            logits, grown = self._step(*inputs, context, state)
            return logits.numpy(), grown

        return BeamSteps(run, self._empty, self._vocab, self._bos)
