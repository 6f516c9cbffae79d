"""In place of vLLM's `tests/utils.py`: its servers are the platform that runs."""

from __future__ import annotations

import os
from typing import Any

import anthropic
import openai

ROCM_EXTRA_ARGS: list[str] = []


class RemoteOpenAIServer:
    url_root = os.environ["CLIENTS_URL"]
    key = os.environ["CLIENTS_KEY"]

    def __init__(self, model: str, arguments: list[str], **named: Any) -> None:
        pass

    def __enter__(self) -> RemoteOpenAIServer:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def url_for(self, *parts: str) -> str:
        return "/".join([self.url_root, *(part.strip("/") for part in parts)])

    def get_client(self, **named: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url_for("v1"), api_key=self.key, max_retries=0, **named)

    def get_async_client(self, **named: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url_for("v1"), api_key=self.key, max_retries=0, **named)

    def get_async_client_anthropic(self, **named: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.url_root, api_key=self.key, max_retries=0, **named)
