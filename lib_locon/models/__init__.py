"""Models: the weights that an adapter may touch, under every name they go by."""
