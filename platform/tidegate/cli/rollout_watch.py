"""Follows a rollout to its end: on a terminal as a picture that is drawn anew, elsewhere as a line for each thing
that happens."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import msgspec

from tidegate.cli.control_client import ControlAway, open_control
from tidegate.cli.output import Format, put, say
from tidegate.cli.rollout_drawing import draw, headline
from tidegate.messages.rollouts import RolloutView

if TYPE_CHECKING:
    from rich.live import Live

POLL_SECONDS = 1.0
ENDED = ("Completed", "Aborted")


def follow(model: str, until: float | None, style: Format, *, shows: bool) -> RolloutView:
    """Return the rollout as it ended, or as it was at `until` (`time.monotonic()`; None: never). A control API
    that goes away meanwhile, as in an upgrade, is asked again. Raises `CommandFailed` where there is none to
    begin with."""
    view: RolloutView | None = None
    with Screen(style, shows=shows) as screen:
        while True:
            try:
                with open_control() as control:
                    while view is None or not _is_over(view, until):
                        if view is not None:
                            time.sleep(POLL_SECONDS)
                        view = control.rollout(model)
                        screen.show(view)
                    return view
            except ControlAway as error:
                if view is None or _is_over(view, until):
                    raise
                say(f"{error.message} Asking again.")
                time.sleep(POLL_SECONDS)


class Screen:
    """Shows views as they come. `shows` False: it shows nothing."""

    def __init__(self, style: Format, *, shows: bool) -> None:
        self._style = style
        self._shows = shows
        self._live: Live | None = None
        self._last: tuple[object, ...] = ()
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

    def show(self, view: RolloutView) -> None:
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(draw(view, time.time())), refresh=True)
        elif self._shows and (happened := _happened(view)) != self._last:
            self._last = happened
            put(self._line(view))

    def _line(self, view: RolloutView) -> str:
        if self._style in (Format.json, Format.yaml):
            return msgspec.json.encode(view).decode()
        return f"{time.monotonic() - self._began:6.1f} s  {headline(view)}"


def _is_over(view: RolloutView, until: float | None) -> bool:
    return view.phase in ENDED or (until is not None and time.monotonic() >= until)


def _happened(view: RolloutView) -> tuple[object, ...]:
    """What is worth a line: counts that grow all the time are not."""
    gates = [(gate.name, gate.state) for gate in view.gates]
    return view.id, view.phase, view.step, view.weight, view.reason, view.position, gates, view.replicas
