"""The one writer of a Ray cluster's Serve config. Local and cluster hosts share it. No ray import.

A PUT replaces the whole set of applications and one that Serve refuses (HTTP 400) refuses them all. So after
a refusal the changes are tried one by one on top of what stands: those that Serve takes stay, the culprits
keep their last good config (or stay out, where they never had one), and their names come back with Serve's
words. What was refused is remembered and not sent again for a while, as long as it does not change. Losing
that memory costs only repeated work.

One task calls `write` and awaits it before the next call: two PUTs must never overlap.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from tidegate.control.observed import ServeState
from tidegate.control.serve_config import put_body
from tidegate.serve_api import ServeRejected, ServeUnavailable, is_applied

log = logging.getLogger(__name__)

# A refusal is a schema error that stays, but Serve itself may be another one by then.
RETRY_SECONDS = 300.0

Config = Mapping[str, Any]  # of one application


class Api(Protocol):
    """The writer asks this of Serve (`tidegate.serve_api.ServeApi`)."""

    async def put(self, config: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class _Refused:
    config: Config
    message: str
    until: float


class ServeWriter:
    """One per Ray cluster, which `name` names in logs; it remembers what was taken and what was refused."""

    def __init__(self, name: str = "Ray", now: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._now = now
        self._taken: dict[str, Config] = {}  # by application, as last sent and accepted
        self._refused: dict[str, _Refused] = {}
        self._has_written = False
        self.problem: tuple[str, str] | None = (
            None  # (reason, sentence) of the last `write` that failed whole
        )

    @property
    def rejected(self) -> Mapping[str, str]:
        """Serve's words by name for applications that it refuses."""
        return {name: refused.message for name, refused in self._refused.items()}

    async def write(self, api: Api, wanted: Mapping[str, Config], standing: ServeState) -> bool:
        """Make Serve hold these applications (by name); PUT only where it does not (`standing` is its last
        answer). Returns whether anything was sent.

        `problem` then says where Serve does not answer (it is unknown what it took), or refuses without a
        single change to blame.
        """
        self._has_written, self.problem = False, None
        stands = {
            name: state.config or {}
            for name, state in standing.applications.items()
            if state.status != "DELETING"
        }
        self._forget(wanted)
        base = self._good(wanted, stands)
        config = {name: base.get(name) if name in self._refused else each for name, each in wanted.items()}
        sent = {name: each for name, each in config.items() if each is not None}
        if not _is_held(sent, stands):
            try:
                await self._send(api, sent, base, stands)
            except (ServeRejected, ServeUnavailable) as error:
                log.error("%s: %s", self._name, error.message)
                self.problem = (error.reason, error.message)
        return self._has_written

    def _forget(self, wanted: Mapping[str, Config]) -> None:
        """Drop what is not wanted any more, wanted otherwise, or due for another try."""
        now = self._now()
        self._taken = {name: config for name, config in self._taken.items() if name in wanted}
        self._refused = {
            name: refused
            for name, refused in self._refused.items()
            if wanted.get(name) == refused.config and now < refused.until
        }

    def _good(self, wanted: Mapping[str, Config], stands: Mapping[str, Config]) -> dict[str, Config]:
        """Return the last good config of each wanted application that stands. As it was made here, where that
        is known: Serve adds its defaults to what it reports."""
        good: dict[str, Config] = {}
        for name, config in wanted.items():
            reported = stands.get(name)
            if not reported:
                continue
            made = (config, self._taken.get(name))
            good[name] = next((each for each in made if each and is_applied(each, reported)), reported)
        return good

    async def _send(
        self,
        api: Api,
        sent: Mapping[str, Config],
        base: Mapping[str, Config],
        stands: Mapping[str, Config],
    ) -> None:
        refusal = await self._put(api, sent)
        if refusal is None:
            return
        held = {name: base[name] for name in sent if name in base}
        changed = [name for name in sent if name not in held or sent[name] != held[name]]
        if not changed:
            raise refusal
        has_taken = False
        for name in changed:
            if len(changed) > 1:
                refusal = await self._put(api, {**held, name: sent[name]})
            if refusal is None:
                held[name], has_taken = sent[name], True
                continue
            log.error("application %s: %s", name, refusal.message)
            self._refused[name] = _Refused(sent[name], refusal.message, self._now() + RETRY_SECONDS)
        # What Serve took has also removed what goes; where it took nothing, that is still to do.
        if not has_taken and held.keys() != stands.keys() and (refusal := await self._put(api, held)):
            raise refusal

    async def _put(self, api: Api, configs: Mapping[str, Config]) -> ServeRejected | None:
        """Send one config. Returns Serve's refusal, where it refuses."""
        log.info("%s: PUT %d applications: %s", self._name, len(configs), ", ".join(configs) or "none")
        self._has_written = True
        try:
            await api.put(put_body(configs.values()))
        except ServeRejected as error:
            return error
        self._taken = dict(configs)
        return None


def _is_held(sent: Mapping[str, Config], stands: Mapping[str, Config]) -> bool:
    return sent.keys() == stands.keys() and all(is_applied(sent[name], stands[name]) for name in sent)
