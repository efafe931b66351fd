"""lm-eval with the model ``pdtrim``: ``python -m pdtrim.lm_eval --model pdtrim ...``.

lm-eval 0.4 finds models in its own list only, not by entry points. Importing this module puts
``pdtrim`` into its registry, which also serves ``lm_eval.simple_evaluate(model="pdtrim", ...)``;
run as a module, it then hands over to lm-eval's own command.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.utils import simple_parse_args_string

from pdtrim.errors import PdtrimError, one_line
from pdtrim.evaluate.configs import BATCH_TOKENS
from pdtrim.evaluate.tasks.lm import WINDOW, PDTrimLM
from pdtrim.exported import load_pair
from pdtrim.stage.forward import Trimmed

ARGUMENTS = ("pair", "device", "batch_tokens", "window")


@register_model("pdtrim")
class PairLM(PDTrimLM):
    """An exported pair; the arguments are those of ``--model_args``.

    Args:
        pair: the folder that ``pdtrim export`` wrote. Its weights have the type of the export.
        device: ``cpu`` or ``cuda``; before lm-eval's ``--device``, which is ``cuda:0`` if not
            given and means ``cpu`` here, as for lm-eval's own models, where there is no GPU.
        batch_tokens: tokens that run together. lm-eval's ``--batch_size`` counts requests and is
            not read: requests differ in length, and are put together by tokens.
        window: tokens of a rolling window.

    Raises:
        PdtrimError: no pair, one that is altered, or an argument that is not known.
    """

    def __init__(
        self,
        pair: str | Path | None = None,
        *,
        device: str = "cpu",
        batch_tokens: int = BATCH_TOKENS,
        window: int = WINDOW,
        batch_size: object = None,
        max_batch_size: object = None,
        **unknown: Any,
    ) -> None:
        del batch_size, max_batch_size
        if unknown or pair is None:
            wrong = f"'{next(iter(unknown))}' is not known" if unknown else "'pair' is missing"
            raise PdtrimError(f"--model_args: {wrong}; give pair=DIR, and {_rest()} if wanted")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise PdtrimError(f"--model_args: device={device}, but torch finds no GPU here")
        stages, plan = load_pair(str(pair), device=device)
        super().__init__(
            Trimmed.of(plan, stages), batch_tokens=int(batch_tokens), window=int(window)
        )
        self.digest = plan.digest

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> PairLM:
        """From the text of ``model_args``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> PairLM:
        """From ``model_args``, and what lm-eval's other options say where they say nothing."""
        more = {k: v for k, v in (additional_config or {}).items() if v is not None}
        if str(more.get("device")).startswith("cuda") and not torch.cuda.is_available():
            more["device"] = "cpu"
        return cls(**{**more, **arg_dict})

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keys its cache of requests by."""
        return f"pdtrim-{self.digest[:12]}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template for ``--apply_chat_template``.

        Raises:
            PdtrimError: the tokenizer has none, or a template is asked for by name.
        """
        if not chat_template:
            return ""
        own = self.tokenizer.chat_template
        if chat_template is not True or not isinstance(own, str):
            raise PdtrimError("--apply_chat_template: the pair's tokenizer has no such template")
        return own

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the prompt's text."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's result says of the model."""
        return {"plan_digest": self.digest}


def _rest() -> str:
    return " or ".join(f"{name}=..." for name in ARGUMENTS[1:])


def main() -> None:
    """lm-eval's own command, with the model ``pdtrim``; a mistake about the pair is one line."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except PdtrimError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
