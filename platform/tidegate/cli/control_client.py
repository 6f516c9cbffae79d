"""The control API as commands ask it: where it is, and a method for each thing that is asked of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import msgspec

from tidegate.cli import kubectl
from tidegate.cli.output import CommandFailed
from tidegate.cli.target import NOT_RUNNING, settings
from tidegate.control_api.views import (
    KeyList,
    ModelList,
    ModelView,
    NewKey,
    PlanView,
    RevisionList,
    RolloutAnswer,
)

if TYPE_CHECKING:
    import httpx

    from tidegate.messages.registry import Key, Scope
    from tidegate.messages.rollouts import Action, RevisionView, RolloutView

# What --context and --namespace name; None: neither was given.
NAMED_CLUSTER: ContextVar[kubectl.Cluster | None] = ContextVar("named cluster", default=None)

TIMEOUT_SECONDS = 30.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
AWAY = (502, 503, 504)  # of a proxy, of an operator that does not lead, while it starts

Answer = TypeVar("Answer")


class ControlAway(CommandFailed):
    """The control API does not answer now. It may soon."""


@dataclass(frozen=True, slots=True)
class Control:
    """A control API that is open. Each method raises `ControlAway` where it does not answer, and
    `CommandFailed` with its own sentence where it refuses."""

    client: httpx.Client

    def models(self) -> list[ModelView]:
        return self._ask("GET", "/models", ModelList).items

    def model(self, name: str) -> ModelView:
        return self._ask("GET", _of(name), ModelView)

    def rollout(self, model: str) -> RolloutView | None:
        return self._ask("GET", f"{_of(model)}/rollout", RolloutAnswer).rollout

    def revisions(self, model: str) -> list[RevisionView]:
        return self._ask("GET", f"{_of(model)}/revisions", RevisionList).items
