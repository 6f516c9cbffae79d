"""langchain-tests' chat model suite on `ChatOpenAI`."""

from __future__ import annotations

import os
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class TestChat(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {
            "base_url": os.environ["CLIENTS_URL"] + "/v1",
            "api_key": os.environ["CLIENTS_KEY"],
            "model": os.environ["CLIENTS_MODEL"],
            "temperature": 0,
            "max_tokens": 256,
            "stream_usage": True,
        }

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def model_override_value(self) -> str:
        return os.environ["CLIENTS_MODEL"]
