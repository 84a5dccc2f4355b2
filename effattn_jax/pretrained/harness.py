"""A model as lm-evaluation-harness takes it. Needs the extra `eval`; nothing else imports this file."""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import LM

from effattn_jax.pretrained.text_model import TextModel


class HarnessModel(LM):
    """`lm_eval.simple_evaluate(model=HarnessModel(text_model), tasks=["hellaswag"])`.

    Args:
      name: of the tokenizer, by which the harness tells cached requests apart.
    """

    def __init__(self, text_model: TextModel, name: str = "effattn_jax"):
        super().__init__()
        self.text_model, self._name = text_model, name

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self.text_model.log_likelihood([request.args for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return self.text_model.log_likelihood_rolling([request.args[0] for request in requests])

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        return self.text_model.generate_until([request.args for request in requests])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.text_model.tokenizer.chat_text(chat_history, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.text_model.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._name
