"""Experiments: exclusive slots, independent layers, ramps that move nobody, kill switch, reload without restart."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from service_fakes import fake_deployment, fake_engine

from onesearch.errors import ConfigError
from service import experiments_file
from service.experiments_file import watch_experiments
from service.telemetry import Metrics
from service.variants import Split, read_split

KEYS = [f"user-{i}" for i in range(8_000)]
FILE = """
salt = "s"
[variants.control]
width = 64
[variants.narrow]
width = 32
[variants.narrower]
width = 16
[variants.keywords]
keywords = true
[experiments.width]
layer = "decode"
slot = [0.0, 0.6]
ramp = 0.5
arms = { control = 1, narrow = 2 }
[experiments.tiny]
layer = "decode"
slot = [0.6, 1.0]
arms = { control = 1, narrower = 1 }
[experiments.words]
layer = "query"
arms = { control = 1, keywords = 1 }
"""


def split_of(folder: Path, text: str = FILE) -> Split:
    path = folder / "experiments.toml"
    path.write_text(text)
    return read_split(path, ["one"])


def test_experiments_of_a_layer_exclude_each_other_and_layers_are_independent(tmp_path: Path) -> None:
    arms = [split_of(tmp_path).assign(key).arms for key in KEYS]
    assert not any({"width", "tiny"} <= found.keys() for found in arms)
    assert all("words" in found for found in arms)
    share = {name: sum(name in found for found in arms) / len(arms) for name in ("width", "tiny")}
    assert share == pytest.approx({"width": 0.3, "tiny": 0.4}, abs=0.025)
    narrow = [found["words"] for found in arms if found.get("width") == "narrow"]
    assert Counter(narrow)["keywords"] / len(narrow) == pytest.approx(0.5, abs=0.05)


def test_the_options_of_both_layers_apply_and_every_name_can_be_forced(tmp_path: Path) -> None:
    split = split_of(tmp_path)
    assert next(iter(split.variants)) == "control"
    both = split.variants["narrow+keywords"]
    assert (both.width, both.keywords, both.bundle) == (32, True, "one")
    assert (split.variants["keywords"].width, split.variants["narrow"].keywords) == (64, False)
    found = Counter(split.assign(key).variant for key in KEYS)
    assert set(found) <= set(split.variants)
    for name, share in split.shares.items():
        assert found[name] / len(KEYS) == pytest.approx(share, abs=0.025), name
    assert sum(split.shares.values()) == pytest.approx(1)


def test_raising_a_ramp_adds_users_and_moves_nobody(tmp_path: Path) -> None:
    before = split_of(tmp_path)
    after = split_of(tmp_path, FILE.replace("ramp = 0.5", "ramp = 0.9"))
    joined = 0
    for key in KEYS:
        old, new = before.assign(key).arms, after.assign(key).arms
        assert old.items() <= new.items()
        joined += len(new) - len(old)
    assert joined / len(KEYS) == pytest.approx(0.6 * 0.4, abs=0.025)


def test_the_kill_switch_sends_everybody_to_the_default_and_leaves_other_layers(tmp_path: Path) -> None:
    before = split_of(tmp_path)
    after = split_of(tmp_path, FILE.replace('layer = "query"', 'layer = "query"\nenabled = false'))
    for key in KEYS[:2000]:
        old, new = dict(before.assign(key).arms), dict(after.assign(key).arms)
        old.pop("words")
        assert new == old
        assert "keywords" not in after.assign(key).variant


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("slot = [0.6, 1.0]", "slot = [0.5, 1.0]", "width and tiny overlap in layer 'decode'"),
        ("slot = [0.6, 1.0]", "slot = [1.0, 0.6]", "slot: [1.0, 0.6] is empty"),
        ("ramp = 0.5", "ramp = 1.5", "experiments.width.ramp: 1.5"),
        ("narrow = 2", "wide = 2", "experiments.width.arms: 'wide' is not one of"),
        ("narrow = 2", "narrow = -2", "experiments.width.arms.narrow: -2"),
        ("keywords = true", "keywords = true\nwidth = 8", "variant 'keywords' sets 'width'"),
        ("keywords = true", "keywords = true\nweight = 8", "variants.keywords.weight"),
        ('salt = "s"', 'salt = "s"\ndefault = "none"', "default: 'none' is not one of"),
    ],
)
def test_a_wrong_file_names_the_key_and_the_value(tmp_path: Path, old: str, new: str, named: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError) as caught:
        split_of(tmp_path, FILE.replace(old, new))
    assert named in str(caught.value)


def test_the_file_is_followed_and_a_wrong_one_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments_file, "POLL_SECONDS", 0.01)
    deployment, metrics = fake_deployment(fake_engine(tmp_path)), Metrics()
    path = tmp_path / "experiments.toml"
    text = FILE.replace("[variants.control]", f'[variants.control]\nbundle = "{deployment.engines[0].name}"')
    path.write_text(text)

    async def follow() -> None:
        watching = asyncio.create_task(watch_experiments(path, deployment, metrics))
        await asyncio.sleep(0.05)
        assert set(deployment.variants) == {"control", "keywords"}  # as opened; nothing has changed since

        path.write_text(text.replace("ramp = 0.5", "ramp = 0.6"))
        await _until(lambda: "narrow+keywords" in deployment.variants)
        path.write_text("[variants")
        await _until(lambda: b'outcome="refused"' in metrics.exposition())
        assert "narrow+keywords" in deployment.variants
        path.unlink()
        await asyncio.sleep(0.05)
        assert "narrow+keywords" in deployment.variants
        watching.cancel()

    asyncio.run(follow())


async def _until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)
