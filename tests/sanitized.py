"""Runs the native module's tests on the sanitizer build in build/sanitized (see `make sanitize`)."""

import sys

import pytest

# The finder of the editable install would give the ordinary build: it is away while `trie` is imported.
finders = list(sys.meta_path)
sys.meta_path = [finder for finder in finders if "ScikitBuild" not in type(finder).__name__]
sys.path[:0] = ["build/sanitized", "."]

import trie._native  # noqa: E402

sys.meta_path = finders

assert "sanitized" in trie._native.__file__, trie._native.__file__
sys.exit(
    pytest.main(
        ["-q", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in ("trie", "decode", "overlay"))]
    )
)
