"""Turns a request's prompt into token ids, with the checkpoint's own chat template and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tidegate.messages.work import ChatPrompt, Generate, Request, TextPrompt, TokenPrompt


class PromptError(Exception):
    """The prompt cannot be rendered. The message is for the client."""


def check_token_ids(request: Request, vocabulary_size: int) -> None:
    """Refuse token ids that the model has not. Raises `PromptError`."""
    named_by: dict[str, Sequence[int]] = {}
    if isinstance(request.work, Generate):
        sampling = request.work.sampling
        named_by = {
            "logit_bias": [token for token, _ in sampling.logit_bias],
            "stop_token_ids": sampling.stop_token_ids,
            "allowed_token_ids": sampling.allowed_token_ids,
        }
    for name, named in named_by.items():
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
    return prompt.text if isinstance(prompt, TextPrompt) else render_chat(prompt, tokenizer, model)


def tokenize(text: str, prompt: TextPrompt | ChatPrompt, tokenizer: Any) -> list[int]:
    """Return the ids of what `render` made of `prompt`. May be empty (see `or_start`)."""
    encoded = tokenizer(
        text,
        add_special_tokens=prompt.add_special_tokens,
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


def bad_word_ids(words: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Return each word's tokens, and those that it has behind a space where these are as many but others."""
    found = []
    for word in words:
        alone, spaced = (
            [int(token) for token in tokenizer(space + word.lstrip(), add_special_tokens=False)["input_ids"]]
            for space in ("", " ")
        )
        found.append(alone)
        if len(spaced) == len(alone) and spaced[:1] != alone[:1]:
            found.append(spaced)
    return [ids for ids in found if ids]


def render_chat(prompt: ChatPrompt, tokenizer: Any, model: str) -> str:
    """Write chat messages as the checkpoint's template does."""
    if not tokenizer.chat_template:
        raise PromptError(
            f"The model {model!r} has no chat template: use /v1/completions, or add one to its tokenizer."
        )
    flat = [flatten(message) for message in prompt.messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                flat,
                tokenize=False,
                add_generation_prompt=prompt.add_generation_prompt,
                continue_final_message=prompt.continue_final_message,
                **prompt.template_args,
            )
        )
    except MemoryError:
        raise
    except Exception as error:  # templates raise what they like (jinja2 errors, TypeError, ...)
        raise PromptError(f"The chat template of {model!r} refuses these messages: {error}") from error


def flatten(message: Mapping[str, Any]) -> dict[str, Any]:
    """Make a message's content one string: text parts are joined, as templates expect."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return {**message, "content": "" if content is None else content}
