"""Measure what a fine-tuned robot policy or language model has forgotten, and why."""

from robot_forgetting import moved  # noqa: F401  (old names of modules)

__version__ = "0.1.0"
