"""Tests on two devices that are there on every machine: see `device.cpp`. Run by `tests/test_second_device.py`."""
