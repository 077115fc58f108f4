"""The miniature: toy data and tiny stand-ins of the big models, so that everything runs offline.

A stand-in is the real model's class (`T5ForConditionalGeneration`, `FluxTransformer2DModel`, ...)
with a tiny configuration, trained from scratch on the toy data of `world.py`. The scripts load it
by path, like the real model. Nothing but the tests imports this package.
"""
from pathlib import Path

# the shipped stand-ins, and where training keeps its state and caches
WEIGHTS = Path(__file__).resolve().parent / "weights"
BUILD = Path(__file__).resolve().parent.parent / "build"
