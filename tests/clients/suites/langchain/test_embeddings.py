"""langchain-tests' embeddings suite on `OpenAIEmbeddings`."""

from __future__ import annotations

import os
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_openai import OpenAIEmbeddings
from langchain_tests.integration_tests import EmbeddingsIntegrationTests


class TestEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return OpenAIEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {
            "base_url": os.environ["CLIENTS_URL"] + "/v1",
            "api_key": os.environ["CLIENTS_KEY"],
            "model": os.environ["CLIENTS_EMBED_MODEL"],
            # Otherwise it counts tokens with tiktoken, which fetches OpenAI's vocabulary.
            "check_embedding_ctx_length": False,
        }
