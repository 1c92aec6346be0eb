"""Measurements: each prints its hardware and checks results before timing them."""
