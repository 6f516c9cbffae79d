"""Cuts generated text at the first stop string, whatever pieces it arrives in.

The result depends on the concatenated text only, never on how it was split: the stop string that is
complete first wins (of two complete at the same character, the longer), the text before it is released
and nothing of the stop string itself ever is. So a buffer is rebuilt by pushing the same text again.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopBuffer:
    """Holds back the longest end of the text that could still become a stop string."""

    __slots__ = ("_held", "_longest", "_stops", "stopped")

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Add `text`; return what can be released now. After `stopped` nothing is."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        held = self._held + text
        cut = self._first_stop(held)
        if cut is not None:
            self.stopped = True
            self._held = ""
            return held[:cut]
        keep = self._possible_beginning(held)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """Release what is held: the text ends here, so it became no stop string."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Find where the stop string begins that is complete first, if any is."""
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _possible_beginning(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            end = text[len(text) - length :]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
