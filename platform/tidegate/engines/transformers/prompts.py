"""Turns a request's prompt into token ids, with the checkpoint's own chat template and tokenizer.

A prompt of any kind is what the client wrote, behind what the tokenizer puts before a text: an end token that
some tokenizers put after every text would end the prompt before it goes on, and a start token that the client
or the template wrote is not put there twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tidegate.engines.transformers.chat_templates import MessagesRefused, TemplateFault, render
from tidegate.messages.work import ChatPrompt, Request, TextPrompt, TokenPrompt


class PromptError(Exception):
    """The prompt cannot be rendered. The message is for the client."""

    def __init__(self, message: str, code: str = "InvalidPrompt") -> None:
        super().__init__(message)
        self.code = code


def prompt_ids(request: Request, tokenizer: Any, vocabulary_size: int) -> list[int]:
    """Return the prompt's token ids, never empty. Raises `PromptError`."""
    sampling = request.work.sampling
    for name, named in (
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if (highest := max(named, default=0)) >= vocabulary_size:
            raise PromptError(
                f"{name}: token id {highest} is outside the vocabulary of {vocabulary_size} tokens."
            )
    match request.work.prompt:
        case ChatPrompt(messages):
            ids = chat_ids(messages, tokenizer, request.model)
        case TextPrompt(text):
            ids = text_ids(text, tokenizer)
        case TokenPrompt(token_ids):
            ids = list(token_ids)
    ids = ids or start_ids(tokenizer)
    if (token := outside(ids, vocabulary_size)) is not None:
        fault = f"{known_as(token, tokenizer)} is outside the vocabulary of {vocabulary_size} tokens."
        if isinstance(request.work.prompt, ChatPrompt) and token in plain_chat_ids(tokenizer):
            raise broken_template(request.model, fault)
        raise PromptError(fault)
    return ids


def chat_ids(messages: list[dict[str, Any]], tokenizer: Any, model: str) -> list[int]:
    """Encode chat messages as the checkpoint's template writes them: it writes the start token too."""
    if not tokenizer.chat_template:
        raise PromptError(
            f"The model {model!r} has no chat template: use /v1/completions, or add one to its tokenizer."
        )
    try:
        return encoded(render(messages, tokenizer), tokenizer)
    except TemplateFault as error:
        raise broken_template(model, str(error)) from error
    except MessagesRefused as error:
        raise PromptError(f"The chat template of {model!r} refuses these messages: {error}") from error


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Encode a text that is to go on."""
    before, after = frame(tokenizer)
    ids = encoded(text, tokenizer)
    return [*(() if tuple(ids[: len(before)]) == before else before), *ids, *after]


@lru_cache(maxsize=4)
def frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that the tokenizer puts before and after a text, but for one that ends it."""
    text = encoded("a", tokenizer)
    whole = [int(token) for token in tokenizer("a")["input_ids"]]
    start = next(at for at in range(len(whole)) if whole[at : at + len(text)] == text)
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return tuple(whole[:start]), tuple(token for token in whole[start + len(text) :] if token not in ends)


def encoded(text: str, tokenizer: Any) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def start_ids(tokenizer: Any) -> list[int]:
    """Return the token that an empty prompt goes on from."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise PromptError("The prompt is empty, and the model's tokenizer has no token to start from.")
    return [int(start)]


def outside(ids: Sequence[int], vocabulary_size: int) -> int | None:
    """Return the first token that the model has no embedding for."""
    return next((token for token in ids if not 0 <= token < vocabulary_size), None)


def known_as(token: int, tokenizer: Any) -> str:
    name = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else None
    return f"Token id {token}" + (f" ({name!r})" if name is not None else "")


def plain_chat_ids(tokenizer: Any) -> list[int]:
    """Encode the least chat: what is in it, no client can leave out."""
    try:
        return encoded(render([{"role": "user", "content": ""}], tokenizer), tokenizer)
    except (TemplateFault, MessagesRefused):
        return []


def broken_template(model: str, fault: str) -> PromptError:
    return PromptError(
        f"The chat template of the model {model!r} is broken, so it serves /v1/completions only: {fault}",
        "ChatTemplateInvalid",
    )
