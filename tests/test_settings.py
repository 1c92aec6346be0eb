"""Settings, variants and the refusal to start: every fault is named, all at once."""

from pathlib import Path

import pytest
from command_line import invoke
from service_fakes import fake_settings

from onesearch.command import REFUSED
from onesearch.errors import BundleError, ConfigError
from service.cli import main
from service.deployment import open_deployment
from service.settings import load_settings
from service.variants import VariantOptions, WeightedSplit, declared_split, read_split


def test_defaults_environment_and_overrides_come_in_this_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().port == 8000
    monkeypatch.setenv("ONESEARCH_PORT", "9000")
    monkeypatch.setenv("onesearch_concurrency", "3")
    assert (load_settings().port, load_settings().concurrency) == (9000, 3)
    assert load_settings(port=9001, host=None).port == 9001


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().port = 1


def test_every_fault_of_the_environment_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PROT": "1", "WORKERS": "0", "STATE": "mysql://x", "ZZZ": "1"}.items():
        monkeypatch.setenv(f"ONESEARCH_{name}", value)
    with pytest.raises(ConfigError) as caught:
        load_settings(port=70_000)
    text = str(caught.value)
    assert "5 fault(s)" in text
    assert "ONESEARCH_PROT: is not a setting; did you mean ONESEARCH_PORT?" in text
    assert "ONESEARCH_ZZZ: is not a setting; known are" in text
    assert "ONESEARCH_WORKERS: '0' is wrong" in text
    assert "ONESEARCH_STATE: 'mysql://x' is wrong" in text
    assert "ONESEARCH_PORT: 70000 is wrong" in text


def test_what_is_secret_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STATE": "postgres://shop:hush@db/0", "ADMIN_KEY": "hush"}.items():
        monkeypatch.setenv(f"ONESEARCH_{name}", value)
    with pytest.raises(ConfigError, match=r"postgres://…@db/0(.|\n)*ADMIN_KEY: it is wrong") as caught:
        load_settings()
    assert "hush" not in str(caught.value)


def test_the_split_is_sticky_weighted_and_salted() -> None:
    weights = {"a": 70.0, "b": 30.0, "off": 0.0}
    variants = {name: VariantOptions(bundle="x", weight=w) for name, w in weights.items()}
    split, again, salted = WeightedSplit(variants), WeightedSplit(variants), WeightedSplit(variants, "other")
    keys = [f"user-{i}" for i in range(20_000)]
    chosen = [split.assign(key).variant for key in keys]
    assert chosen == [again.assign(key).variant for key in keys]
    assert set(chosen) == {"a", "b"}
    assert abs(chosen.count("a") / len(keys) - 0.7) < 0.015
    moved = sum(one != salted.assign(key).variant for one, key in zip(chosen, keys, strict=True)) / len(keys)
    assert abs(moved - 2 * 0.7 * 0.3) < 0.02  # another salt deals the users anew


def test_the_split_never_changes_between_versions() -> None:
    split = WeightedSplit({name: VariantOptions(bundle="x") for name in ("a", "b", "c")})
    assert "".join(split.assign(str(i)).variant for i in range(12)) == "abbaacbbbbbb"


def test_weights_must_leave_something_to_serve() -> None:
    with pytest.raises(ConfigError, match="add up to 0"):
        WeightedSplit({"a": VariantOptions(bundle="x", weight=0)})


def test_one_bundle_keeps_the_names_it_declares_and_several_prefix_them() -> None:
    declared = {"variants": {"control": {"weight": 50}, "keywords": {"keywords": True, "weight": 50}}}
    assert list(declared_split({"demo": declared}).variants) == ["control", "keywords"]
    assert list(declared_split({"demo": {}}).variants) == ["default"]
    both = declared_split({"demo": declared, "next": {}}).variants
    assert list(both) == ["demo.control", "demo.keywords", "next.default"]
    assert both["next.default"].bundle == "next"


def test_a_variants_file_names_bundles_and_options(tmp_path: Path) -> None:
    path = tmp_path / "variants.toml"
    path.write_text('salt = "s"\n[variants.a]\nwidth = 256\n[variants.b]\nbundle = "one"\nscore = "legal"\n')
    split = read_split(path, ["one"])
    assert {name: v.bundle for name, v in split.variants.items()} == {"a": "one", "b": "one"}
    assert (split.variants["a"].width, split.variants["b"].score) == (256, "legal")
    with pytest.raises(ConfigError, match=r"variants\.a\.bundle: None is not served, expected one of one, two"):
        read_split(path, ["one", "two"])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[variants.a]\nwitdh = 3", "variants.a.witdh"),
        ("[variants.a]\nwidth = 0", "variants.a.width: 0"),
        ('[variants.a]\nscore = "best"', "variants.a.score: 'best'"),
        ('[variants.a]\nweight = "x"', "variants.a.weight"),
        ("[variants.'a b']\nwidth = 1", "a b"),
        ("[variants]", "variants: {}"),
        ("salt = 1", "salt: 1"),
        ("[variants.a", "variants.toml"),
        (None, "variants.toml"),
    ],
)
def test_a_wrong_variants_file_names_the_key(tmp_path: Path, text: str | None, named: str) -> None:
    path = tmp_path / "variants.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_split(path, ["one"])
    assert named in str(caught.value)


def test_faults_of_all_bundles_are_listed_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BundleError) as caught:
        open_deployment([tmp_path / "missing", tmp_path / "empty"], fake_settings(tmp_path))
    assert len(caught.value.faults) == 2
    assert "missing" in str(caught.value)
    assert "empty" in str(caught.value)


def test_the_command_refuses_with_exit_code_2_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = invoke(main, tmp_path / "missing", tmp_path / "gone", name="onesearch-serve")
    assert refused.exit_code == REFUSED
    assert refused.stderr.startswith("onesearch-serve: cannot serve") and "missing" in refused.stderr
    assert "gone" in refused.output
    monkeypatch.setenv("ONESEARCH_PROT", "1")
    refused = invoke(main, tmp_path / "missing")
    assert refused.exit_code == REFUSED
    assert "did you mean ONESEARCH_PORT?" in refused.output
