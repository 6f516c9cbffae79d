"""What vLLM's tests import of vLLM, which is not installed: of its names, those that stand for our platform
answer; any other skips the test that uses it, as that test asks vLLM's own code and no server."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import requests
from transformers import AutoConfig, AutoTokenizer

SOURCE = os.environ["CLIENTS_SOURCE"]


class Absent:
    """One name of vLLM's."""

    def __init__(self, *words: Any, **named: Any) -> None:
        pytest.skip("asks vLLM's own code, no server")


class ModelConfig:
    def __init__(self, **named: Any) -> None:
        pass

    @staticmethod
    def get_vocab_size() -> int:
        return int(AutoConfig.from_pretrained(SOURCE).vocab_size)


class NoHub:
    @staticmethod
    def snapshot_download(**named: Any) -> str:
        return ""


OURS: dict[str, Any] = {
    "vllm.config.ModelConfig": ModelConfig,
    "vllm.tokenizers.get_tokenizer": lambda *words, **named: AutoTokenizer.from_pretrained(SOURCE),
    "vllm.transformers_utils.repo_utils.hf_api": NoHub,
}


class Stub(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return OURS.get(f"{self.__name__}.{name}", Exception if name.endswith("Error") else Absent)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self) if name.split(".")[0] == "vllm" else None

    def create_module(self, spec: Any) -> ModuleType:
        stub = Stub(spec.name)
        stub.__path__ = []
        return stub

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, Finder())


@pytest.fixture(autouse=True, scope="session")
def key() -> Any:
    """Their tests that speak HTTP themselves send no key."""
    patch = pytest.MonkeyPatch()
    send = requests.Session.request

    def with_key(self: Any, method: str, url: str, **named: Any) -> Any:
        headers = {"Authorization": f"Bearer {os.environ['CLIENTS_KEY']}"} | (
            named.pop("headers", None) or {}
        )
        return send(self, method, url, headers=headers, **named)

    patch.setattr(requests.Session, "request", with_key)
    yield
    patch.undo()
