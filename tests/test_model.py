from typing import get_args

import numpy as np
import pytest
import torch
from tiny import HISTORY_DIM, SHAPES, SIZES, tiny_model, tiny_prompt, tiny_renderer
from transformers import AutoConfig, AutoModel, BartConfig, GPT2Config, Qwen3Config

from onesearch.decode import BeamConfig, beam_search
from onesearch.errors import BundleError, ConfigError
from onesearch.model import OneSearchModel, TorchDecoder
from onesearch.model_config import HistoryMode, ModelConfig
from onesearch.pretrained import from_pretrained
from onesearch.sequence import Fields, Prompt
from trie import SidTrie


@pytest.fixture(scope="module")
def renderer():
    return tiny_renderer()


@pytest.fixture(scope="module", params=[(name, kind) for name in SHAPES for kind in get_args(HistoryMode)])
def model(renderer, request):
    return tiny_model(renderer, 0, *request.param)


def batch(prompts, pad):
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt.ids)] = torch.from_numpy(prompt.ids)
    history = torch.from_numpy(np.stack([p.history for p in prompts]))
    return ids, (ids != pad).long(), history


def embedded_prompt(model, prompt):
    ids = torch.from_numpy(prompt.ids)[None]
    embeds = model.backbone.get_input_embeddings()(ids)
    vectors = model.history(torch.from_numpy(prompt.history)[None])[0]
    for vector, token in zip(vectors, model.config.history_ids, strict=True):
        embeds = embeds + (ids == token)[..., None] * vector
    return embeds


def last_hidden(model, prompt, target):
    """What `transformers` itself computes after the last of the target inputs [1, T]."""
    network, embeds = model.backbone, embedded_prompt(model, prompt)
    if model.config.backbone == "bart":
        return network(inputs_embeds=embeds, decoder_input_ids=target).last_hidden_state[0, -1]
    read = network(inputs_embeds=embeds, use_cache=True)
    for token in target[0]:
        read = network(input_ids=token.view(1, 1), cache=read.cache, use_cache=True)
    return read.last_hidden_state[0, -1]


@torch.no_grad()
def reference_logits(model, prompt: Prompt, codes):
    """Next-level logits [K, size] of each prefix by `transformers` alone, one prefix at a time, its KV cache in use
    where the network is decoder-only, head over all tokens."""
    vocab, level = model.config.sids, codes.shape[1]
    rows = []
    for prefix in vocab.token_ids(codes):
        hidden = last_hidden(model, prompt, torch.tensor([[model.config.bos, *prefix]]))
        scores = model.backbone.get_input_embeddings().weight @ hidden + model.head_bias
        rows.append(scores[slice(*vocab.level_range(level))].numpy())
    return np.stack(rows)


def walk(rng, sizes=SIZES, beams=9):
    """Codes [K, t] and parents [K] of a made-up search that reorders and repeats its beams."""
    codes, parents = np.empty((1, 0), np.uint16), np.zeros(1, np.int64)
    yield codes, parents
    for size in sizes[:-1]:
        parents = rng.integers(0, len(codes), beams)
        codes = np.column_stack([codes[parents], rng.integers(0, size, beams).astype(np.uint16)])
        yield codes, parents


def test_step_equals_a_full_forward_of_every_prefix(renderer, model):
    prompt = tiny_prompt(renderer)
    step = TorchDecoder(model, renderer).start(prompt)
    for codes, parents in walk(np.random.default_rng(1)):
        logits = step(codes, parents)
        assert logits.dtype == np.float32 and logits.flags.c_contiguous
        np.testing.assert_allclose(logits, reference_logits(model, prompt, codes), atol=1e-5)


def test_a_step_follows_the_last_one(renderer, model):
    step = TorchDecoder(model, renderer).start(tiny_prompt(renderer))
    first = (np.empty((1, 0), np.uint16), np.zeros(1, np.int64))
    step(*first)
    with pytest.raises(ValueError, match="expected 1"):
        step(*first)


def test_teacher_forcing_predicts_every_level_from_its_prefix(renderer, model):
    prompt = tiny_prompt(renderer)
    codes = np.array([[6, 4, 3, 2, 5]], np.uint16)
    logits = model.sid_logits(*batch([prompt], renderer.pad), torch.from_numpy(renderer.sids.token_ids(codes)))
    assert [tuple(level.shape) for level in logits] == [(1, size) for size in SIZES]
    for level, scores in enumerate(logits):
        expected = reference_logits(model, prompt, codes[:, :level])
        np.testing.assert_allclose(scores.detach().numpy(), expected, atol=1e-5)


def test_padding_changes_nothing(renderer, model):
    prompts = [tiny_prompt(renderer), renderer.prompt("query_to_sid", Fields(query="bag"))]
    target = torch.from_numpy(renderer.sids.token_ids(np.array([[1, 2, 3, 0, 4], [0, 1, 2, 2, 1]])))
    both = model.sid_logits(*batch(prompts, renderer.pad), target)
    alone = model.sid_logits(*batch(prompts[1:], renderer.pad), target[1:])
    for together, single in zip(both, alone, strict=True):
        torch.testing.assert_close(together[1:], single, atol=1e-5, rtol=1e-5)


def test_text_logits_are_causal_over_the_full_vocabulary(renderer, model):
    inputs = batch([tiny_prompt(renderer)], renderer.pad)
    target = torch.from_numpy(renderer.target("blue bag"))[None]
    logits = model.text_logits(*inputs, target)
    assert logits.shape == (1, target.shape[1], renderer.vocab_size)
    changed = target.clone()
    changed[0, -2:] = renderer.pad
    torch.testing.assert_close(model.text_logits(*inputs, changed)[:, :-1], logits[:, :-1])


def test_history_vectors_enter_only_at_their_placeholders(renderer, model):
    history = torch.randn(1, 2, 3, HISTORY_DIM)
    ids = torch.tensor([[renderer.bos, renderer.history_ids[1], renderer.eos]])
    moved = model.embed_prompt(ids, history) - model.embed(ids)
    torch.testing.assert_close(moved[0, 1], model.history(history)[0, 1])
    assert moved[0, [0, 2]].abs().max() == 0


@pytest.mark.parametrize("kind", get_args(HistoryMode))
@pytest.mark.parametrize("backbone", SHAPES)
def test_gradients_reach_history_and_both_ends_of_the_tied_embedding(renderer, backbone, kind):
    model = tiny_model(renderer, backbone=backbone, history=kind).train()
    target = torch.from_numpy(renderer.sids.token_ids(np.array([[1, 2, 3, 0, 4]])))
    sum(
        level.logsumexp(-1).sum() for level in model.sid_logits(*batch([tiny_prompt(renderer)], 0), target)
    ).backward()
    learned = model.history.gates if kind == "gates" else model.history.behaviours
    assert all(part.grad.abs().sum() > 0 for part in (model.history.projection.weight, learned))
    first = renderer.sids.first_id
    assert (model.embedding.grad[first : first + sum(SIZES)].abs().sum(1) > 0).all()


def test_weights_round_trip(renderer, model, tmp_path):
    path = tmp_path / "weights.safetensors"
    model.save_weights(path)
    other = tiny_model(renderer, 1, model.config.backbone, model.config.history)
    other.load_weights(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    if model.config.backbone == "bart":
        assert other.bart.encoder.embed_tokens.weight is other.bart.shared.weight
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_foreign_or_damaged_weights_are_refused(renderer, tmp_path):
    model = tiny_model(renderer)
    path = tmp_path / "weights.safetensors"
    model.save_weights(path)
    wide = OneSearchModel(ModelConfig.for_renderer(renderer, d_model=16, heads=2))
    with pytest.raises(BundleError, match=r"(?s)'history\.behaviours': is missing.*'history\.gates': is unknown"):
        tiny_model(renderer, history="qformer").load_weights(path)
    with pytest.raises(BundleError, match=r"'bart.*is unknown.*\n?.*'gpt2.*is missing"):
        tiny_model(renderer, backbone="gpt2").load_weights(path)
    with pytest.raises(BundleError, match=r"has shape .*, expected"):
        wide.load_weights(path)
    model.save_weights(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError, match="weights"):
        model.load_weights(path)


def test_the_hidden_state_that_predicts_a_target_does_not_depend_on_the_padding_before_it(renderer, model):
    """What a student and a teacher prompt of other lengths compare (spec §4.4): target by target."""
    prompts = [renderer.prompt("search", Fields(query="bag", keywords=k)) for k in ((), ("blue", "red shoes"))]
    ids, mask, history = batch(prompts, renderer.pad)
    target = torch.from_numpy(renderer.sids.token_ids(np.array([[1, 2, 3, 0, 4]] * 2)))
    both = model.decode(model.encode(ids, mask, history), mask, target)
    short = len(prompts[0].ids)
    one = (ids[:1, :short], mask[:1, :short], history[:1])
    alone = model.decode(model.encode(*one), one[1], target[:1])
    assert both.shape == (2, 5, 32) and not torch.allclose(both[0], both[1], atol=1e-2)
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=1e-5)


def test_config_round_trips_and_names_what_is_wrong(renderer, model):
    assert ModelConfig.from_json(model.config.to_json()) == model.config
    with pytest.raises(ConfigError, match="dmodel"):
        ModelConfig.for_renderer(renderer, dmodel=3)
    with pytest.raises(ConfigError, match="max_positions: 64"):
        ModelConfig.for_renderer(renderer, max_positions=64)
    with pytest.raises(ConfigError, match="max_positions: 96"):
        ModelConfig.for_renderer(renderer, backbone="gpt2", max_positions=96)
    with pytest.raises(ConfigError, match="multiple"):
        ModelConfig.for_renderer(renderer, d_model=30, heads=4)
    with pytest.raises(ConfigError, match=r"heads: 4 is not a multiple of model\.kv_heads 3"):
        ModelConfig.for_renderer(renderer, backbone="qwen3", kv_heads=3)
    with pytest.raises(ConfigError, match="kv_heads"):
        ModelConfig.for_renderer(renderer, kv_heads=2)
    with pytest.raises(ConfigError, match="backbone: 'mamba' is unknown, expected one of 'bart', 'gpt2', 'qwen3'"):
        ModelConfig.for_renderer(renderer, backbone="mamba")
    with pytest.raises(ConfigError, match="history: 'mean' is unknown, expected one of 'gates', 'qformer'"):
        ModelConfig.for_renderer(renderer, history="mean")
    with pytest.raises(ConfigError, match="colour"):
        ModelConfig.from_json(b'{"colour": 1}')


def hf_config(backbone, rows, **changes):
    size = dict(vocab_size=rows, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if backbone == "bart":
        shape = dict(d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48)
        shape |= dict(decoder_attention_heads=4, decoder_ffn_dim=48, max_position_embeddings=256)
        return BartConfig(**size | shape | changes)
    if backbone == "gpt2":
        return GPT2Config(**size | dict(n_embd=32, n_layer=2, n_head=4, n_positions=256) | changes)
    shape = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    shape |= dict(intermediate_size=48, tie_word_embeddings=True)
    return Qwen3Config(
        **size | shape | dict(rope_parameters={"rope_type": "default", "rope_theta": 1e6}) | changes
    )


def checkpoint(folder, backbone, rows, **changes):
    torch.manual_seed(3)
    network = AutoModel.from_config(hf_config(backbone, rows, **changes)).eval()
    network.save_pretrained(folder)
    return network


@pytest.mark.parametrize("backbone", SHAPES)
def test_a_pretrained_checkpoint_keeps_its_function_and_gains_rows(renderer, tmp_path, backbone):
    network = checkpoint(tmp_path, backbone, renderer.sids.first_id)
    model = from_pretrained(tmp_path, renderer).eval()
    prompt = renderer.prompt("query_to_sid", Fields(query="red shoes"))
    ids, target = torch.from_numpy(prompt.ids)[None], torch.from_numpy(renderer.target("blue bag"))[None]
    inputs = torch.cat([torch.full((1, 1), renderer.bos), target[:, :-1]], dim=1)
    if backbone == "bart":
        expected = network(input_ids=ids, decoder_input_ids=inputs).last_hidden_state
    else:
        expected = network(input_ids=torch.cat([ids, inputs], 1)).last_hidden_state[:, ids.shape[1] :]
    mask = torch.ones_like(ids)
    found = model.decode(model.encode(ids, mask, torch.zeros(1, 2, 3, HISTORY_DIM)), mask, target)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert len(model.embedding) == renderer.vocab_size
    assert model.embedding[renderer.sids.first_id :].std() > 0


def test_a_checkpoint_that_would_compute_something_else_is_refused(renderer, tmp_path):
    rows = renderer.sids.first_id
    faults = {
        ("bart", "tokens"): dict(rows=rows + 1),
        ("bart", "has 9 tokens, the tokenizer"): dict(rows=9),
        ("bart", "scale_embedding is True, expected False.*|activation_function is 'relu'"): dict(
            scale_embedding=True, activation_function="relu"
        ),
        ("gpt2", "scale_attn_by_inverse_layer_idx"): dict(scale_attn_by_inverse_layer_idx=True),
        ("qwen3", "tie_word_embeddings is False, expected True"): dict(tie_word_embeddings=False),
    }
    for number, ((backbone, message), changes) in enumerate(faults.items()):
        hf_config(backbone, **{"rows": rows} | changes).save_pretrained(tmp_path / str(number))
        with pytest.raises(ConfigError, match=message):
            from_pretrained(tmp_path / str(number), renderer)
    AutoConfig.for_model("mamba").save_pretrained(tmp_path / "mamba")
    with pytest.raises(ConfigError, match="model_type is 'mamba', expected one of bart, gpt2, qwen3"):
        from_pretrained(tmp_path / "mamba", renderer)
    with pytest.raises(ConfigError, match="cannot be read"):
        from_pretrained(tmp_path / "nothing", renderer)


@torch.no_grad()
def plain_beam_search(model, prompt, sids, width, top_n):
    """Beam search with PyTorch alone: every prefix run as a whole, log-softmax, legal children looked up in a set."""
    ids, mask, history = batch([prompt], 0)
    beams, scores = torch.empty((1, 0), dtype=torch.int64), torch.zeros(1)
    for level in range(sids.shape[1]):
        legal = {tuple(sid) for sid in sids[:, : level + 1].tolist()}
        target = torch.cat([beams, torch.zeros((len(beams), sids.shape[1] - level), dtype=torch.int64)], dim=1)
        tokens = torch.from_numpy(model.config.sids.token_ids(target.numpy()))
        repeated = [each.expand(len(beams), *each.shape[1:]) for each in (ids, torch.ones_like(mask), history)]
        found = scores[:, None] + torch.log_softmax(model.sid_logits(*repeated, tokens)[level], dim=-1)
        children = [
            (float(score), [*beam, code])
            for beam, row in zip(beams.tolist(), found, strict=True)
            for code, score in enumerate(row)
            if (*beam, code) in legal
        ]
        children.sort(key=lambda each: -each[0])
        children = children[: top_n if level + 1 == sids.shape[1] else width]
        beams, scores = torch.tensor([sid for _, sid in children]), torch.tensor([score for score, _ in children])
    return beams.numpy(), scores.numpy()


def test_a_search_finds_what_plain_pytorch_finds(renderer, model):
    rng = np.random.default_rng(4)
    trie = SidTrie.build(np.stack([rng.integers(0, size, 900) for size in SIZES], axis=1), SIZES)
    prompt = tiny_prompt(renderer)
    found = beam_search(TorchDecoder(model, renderer).start(prompt), trie, BeamConfig(width=64, top_n=50))
    codes, scores = plain_beam_search(model, prompt, trie.sids(), 64, 50)
    assert len(found.scores) == 50
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    close = np.minimum(np.diff(-scores, prepend=-np.inf), np.diff(-scores, append=np.inf)) < 1e-4
    assert (found.codes == codes).all(axis=1)[~close].all()
