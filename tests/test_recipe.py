"""Recipes: strict, and every message names the key, the value and what was expected."""

from pathlib import Path

import pytest

from onesearch.errors import ConfigError
from training.recipe import load_recipe
from training.stages import SdftStage

STAGE = '[[stages]]\nname = "s"\nsteps = 1\nmixture = { search = 1.0 }\n'
FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(
    path for path in FOLDER.glob("*.toml") if path.stem != "stream"
)  # that one is of `training.stream`


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_reads(path: Path) -> None:
    assert load_recipe(path).name == path.stem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 3\n" + STAGE, "name: 3, expected a value of type str"),
        ('name = "x"\nsteps = 3\n' + STAGE, "steps: unknown key, expected one of name, seed"),
        ('name = "x"\n' + STAGE + "batsh = 3\n", r"stages\[0\]\.batsh: unknown key"),
        ('name = "x"\n', "stages: the recipe has none"),
        (STAGE, "name: is missing"),
        ('name = "x"\nprecision = "fp64"\n' + STAGE, "precision: 'fp64', expected one of 'auto', 'fp32', 'bf16'"),
        ('name = "x"\n[codebooks]\nsizes = 4\n' + STAGE, "codebooks.sizes: 4, expected a list"),
        ('name = "x"\n[codebooks]\nsizes = [4, 4]\n' + STAGE, "expected 5"),
        ('name = "x"\n' + STAGE.replace("search", "serach"), "positive shares of tasks among search,"),
        ('name = "x"\n' + STAGE + 'tasks = ["search"]\n', "expected either mixture, .* or tasks"),
        ('name = "x"\n' + STAGE + STAGE, "stages: names s, s, expected each once"),
        ('name = "x"\n' + STAGE + 'kind = "sfd"\n', r"stages\[0\]\.kind: 'sfd', expected one of sft, sdft"),
        ('name = "x"\n' + STAGE + "tau = 2.0\n", r"stages\[0\]\.tau: unknown key"),
        (
            'name = "x"\n' + STAGE + 'kind = "sdft"\ntau = 0.0\n',
            r"stages\.s\.tau: 0\.0, expected a positive number",
        ),
        (
            'name = "x"\n' + STAGE + 'kind = "sdft"\nclass_balance = 1.0\n',
            r"stages\.s\.class_balance: 1\.0, expected a share in 0\.\.1, below 1",
        ),
        (
            'name = "x"\n' + STAGE + 'kind = "sdft"\nmode = "mutual"\n',
            "mode: 'mutual', expected one of 'off', 'self'",
        ),
        ('name = "x"\n' + STAGE + "kw_mix = 1.5\n", r"kw_mix: 1\.5, expected a share"),
        ('name = "x"\n' + STAGE.replace("1.0", "0.0"), "positive shares"),
        ('name = "x"\nmodel = 3\n' + STAGE, "model: 3, expected a table"),
        (
            'name = "x"\n[model]\nhistory = "mean"\n' + STAGE,
            "model.history: 'mean', expected one of 'gates', 'qformer'",
        ),
        (
            'name = "x"\n[sequence]\nhistory_vectors = 1\n' + STAGE,
            "history_vectors: 1, expected a value of type bool",
        ),
        ('name = "x"\nseed = -1\n' + STAGE, "seed: -1, expected at least 0"),
        ('name = "x"\nthreads = 0\n' + STAGE, "threads: 0, expected at least 1"),
        ('name = "x"\nseed = true\n' + STAGE, "seed: True, expected a value of type int"),
        ("name = ", "recipe .*: "),
    ],
)
def test_a_wrong_recipe_names_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_the_kind_of_a_stage_chooses_its_keys(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n' + STAGE + 'kind = "sdft"\nmode = "ema"\nema_decay = 0.9\n')
    (stage,) = load_recipe(path).stages
    assert isinstance(stage, SdftStage) and stage.ema_decay == 0.9
    assert stage.kw_mix == 0.5  # the teacher learns to use keywords unless a recipe says otherwise (spec §9.2)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"r\.toml: .*can't decode"):
        load_recipe(tmp_path / "r.toml")


def test_integers_are_read_where_a_number_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n' + STAGE + "lr = 1\n")
    assert load_recipe(path).stages[0].lr == 1.0
