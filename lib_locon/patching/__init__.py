"""Patching: the only writer of weights. Knows neither files nor families: it asks a `Delta` for numbers."""
