"""One file per training stage; each runs as `python -m training.<stage>`."""
