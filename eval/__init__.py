"""Measurements and pictures of trained parts. Import `from eval.x import y`; runnable as `python -m eval.x`."""
