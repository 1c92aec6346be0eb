"""Text embedders: hashing, invariance to the batch, fitting on clicks, files, and parity of the ONNX export."""

import json
from pathlib import Path

import numpy as np
import pytest

from onesearch.embedder import HashedEmbedder, KeywordEmbedder, hash_features, open_embedder
from onesearch.errors import BundleError, ConfigError
from onesearch.keywords import KeywordRules
from training.embedder import ClickPairs, EmbedderConfig, fit_embedder

TEXTS = [
    "red running shoes",
    "Red  RUNNING shoes",
    "红色跑步鞋",
    "",
    "   ",
    "a",
    "x" * 256,
    "lámpara de pie",
    "\x00<>",
]
SMALL = EmbedderConfig(buckets=2048, svd_dim=16, dim=8, batch=32)


@pytest.fixture(scope="module")
def embedder() -> HashedEmbedder:
    return HashedEmbedder(np.random.default_rng(0).standard_normal((4096, 16)))


def naive_features(text: str) -> set[str]:
    """Padded n-grams inside words, whole words, CJK unigrams and bigrams, written the slow way."""
    grams = set()
    for word in text.split():
        padded = f" {word} "
        grams |= {padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1)} | {f"word:{word}"}
        grams |= {word[i : i + n] for n in (1, 2) for i in range(len(word) - n + 1) if min(word[i : i + n]) >= "぀"}
    return grams


@pytest.mark.parametrize(
    "text", ["red running shoes", "a", "usb c hub", "红色跑步鞋", "red 红色鞋", "shoes shoes"]
)
def test_hashed_features_are_the_padded_n_grams_and_words(text: str) -> None:
    features = hash_features([text], 1 << 31)
    assert len(features.columns) == len(naive_features(text))


def test_a_repeated_word_counts_twice_and_features_do_not_cross_texts() -> None:
    once, twice = hash_features(["shoe"], 1 << 31), hash_features(["shoe shoe"], 1 << 31)
    assert once.columns.tolist() == twice.columns.tolist()
    assert (twice.counts == 2).all()
    both = hash_features(["ab", "", "cd"], 1 << 31)
    alone = [hash_features([text], 1 << 31).columns.tolist() for text in ("ab", "cd")]
    assert [both.columns[both.rows == row].tolist() for row in (0, 1, 2)] == [alone[0], [], alone[1]]


def test_rows_are_unit_vectors_for_any_text(embedder: HashedEmbedder) -> None:
    vectors = embedder.embed(TEXTS)
    assert vectors.dtype == np.float32 and vectors.shape == (len(TEXTS), 16)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (vectors[3] == vectors[4]).all() and (vectors[0] == vectors[1]).all()
    assert embedder.embed([]).shape == (0, 16)


def test_a_text_alone_and_in_a_large_batch_gives_the_same_bits(embedder: HashedEmbedder) -> None:
    texts = [f"item {i} of {i % 7} 号" for i in range(1200)]
    batch = embedder.embed(texts)
    assert all((embedder.embed([texts[i]])[0] == batch[i]).all() for i in range(0, 1200, 37))


def test_texts_sharing_word_parts_are_closer_than_others_also_in_chinese() -> None:
    embedder = HashedEmbedder(np.random.default_rng(0).standard_normal((4096, 256)))
    shoes, shoe, lamp = embedder.embed(["running shoes", "running shoe", "desk lamp"])
    assert shoes @ shoe > shoes @ lamp + 0.3
    red, also_red, carpet = embedder.embed(["红色跑步鞋", "跑步鞋红色", "床边地毯"])
    assert red @ also_red > red @ carpet + 0.2


def test_save_and_open_gives_the_same_bits(embedder: HashedEmbedder, tmp_path: Path) -> None:
    embedder.save(tmp_path / "embedder")
    opened = open_embedder(tmp_path / "embedder")
    assert (opened.embed(TEXTS) == embedder.embed(TEXTS)).all()
    assert sorted(p.name for p in (tmp_path / "embedder").iterdir()) == ["config.json", "weights.npz"]


def test_a_damaged_folder_is_refused_with_its_faults(embedder: HashedEmbedder, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be read as JSON"):
        open_embedder(tmp_path)
    embedder.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"kind": "word2vec"}, {"buckets": -1, "dim": "8"}, {"dim": 3}, {"version": 99}):
        (tmp_path / "config.json").write_text(json.dumps(config | wrong))
        with pytest.raises(BundleError) as raised:
            open_embedder(tmp_path)
        assert len(raised.value.faults) == len(wrong)
    (tmp_path / "config.json").write_text(json.dumps(config))
    whole = (tmp_path / "weights.npz").read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:5000] + bytes([whole[5000] ^ 255]) + whole[5001:],
        b"",
        b"junk",
    ):
        (tmp_path / "weights.npz").write_bytes(damaged)
        with pytest.raises(BundleError, match=r"weights\.npz"):
            open_embedder(tmp_path)


def test_a_pickled_archive_is_rejected(embedder: HashedEmbedder, tmp_path: Path) -> None:
    embedder.save(tmp_path)
    np.savez(tmp_path / "weights.npz", matrix=np.array([{"a": 1}], dtype=object))
    with pytest.raises(BundleError, match="allow_pickle"):
        open_embedder(tmp_path)


def shop(seed: int = 0) -> tuple[list[str], list[str], list[int]]:
    """Titles, queries that share no character with them, and each query's item."""
    nouns = [f"{a}{b}" for a in ("bako", "deni", "fulo", "giru") for b in ("ma", "ne", "ti")]
    aliases = [f"{a}{b}" for a in ("xyzz", "wvqq", "hjkk", "pccs") for b in ("1x", "2y", "3z")]
    chosen = np.random.default_rng(seed).integers(0, len(nouns), 400)
    titles = [f"{nouns[n]} {i % 10}{i % 7}" for i, n in enumerate(chosen)]
    return titles, [aliases[n] for n in chosen], list(range(400))


def test_clicks_teach_queries_the_items_they_share_no_word_with() -> None:
    titles, queries, _ = shop()
    pairs = ClickPairs(np.arange(300) + 400, np.arange(300), np.full(300, -1))
    config = EmbedderConfig(buckets=2048, svd_dim=16, dim=8, batch=32, epochs=2, finetune_epochs=5, lr=0.02)
    plain = fit_embedder(titles + queries, None, config)
    taught = fit_embedder(titles + queries, pairs, config)
    held = slice(300, 400)

    def top10_share(embedder: HashedEmbedder) -> float:
        scores = embedder.embed(queries[held]) @ embedder.embed(titles).T
        top = np.argsort(-scores, axis=1)[:, :10]
        return float(
            np.mean([[queries[i] == queries[q] for i in row] for q, row in zip(range(300, 400), top, strict=True)])
        )

    assert top10_share(plain) < 0.4 < 0.9 < top10_share(taught)


def test_the_margin_loss_puts_the_lower_item_further_away() -> None:
    texts = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    clicked = ClickPairs(np.zeros(64, np.int64), np.ones(64, np.int64), np.full(64, -1))
    ranked = ClickPairs(clicked.query, clicked.item, np.full(64, 2))
    config = EmbedderConfig(buckets=512, svd_dim=6, dim=6, batch=16, epochs=10, finetune_epochs=0)
    gaps = []
    for pairs in (clicked, ranked):
        query, item, lower = fit_embedder(texts, pairs, config).embed(texts[:3])
        gaps.append(float(query @ item - query @ lower))
    assert gaps[1] > gaps[0] + 0.05


def test_fitting_is_deterministic_and_reports_progress() -> None:
    titles, queries, _ = shop()
    pairs = ClickPairs(np.arange(100) + 400, np.arange(100), np.full(100, -1))
    stages: dict[str, tuple[int, int]] = {}
    first = fit_embedder(
        titles + queries, pairs, SMALL, lambda stage, done, total: stages.update({stage: (done, total)})
    )
    second = fit_embedder(titles + queries, pairs, SMALL)
    assert (first.embed(titles) == second.embed(titles)).all()
    assert len(stages) == 4 and all(done == total for done, total in stages.values())


def test_fewer_texts_than_dimensions_still_give_an_embedder() -> None:
    embedder = fit_embedder(["one", "two"], None, SMALL)
    np.testing.assert_allclose(np.linalg.norm(embedder.embed(["one", "unseen words"]), axis=1), 1, atol=1e-6)


def test_wrong_settings_name_the_key_and_the_value() -> None:
    with pytest.raises(ConfigError, match="embedder dim: 64, expected at most svd_dim = 8"):
        EmbedderConfig(svd_dim=8)
    with pytest.raises(ConfigError, match="batch: 0"):
        EmbedderConfig(batch=0)
    with pytest.raises(ConfigError, match="texts"):
        fit_embedder([], None, SMALL)


def test_keywords_pull_a_text_half_way_and_excluded_types_do_not(embedder: HashedEmbedder, tmp_path: Path) -> None:
    rules = KeywordRules({"running shoes": "Entity", "red": "Color", "bestseller": "Marketing"})
    enhanced = KeywordEmbedder(embedder, rules)
    text = "bestseller red running shoes, red"
    own, red, shoes = embedder.embed([text, "red", "running shoes"])
    expected = own / 2 + (red + shoes) / 4  # V1 Eq. 2: half the text, half the mean of its keywords
    np.testing.assert_allclose(enhanced.embed([text])[0], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(enhanced.embed(["shredder"]), embedder.embed(["shredder"]), atol=1e-6)
    enhanced.save(tmp_path / "khqe")
    opened = open_embedder(tmp_path / "khqe")
    assert (opened.embed([text, "shredder", ""]) == enhanced.embed([text, "shredder", ""])).all()
    assert enhanced.embed([]).shape == (0, 16)
    assert (KeywordEmbedder(embedder, KeywordRules()).embed([text]) == embedder.embed([text])).all()
    config = json.loads((tmp_path / "khqe" / "config.json").read_text())
    (tmp_path / "khqe" / "config.json").write_text(json.dumps(config | {"excluded": "Marketing"}))
    with pytest.raises(BundleError, match="excluded"):
        open_embedder(tmp_path / "khqe")
