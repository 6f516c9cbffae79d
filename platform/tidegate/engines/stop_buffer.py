"""Cuts generated text at the first stop string, whatever pieces it arrives in.

The result depends on the concatenated text only, never on how it was split: the stop string that is
complete first wins (of two complete at the same character, the longer), the text before it is released
and nothing of the stop string itself ever is. So a buffer is rebuilt by pushing the same text again.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopBuffer:
    """Holds back the longest end of the text that could still become a stop string. `keeps_stop`: the stop
    string itself is released too."""

    __slots__ = ("_held", "_keeps_stop", "_longest", "_stops", "stopped", "stopped_by")

    def __init__(self, stops: Sequence[str] = (), *, keeps_stop: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._keeps_stop = keeps_stop
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False
        self.stopped_by = ""  # the stop string that was complete

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Add `text`; return what can be released now. After `stopped` nothing is. Stop strings that are
        complete with a text that may not stop are passed over."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        held = self._held + text
        found = self._first_stop(held, len(self._held)) if may_stop else None
        if found is not None:
            end, begin = found
            self.stopped, self.stopped_by = True, held[begin:end]
            self._held = ""
            return held[: end if self._keeps_stop else begin]
        keep = self._possible_beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Release what is held: the text ends here, so it became no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str, searched: int) -> tuple[int, int] | None:
        """Find the end and the beginning of the stop string that is complete first, if any is after what was
        searched before."""
        found = [
            (at + len(stop), at)
            for stop in self._stops
            if (at := text.find(stop, max(0, searched + 1 - len(stop)))) >= 0
        ]
        return min(found) if found else None

    def _possible_beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
