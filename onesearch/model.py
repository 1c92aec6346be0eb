"""The model: a network over text, control and SID tokens, with everything that turns it into a search model.

Training calls `OneSearchModel`; decoding calls `Prefill` and `Step`, which read the same weights and are also what
is exported, so the torch decoder and the ONNX graphs are one definition. Which network it is belongs to `backbones`;
losses live in training.

Legend: B batch, S prompt tokens, T target tokens, L SID levels, V vocabulary, D model width, R behaviours, E history
width, K beams, P beams of the previous step, t steps taken, H codes of a level, g key-value heads, d head width.
"""

from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from onesearch.backbones import MASKED, Backbone, build
from onesearch.decode import StepFn
from onesearch.errors import BundleError
from onesearch.history import HISTORY_MODULES
from onesearch.model_config import ModelConfig
from onesearch.runtime import BeamSteps, Ids, Logits
from onesearch.sequence import Prompt, Renderer


class OneSearchModel(nn.Module):
    """A backbone with long-history vectors at placeholder tokens and one tied head (spec §3.6, §3.7).

    The backbone's parameters are named after it (`bart.…`, `gpt2.…`, `qwen3.…`), in memory and in the weights file.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.add_module(config.backbone, build(config))
        self.history = HISTORY_MODULES[config.history](config)
        self.head_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.history_ids: Tensor
        self.register_buffer("history_ids", torch.tensor(config.history_ids), persistent=False)

    @property
    def backbone(self) -> Backbone:
        """The network."""
        return cast(Backbone, self.get_submodule(self.config.backbone))

    @property
    def embedding(self) -> Tensor:
        """The shared embedding and head matrix, float32 [V, D]."""
        weight: Tensor = self.backbone.get_input_embeddings().weight
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., D] of ids int64 [...]."""
        embedded: Tensor = self.backbone.get_input_embeddings()(ids)
        return embedded

    def embed_prompt(self, ids: Tensor, history: Tensor) -> Tensor:
        """Token embeddings [B, S, D] of ids int64 [B, S]; placeholder l carries vector l of history [B, R, 3, E]."""
        slots = (ids[..., None] == self.history_ids).to(history.dtype)
        vectors: Tensor = self.history(history)
        return self.embed(ids) + slots @ vectors

    def encode(self, ids: Tensor, mask: Tensor, history: Tensor) -> Tensor:
        """Memory [B, S, D] of ids int64 [B, S], mask [B, S] (1 = token, 0 = padding at the end), history [B, R, 3, E].

        What `decode` conditions on: the encoder's output, or the embedded prompt of a decoder-only network.
        """
        return self.backbone.encode(self.embed_prompt(ids, history), mask)

    def decode(self, memory: Tensor, mask: Tensor, target_ids: Tensor) -> Tensor:
        """Teacher forcing: hidden [B, T, D] that predict target_ids int64 [B, T]; position 0 reads only BOS.

        Position t of the result predicts target t, whatever the network and the prompt's length, so the hidden
        states of two prompts (with and without keywords) align target by target (spec §4.4).
        """
        inputs = torch.cat([torch.full_like(target_ids[:, :1], self.config.bos), target_ids[:, :-1]], dim=1)
        return self.backbone.predict(memory, mask, self.embed(inputs))

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


class Prefill(nn.Module):
    """The once-per-request graph: reads the prompt at batch 1 and keeps what every beam attends to."""

    def __init__(self, model: OneSearchModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor, history: Tensor) -> list[Tensor]:
        """ids, mask int64 [1, S], history float32 [1, R, 3, E] → context.

        context[0] is the additive mask [S]; then per decoder layer keys [g, d, S] and values [g, S, d], for BART of
        its cross-attention. All are of the weights' type.
        """
        history = history.to(self.model.embedding.dtype)
        bias = (1 - mask[0].to(history.dtype)) * MASKED
        return [bias, *self.model.backbone.prefill(self.model.embed_prompt(ids, history)[0], bias)]


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
        to score, context from `Prefill`, state: per layer self-attention keys and values [t, P, g·d], time first so
        that appending is a plain concatenation. Returns logits float32 [K, H] and the new state [t + 1, K, g·d].
        """
        embedding = self.model.embedding
        x, grown = self.model.backbone.step(embedding.index_select(0, tokens), parents, context, state)
        rows, bias = embedding.index_select(0, head), self.model.head_bias.index_select(0, head)
        return F.linear(x, rows, bias).float(), grown


class TorchDecoder:
    """`Prefill` and `Step` run by torch: for rollouts, evaluation in training, and as the parity reference."""

    def __init__(self, model: OneSearchModel, renderer: Renderer) -> None:
        self._prefill, self._step = Prefill(model), Step(model)
        self._vocab, self._bos = renderer.sids, renderer.bos
        empty = torch.zeros(0, 1, model.config.state_width, dtype=model.embedding.dtype)
        self._empty = [empty] * (2 * model.config.decoder_layers)

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
