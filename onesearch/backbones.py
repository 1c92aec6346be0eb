"""The three networks a model can be built on: BART (encoder-decoder), GPT-2 and Qwen3 (decoder-only).

Each is the `transformers` class of that name plus one interface, so that training and both decoder graphs are one
code path whatever the network:

    encode(embedded, mask) -> memory            what targets condition on; batched
    predict(memory, mask, embedded) -> hidden   teacher forcing; hidden state t predicts target t; batched
    prefill(embedded, bias) -> context          the prompt of one request, read once
    step(embedded, parents, context, state)     one level further for all beams of that request

A decoder-only network reads the prompt causally, then BOS and the target behind it, so its memory is the embedded
prompt itself. In a graph the beams are the query positions of one sequence: keys and values of the prompt exist once.

Legend: B batch, S prompt tokens, T target tokens, D model width, K beams, P beams of the previous step, t steps
taken, h heads, g key-value heads (g = h but for Qwen3), r = h / g, d head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import BartConfig, BartModel, GPT2Config, GPT2Model, Qwen3Config, Qwen3Model

from onesearch.model_config import ModelConfig

MASKED = -3e4  # an additive mask that float16 can hold, twice over
_POSITION_OFFSET = 2  # BART keeps two unused rows before position 0


class Bart(BartModel):  # type: ignore[misc]
    """Encoder-decoder; beams attend to the encoder's output and to their own past (post-norm, learned positions)."""

    def encode(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """Memory [B, S, D] of embedded [B, S, D] and mask [B, S], 1 = token."""
        memory: Tensor = self.encoder(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
        return memory

    def predict(self, memory: Tensor, mask: Tensor, embedded: Tensor) -> Tensor:
        """Hidden [B, T, D] after each of the embedded decoder inputs [B, T, D]."""
        output = self.decoder(
            inputs_embeds=embedded, encoder_hidden_states=memory, encoder_attention_mask=mask, use_cache=False
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def prefill(self, embedded: Tensor, bias: Tensor) -> list[Tensor]:
        """Embedded [S, D] → per decoder layer cross-attention keys [h, d, S], scaled by d^-½, and values [h, S, d]."""
        positions = self.encoder.embed_positions.weight[_POSITION_OFFSET : _POSITION_OFFSET + embedded.shape[0]]
        x = self.encoder.layernorm_embedding(embedded + positions)
        for layer in self.encoder.layers:
            attention = layer.self_attn
            queries, (keys, values) = _heads(attention.q_proj(x), attention.num_heads), _memory(attention, x)
            x = layer.self_attn_layer_norm(x + attention.out_proj(_attend(queries, keys, values, bias)))
            x = _feed_forward(layer, x)
        return [tensor for layer in self.decoder.layers for tensor in _memory(layer.encoder_attn, x)]

    def step(
        self, embedded: Tensor, parents: Tensor, context: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden [K, D] of embedded [K, D] and the new state, per layer keys and values [t + 1, K, D]."""
        position = self.decoder.embed_positions.weight[state[0].shape[0] + _POSITION_OFFSET]
        x = self.decoder.layernorm_embedding(embedded + position)
        grown: list[Tensor] = []
        for i, layer in enumerate(self.decoder.layers):
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
        return x, grown


def _heads(x: Tensor, heads: int) -> Tensor:
    """[N, D] → [h, N, d]."""
    return x.view(x.shape[0], heads, x.shape[1] // heads).transpose(0, 1)


def _memory(attention: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """What can be attended to: scaled keys [h, d, S] and values [h, S, d] of x [S, D]."""
    keys = _heads(attention.k_proj(x) * attention.scaling, attention.num_heads).transpose(1, 2)
    return keys, _heads(attention.v_proj(x), attention.num_heads)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Queries [h, N, d], keys [h, d, S] already scaled, values [h, S, d], bias [S] → [N, D]."""
    weights = torch.softmax(queries @ keys + bias, dim=-1)
    return (weights @ values).transpose(0, 1).flatten(1)


def _attend_own(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Each beam over its own past: queries [K, D], keys and values [t, K, D] → [K, D].

    At most L keys a beam: products and sums beat thousands of tiny matrix products.
    """
    split = (*keys.shape[:2], heads, keys.shape[2] // heads)
    weights = torch.softmax((queries.view(split[1:]) * keys.view(split)).sum(-1), dim=0)
    return (weights[..., None] * values.view(split)).sum(0).flatten(1)


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    output: Tensor = layer.final_layer_norm(x + layer.fc2(F.gelu(layer.fc1(x))))
    return output


class _Causal:
    """What GPT-2 and Qwen3 share. A subclass says how a layer projects and finishes, and what positions mean."""

    def encode(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """The embedded prompt [B, S, D] itself: it is read together with the target."""
        return embedded

    def predict(self: Any, memory: Tensor, mask: Tensor, embedded: Tensor) -> Tensor:
        """Hidden [B, T, D] after each of the embedded target inputs [B, T, D].

        They follow the prompt's last token whatever padding lies between: padding is not seen and has no position.
        """
        seen = torch.cat([mask, mask.new_ones(embedded.shape[:2])], dim=1)
        output = self(
            inputs_embeds=torch.cat([memory, embedded], dim=1),
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
        )
        hidden: Tensor = output.last_hidden_state[:, memory.shape[1] :]
        return hidden

    def prefill(self: Any, embedded: Tensor, bias: Tensor) -> list[Tensor]:
        """Embedded [S, D] → per layer prompt keys [g, d, S] and values [g, S, d]."""
        positions = torch.arange(embedded.shape[0], device=embedded.device)
        causal = bias + (positions[:, None] < positions).to(bias.dtype) * MASKED
        x = self.enter(embedded, positions)
        context: list[Tensor] = []
        for layer in self.blocks:
            queries, keys, values = self.project(layer, x, positions)
            keys, values = keys.permute(1, 2, 0), values.transpose(0, 1)
            context += [keys, values]
            repeats = queries.shape[1] // len(keys)
            weights = torch.softmax(_folded(queries, len(keys)) @ keys + causal.repeat(repeats, 1), dim=-1)
            x = self.finish(layer, x, _unfolded(weights @ values, repeats))
        return context

    def step(
        self: Any, embedded: Tensor, parents: Tensor, context: list[Tensor], state: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden [K, D] of embedded [K, D] and the new state, per layer keys and values [t + 1, K, g·d]."""
        prompt = (context[0] > MASKED / 2).sum()
        positions = (prompt + state[0].shape[0]).view(1)
        x = self.enter(embedded, positions)
        grown: list[Tensor] = []
        for i, layer in enumerate(self.blocks):
            queries, key, value = self.project(layer, x, positions)
            keys = torch.cat([state[2 * i].index_select(1, parents), key.flatten(1)[None]])
            values = torch.cat([state[2 * i + 1].index_select(1, parents), value.flatten(1)[None]])
            grown += [keys, values]
            seen = _attend_both(queries, context[2 * i + 1], context[2 * i + 2], context[0], keys, values)
            x = self.finish(layer, x, seen)
        return self.leave(x), grown


def _folded(queries: Tensor, groups: int) -> Tensor:
    """[N, h, d] → [g, r·N, d]: heads that share keys become further rows of one product."""
    rows, heads, width = queries.shape
    return queries.view(rows, groups, heads // groups, width).permute(1, 2, 0, 3).reshape(groups, -1, width)


def _unfolded(x: Tensor, repeats: int) -> Tensor:
    """[g, r·N, d] → [N, h·d]."""
    groups, rows, width = x.shape
    return x.view(groups, repeats, rows // repeats, width).permute(2, 0, 1, 3).flatten(1)


def _attend_both(
    queries: Tensor, keys: Tensor, values: Tensor, bias: Tensor, own_keys: Tensor, own_values: Tensor
) -> Tensor:
    """One softmax over the shared prompt and each beam's own past.

    Queries [K, h, d] scaled, keys [g, d, S], values [g, S, d], bias [S], own keys and values [t, K, g·d] → [K, h·d].
    """
    (beams, heads, width), groups, prompt = queries.shape, keys.shape[0], keys.shape[2]
    repeats, steps = heads // groups, own_keys.shape[0]
    past = (steps, beams, groups, 1, width)
    near = (queries.view(beams, groups, repeats, width) * own_keys.view(past)).sum(-1)  # [t, K, g, r]
    near = near.permute(2, 3, 1, 0).reshape(groups, repeats * beams, steps)
    weights = torch.softmax(torch.cat([_folded(queries, groups) @ keys + bias, near], dim=-1), dim=-1)
    far = _unfolded(weights[..., :prompt] @ values, repeats)
    near = weights[..., prompt:].view(groups, repeats, beams, steps).permute(3, 2, 0, 1)
    return far + (near[..., None] * own_values.view(past)).sum(0).flatten(1)


class Gpt2(_Causal, GPT2Model):  # type: ignore[misc]
    """Decoder-only with learned positions (pre-norm)."""

    @property
    def blocks(self) -> Any:
        return self.h

    def enter(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Rows at their positions, int64 [rows] or [1]."""
        table: Tensor = self.wpe.weight
        return embedded + table.index_select(0, positions)

    def project(self, layer: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values [N, h, d] of x [N, D]."""
        parts = layer.attn.c_attn(layer.ln_1(x)).view(x.shape[0], 3, layer.attn.num_heads, layer.attn.head_dim)
        return parts[:, 0] * layer.attn.scaling, parts[:, 1], parts[:, 2]

    def finish(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer after its attention."""
        x = x + layer.attn.c_proj(attended)
        hidden = F.gelu(layer.mlp.c_fc(layer.ln_2(x)), approximate="tanh")
        return x + layer.mlp.c_proj(hidden)  # type: ignore[no-any-return]

    def leave(self, x: Tensor) -> Tensor:
        """The norm before the head."""
        return self.ln_f(x)  # type: ignore[no-any-return]


class Qwen3(_Causal, Qwen3Model):  # type: ignore[misc]
    """Decoder-only with rotary positions, grouped-query attention and RMS norms, also of queries and keys."""

    @property
    def blocks(self) -> Any:
        return self.layers

    def enter(self, embedded: Tensor, positions: Tensor) -> Tensor:
        """Positions enter in `project`, by rotation."""
        return embedded

    def project(self, layer: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries [N, h, d], keys and values [N, g, d] of x [N, D]; positions int64 [N] or [1]."""
        attention, x = layer.self_attn, layer.input_layernorm(x)
        split = (x.shape[0], -1, attention.head_dim)
        queries = attention.q_norm(attention.q_proj(x).view(split))
        keys = attention.k_norm(attention.k_proj(x).view(split))
        angles = positions[:, None].float() * self.rotary_emb.inv_freq
        cos, sin = (table.to(x.dtype)[:, None] for table in (angles.cos(), angles.sin()))
        queries, keys = (_rotated(part, cos, sin) for part in (queries, keys))
        return queries * attention.scaling, keys, attention.v_proj(x).view(split)

    def finish(self, layer: Any, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer after its attention."""
        x = x + layer.self_attn.o_proj(attended)
        return x + layer.mlp(layer.post_attention_layernorm(x))  # type: ignore[no-any-return]

    def leave(self, x: Tensor) -> Tensor:
        """The norm before the head."""
        return self.norm(x)  # type: ignore[no-any-return]


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [N, h, d] turned by the angles [N or 1, 1, d/2]; the halves of a head are the two coordinates."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


Backbone = Bart | Gpt2 | Qwen3


def build(config: ModelConfig) -> Backbone:
    """A freshly initialised network.

    No dropout inside attention where the network has residual dropout: it would force the slow attention kernel.
    Qwen3 has no other place for it.
    """
    ids = {"pad_token_id": config.pad, "bos_token_id": config.bos, "eos_token_id": config.eos}
    if config.backbone == "bart":
        return Bart(
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
                decoder_start_token_id=config.bos,
                forced_eos_token_id=None,
                **ids,
            )
        )
    if config.backbone == "gpt2":
        return Gpt2(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_embd=config.d_model,
                n_layer=config.decoder_layers,
                n_head=config.heads,
                n_inner=config.ffn,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=0.0,
                n_positions=config.max_positions,
                **ids,
            )
        )
    return Qwen3(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=config.decoder_layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads or config.heads,
            head_dim=config.head_dim or config.d_model // config.heads,
            intermediate_size=config.ffn,
            attention_dropout=config.dropout,
            max_position_embeddings=config.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            **ids,
        )
    )
