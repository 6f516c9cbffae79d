"""`tidegate models`: what can be asked, and how each model is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.output import (
    Column,
    CommandFailed,
    Format,
    OutputOption,
    Record,
    show_list,
    show_record,
    size,
    table,
)

if TYPE_CHECKING:
    from tidegate.messages.queue import Depth
    from tidegate.messages.registry import ModelEntry, ReplicaStats

COLUMNS = (
    Column("NAME", lambda model: model["name"]),
    Column("TASK", lambda model: model["task"]),
    Column("FORMAT", lambda model: model["format"] or "-"),
    Column("SIZE", lambda model: size(model["weights_bytes"])),
    Column("REPLICAS", lambda model: f"{model['replicas_ready']}/{model['replicas_wanted']}"),
    Column("WAITING", lambda model: str(model["waiting"])),
    Column("RUNNING", lambda model: str(model["running"]), only_wide=True),
    Column("TOKENS/S", lambda model: f"{model['tokens_per_second']:.1f}"),
    Column("READY", lambda model: "yes" if model["ready"] else "no"),
    Column("REASON", lambda model: model["reason"]),
    Column("ENGINE", lambda model: model["engine"], only_wide=True),
    Column("CONTEXT", lambda model: str(model["context_length"] or ""), only_wide=True),
    Column("SLOTS", lambda model: str(model["slots"] or ""), only_wide=True),
    Column("REVISION", lambda model: ",".join(model["revisions"]), only_wide=True),
    Column("MESSAGE", lambda model: model["message"], only_wide=True),
)


def models(
    name: Annotated[str, typer.Argument(help="Show this model with its conditions.")] = "",
    output: OutputOption = Format.table,
) -> None:
    """List the models, or show one with its conditions."""
    records = asyncio.run(_read())
    if not name:
        show_list(records, COLUMNS, output, "No models; `tidegate up -f FILE` serves some.")
        return
    found = next((record for record in records if record["name"] == name), None)
    if found is None:
        known = ", ".join(record["name"] for record in records) or "none"
        raise CommandFailed(f"No model is called {name!r}; there is: {known}.")
    show_record(found, output, _details(found))


async def _read() -> list[dict[str, Any]]:
    from tidegate.cli.target import open_store
    from tidegate.store.depths import QueueDepths
    from tidegate.store.registry import Registry

    async with open_store() as (connection, key_prefix):
        registry = Registry(connection, key_prefix=key_prefix)
        entries = await registry.read_models()
        queues = [(entry.name, revision) for entry in entries.values() for revision in entry.revisions]
        depths = await QueueDepths(connection, key_prefix=key_prefix).poll(queues, timeout_seconds=5.0)
        replicas = await registry.replicas()
    return [_record(entries[name], depths, replicas) for name in sorted(entries)]


def _record(
    entry: ModelEntry, depths: dict[tuple[str, str], Depth], replicas: list[ReplicaStats]
) -> dict[str, Any]:
    import msgspec

    own_depths = [depths[entry.name, revision] for revision in entry.revisions]
    own_replicas = [replica for replica in replicas if replica.model == entry.name]
    fields: dict[str, Any] = msgspec.to_builtins(entry)
    return fields | {
        "format": entry.quantization if entry.quantization not in ("", "none", "auto") else entry.precision,
        "waiting": sum(depth.waiting for depth in own_depths),
        "running": sum(depth.running for depth in own_depths),
        "tokens_per_second": round(sum(replica.tokens_per_second for replica in own_replicas), 1),
        "replicas": [msgspec.to_builtins(replica) for replica in own_replicas],
    }


def _details(model: Record) -> str:
    """The model's table line, its sentence, its conditions and its replicas."""
    parts = [table([c.title for c in COLUMNS[:10]], [[c.text(model) for c in COLUMNS[:10]]])]
    if model["message"]:
        parts.append(model["message"])
    conditions = [[c["type"], c["status"], c["reason"], c["message"]] for c in model["conditions"]]
    if conditions:
        parts.append(table(["CONDITION", "STATUS", "REASON", "MESSAGE"], conditions))
    replicas = [
        [r["replica"], str(r["pid"]), f"{r['running']}/{r['slots']}", f"{r['tokens_per_second']:.1f}"]
        for r in model["replicas"]
    ]
    if replicas:
        parts.append(table(["REPLICA", "PID", "RUNNING", "TOKENS/S"], replicas))
    return "\n\n".join(parts)
