"""Turns a request's prompt into token ids, with the checkpoint's own chat template and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tidegate.errors import MOST_CHARACTERS, shortened
from tidegate.messages.work import ChatPrompt, Request, TextPrompt, TokenPrompt


class PromptError(Exception):
    """The prompt cannot be rendered. The message is for the client."""


def check_token_ids(request: Request, vocabulary_size: int) -> None:
    """Refuse token ids that the model has not. Raises `PromptError`."""
    sampling = request.work.sampling
    for name, named in (
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
        ("stop_token_ids", sampling.stop_token_ids),
    ):
        if (highest := max(named, default=0)) >= vocabulary_size:
            raise PromptError(
                f"{name}: token id {highest} is outside the vocabulary of {vocabulary_size} tokens."
            )
    if isinstance(request.work.prompt, TokenPrompt):
        ids = request.work.prompt.token_ids
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < vocabulary_size:
                raise PromptError(f"Token id {token} is outside the vocabulary of {vocabulary_size} tokens.")


def render(prompt: TextPrompt | ChatPrompt, tokenizer: Any, model: str) -> str:
    """Return the text to tokenize. Raises `PromptError`."""
    return prompt.text if isinstance(prompt, TextPrompt) else render_chat(prompt.messages, tokenizer, model)


def tokenize(text: str, prompt: TextPrompt | ChatPrompt, tokenizer: Any) -> list[int]:
    """Return the ids of what `render` made of `prompt`: a template writes special tokens itself. May be empty
    (see `or_start`)."""
    encoded = tokenizer(
        text,
        add_special_tokens=isinstance(prompt, TextPrompt),
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [int(token) for token in encoded["input_ids"]]


def or_start(ids: list[int], tokenizer: Any) -> list[int]:
    """Return the ids, or where there are none the token that texts start from. Raises `PromptError`."""
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise PromptError("The prompt is empty, and the model's tokenizer has no token to start from.")
    return [int(start)]


def render_chat(messages: list[dict[str, Any]], tokenizer: Any, model: str) -> str:
    """Write chat messages as the checkpoint's template does, ready for the assistant's turn."""
    if not tokenizer.chat_template:
        raise PromptError(
            f"The model {model!r} has no chat template: use /v1/completions, or add one to its tokenizer."
        )
    flat = [flatten(message) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(flat, add_generation_prompt=True, tokenize=False))
    except MemoryError:
        raise
    except Exception as error:  # templates raise what they like (jinja2 errors, TypeError, ...)
        why = shortened(str(error), MOST_CHARACTERS // 2)  # a template may raise with all of the messages
        raise PromptError(f"The chat template of {model!r} refuses these messages: {why}") from error


def flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """Make a message's content one string: text parts are joined, as templates expect."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return {**message, "content": "" if content is None else content}
