import numpy as np
import pytest
import torch
from tiny import HISTORY_DIM, SIZES, tiny_model, tiny_prompt, tiny_renderer
from transformers import BartConfig, BartModel

from onesearch.errors import BundleError, ConfigError
from onesearch.model import ModelConfig, OneSearchModel, TorchDecoder, from_pretrained
from onesearch.sequence import Fields, Prompt


@pytest.fixture(scope="module")
def renderer():
    return tiny_renderer()


@pytest.fixture(scope="module")
def model(renderer):
    return tiny_model(renderer)


def batch(prompts, pad):
    width = max(len(p.ids) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt.ids)] = torch.from_numpy(prompt.ids)
    history = torch.from_numpy(np.stack([p.history for p in prompts]))
    return ids, (ids != pad).long(), history


@torch.no_grad()
def reference_logits(model, prompt: Prompt, codes):
    """Next-level logits [K, size] of each prefix by one plain full forward per prefix, head over all tokens."""
    vocab, level = model.config.sids, codes.shape[1]
    ids = torch.from_numpy(prompt.ids)[None]
    embeds = model.bart.shared(ids)
    for slot, token in enumerate(model.config.history_ids):
        vector = model.history.weight @ torch.from_numpy(prompt.history[slot])
        embeds = embeds + (ids == token)[..., None] * vector
    rows = []
    for prefix in vocab.token_ids(codes):
        target = torch.tensor([[model.config.bos, *prefix]])
        hidden = model.bart(inputs_embeds=embeds, decoder_input_ids=target).last_hidden_state[0, -1]
        scores = model.bart.shared.weight @ hidden + model.head_bias
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
    history = torch.randn(1, 3, HISTORY_DIM)
    ids = torch.tensor([[renderer.bos, renderer.history_ids[1], renderer.eos]])
    moved = model.embed_prompt(ids, history) - model.bart.shared(ids)
    torch.testing.assert_close(moved[0, 1], model.history(history[0, 1]))
    assert moved[0, [0, 2]].abs().max() == 0


def test_gradients_reach_history_and_both_ends_of_the_tied_embedding(renderer):
    model = tiny_model(renderer).train()
    target = torch.from_numpy(renderer.sids.token_ids(np.array([[1, 2, 3, 0, 4]])))
    sum(
        level.logsumexp(-1).sum() for level in model.sid_logits(*batch([tiny_prompt(renderer)], 0), target)
    ).backward()
    assert model.history.weight.grad.abs().sum() > 0
    first = renderer.sids.first_id
    assert (model.embedding.grad[first : first + sum(SIZES)].abs().sum(1) > 0).all()


def test_weights_round_trip(renderer, model, tmp_path):
    path = tmp_path / "weights.safetensors"
    model.save_weights(path)
    other = tiny_model(renderer, seed=1)
    other.load_weights(path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert other.bart.encoder.embed_tokens.weight is other.bart.shared.weight
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_foreign_or_damaged_weights_are_refused(renderer, model, tmp_path):
    path = tmp_path / "weights.safetensors"
    model.save_weights(path)
    wide = OneSearchModel(ModelConfig.for_renderer(renderer, d_model=16, heads=2))
    with pytest.raises(BundleError, match=r"has shape .*, expected"):
        wide.load_weights(path)
    model.save_weights(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BundleError, match="weights"):
        model.load_weights(path)


def test_config_round_trips_and_names_what_is_wrong(renderer, model):
    assert ModelConfig.from_json(model.config.to_json()) == model.config
    with pytest.raises(ConfigError, match="dmodel"):
        ModelConfig.for_renderer(renderer, dmodel=3)
    with pytest.raises(ConfigError, match="max_positions: 64"):
        ModelConfig.for_renderer(renderer, max_positions=64)
    with pytest.raises(ConfigError, match="multiple"):
        ModelConfig.for_renderer(renderer, d_model=30, heads=4)
    with pytest.raises(ConfigError, match="colour"):
        ModelConfig.from_json(b'{"colour": 1}')


def checkpoint(folder, renderer, **changes):
    shape = dict(d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=48)
    shape |= dict(decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=renderer.sids.first_id) | changes
    bart = BartModel(BartConfig(**shape, max_position_embeddings=256, pad_token_id=renderer.pad)).eval()
    bart.save_pretrained(folder)
    return bart


def test_a_pretrained_checkpoint_keeps_its_function_and_gains_rows(renderer, tmp_path):
    bart = checkpoint(tmp_path, renderer)
    model = from_pretrained(tmp_path, renderer).eval()
    ids = torch.from_numpy(renderer.prompt("query_to_sid", Fields(query="red shoes")).ids)[None]
    expected = bart.encoder(input_ids=ids).last_hidden_state
    memory = model.encode(ids, torch.ones_like(ids), torch.zeros(1, 3, HISTORY_DIM))
    torch.testing.assert_close(memory, expected)
    assert len(model.embedding) == renderer.vocab_size
    assert model.embedding[renderer.sids.first_id :].std() > 0


def test_a_foreign_checkpoint_is_refused(renderer, tmp_path):
    checkpoint(tmp_path / "large", renderer, vocab_size=renderer.vocab_size + 1)
    with pytest.raises(ConfigError, match="tokens"):
        from_pretrained(tmp_path / "large", renderer)
    checkpoint(tmp_path / "scaled", renderer, scale_embedding=True)
    with pytest.raises(ConfigError, match="GELU"):
        from_pretrained(tmp_path / "scaled", renderer)
