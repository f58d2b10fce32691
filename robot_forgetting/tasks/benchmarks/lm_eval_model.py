"""lm-eval's view of a policy's model, which also says what was cut off: lm-eval itself leaves that to a log line."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.models.huggingface import HFLM

from robot_forgetting.errors import UserError
from robot_forgetting.policies.causal_lm.chat import TooLong, limited


class WatchedModel(HFLM):
    """``HFLM`` with the same numbers; ``cut`` says of each request of the last call what was cut off.

    task: the benchmark's name; reader: the policy's, both for messages
    """

    def __init__(self, model, *, task: str, reader: str, **options):
        super().__init__(model, **options)
        self.task, self.reader = task, reader
        self._lost: list[int] = []  # tokens of each log-likelihood request
        self._unfinished: list[bool] = []  # of the batch that is generated
        self._cut_answers: dict[str, bool] = {}  # prompt -> whether its answer was stopped by its length

    def answers(self, kind: str, requests: Sequence) -> tuple[list, list[dict]]:
        """What ``kind`` ("loglikelihood", "generate_until") answers, and {"prompt_cut": tokens, "answer_cut": True} of
        each request, without the keys of what is whole."""
        self._lost, self._cut_answers, self.cache_hook = [], {}, self
        if kind == "generate_until":
            self._lost = [self._too_long(*request.args) for request in requests]
        answers = getattr(self, kind)(requests, disable_tqdm=True)
        cut = [{"prompt_cut": lost} if lost else {} for lost in self._lost]
        if kind == "generate_until":
            for request, found in zip(requests, cut, strict=True):
                found |= {"answer_cut": True} if self._cut_answers.get(request.args[0]) else {}
        return answers, cut

    def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
        try:
            with limited():
                return super().apply_chat_template(chat_history, add_generation_prompt)
        except TooLong:
            raise UserError(
                f"the chat template of policy '{self.reader}' does not end; give another one: "
                "policy.chat_template=FILE.jinja"
            ) from None

    # ---- what HFLM calls

    def _loglikelihood_tokens(self, requests, *args, **options):
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(
                    f"task '{self.task}' has an answer of {len(continuation)} tokens, and policy '{self.reader}' reads "
                    f"{self.max_length} at most; choose a policy with a longer context, or leave the benchmark out"
                )
            self._lost.append(max(0, len(context) + len(continuation) - (self.max_length + 1)))
        return super()._loglikelihood_tokens(requests, *args, **options)

    def _too_long(self, context: str, options: dict) -> int:
        room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
        if room <= 0:
            raise UserError(
                f"task '{self.task}' lets an answer have {options.get('max_gen_toks', self.max_gen_toks)} tokens, and "
                f"policy '{self.reader}' reads {self.max_length} with the prompt; lower task.max_new_tokens, or choose "
                "a policy with a longer context"
            )
        return max(0, len(self.tok_encode(context)) - room)

    def _model_generate(self, context, max_length: int, stop: list[str], **options):
        made = super()._model_generate(context, max_length, stop, **options)
        texts = [row[context.shape[1] :].tolist() for row in made]
        ends = {self.tokenizer.pad_token_id, self.eot_token_id}
        self._unfinished = [
            made.shape[1] >= max_length
            and not ends & set(row)
            and not any(word in self.tok_decode(row, skip_special_tokens=False) for word in stop)
            for row in texts
        ]
        return made

    def add_partial(self, kind: str, request, result) -> None:
        """Called by HFLM after each answer, in the order of the batch."""
        if kind == "generate_until":
            self._cut_answers[request[0]] = self._unfinished.pop(0)
