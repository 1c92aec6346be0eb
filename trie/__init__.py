"""A native prefix trie of semantic IDs: integers in, integers out."""

from trie.trie import EdgeMask, SidTrie

__all__ = ["EdgeMask", "SidTrie"]
