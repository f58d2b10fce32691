"""Causal language models of the transformers library."""

from robot_forgetting.policies.causal_lm.lm import CausalLM

__all__ = ["CausalLM"]
