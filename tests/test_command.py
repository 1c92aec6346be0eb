"""Every console script of the project explains itself under both names of help, and keeps its secrets when it fails."""

import importlib
import sys
import tomllib
from pathlib import Path

import pytest

from onesearch.command import REFUSED, run
from onesearch.errors import ConfigError

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


def test_what_was_asked_wrongly_is_told_after_the_commands_name(monkeypatch, capsys):
    def command(size: int = 1) -> None:
        raise ConfigError(f"size: {size}, expected [2]")

    for arguments in ([], ["--size", "3"]):
        monkeypatch.setattr(sys, "argv", ["/bin/onesearch-x", *arguments])
        with pytest.raises(SystemExit) as stopped:
            run(command)
        assert stopped.value.code == REFUSED == 2
    assert capsys.readouterr() == ("", "onesearch-x: size: 1, expected [2]\nonesearch-x: size: 3, expected [2]\n")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
    def command() -> None:
        (tmp_path / "missing" / "file").write_text("x")

    monkeypatch.setattr(sys, "argv", ["/bin/onesearch-x"])
    with pytest.raises(SystemExit) as stopped:
        run(command)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("onesearch-x: [Errno 2] No such file or directory")
