"""Measure what a fine-tuned robot policy or language model has forgotten, and why."""

__version__ = "0.1.0"
