"""Files for the small model. The adapters in `Lora/` are written by `make_adapters`."""
