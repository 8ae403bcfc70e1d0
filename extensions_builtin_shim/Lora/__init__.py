"""Answers for the webui's built-in `Lora` extension where that is switched off: the names that others import.

Each file is found under its own name, as a module of the top level (`lib_locon/hosts/takeover.py`). No logic here.
"""
