"""The GPU benchmark on the CPU, at a toy size: its check catches a wrong search, its row says what was not measured."""

import json
import sys

import pytest
import torch

from benchmarks import gpu


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "RUNS", 1)
    monkeypatch.setattr(gpu, "WARM_UP", 0)


@pytest.mark.parametrize("name", gpu.SHAPES)
def test_a_row_is_checked_and_names_its_hardware(name, quick, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "generate_ms", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--json", "--shape", name])
    gpu.main()
    row = json.loads(capsys.readouterr().out)
    assert (
        row["shape"] == f"{name} (tiny)" and row["checked"] and row["device"] and row["torch"] == torch.__version__
    )
    assert row["eager_ms"] > row["floor_ms"] > 0 and row["graph_ms"] is None


def test_generate_runs_on_the_same_shape(quick):
    assert gpu.generate_ms(gpu.tiny(gpu.SHAPES["bart-base"]), "cpu", torch.float32) > 0


@pytest.mark.parametrize("name", gpu.SHAPES)
def test_a_wrong_search_is_not_timed(name):
    shape = gpu.tiny(gpu.SHAPES[name])
    decoder, trie = gpu.Decoder(shape, "cpu", torch.float32), gpu.Trie(shape, "cpu")
    gpu.check(decoder, trie, 1e-4)
    step = decoder.step
    decoder.step = lambda tokens, parents, state: step(tokens, torch.zeros_like(parents), state)
    with pytest.raises(SystemExit, match="scores differ"):
        gpu.check(decoder, trie, 1e-4)


def test_without_a_gpu_the_default_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "sees no CUDA device" in capsys.readouterr().err
