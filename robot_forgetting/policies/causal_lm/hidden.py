"""Prompts as tokens, and the hidden states from which a completion's tokens are predicted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from robot_forgetting.errors import UserError, shortened
from robot_forgetting.policies.causal_lm.chat import ChatTemplate
from robot_forgetting.policies.causal_lm.sampling import read_prompts
from robot_forgetting.policy import Action

REMEMBERED = 20_000  # prompts whose tokens are kept


class Prompts:
    """The chat template and the tokenizer, with memory: a group's rows and a step's passes read the same prompt."""

    def __init__(self, template: ChatTemplate, context: int):
        self.template, self.tokenizer, self.name = template, template.tokenizer, template.name
        self.context = context
        self._known: dict[str, list[int]] = {}

    def read(self, chats: Sequence[list[dict]], room: int) -> list[list[int]]:
        """Token ids of each prompt, ready to be answered; ``UserError`` where ``room`` tokens more do not fit."""
        rows = []
        for index, chat in enumerate(chats):
            text = self.template.render(chat)
            ids = self._known.get(text)
            if ids is None:
                if len(self._known) >= REMEMBERED:
                    self._known.clear()
                ids = self._known[text] = self.tokens([text])[0]
            if len(ids) + room > self.context:
                raise UserError(
                    f"item {index} of the batch, '{_beginning(chat)}': its prompt has {len(ids)} tokens and its "
                    f"completion may have {room}, together more than the {self.context} that policy '{self.name}' can "
                    "read; shorten it, leave it out, or lower policy.max_new_tokens"
                )
            rows.append(ids)
        return rows

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that are no chat, with the special tokens that the tokenizer puts around any text.

        Of a text longer than the context its beginning; a text must have a token.
        """
        rows = self.tokenizer(list(texts), verbose=False)["input_ids"] if len(texts) else []
        for text, ids in zip(texts, rows, strict=True):
            if not ids:
                raise UserError(f"policy '{self.name}' makes no token of the text {text!r}; leave it out")
        return [ids[: self.context] for ids in rows]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole turns: each text as the template writes an answer, with the token that ends it.

        A text that begins with thoughts of its own does not get the template's empty ones before it.
        Read behind a prompt, so that a tokenizer that puts a space before any text does not put one here.
        """
        opening, turn = self.template.opening, self.template.turn
        begun, made = self.tokens([opening])[0], []
        mark = turn.before.split()[:1]  # such as <think>; none where there are blanks only
        for text in texts:
            written = ("" if mark and text.startswith(mark[0]) else turn.before) + text + turn.after
            whole = self.tokens([opening + written])[0]
            apart = whole[: len(begun)] != begun  # the text begins with what the tokenizer joins to the prompt's end
            made.append([*(self.tokens([written])[0] if apart else whole[len(begun) :]), turn.end])
        return made

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts; the chat template writes special tokens itself."""
        if not texts:
            return []
        # The tokenizer would warn of texts longer than the context; ``read`` says more.
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def _beginning(chat: list[dict]) -> str:
    words = " ".join(str(chat[-1].get("content", "")).split()) if chat else ""
    return shortened(words)


def completion_states(
    body: nn.Module, prompts: Sequence[Sequence[int]], action: Action, pad: int, *, share: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The last layer's states [M, D] from which each counting token is predicted, and those tokens' (row, column).

    share: compute a prompt that several rows have once, with its keys and values serving all of them
    Rows of very different length are computed apart: padding costs as much as text.
    """
    device = next(body.parameters()).device
    tokens, mask = action.tokens.to(device), action.mask.to(device)
    width = max(1, int(mask.any(0).sum()))
    tokens, mask = tokens[:, :width].masked_fill(~mask[:, :width], pad), mask[:, :width]
    owners: dict[tuple, list[int]] = {}  # what is computed once -> the rows that it serves
    for row, prompt in enumerate(prompts):
        owners.setdefault(tuple(prompt) if share else (row,), []).append(row)
    share = share and len(owners) < len(prompts)
    units, used = list(owners.values()), mask.sum(1).tolist()
    lengths = [len(prompts[rows[0]]) + (0 if share else used[rows[0]]) for rows in units]
    parts, order = [], []
    for group in of_like_length(lengths):
        rows = [row for unit in group for row in units[unit]]
        compute = _shared if share else _whole
        parts.append(compute(body, [prompts[row] for row in rows], tokens[rows], mask[rows], pad))
        order += rows
    hidden = parts[0] if len(parts) == 1 else torch.cat(parts)
    if order != sorted(order):
        hidden = hidden[torch.argsort(torch.tensor(order, device=device))]
    places = mask.nonzero(as_tuple=True)
    return hidden[places], places


def of_like_length(lengths: Sequence[int], waste: float = 0.15) -> list[list[int]]:
    """Rows in groups of which padding to the longest takes at most the share ``waste``; one group where that is so."""
    if sum(lengths) >= (1 - waste) * max(lengths, default=0) * len(lengths):
        return [list(range(len(lengths)))]
    groups: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        group = groups[-1] if groups else []
        used = sum(lengths[other] for other in group) + lengths[row]
        if group and used >= (1 - waste) * lengths[group[0]] * (len(group) + 1):
            group.append(row)
        else:
            groups.append([row])
    return groups


def _whole(body, prompts, tokens: Tensor, mask: Tensor, pad: int) -> Tensor:
    """States [N, T, D]; prompt and completion in one row, right-padded, so that plain causal attention is right."""
    device = tokens.device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    used = mask.sum(1)
    width = int((starts + used).max())
    ids = torch.tensor([[*prompt, *[pad] * (width - len(prompt))] for prompt in prompts], device=device)
    rows, columns = mask.nonzero(as_tuple=True)
    ids[rows, starts[rows] + columns] = tokens[rows, columns]
    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
    before = starts.unsqueeze(1) - 1 + torch.arange(tokens.shape[1], device=device)
    before = before.clamp_max(hidden.shape[1] - 1)
    return hidden.gather(1, before.unsqueeze(2).expand(-1, -1, hidden.shape[2]))


def _shared(body, prompts, tokens: Tensor, mask: Tensor, pad: int) -> Tensor:
    """The same, each distinct prompt read once: its cache goes to all rows that have it, gradients included."""
    different = list(dict.fromkeys(map(tuple, prompts)))
    which = {prompt: number for number, prompt in enumerate(different)}
    owner = torch.tensor([which[tuple(prompt)] for prompt in prompts], device=tokens.device)
    cache = DynamicCache(config=body.config)
    first, seen, positions = read_prompts(body, different, pad, cache)
    first = first[owner]
    if tokens.shape[1] == 1:
        return first
    cache.batch_select_indices(owner)
    steps = torch.arange(1, tokens.shape[1], device=tokens.device)
    rest = body(
        input_ids=tokens[:, :-1],
        attention_mask=torch.cat([seen[owner], torch.ones_like(mask[:, :-1])], 1).long(),
        position_ids=positions[owner, -1:] + steps,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first, rest], 1)
