"""Turns a request's prompt into token ids, with the checkpoint's own chat template and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.messages.work import ChatPrompt, Request, TextPrompt, TokenPrompt


class PromptError(Exception):
    """The prompt cannot be rendered. The message is for the client."""


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
            ids = render_chat(messages, tokenizer, request.model)
        case TextPrompt(text):
            ids = [int(token) for token in tokenizer(text)["input_ids"]]
        case TokenPrompt(token_ids):
            wrong = next((token for token in token_ids if not 0 <= token < vocabulary_size), None)
            if wrong is not None:
                raise PromptError(f"Token id {wrong} is outside the vocabulary of {vocabulary_size} tokens.")
            ids = list(token_ids)
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise PromptError("The prompt is empty, and the model's tokenizer has no token to start from.")
    return [int(start)]


def render_chat(messages: list[dict[str, Any]], tokenizer: Any, model: str) -> list[int]:
    """Write chat messages as the checkpoint's template does, ready for the assistant's turn."""
    if not tokenizer.chat_template:
        raise PromptError(
            f"The model {model!r} has no chat template: use /v1/completions, or add one to its tokenizer."
        )
    flat = [flatten(message) for message in messages]
    try:
        ids = tokenizer.apply_chat_template(
            flat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except Exception as error:  # templates raise what they like (jinja2 errors, TypeError, ...)
        raise PromptError(f"The chat template of {model!r} refuses these messages: {error}") from error
    return [int(token) for token in ids]


def flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """Make a message's content one string: text parts are joined, as templates expect."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return {**message, "content": "" if content is None else content}
