"""The prompt: text → requests. Plain strings, no torch."""
