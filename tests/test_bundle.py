"""The bundle: whole or not at all, every fault in one message, other contracts refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from tiny_bundle import GOLDEN, write_tiny_bundle

from onesearch import bundle as bundle_module
from onesearch.bundle import open_bundle, seal
from onesearch.errors import BundleError
from onesearch.model import OneSearchModel, TorchDecoder
from onesearch.search import Searcher, replay


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OneSearchModel]:
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def copy(made: tuple[Path, OneSearchModel], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "copy"))


def test_a_bundle_opens_and_replays_its_golden_examples(made: tuple[Path, OneSearchModel]) -> None:
    bundle = open_bundle(made[0])
    assert [example.context for example in bundle.examples] == list(GOLDEN)
    assert bundle.graphs is None
    assert bundle.catalog.num_items == 30
    searcher = Searcher(bundle, TorchDecoder(made[1], bundle.renderer))
    assert replay(searcher, bundle.examples) == []


def test_another_model_fails_the_golden_examples(made: tuple[Path, OneSearchModel]) -> None:
    bundle = open_bundle(made[0])
    other = OneSearchModel(made[1].config).eval()
    faults = replay(Searcher(bundle, TorchDecoder(other, bundle.renderer)), bundle.examples)
    assert len(faults) == len(GOLDEN)


def test_every_damaged_file_is_listed_in_one_message(copy: Path) -> None:
    weights = bytearray((copy / "weights.safetensors").read_bytes())
    weights[len(weights) // 2] ^= 1
    (copy / "weights.safetensors").write_bytes(weights)
    (copy / "trie.bin").write_bytes((copy / "trie.bin").read_bytes()[:-3])
    (copy / "keywords.json").unlink()
    (copy / "foreign.pkl").write_bytes(b"x")
    with pytest.raises(BundleError) as caught:
        open_bundle(copy)
    assert {fault.split(":")[0] for fault in caught.value.faults} == {
        *("weights.safetensors", "trie.bin", "keywords.json", "foreign.pkl")
    }


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_a_flipped_byte_in_any_file_is_noticed(copy: Path) -> None:
    for name in _names(copy):
        original = (copy / name).read_bytes()
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 0x20
        (copy / name).write_bytes(damaged)
        with pytest.raises(BundleError):
            open_bundle(copy)
        (copy / name).write_bytes(original)
    open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(schema_version=2),
            "schema_version is 2, this software reads 3; make the bundle again",
        ),
        (lambda m: m.update(schema_version=99), "schema_version is 99, this software reads 3"),
        (lambda m: m.update(digest="0" * 64), "contract digest"),
        (lambda m: m.pop("files"), "not a manifest"),
        (lambda m: m.update(surprise=1), "not a manifest"),
    ],
)
def test_a_foreign_manifest_is_refused(
    copy: Path, change: Callable[[dict[str, object]], object], message: str
) -> None:
    manifest = orjson.loads((copy / "manifest.json").read_bytes())
    change(manifest)
    (copy / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


def test_another_template_version_is_another_contract(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "TEMPLATE_VERSION", 3)
    with pytest.raises(BundleError, match="another version of the prompt or identifier code"):
        open_bundle(copy)


def test_histories_of_other_behaviours_are_another_contract(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_module, "BEHAVIOURS", ("order", "click"))
    with pytest.raises(BundleError, match="another version of the prompt or identifier code"):
        open_bundle(copy)


def test_a_missing_folder_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: is missing"):
        open_bundle(tmp_path / "nowhere")


def test_a_bundle_is_never_overwritten_and_every_missing_part_is_named(copy: Path, tmp_path: Path) -> None:
    (copy / "examples.jsonl").unlink()
    (copy / "model.json").unlink()
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(BundleError) as caught:
        seal(copy, target, recipe={}, metrics={}, created="now")
    assert len(caught.value.faults) == 3


def test_graphs_of_another_model_are_refused_but_can_be_replaced(copy: Path) -> None:
    manifest = orjson.loads((copy / "manifest.json").read_bytes())
    graphs = copy / "graphs"
    graphs.mkdir()
    stamp = {"digest": manifest["digest"], "model_version": "another", "files": {}}
    (graphs / "stamp.json").write_bytes(orjson.dumps(stamp))
    with pytest.raises(BundleError, match="not from model"):
        open_bundle(copy)
    assert open_bundle(copy, graphs=False).graphs is None
