"""The verb that runs a pair: generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pdtrim.cli.common import Json, err, out, print_json, visible
from pdtrim.cli.options import from_record
from pdtrim.runtime.config import RuntimeConfig
from pdtrim.stage.sampling import Sampling

app = typer.Typer()


@app.command(epilog='Example: pdtrim generate pair --prompt "Explain what AI is." ')
@from_record(Sampling)
@from_record(RuntimeConfig, into="placed")
def generate(
    folder: Annotated[Path, typer.Argument(help="An exported pair.")],
    prompt: Annotated[list[str], typer.Option(help="A prompt; give it again for a batch.")],
    config: Sampling,
    placed: RuntimeConfig,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate, at most.")] = 128,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Use the chat template; by default if there is one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Generate with the two processes; a single prompt streams."""
    from pdtrim.runtime.session import Session

    with Session(folder, placed) as session:
        if len(prompt) == 1 and not as_json:
            _stream(session, session.encode(prompt[0], chat=chat), max_new_tokens, config)
        else:
            results = session.generate(
                prompt, max_new_tokens=max_new_tokens, sampling=config, chat=chat
            )
            if as_json:
                print_json([vars(result) for result in results])
            else:
                for text, result in zip(prompt, results, strict=True):
                    out.print(text, style="bold")
                    out.print(result.text + "\n")
        _say_timing(session, as_json)


def _stream(session: Any, tokens: list[int], max_new_tokens: int, config: Sampling) -> None:
    ids: list[int] = []
    text = shown = ""
    try:
        for _, token in session.stream([tokens], max_new_tokens=max_new_tokens, sampling=config):
            ids.append(token)
            text = session.tokenizer.decode(ids, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # half of a character: wait for the rest
                _write(text[len(shown) :])
                shown = text
    finally:  # what no token completed is shown as it is
        _write(text[len(shown) :] + "\n")


def _write(text: str) -> None:
    sys.stdout.write(visible(text))
    sys.stdout.flush()


def _say_timing(session: Any, as_json: bool) -> None:
    if not as_json and session.timing is not None:
        t = session.timing
        err.print(
            f"prefill {t.prefill_s:.2f} s, handover {sum(session.kv_bytes):,} bytes in"
            f" {t.handover_s * 1000:.1f} ms by {t.transport} ({t.exposed_handover * 1000:.1f} ms"
            f" of it behind prefill), decode {t.decode_s:.2f} s with"
            f" {t.cache_bytes / 2**20:.1f} MiB of KV cache",
            style="dim",
        )
