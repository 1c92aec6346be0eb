"""Constrained beam search on one GPU: `python -m benchmarks.gpu [--json] [--shape bart-base|qwen3-0.6b]`.

One file that needs torch alone, so that it can be copied to a machine with a GPU; random weights of the named shape.
The decode of a request (all levels, prompt already read) is timed eagerly and as one CUDA graph that holds model,
trie and selection, beside `transformers.generate` (if installed; unconstrained, its best case, and it reads the
prompt too) and beside the floor: what must be multiplied at this device's measured peak, or read at its measured
bandwidth, whichever takes longer on each level. Results are checked first, against a plain forward of every prefix
and a selection that walks the trie in Python.

Legend: K beams, L levels, S prompt tokens, D model width, h heads, g key-value heads, d head width, W chunk width.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RUNS, WARM_UP = 15, 5


@dataclass(frozen=True)
class Shape:
    """A decoder. `cross`: attends to an encoder's output beside its own past (BART); else to the prompt (Qwen3)."""

    name: str
    cross: bool
    layers: int
    width: int
    heads: int
    groups: int
    head: int
    ffn: int
    prompt: int = 128
    beams: int = 512
    sizes: tuple[int, ...] = (1024, 512, 512, 256, 256)
    items: int = 1_000_000
    text: int = 50_000
    top_n: int = 50


SHAPES = {
    "bart-base": Shape("bart-base", True, 6, 768, 12, 12, 64, 3072),
    "qwen3-0.6b": Shape("qwen3-0.6b", False, 28, 1024, 16, 8, 128, 3072, text=151_000),
}


def tiny(shape: Shape) -> Shape:
    """The same kind of network at a size a test can afford."""
    small = dict(layers=2, width=32, heads=4, groups=2 + 2 * shape.cross, head=8, ffn=48, prompt=9, beams=16)
    return replace(shape, **small, sizes=(9, 7, 6, 5, 8), items=500, text=50, top_n=10)  # type: ignore[arg-type]


class Decoder:
    """A folded decoder with random weights: beams are query rows of one sequence, the prompt's K/V exist once."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)

        def weight(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator).mul_(size[-1] ** -0.5).to(device, dtype)

        own, shared = shape.heads * shape.head, shape.groups * shape.head
        sizes = {"q": (own, shape.width), "k": (shared, shape.width), "v": (shared, shape.width)}
        sizes |= {"o": (shape.width, own), "up": (shape.ffn, shape.width), "down": (shape.width, shape.ffn)}
        sizes |= {"cq": (own, shape.width), "co": (shape.width, own)} if shape.cross else {}
        sizes |= {} if shape.cross else {"gate": (shape.ffn, shape.width)}
        self.layers = [{name: weight(*size) for name, size in sizes.items()} for _ in range(shape.layers)]
        self.tokens = weight(1 + sum(shape.sizes), shape.width)  # BOS, then the SID tokens
        # Keys [g, d, S] and values [g, S, d] of a prompt that has been read.
        self.context = [
            (weight(shape.groups, shape.head, shape.prompt), weight(shape.groups, shape.prompt, shape.head))
            for _ in range(shape.layers)
        ]

    def step(self, tokens: Tensor, parents: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Hidden [K, D] after tokens [K], and the state [2, t + 1, K, g·d] of every layer, gathered by parents."""
        shape, x = self.shape, self.tokens[tokens]
        grown = []
        for i, (layer, (keys, values)) in enumerate(zip(self.layers, self.context, strict=True)):
            normed = F.rms_norm(x, (shape.width,))
            new = torch.stack([F.linear(normed, layer["k"]), F.linear(normed, layer["v"])])[:, None]
            past = torch.cat([state[i].index_select(2, parents), new], dim=1)
            grown.append(past)
            q = F.linear(normed, layer["q"])
            if shape.cross:
                x = x + F.linear(self._attend(q, None, past), layer["o"])
                crossed = F.linear(F.rms_norm(x, (shape.width,)), layer["cq"])
                x = x + F.linear(self._attend(crossed, (keys, values), None), layer["co"])
            else:
                x = x + F.linear(self._attend(q, (keys, values), past), layer["o"])
            x = x + self.feed_forward(layer, F.rms_norm(x, (shape.width,)))
        return F.rms_norm(x, (shape.width,)), grown

    def feed_forward(self, layer: dict[str, Tensor], x: Tensor) -> Tensor:
        """The layer's two or three products per token."""
        up = F.linear(x, layer["up"])
        return F.linear(F.gelu(up) if self.shape.cross else F.silu(F.linear(x, layer["gate"])) * up, layer["down"])

    def head(self, hidden: Tensor, level: int) -> Tensor:
        """Log-probabilities float32 [K, sizes[level]] over the level's codebook."""
        first = 1 + sum(self.shape.sizes[:level])
        rows = self.tokens[first : first + self.shape.sizes[level]]
        return torch.log_softmax(F.linear(hidden, rows).float(), dim=-1)

    def _attend(self, q: Tensor, shared: tuple[Tensor, Tensor] | None, past: Tensor | None) -> Tensor:
        shape, beams = self.shape, len(q)
        group = shape.heads // shape.groups
        q = q.view(beams, shape.groups, group, shape.head) * shape.head**-0.5
        scores = []
        if shared is not None:
            folded = q.permute(1, 2, 0, 3).reshape(shape.groups, group * beams, shape.head)
            far = (folded @ shared[0]).view(shape.groups, group, beams, -1)
            scores.append(far.permute(2, 0, 1, 3))
        if past is not None:
            near = past.view(2, -1, beams, shape.groups, 1, shape.head)
            scores.append((q * near[0]).sum(-1).permute(1, 2, 3, 0))
        weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1)
        seen = torch.zeros_like(q)
        if shared is not None:
            prompt = shared[0].shape[2]
            rows = weights[..., :prompt].permute(1, 2, 0, 3).reshape(shape.groups, group * beams, prompt)
            seen = (rows @ shared[1]).view(shape.groups, group, beams, -1).permute(2, 0, 1, 3)
        if past is not None:
            own = weights[..., -near.shape[1] :].permute(3, 0, 1, 2)[..., None]
            seen = seen + (own * near[1]).sum(0)
        return seen.reshape(beams, -1)

    def plain(self, prefixes: Tensor) -> Tensor:
        """Hidden [N, D] after the last of tokens [N, t]: no cache, no folding, context copied per row."""
        shape, x = self.shape, self.tokens[prefixes]
        rows, length = prefixes.shape
        for layer, (keys, values) in zip(self.layers, self.context, strict=True):
            normed = F.rms_norm(x, (shape.width,))
            q = F.linear(normed, layer["q"]).view(rows, length, shape.heads, -1).transpose(1, 2)
            k, v = (F.linear(normed, layer[n]).view(rows, length, shape.groups, -1).transpose(1, 2) for n in "kv")
            far_k, far_v = (part.expand(rows, *part.shape) for part in (keys.transpose(1, 2), values))
            causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
            if shape.cross:
                x = x + F.linear(_merged(F.scaled_dot_product_attention(q, k, v, attn_mask=causal)), layer["o"])
                q = F.linear(F.rms_norm(x, (shape.width,)), layer["cq"]).view(rows, length, shape.heads, -1)
                seen = F.scaled_dot_product_attention(q.transpose(1, 2), far_k, far_v)
                x = x + F.linear(_merged(seen), layer["co"])
            else:
                k, v = torch.cat([far_k, k], dim=2), torch.cat([far_v, v], dim=2)
                mask = torch.cat([causal.new_ones(length, shape.prompt), causal], dim=1)
                seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
                x = x + F.linear(_merged(seen), layer["o"])
            x = x + self.feed_forward(layer, F.rms_norm(x, (shape.width,)))
        return F.rms_norm(x[:, -1], (shape.width,))


def _merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


class Trie:
    """Random SIDs as CSR arrays on the device, with the chunks that hold all children of any K nodes."""

    def __init__(self, shape: Shape, device: str) -> None:
        generator = torch.Generator().manual_seed(1)
        columns = [torch.randint(size, (shape.items,), generator=generator) for size in shape.sizes]
        sids = torch.unique(torch.stack(columns, dim=1), dim=0)
        self.first: list[Tensor] = []
        self.codes: list[Tensor] = []
        self.chunk: list[tuple[int, int]] = []
        parent, nodes = torch.zeros(len(sids), dtype=torch.int64), 1
        for level in range(len(shape.sizes)):
            opens = torch.ones(len(sids), dtype=torch.bool)
            opens[1:] = (sids[1:, : level + 1] != sids[:-1, : level + 1]).any(dim=1)
            degree = torch.bincount(parent[opens], minlength=nodes)
            self.first.append(F.pad(degree.cumsum(0), (1, 0)).to(device))
            self.codes.append(sids[opens, level].to(device))
            largest = degree.sort(descending=True).values[: shape.beams]
            step = 1 << max(0, int(largest.float().mean().ceil()) - 1).bit_length()
            self.chunk.append((int((-(-largest // step)).sum()), step))
            parent, nodes = opens.cumsum(0) - 1, int(opens.sum())


def search(decoder: Decoder, trie: Trie) -> tuple[Tensor, Tensor]:
    """The best leaves int64 [n] and scores float32 [n]; every shape depends on the level only."""
    shape, device = decoder.shape, decoder.tokens.device
    tokens = torch.zeros(1, dtype=torch.int64, device=device)
    parents, nodes, scores = tokens, tokens, torch.zeros(1, device=device)
    state = [decoder.tokens.new_zeros(2, 0, 1, shape.groups * shape.head)] * shape.layers
    for level in range(len(shape.sizes)):
        hidden, state = decoder.step(tokens, parents, state)
        gain = decoder.head(hidden, level)
        first, (rows, step) = trie.first[level], trie.chunk[level]
        start = first[nodes]
        degree = torch.where(scores > -torch.inf, first[nodes + 1] - start, 0)
        count = (degree + step - 1) // step
        end = count.cumsum(0)
        row = torch.arange(rows, device=device)
        beam = (row[:, None] >= end).sum(1)
        used, beam = beam < len(nodes), beam.clamp(max=len(nodes) - 1)
        inside = ((row - (end - count)[beam]) * step)[:, None] + torch.arange(step, device=device)
        valid = used[:, None] & (inside < degree[beam][:, None])
        child = torch.where(valid, start[beam][:, None] + inside, 0)
        code, beam = trie.codes[level][child], beam[:, None].expand_as(child)
        total = torch.where(valid, scores[beam] + gain[beam, code], -torch.inf).flatten()
        scores, kept = torch.topk(total, min(shape.beams, len(total)))
        parents, nodes = beam.flatten()[kept], child.flatten()[kept]
        tokens = code.flatten()[kept] + 1 + sum(shape.sizes[:level])
    return nodes[: shape.top_n], scores[: shape.top_n]


def check(decoder: Decoder, trie: Trie, tolerance: float) -> None:
    """Raises SystemExit unless the search finds what a plain search finds, near ties apart."""
    shape = decoder.shape
    beams: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, (0,))]
    for level in range(len(shape.sizes)):
        prefixes = torch.tensor([prefix for _, _, prefix in beams], device=decoder.tokens.device)
        gain = torch.cat([decoder.head(decoder.plain(part), level) for part in torch.split(prefixes, 64)]).cpu()
        first, codes = trie.first[level].tolist(), trie.codes[level].cpu()
        offset, grown = 1 + sum(shape.sizes[:level]), []
        for (score, node, prefix), row in zip(beams, gain, strict=True):
            edges = range(first[node], first[node + 1])
            own = codes[edges.start : edges.stop]
            gains = zip(edges, own.tolist(), row[own].tolist(), strict=True)
            grown += [(score + gain, edge, (*prefix, offset + code)) for edge, code, gain in gains]
        beams = sorted(grown, key=lambda beam: (-beam[0], beam[1]))[: shape.beams]
    leaves, scores = search(decoder, trie)
    expected = torch.tensor([score for score, _, _ in beams[: shape.top_n]])
    gap = (scores.cpu() - expected).abs().max().item()
    common = len({leaf for _, leaf, _ in beams[: shape.top_n]} & set(leaves.tolist())) / len(leaves)
    if gap > tolerance or common < 0.9:
        raise SystemExit(f"check failed: scores differ by {gap:.3g}, {common:.2f} of the results in common")


def floor_ms(decoder: Decoder, device: str) -> float:
    """Time the products and the reads of all levels cannot be faster than, at measured peaks."""
    shape, dtype = decoder.shape, decoder.tokens.dtype
    size = 4096 if device == "cuda" else 512
    a = torch.randn(size, size, device=device, dtype=dtype)
    flops = 2 * size**3 / median_ms(lambda: a @ a, device)
    block = torch.empty((1 << 28) if device == "cuda" else (1 << 24), device=device, dtype=torch.uint8)
    speed = 2 * block.numel() / median_ms(lambda: block.clone(), device)
    per_token = sum(weight.numel() for layer in decoder.layers for weight in layer.values())
    per_token += 2 * shape.layers * shape.prompt * shape.heads * shape.head
    context = sum(k.numel() + v.numel() for k, v in decoder.context)
    read = sum(weight.numel() for layer in decoder.layers for weight in layer.values()) + context
    total = 0.0
    for level in range(len(shape.sizes)):
        beams = 1 if level == 0 else shape.beams
        products = 2 * beams * (per_token + shape.sizes[level] * shape.width)
        state = 2 * shape.layers * level * beams * shape.groups * shape.head
        total += max(products / flops, (read + state) * decoder.tokens.element_size() / speed)
    return total


def median_ms(run: Callable[[], object], device: str) -> float:
    """Median wall time of a call, in milliseconds."""
    times = []
    for i in range(WARM_UP + RUNS):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= WARM_UP:
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def captured(run: Callable[[], tuple[Tensor, Tensor]]) -> torch.cuda.CUDAGraph:
    """The call as one CUDA graph. Fails if anything in it would go through the host."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def generate_ms(shape: Shape, device: str, dtype: torch.dtype) -> float | None:
    """`transformers.generate` with as many beams and levels on the same shape; None without transformers."""
    try:
        from transformers import BartConfig, BartForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        return None
    ids = {"vocab_size": shape.text + sum(shape.sizes), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if shape.cross:
        sides = ("encoder", "decoder")
        sizes = {f"{side}_layers": shape.layers for side in sides} | {
            f"{side}_ffn_dim": shape.ffn for side in sides
        }
        heads = {f"{side}_attention_heads": shape.heads for side in sides}
        start = {"decoder_start_token_id": 1, "forced_eos_token_id": None}
        model = BartForConditionalGeneration(BartConfig(d_model=shape.width, **ids, **sizes, **heads, **start))
    else:
        sizes = {"hidden_size": shape.width, "intermediate_size": shape.ffn, "head_dim": shape.head}
        heads = {"num_attention_heads": shape.heads, "num_key_value_heads": shape.groups}
        depth = {"num_hidden_layers": shape.layers, "tie_word_embeddings": True}
        model = Qwen3ForCausalLM(Qwen3Config(**ids, **sizes, **heads, **depth))
    model = model.to(device, dtype).eval()
    prompt = torch.full((1, shape.prompt), 5, device=device)
    levels = len(shape.sizes)
    options = {"num_beams": shape.beams, "num_return_sequences": shape.top_n, "do_sample": False}
    lengths = {"min_new_tokens": levels, "max_new_tokens": levels}
    mask = torch.ones_like(prompt)
    return median_ms(lambda: model.generate(prompt, attention_mask=mask, **options, **lengths), device)


@torch.inference_mode()
def measure(shape: Shape, device: str) -> dict[str, object]:
    """Check, then time; the row that is printed."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    decoder, trie = Decoder(shape, device, dtype), Trie(shape, device)
    check(decoder, trie, 0.25 if dtype == torch.bfloat16 else 1e-4)
    row: dict[str, object] = {
        "shape": shape.name,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "type": str(dtype).removeprefix("torch."),
        "beams": shape.beams,
        "prompt": shape.prompt,
        "sids": len(trie.codes[-1]),
        "checked": True,
        "eager_ms": median_ms(lambda: search(decoder, trie), device),
        "graph_ms": None,
        "generate_ms": generate_ms(shape, device, dtype),
        "floor_ms": floor_ms(decoder, device),
    }
    if device == "cuda":
        row["graph_ms"] = median_ms(captured(lambda: search(decoder, trie)).replay, device)
    return row


def main() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: both")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy size, to try the code")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device")
    for name in arguments.shape or SHAPES:
        shape = tiny(SHAPES[name]) if arguments.tiny else SHAPES[name]
        row = measure(replace(shape, name=f"{name} (tiny)") if arguments.tiny else shape, arguments.device)
        print(json.dumps(row) if arguments.json else "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
