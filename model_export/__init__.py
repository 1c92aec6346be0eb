"""Reads a bundle, adds graphs/, proves parity."""
