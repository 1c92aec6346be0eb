"""A local transformers folder becomes a bundle: tokens added, weights kept, whole or not at all."""

import orjson
import pytest
import torch
from test_export import command
from test_model import hf_config
from tiny_bundle import write_tiny_identifiers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModel, PreTrainedTokenizerFast

from model_export.from_hf import wrap
from onesearch.bundle import open_bundle
from onesearch.errors import BundleError, ConfigError
from onesearch.model import TorchDecoder, open_model
from onesearch.search import Searcher, replay


@pytest.fixture(scope="module")
def identifiers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrap") / "identifiers"
    write_tiny_identifiers(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny GPT-2 with a tokenizer of its own and, as published checkpoints have, some rows nobody uses."""
    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    tokenizer.train_from_iterator(["red shoes", "blue bag"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(1)
    AutoModel.from_config(hf_config("gpt2", tokenizer.get_vocab_size() + 3)).save_pretrained(folder)
    return folder


def test_a_checkpoint_becomes_a_bundle_that_searches(identifiers, checkpoint, tmp_path):
    manifest = wrap(checkpoint, identifiers / "sid_spec.json", tmp_path / "bundle")
    bundle, model = open_bundle(tmp_path / "bundle"), open_model(tmp_path / "bundle")
    assert manifest.recipe["from_hf"] == "gpt2" and model.config.backbone == "gpt2" and len(bundle.examples) == 8
    assert replay(Searcher(bundle, TorchDecoder(model, bundle.renderer)), bundle.examples) == []
    known = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).get_vocab_size()
    old = AutoModel.from_pretrained(checkpoint).wte.weight
    assert torch.equal(model.embedding[:known], old[:known]) and len(model.embedding) == bundle.renderer.vocab_size
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_every_fault_is_listed_and_nothing_is_written(identifiers, checkpoint, tmp_path):
    (tmp_path / "sid_spec.json").write_bytes(orjson.dumps({"sizes": [4, 3, 3, 2, 2]}))
    (tmp_path / "bundle").mkdir()
    with pytest.raises(BundleError) as error:
        wrap(tmp_path / "nowhere", tmp_path / "sid_spec.json", tmp_path / "bundle")
    faults = "\n".join(error.value.faults)
    assert all(text in faults for text in ("codebooks.npz: is missing", "not a folder", "exists already"))
    with pytest.raises(ConfigError, match=r"no tokenizer|cannot be read"):
        wrap(identifiers, identifiers / "sid_spec.json", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "sid_spec.json"]
    result = command(tmp_path / "other", "--from-hf", checkpoint)
    assert result.exit_code == 2 and "--sid-spec: is missing" in result.output
