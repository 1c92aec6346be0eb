import pytest
from tiny_bundle import write_tiny_bundle

from model_export.cli import export_onnx


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A tiny bundle exported in both precisions, its stamp, and the steps the exporter announced."""
    path, _ = write_tiny_bundle(tmp_path_factory.mktemp("export"))
    steps = []
    return path, export_onnx(path, "int8", steps.append), steps
