"""Writes chat messages as the checkpoint's own template does.

Templates are programs that a checkpoint brings along, so what one wants is found by trying it: whether a
role's content is a text or a list of parts, and who is at fault where it fails. A template that cannot write
one plain message of a user is broken for every client.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from tidegate.messages.work import ChatPrompt

WORD = "tidegate"  # what a template that shows a message's content must show
ROLES = ("user", "system", "assistant")


class TemplateFault(Exception):
    """The template itself is broken, whatever the messages. The message is for whoever runs the model."""


class MessagesRefused(Exception):
    """The template does not take these messages. The message is for the client."""


def render(prompt: ChatPrompt, tokenizer: Any) -> str:
    """Write the messages of `prompt`. Raises `TemplateFault` or `MessagesRefused`."""
    check_template(tokenizer)
    in_parts = roles_in_parts(tokenizer)
    try:
        return write(
            [shaped(message, message.get("role") in in_parts) for message in prompt.messages],
            tokenizer,
            add_generation_prompt=prompt.add_generation_prompt,
            continue_final_message=prompt.continue_final_message,
            tools=prompt.tools or None,
            **prompt.template_args,
        )
    except MemoryError:
        raise
    except Exception as error:  # templates raise what they like (jinja2 errors, TypeError, ...)
        raise MessagesRefused(str(error) or type(error).__name__) from error


def check_template(tokenizer: Any) -> None:
    """Raise `TemplateFault` where the template cannot write a plain question."""
    if fault := template_fault(tokenizer):
        raise TemplateFault(fault)


@lru_cache(maxsize=4)
def template_fault(tokenizer: Any) -> str:
    """Say what is wrong with the template; empty where nothing is."""
    question = [{"role": "user", "content": WORD}]
    try:
        write(question, tokenizer)
    except Exception as error:
        # Its own sentence, by raise_exception: it works, and wants more than a question.
        if type(error) is TemplateError or roles_in_parts(tokenizer):
            return ""
        place = f"line {line}: " if (line := getattr(error, "lineno", None)) else ""
        return f"{place}{error or type(error).__name__}"
    if shows(question, tokenizer) or roles_in_parts(tokenizer):
        return ""
    return "it shows nothing of what a user says"


@lru_cache(maxsize=4)
def roles_in_parts(tokenizer: Any) -> frozenset[str]:
    """Return the roles whose content the template shows only as a list of parts."""
    found: set[str] = set()
    for role in ROLES:
        other = shaped({"role": "user", "content": "?"}, "user" in found)
        before, after = {"user": ([], []), "system": ([], [other]), "assistant": ([other], [other])}[role]
        as_text, as_parts = (
            [*before, shaped({"role": role, "content": WORD}, in_parts), *after] for in_parts in (False, True)
        )
        if not shows(as_text, tokenizer) and shows(as_parts, tokenizer):
            found.add(role)
    return frozenset(found)


def shows(messages: list[dict[str, Any]], tokenizer: Any) -> bool:
    try:
        return WORD in write(messages, tokenizer).lower()
    except Exception:
        return False


def write(
    messages: list[dict[str, Any]], tokenizer: Any, *, add_generation_prompt: bool = True, **options: Any
) -> str:
    return str(
        tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
        )
    )


def shaped(message: Mapping[str, Any], in_parts: bool) -> dict[str, Any]:
    """Give a message's content the form that the template wants: one text, or a list of text parts."""
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [str(part.get("text", "")) for part in content]
    parts = [{"type": "text", "text": text} for text in texts]
    return {**message, "content": parts if in_parts else "".join(texts)}
