"""Native int8 decoder steps of a BART: arrays in, logits out. Knows nothing of prompts, SIDs or files."""

from decoder._native import Model, Request, kernels, product

__all__ = ["Model", "Request", "kernels", "product"]
