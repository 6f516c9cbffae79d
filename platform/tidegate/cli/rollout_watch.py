"""Follows a rollout to its end: on a terminal as a picture that is drawn anew, elsewhere as a line for each
thing that happens."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

import msgspec

from tidegate.cli.control_client import ControlAway, open_control
from tidegate.cli.output import Format, put, say
from tidegate.cli.rollout_drawing import draw_model, headline, record_of
from tidegate.control.reasons import WEIGHTS_AVAILABLE

if TYPE_CHECKING:
    from rich.live import Live

    from tidegate.control_api.views import ModelView

POLL_SECONDS = 1.0

Outcome = Literal["rolled out", "aborted", "under way"]


def outcome(model: ModelView) -> Outcome:
    """Tell how a model's rollout ended. The last one says nothing of a spec, an action or a source that is
    still to be looked at. An undo whose source has not the bytes any more ends like one that was aborted.
    Without any rollout the model is there when it is ready."""
    view, entry = model.rollout, model.entry
    if entry is None or not model.is_observed or model.action is not None:
        return "under way"
    if any(
        condition.type == WEIGHTS_AVAILABLE and condition.status != "True" for condition in entry.conditions
    ):
        return "under way"
    if view is None:
        return "rolled out" if entry.ready else "under way"
    if view.undo == "LookedAt":
        return "under way"
    if view.phase == "Aborted" or view.undo == "Refused":
        return "aborted"
    return "rolled out" if view.phase == "Completed" else "under way"


def follow(name: str, until: float | None, style: Format, *, shows: bool) -> ModelView:
    """Return the model when its rollout has ended, or as it was at `until` (`time.monotonic()`; None: never).
    A control API that goes away meanwhile, as in an upgrade, is asked again. Raises `CommandFailed` where
    there is none to begin with."""
    model: ModelView | None = None
    with Screen(style, shows=shows) as screen:
        while True:
            try:
                with open_control() as control:
                    while model is None or not _is_over(model, until):
                        if model is not None:
                            time.sleep(POLL_SECONDS)
                        model = control.model(name)
                        screen.show(model)
                    return model
            except ControlAway as error:
                if model is None or _is_over(model, until):
                    raise
                say(f"{error.message} Asking again.")
                time.sleep(POLL_SECONDS)


class Screen:
    """Shows a model's rollout as it goes on. `shows` False: it shows nothing."""

    def __init__(self, style: Format, *, shows: bool) -> None:
        self._style = style
        self._shows = shows
        self._live: Live | None = None
        self._last: object = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self._shows and self._style in (Format.table, Format.wide) and sys.stdout.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(highlight=False), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, model: ModelView) -> None:
        if self._live is not None:
            from rich.text import Text

            is_wide = self._style is Format.wide
            self._live.update(Text(draw_model(model, time.time(), is_wide=is_wide)), refresh=True)
        elif self._shows and (happened := _happened(model)) != self._last:
            self._last = happened
            put(self._line(model))

    def _line(self, model: ModelView) -> str:
        if self._style in (Format.json, Format.yaml):
            return msgspec.json.encode(record_of(model)).decode()
        return f"{time.monotonic() - self._began:6.1f} s  {headline(model)}"


def _is_over(model: ModelView, until: float | None) -> bool:
    return outcome(model) != "under way" or (until is not None and time.monotonic() >= until)


def _happened(model: ModelView) -> object:
    """What is worth a line: counts that grow all the time are not."""
    view = model.rollout
    if view is None:
        return model.action, model.entry and (model.entry.ready, model.entry.reason)
    gates = [(gate.name, gate.state) for gate in view.gates]
    moves = (view.id, view.phase, view.step, view.weight, view.reason, view.position)
    return model.action, moves, gates, view.replicas
