"""The laptop behind the control API. Implements `tidegate.control_api.ports.Host`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tidegate.control.desired import spec_on_wire
from tidegate.control.resource_files import with_absolute_source
from tidegate.control.resources import DEFAULT_POOL, Model
from tidegate.control_api.planned import plan_view
from tidegate.control_api.shown import (
    changed_since,
    checked,
    observed,
    shown_fields,
    unknown_model,
    version_of,
)
from tidegate.control_api.views import ModelView, PlanView, PoolView
from tidegate.control_round import Depths, Registry
from tidegate.local.asked import Asked
from tidegate.local.control_loop import ControlLoop
from tidegate.messages.rollouts import Action, RevisionView


class LaptopHost:
    """`changed` is called where the control loop has something new to decide on."""

    def __init__(
        self,
        loop: ControlLoop,
        asked: Asked,
        registry: Registry,
        depths: Depths,
        changed: Callable[[], None],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._loop = loop
        self._asked = asked
        self._registry = registry
        self._depths = depths
        self._changed = changed
        self._now = now

    async def models(self) -> list[ModelView]:
        models = self._models()
        return await self._views(models)

    async def model(self, name: str) -> ModelView:
        (view,) = await self._views({name: self._model(name)})
        return view

    async def pools(self) -> list[PoolView]:
        spec = self._asked.pool.model_dump(mode="json", by_alias=True)
        return [PoolView(DEFAULT_POOL, "", version_of(spec), spec, sorted(self._models()))]

    async def revisions(self, name: str) -> list[RevisionView]:
        self._model(name)
        return self._loop.revisions(name)

    async def put_spec(
        self, name: str, spec: Mapping[str, Any], resource_version: str, author: str
    ) -> ModelView:
        past = self._model(name)
        if version_of(spec_on_wire(past.spec)) != resource_version:
            raise changed_since(name)
        self._asked.set_spec(self._checked(name, spec), author)
        self._changed()
        return await self.model(name)

    async def act(self, name: str, action: Action) -> None:
        self._model(name)
        self._asked.act(name, action)
        self._changed()

    async def drain(self, name: str, is_on: bool, author: str) -> ModelView:
        self._model(name)
        self._asked.drain(name, is_on, author)
        self._changed()
        return await self.model(name)

    async def plan(
        self, name: str, *, spec: Mapping[str, Any] | None = None, action: Action | None = None
    ) -> PlanView:
        self._model(name)
        models = self._models()
        if spec is not None:
            models[name] = self._checked(name, spec)
        actions = {name: action} if action is not None else {}
        snapshot = await self._loop.look(list(models.values()), actions)
        return plan_view(snapshot, name, self._now())

    def _models(self) -> dict[str, Model]:
        return {model.name: model for model in self._asked.resources.models}

    def _model(self, name: str) -> Model:
        models = self._models()
        if name not in models:
            raise unknown_model(name, models)
        return models[name]

    def _checked(self, name: str, spec: Mapping[str, Any]) -> Model:
        """A relative path means what it means in the model's file."""
        origin = self._asked.resources.origins.get(name, Path(os.sep) / "none")
        return with_absolute_source(checked(name, spec), origin.parent)

    async def _views(self, models: Mapping[str, Model]) -> list[ModelView]:
        records = self._loop.records
        seen = await observed(self._registry, self._depths, records, models)
        return [
            self._view(model, shown_fields(name, seen, records.get(name)))
            for name, model in sorted(models.items())
        ]

    def _view(self, model: Model, load: Mapping[str, Any]) -> ModelView:
        spec = spec_on_wire(model.spec)
        return ModelView(
            name=model.name,
            namespace="",
            pool=DEFAULT_POOL,
            resource_version=version_of(spec),
            spec=spec,
            is_observed=self._loop.decided.get(model.name) == model,
            rollout=self._loop.rollouts.get(model.name),
            is_overlaid=self._asked.is_overlaid(model.name),
            drains=model.name in self._asked.drains,
            action=self._asked.actions.get(model.name),
            **load,
        )
