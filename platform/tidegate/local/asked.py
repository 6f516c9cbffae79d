"""What was asked of this host through its control API, beside the resource files: specs in their place,
actions on rollouts, models that drain. One JSON file, so that a host that starts anew knows it.

The files stay the user's: a spec that was set here ends as soon as the file says something else, and an
action once it has been acted on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
from pydantic import ValidationError

from tidegate.control.desired import spec_on_wire
from tidegate.control.resource_files import ResourceSet
from tidegate.control.resources import Model, ModelSpec, PoolSpec
from tidegate.local.home import write_atomically
from tidegate.messages.rollouts import Action

log = logging.getLogger(__name__)


class Overlay(msgspec.Struct, frozen=True):
    """The spec that a model has instead of `base`, its file's."""

    base: dict[str, Any]
    spec: dict[str, Any]
    author: str


class _Stored(msgspec.Struct):
    overlays: dict[str, Overlay] = {}
    actions: dict[str, Action] = {}
    drains: dict[str, str] = {}  # model -> who asked for it


class Files(Protocol):
    @property
    def resources(self) -> ResourceSet: ...

    @property
    def pool(self) -> PoolSpec: ...


class Asked:
    """Stands between the resource files and the control loop. All of it is touched on the event loop only."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files = files
        self._path = path
        self._stored = _read(path)

    @property
    def resources(self) -> ResourceSet:
        """The files' resources with the specs that were set here. What has ended by a change is forgotten."""
        found = self._files.resources
        declared = {model.name: model for model in found.models}
        self._forget(declared)
        models = tuple(self._overlaid(model) for model in found.models)
        return replace(found, models=models)

    @property
    def pool(self) -> PoolSpec:
        return self._files.pool

    @property
    def actions(self) -> Mapping[str, Action]:
        return dict(self._stored.actions)

    @property
    def drains(self) -> frozenset[str]:
        return frozenset(self._stored.drains)

    @property
    def authors(self) -> Mapping[str, str]:
        """Who set a spec here, by model."""
        return {name: overlay.author for name, overlay in self._stored.overlays.items()}

    def is_overlaid(self, name: str) -> bool:
        return name in self._stored.overlays

    def set_spec(self, model: Model, author: str) -> None:
        """Give this model another spec than its file's. Its file's own ends what was set."""
        base = next(
            spec_on_wire(each.spec) for each in self._files.resources.models if each.name == model.name
        )
        spec = spec_on_wire(model.spec)
        self._stored.overlays.pop(model.name, None)
        if spec != base:
            self._stored.overlays[model.name] = Overlay(base, spec, author)
        self._write()

    def act(self, name: str, action: Action) -> None:
        self._stored.actions[name] = action
        self._write()

    def acted(self, actions: Mapping[str, Action]) -> None:
        """Forget these actions, which the records say were acted on."""
        done = [name for name, action in actions.items() if self._stored.actions.get(name) == action]
        for name in done:
            del self._stored.actions[name]
        if done:
            self._write()

    def drain(self, name: str, is_on: bool, author: str) -> None:
        self._stored.drains.pop(name, None)
        if is_on:
            self._stored.drains[name] = author
        self._write()

    def _overlaid(self, model: Model) -> Model:
        overlay = self._stored.overlays.get(model.name)
        if overlay is None:
            return model
        return model.model_copy(update={"spec": ModelSpec.model_validate(overlay.spec)})

    def _forget(self, declared: Mapping[str, Model]) -> None:
        stored = self._stored
        ended = [
            name
            for name, overlay in stored.overlays.items()
            if name not in declared
            or spec_on_wire(declared[name].spec) != overlay.base
            or not _is_valid(overlay)
        ]
        for name in ended:
            log.warning("model %s: its file has changed, so what was set by the control API ends", name)
            del stored.overlays[name]
        gone = [
            (kind, name) for kind in (stored.actions, stored.drains) for name in kind if name not in declared
        ]
        for kind, name in gone:
            del kind[name]
        if ended or gone:
            self._write()

    def _write(self) -> None:
        write_atomically(self._path, msgspec.json.encode(self._stored))


def _is_valid(overlay: Overlay) -> bool:
    """Tell whether this version's schema takes it."""
    try:
        ModelSpec.model_validate(overlay.spec)
    except ValidationError:
        return False
    return True


def _read(path: Path) -> _Stored:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Stored)
    except FileNotFoundError:
        return _Stored()
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s cannot be read (%s); what was asked of the control API is lost", path, error)
        return _Stored()
