"""Stands for a model whose weights are loaded elsewhere: what its files say of it, for rules and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.generation.utils import GenerationMixin

from tidegate.engines.base import EngineLoadError


class Described(GenerationMixin):  # type: ignore[misc]
    """Has the configurations that the loaded model would have, and makes its generation rules on `device`."""

    def __init__(self, folder: Path, vocabulary_size: int, device: str = "cpu") -> None:
        """Raises `EngineLoadError` (WeightsWrong)."""
        try:
            self.config: Any = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            self.generation_config = (
                GenerationConfig.from_pretrained(folder)
                if (folder / "generation_config.json").is_file()
                else GenerationConfig.from_model_config(self.config)
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineLoadError(
                "WeightsWrong", f"{folder / 'config.json'} cannot be read ({error}); copy it again."
            ) from error
        self.device = torch.device(device)
        self._embeddings = torch.nn.Embedding(vocabulary_size, 1, device="meta")

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self._embeddings
