"""Runs the native modules' tests on the sanitizer build in build/sanitized (see `make sanitize`)."""

import sys

import pytest

# The finder of the editable install would give the ordinary build: it is away while the two are imported.
finders = list(sys.meta_path)
sys.meta_path = [finder for finder in finders if "ScikitBuild" not in type(finder).__name__]
sys.path[:0] = ["build/sanitized", "."]

import decoder._native  # noqa: E402
import trie._native  # noqa: E402

sys.meta_path = finders

for module in (trie._native, decoder._native):
    assert "sanitized" in module.__file__, module.__file__
tests = [f"tests/test_{name}.py" for name in ("trie", "decode", "overlay", "decoder")]
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *tests]))
