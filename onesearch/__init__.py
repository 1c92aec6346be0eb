"""The contract shared by training, export, evaluation and serving."""

__version__ = "0.1.0"
