"""Benchmarks: what it costs to change a model's adapters. `python -m benchmarks.switch --help`."""
