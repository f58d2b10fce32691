"""Chat language models as policies: a list of messages in, a completion out; any causal LM that transformers loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated

import torch
from torch import Tensor, nn

from robot_forgetting.contracts import checked_settings
from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.machine.device import PRECISIONS, parse_device
from robot_forgetting.machine.files import disk
from robot_forgetting.one_step import Repeated
from robot_forgetting.policies import lora as adapters
from robot_forgetting.policies.causal_lm.blocks import blocks_of, mean_states
from robot_forgetting.policies.causal_lm.chat import ChatTemplate
from robot_forgetting.policies.causal_lm.hidden import Prompts, completion_states
from robot_forgetting.policies.causal_lm.lm_checkpoint import load, quiet
from robot_forgetting.policies.causal_lm.sampling import sample
from robot_forgetting.policies.causal_lm.vllm_sampler import Sampler, as_action, importance_ratios
from robot_forgetting.policies.causal_lm.vocabulary import Head, compare, token_log_probs
from robot_forgetting.policies.own_base import OwnBase
from robot_forgetting.policy import Action, ConventionSpec, Policy, Reference
from robot_forgetting.ranges import ArgumentsOf, Processes, Range, Tokens

DTYPES = ("float32", "bfloat16", "mixed")


class CausalLM(OwnBase):
    """Reads the column ``messages`` (a list of {"role", "content"} per row) and answers with a text.

    An action is a completion: its tokens are indices into the whole vocabulary [N, T], right-padded, and its mask is
    True up to and including the token that ends the turn, if it came before ``max_new_tokens``.

    checkpoint: a folder, a Hub id, a GGUF file, or one inside an installed package; see ``causal_lm_checkpoint.load``
    max_new_tokens: the longest completion that is sampled; context: the longest prompt with completion, in tokens
        (null: what the model was made for)
    dtype: float32; mixed: weights in float32, products in bfloat16; bfloat16: to evaluate, or with lora. Full
        fine-tuning in it is refused: it would lose updates smaller than 1/256 of a weight.
    lora: null for full fine-tuning, or {rank, alpha, targets} of ``lora.add``; adapters are float32
    keep_base: whether full fine-tuning keeps a copy of the base weights, which ``base()`` needs
    batch_rows: completions sampled at once, and rows of a forward pass without gradients
    threads: torch's, on a CPU; null leaves them as they are (the command line starts with one)
    chat_template: a jinja file in the place of the tokenizer's own
    sampler: null for transformers, or {_target_: ...VLLMSampler, ...}, see ``causal_lm_vllm``
    """

    declares = ConventionSpec(action_dimensions=1, action_mode="text")
    noise_width = 1  # the seed of a stream, however long the completion
    splits_batches = False  # one process with all cores beats forked halves here: the weights are read once

    def __init__(
        self,
        checkpoint: str,
        *,
        name: str = "causal-lm",
        max_new_tokens: Tokens = 256,
        context: Tokens | None = None,
        dtype: str = "float32",
        device: str = "auto",
        lora: Annotated[dict, ArgumentsOf(adapters.add)] | None = None,
        keep_base: bool = True,
        gradient_checkpointing: bool = False,
        batch_rows: Annotated[int, Range(1, 65_536)] = 64,
        threads: Processes | None = None,
        chat_template: str | None = None,
        sampler: Sampler | None = None,
    ):
        super().__init__(name, lora, products=torch.bfloat16 if dtype == "mixed" else None)
        check_choice("dtype", dtype, DTYPES)
        place = parse_device(device)
        if threads is not None and place.type == "cpu":
            torch.set_num_threads(threads)
        loaded = load(checkpoint, dtype=PRECISIONS[dtype].weights, chat_template=chat_template)
        self.source, self.tokenizer = loaded.source, loaded.tokenizer
        self.model = loaded.model.to(place).eval()
        self.dtype = dtype
        longest = self.model.config.max_position_embeddings
        self.max_new_tokens, self.batch_rows = max_new_tokens, batch_rows
        checked_settings(self)
        self.decisions_at_once = batch_rows
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.stops = {self.tokenizer.eos_token_id, *(end for end in ends if end is not None)}
        template = ChatTemplate(self.tokenizer, name, self.stops)
        self.prompts = Prompts(template, min(context or longest, longest))
        self.turn = template.turn
        self.stops.add(self.turn.end)
        pad = self.tokenizer.pad_token_id
        self.pad = self.tokenizer.eos_token_id if pad is None else pad
        _without_dropout(self.model)
        self._check_head()
        self.blocks = len(self.layers()) - 1
        if gradient_checkpointing:
            # The older name, which transformers 5.23 deprecates, is the only one of its first 5.x releases.
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        self.gradient_checkpointing = gradient_checkpointing
        self.sampler = sampler
        self._metrics: dict[str, float] = {}
        self._choose_trained()
        if hasattr(self.model.get_output_embeddings(), "base_layer"):  # ``_head`` is the weights without it
            raise UserError("an adapter on the output head is not supported; leave it out of policy.lora.targets")
        if self.continues or (lora is None and keep_base):
            self._keep_base()
        # What changes a completion besides the weights: part of a run's fingerprint.
        self.config = {
            "max_new_tokens": max_new_tokens,
            "context": self.prompts.context,
            "chat_template": self.tokenizer.chat_template,
            "stops": sorted(self.stops),
        }
        if self.turn.before or self.turn.after:
            self.config["turn"] = [self.turn.before, self.turn.after]

    # ---- Policy

    @torch.no_grad()
    def act(self, obs: dict, *, temperature: float = 1.0, noise: Tensor | None = None) -> Action:
        prompts, repeats, order = self._read(obs, room=self.max_new_tokens)
        count = len(prompts) * repeats
        noise = torch.rand(count) if noise is None else noise[:, 0]
        noise = noise[order]
        if self.sampler is not None:
            action = self._sampled_outside(prompts, repeats, temperature, noise)
        else:
            action = self._sampled(prompts, repeats, temperature, noise)
        return action[torch.argsort(order)]

    def logits(self, obs: dict, action: Action) -> Tensor:
        hidden, places = self._states(self._prompts_of(obs, action), action)
        weight, bias = self._head()
        flat = nn.functional.linear(hidden, weight, bias).float()
        out = flat.new_zeros(*action.tokens.shape, flat.shape[-1])
        return out.index_put(places, flat)

    def log_prob(self, obs: dict, action: Action) -> Tensor:
        if not torch.is_grad_enabled() and len(action) > self.batch_rows:
            return torch.cat([self.log_prob(*part) for part in self._parts(obs, action)])
        return self._log_prob(self._prompts_of(obs, action), action)

    def compared(
        self,
        obs: dict,
        action: Action,
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]],
        reference: Reference | None = None,
    ) -> dict[str, Tensor]:
        if not torch.is_grad_enabled() and len(action) > self.batch_rows and reference is None:
            parts = [self.compared(*part, functions) for part in self._parts(obs, action)]
            return {name: torch.cat([part[name] for part in parts]) for name in functions}
        prompts = self._prompts_of(obs, action)
        if reference is None:
            with self.base():
                base, base_head = self._frozen(prompts, action)
        else:
            base, base_head = reference.policy._frozen(reference.policy._prompts_of(reference.obs, action), action)
        hidden, places = self._states(prompts, action)
        heads = base_head, self._head()
        if len(heads[0][0]) != len(heads[1][0]):  # one tokenizer, but models of one family pad it to different sizes
            words = min(len(weight) for weight, _ in heads)
            heads = tuple((weight[:words], None if bias is None else bias[:words]) for weight, bias in heads)
        values = compare(base, hidden, heads, list(functions.values()))
        shape = action.tokens.shape
        return {name: row.new_zeros(shape).index_put(places, row) for name, row in zip(functions, values, strict=True)}

    def decode(self, action: Action, *, statistics: str | None = None) -> list[str]:
        """Completions as texts: without the tokens that stop or pad them, and what the template writes around answers.

        Other special tokens stay: an answer's tags may be among them.
        """
        rows = zip(action.tokens.cpu(), action.mask.cpu(), strict=True)
        left_out = {*self.stops, self.pad}
        kept = [[token for token in row[mask].tolist() if token not in left_out] for row, mask in rows]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return [text.removeprefix(self.turn.before).removesuffix(self.turn.after) for text in texts]

    def encode(self, commands, *, statistics: str | None = None) -> Action:
        """Texts to completions that end as the chat template ends an assistant's turn."""
        rows = self.prompts.answers(list(commands))
        width = max(map(len, rows), default=1)
        tokens = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows], dtype=torch.int64)
        lengths = torch.tensor([len(row) for row in rows])
        return Action(tokens.view(len(rows), width), torch.arange(width) < lengths.view(-1, 1))

    def convention(self) -> ConventionSpec:
        return self.declares

    def check_tokens(self, other: Policy) -> None:
        super().check_tokens(other)
        if not isinstance(other, CausalLM) or self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise UserError(
                f"policies '{self.name}' and '{other.name}' have different tokenizers; what one writes cannot be "
                "judged token by token by the other"
            )

    @torch.no_grad()
    def hidden_states(self, obs: dict) -> Tensor:
        if "text" not in obs:
            raise UserError(f"policy '{self.name}' shows its layers on plain texts, not on {sorted(obs)}")
        with self._products():
            return mean_states(self.body, self.prompts.plain(obs["text"]), self.pad, self.batch_rows)

    def layers(self) -> list[nn.Module]:
        return [self.model.get_input_embeddings(), *blocks_of(self.body)]

    def cut_off(self, action: Action) -> list[bool]:
        rows = zip(action.tokens.cpu(), action.mask.cpu(), strict=True)
        return [not self.stops.intersection(row[mask].tolist()) for row, mask in rows]

    def metrics(self) -> dict[str, float]:
        return self._metrics

    # ---- beyond Policy

    def save(self, folder) -> None:
        """Writes the whole policy in transformers' layout, or with LoRA the adapter alone in peft's."""
        if self.lora is not None:
            adapters.save(folder, self.model, base=self.source)
            return
        with disk(folder), quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    @property
    def body(self) -> nn.Module:
        """The model without its head."""
        return self.model.base_model

    def _read(self, obs: dict, *, room: int) -> tuple[list[list[int]], int, Tensor]:
        """Prompts' tokens, how often each is repeated in a row, and the order of rows that sorts them by length.

        Prompts of like length share a batch; a ``Repeated`` column's values stay together.
        """
        column = self._messages(obs)
        repeats = 1
        if isinstance(column, Repeated):
            column, repeats = column.values, column.times
        prompts = self.prompts.read(column, room)
        by_length = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))
        order = torch.tensor([row * repeats + copy for row in by_length for copy in range(repeats)], dtype=torch.int64)
        return [prompts[row] for row in by_length], repeats, order

    def _messages(self, obs: dict):
        if "messages" not in obs:
            raise UserError(
                f"policy '{self.name}' needs observations with 'messages'; this task gives {sorted(obs)}: "
                "language models go with text tasks"
            )
        return obs["messages"]

    def _sampled(self, prompts, repeats: int, temperature: float, noise: Tensor) -> Action:
        """In batches of at most ``batch_rows`` rows: several prompts with all their copies, or some of one's copies."""
        parts, at_once = [], max(1, self.batch_rows // repeats)
        with self._products():
            for start in range(0, len(prompts), at_once):
                for copy in range(0, repeats, self.batch_rows):
                    drawn = noise.view(-1, repeats)[start : start + at_once, copy : copy + self.batch_rows]
                    parts.append(
                        sample(
                            self.body,
                            self.model.get_output_embeddings(),
                            prompts[start : start + at_once],
                            repeats=drawn.shape[1],
                            stops=self.stops,
                            pad=self.pad,
                            limit=self.max_new_tokens,
                            temperature=temperature,
                            noise=drawn.flatten(),
                        )
                    )
        return Action.cat(parts)

    def _sampled_outside(self, prompts, repeats: int, temperature: float, noise: Tensor) -> Action:
        """The same through ``sampler``, whose probabilities are compared with the policy's own."""
        self.sampler.update(self)
        every = [prompt for prompt in prompts for _ in range(repeats)]
        seeds = (noise.double() * 2**24).long().tolist()
        options = {"limit": self.max_new_tokens, "stops": self.stops, "temperature": temperature, "seeds": seeds}
        action = as_action(self.sampler.complete(every, **options), self.pad)
        if temperature == 1:  # what training rollouts use; others are evaluations
            own = torch.cat(
                [
                    self._log_prob(every[start : start + self.batch_rows], action[start : start + self.batch_rows])
                    for start in range(0, len(every), self.batch_rows)
                ]
            )
            self._metrics = importance_ratios(own, action, self.sampler.largest_difference)
        return action

    def _log_prob(self, prompts, action: Action) -> Tensor:
        hidden, places = self._states(prompts, action)
        weight, bias = self._head()
        values = token_log_probs(hidden, weight, bias, action.tokens.to(self.device)[places])
        return values.new_zeros(action.tokens.shape).index_put(places, values)

    def _prompts_of(self, obs: dict, action: Action) -> list[list[int]]:
        column = self._messages(obs)
        rows = column[torch.arange(len(column)).numpy()] if isinstance(column, Repeated) else column
        return self.prompts.read(rows, max(action.mask.sum(1).tolist(), default=0))

    def _states(self, prompts, action: Action) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Hidden states [M, D] before each token that counts, and those tokens' (row, column)."""
        with self._products():
            hidden, places = completion_states(
                self.body, prompts, action, self.pad, share=not (self.model.training and self.gradient_checkpointing)
            )
        return hidden if self._product_dtype is None else hidden.to(self._product_dtype), places

    @torch.no_grad()
    def _frozen(self, prompts, action: Action) -> tuple[Tensor, Head]:
        """Hidden states and head as they are now, for a comparison."""
        hidden, _ = self._states(prompts, action)
        return hidden, tuple(None if part is None else part.detach() for part in self._head())

    def _parts(self, obs: dict, action: Action) -> Iterator[tuple[dict, Action]]:
        for start in range(0, len(action), self.batch_rows):
            rows = slice(start, start + self.batch_rows)
            yield {key: column[rows] for key, column in obs.items()}, action[rows]

    def _head(self) -> Head:
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        if self._product_dtype is None:
            return head.weight, bias
        return head.weight.to(self._product_dtype), None if bias is None else bias.to(self._product_dtype)

    @torch.no_grad()
    def _check_head(self) -> None:
        """``UserError`` for a model that does more to its logits than multiply (soft caps, scales)."""
        ids = torch.arange(1, 5, device=self.device).unsqueeze(0)
        with self._products():
            hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
            ours, theirs = self.model.get_output_embeddings()(hidden), self.model(input_ids=ids, use_cache=False).logits
        if not (torch.isfinite(ours).all() and torch.allclose(ours.float(), theirs.float(), rtol=1e-3, atol=1e-3)):
            raise UserError(
                f"{self.source} does more to its logits than one linear layer, or its weights are broken; policies of "
                "this kind are not supported"
            )


def _without_dropout(model: nn.Module) -> None:
    """The distribution that is trained is the one that was sampled from."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
