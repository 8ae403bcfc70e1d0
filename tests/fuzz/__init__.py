"""Random hostile input, by kind: adapter files, what lies beside them, prompts, requests. `python -m tests.fuzz -h`."""
