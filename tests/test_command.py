"""Every console script of the project explains itself under both names of help, and keeps its secrets when it fails."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from onesearch.command import run

SCRIPTS = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_itself(name, flag, monkeypatch, capsys):
    module, function = SCRIPTS[name].split(":")
    monkeypatch.setattr(sys, "argv", [name, flag])
    with pytest.raises(SystemExit) as stopped:
        getattr(importlib.import_module(module), function)()
    assert stopped.value.code == 0
    assert "Usage:" in capsys.readouterr().out


def test_an_error_nobody_expected_does_not_print_local_variables(monkeypatch, capsys):
    def command() -> None:
        key = "k-" + "secret"
        raise RuntimeError(f"broken after {len(key)}")

    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(RuntimeError) as broken:
        run(command)
    sys.excepthook(broken.type, broken.value, broken.tb)
    shown = capsys.readouterr().err
    assert "broken after 8" in shown and "k-secret" not in shown
