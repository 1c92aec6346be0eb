"""A native prefix trie of semantic IDs: integers in, integers out."""

from trie.mask import AnyMask, EdgeMask, OverlayMask
from trie.overlay import AnyTrie, Overlay
from trie.trie import SidTrie

__all__ = ["AnyMask", "AnyTrie", "EdgeMask", "Overlay", "OverlayMask", "SidTrie"]
