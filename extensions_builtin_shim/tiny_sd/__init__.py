"""A small, complete text-to-image model with SD1's module tree and names, for tests, demos and the headless host."""

from .checkpoint import load, save
from .config import Config
from .model import TinySD
from .sampler import sample, to_image

__all__ = ["Config", "TinySD", "load", "sample", "save", "to_image"]
