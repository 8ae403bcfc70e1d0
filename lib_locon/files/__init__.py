"""Files: bytes → Adapter. Headers first; tensors only when they are needed."""
