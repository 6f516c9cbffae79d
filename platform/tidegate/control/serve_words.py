"""Ray Serve's words of an application that it gave up, as one sentence with its remedy. Pure.

Serve repeats Ray's own account of a replica's end, which for want of memory is a page of numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tidegate.control.conditions import last_lines
from tidegate.control.observed import ApplicationState, Worker

CONTAINER = "ray-worker"
LOGS = "/tmp/ray/session_latest/logs/serve"  # noqa: S108 - Ray's own, in the container
MAX_CHARACTERS = 1000
_TIMES = re.compile(r"failed to start (\d+) times in a row")
_MEMORY = re.compile(r"OutOfMemoryError.*?\(IP: ([0-9A-Fa-f.:]+),.*? was (\S+) used / (\S+) limit", re.DOTALL)
_DIED = re.compile(r"ActorDiedError|worker process has died")
_EXIT = re.compile(r"Worker exit type: (\w+)")
_ADDRESS = re.compile(r"^\s*ip: (\S+)$", re.MULTILINE)


def why_given_up(state: ApplicationState, group: str, workers: Sequence[Worker]) -> tuple[str, str]:
    """(reason, sentence). `group` is the one that its replicas run in; empty on one machine, where there are
    no `workers` either."""
    text = state.deployment_message or state.message
    if found := _MEMORY.search(text):
        address, used, limit = found.groups()
        return "OutOfMemory", _out_of_memory(f"{used} of {limit}", address, group, workers)
    if group and _DIED.search(text):
        return "DeployFailed", _died(text, group, workers)
    return "DeployFailed", _short(last_lines(text))


def _out_of_memory(amounts: str, address: str, group: str, workers: Sequence[Worker]) -> str:
    if not group:
        return (
            f"The machine ran out of memory while the replica started ({amounts} were taken), and Ray ended "
            "the replica; free some, or serve a smaller model."
        )
    pod = next((worker.pod for worker in workers if worker.address == address), f"at {address}")
    return (
        f"Pod {pod}, container {CONTAINER} ran out of memory while the replica started ({amounts} were "
        f"taken), and Ray ended the replica; raise the memory of group {group} in the Pool, or set "
        "spec.resources.memory of the models so that fewer share a worker."
    )


def _died(text: str, group: str, workers: Sequence[Worker]) -> str:
    """Ray names the address of some deaths and not of others."""
    times, exit_type, address = _TIMES.search(text), _EXIT.search(text), _ADDRESS.search(text)
    often = f", {times[1]} times in a row" if times else ""
    how = f" ({exit_type[1]})" if exit_type else ""
    of_group = [worker for worker in workers if worker.group == group]
    hosts = [worker for worker in of_group if address and worker.address == address[1]] or of_group
    names = ", ".join(worker.pod for worker in hosts)
    return (
        f"The replica's process ended while it started{often}{how}. What it said is in {LOGS} of container "
        f"{CONTAINER} in {names or f'the pods of group {group}'}."
    )


def _short(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}…"
