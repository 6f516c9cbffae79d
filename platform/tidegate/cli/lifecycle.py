"""Start, look at and stop the platform on this machine."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidegate.cli.output import CommandFailed, Format, OutputOption, age, put, say, show_record, size, table

if TYPE_CHECKING:
    from tidegate.local.home import Running
    from tidegate.local.lifecycle import Snapshot
    from tidegate.local.progress import Progress
    from tidegate.settings import Settings

FilesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "-f", "--file", help="A YAML file or a folder of them, watched; may be repeated.", metavar="PATH"
    ),
]
PortOption = Annotated[int | None, typer.Option(min=0, max=65_535, help="The gateway's port; 0: a free one.")]
NoAuthOption = Annotated[
    bool, typer.Option("--no-auth", help="Answer without keys; on a loopback address only.")
]


_CHAT = (
    "chat/completions",
    '"stream": true, "temperature": 0, "messages": [{"role": "user", "content": "What is Tidegate?"}]',
)
_CALLS = {
    "embed": ("embeddings", '"input": "What is Tidegate?"'),
    "score": ("rerank", '"query": "What is Tidegate?", "documents": ["It serves models.", "It rains."]'),
    "classify": ("classify", '"input": "What is Tidegate?"'),
}


def up(
    files: FilesOption = None,
    port: PortOption = None,
    no_auth: NoAuthOption = False,
    output: OutputOption = Format.table,
) -> None:
    """Start the platform in the background; without files, with its demo models.

    Prints the address, a key and a call that works as soon as a model answers. Does nothing where the
    platform runs already. Status 1 where no model can answer.
    """
    from tidegate.cli.progress import Steps
    from tidegate.local import lifecycle

    settings = _settings(port, no_auth)
    began = time.monotonic()
    with Steps() as steps:
        started = asyncio.run(lifecycle.up(settings, _up_paths(settings, files), steps.show))
    if started.was_running:
        lifecycle.check_runs_as(started.running, port=port, no_auth=no_auth)
    took = "It runs already." if started.was_running else f"Up after {time.monotonic() - began:.0f} s."
    say(f"{took} `tidegate models` shows all models.")
    running, model = started.running, started.model
    record = {
        "url": running.url + "/v1",
        "key": running.key,
        "logs": running.logs,
        "model": model.name if model else "",
        "ready": bool(model and model.ready),
    }
    show_record(record, output, welcome(running, model.name if model else "", model.task if model else ""))
    for problem in running.problems:
        say(f"refused: {problem.field}: {problem.value}: {problem.remedy}")
    if model is not None and not model.ready:
        raise CommandFailed(f"No model can answer. {model.name}: {model.reason}: {model.message}")


def down(output: OutputOption = Format.table) -> None:
    """Stop the platform. Keys, caches and queue data stay."""
    from tidegate.cli.progress import Steps
    from tidegate.local import lifecycle

    with Steps() as steps:
        has_stopped = asyncio.run(lifecycle.down(_settings(), steps.show))
    text = "Keys, caches and queue data stay; `tidegate clean` removes them."
    show_record({"stopped": has_stopped}, output, text if has_stopped else "Nothing runs.")


def serve(
    files: FilesOption = None,
    port: PortOption = None,
    no_auth: NoAuthOption = False,
) -> None:
    """Run the platform in the foreground; Ctrl-C stops it as `tidegate down` does."""
    from tidegate.control.resource_files import load_resources
    from tidegate.telemetry import configure_logging

    settings = _settings(port, no_auth)
    paths = _paths(settings, files)
    load_resources(paths)  # refused before the first log line; from then on they are watched
    configure_logging(settings.log_format, settings.log_level)
    asyncio.run(_serve(settings, paths))


def status(output: OutputOption = Format.table) -> None:
    """Show whether the platform runs, its processes and refused files. Status 1 where it does not run."""
    from tidegate.local import lifecycle

    settings = _settings()
    found = asyncio.run(lifecycle.status(settings))
    show_record(_status_record(settings, found), output, _status_text(settings, found))
    if found.running is None:
        raise typer.Exit(1)


def clean(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output: OutputOption = Format.table,
) -> None:
    """Stop the platform and remove its keys, queue data, logs and caches."""
    from tidegate.cli.progress import Steps
    from tidegate.local import lifecycle

    settings = _settings()
    if not yes:
        question = f"Remove keys, queue data, logs and caches in {settings.home}?"
        typer.confirm(question, abort=True, err=True)
    with Steps() as steps:
        asyncio.run(lifecycle.clean(settings, steps.show))
    show_record({"removed": str(settings.home)}, output, f"Removed what was in {settings.home}.")


def welcome(running: Running, model: str, task: str) -> str:
    """What a person needs next: address, key, a call to paste that `task` answers, where the logs are."""
    path, body = _CALLS.get(task, _CHAT)
    header = f"  -H 'Authorization: Bearer {running.key}' \\\n" if running.key else ""
    return (
        f"\naddress  {running.url}/v1\n"
        f"key      {running.key or 'none is needed'}\n"
        f"logs     {running.logs} (tidegate logs)\n"
        "\n"
        f"curl -N {running.url}/v1/{path} \\\n"
        f"{header}"
        "  -H 'Content-Type: application/json' \\\n"
        f'  -d \'{{"model": "{model or "MODEL"}", {body}}}\'\n'
    )


async def _serve(settings: Settings, paths: list[Path]) -> None:
    import signal

    from tidegate.cli.progress import Steps
    from tidegate.local.home import find
    from tidegate.local.host import serve as host

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    has_welcomed = False

    def show(progress: Progress) -> None:
        nonlocal has_welcomed
        steps.show(progress)
        running = find(settings.home)
        if progress.step == "model" and progress.state == "done" and running and not has_welcomed:
            has_welcomed = True
            put(welcome(running, progress.name, progress.task))

    with Steps(plain=True) as steps:
        await host(settings, paths, show, stop)


def _settings(port: int | None = None, no_auth: bool = False) -> Settings:
    """The environment's settings with the command's options over them."""
    from tidegate.gateway.auth import check_no_auth
    from tidegate.settings import PREFIX, load_settings

    options = {f"{PREFIX}PORT": port, f"{PREFIX}NO_AUTH": no_auth or None}
    settings = load_settings(
        os.environ | {name: str(value) for name, value in options.items() if value is not None}
    )
    check_no_auth(settings)
    return settings


def _up_paths(settings: Settings, files: list[Path] | None) -> list[Path]:
    """The files named, or those that run already, or the demo's."""
    from tidegate.local.home import Home, read_record

    running = None if files else read_record(Home(settings.home))
    return [Path(path) for path in running.paths] if running is not None else _paths(settings, files)


def _paths(settings: Settings, files: list[Path] | None) -> list[Path]:
    from tidegate.local.home import Home
    from tidegate.local.lifecycle import default_paths

    return list(files) if files else default_paths(Home(settings.home))


def _status_record(settings: Settings, found: Snapshot) -> dict[str, Any]:
    import msgspec

    running = found.running
    record: dict[str, Any] = {"running": running is not None, "home": str(settings.home)}
    if running is None:
        return record | {"leftovers": found.leftovers}
    return record | {
        "url": running.url + "/v1",
        "is_up": bool(running.url),
        "since": running.host.created,
        "paths": running.paths,
        "logs": running.logs,
        "restarts": running.restarts,
        "processes": msgspec.to_builtins(found.parts),
        "models": {model.name: model.reason for model in found.models},
        "problems": msgspec.to_builtins(found.problems),
        "queue": found.queue,
    }


def _status_text(settings: Settings, found: Snapshot) -> str:
    running = found.running
    if running is None:
        left = f" {found.leftovers} processes of a killed host are left; `tidegate down` ends them."
        return f"Not running (home: {settings.home})." + (left if found.leftovers else "")
    ready = sum(model.ready for model in found.models)
    rows = [
        (
            part.name,
            str(part.pid),
            size(part.memory_bytes),
            "yes" if part.is_alive else "no",
            str(running.restarts.get(part.name, 0)),
        )
        for part in found.parts
    ]
    lines = [
        f"address  {running.url}/v1" if running.url else "address  none yet: it is starting",
        f"since    {age(time.time() - running.host.created)}",
        f"home     {settings.home}",
        f"files    {', '.join(running.paths)}",
        f"models   {ready} of {len(found.models)} ready",
        *(f"refused  {problem.field}: {problem.value}: {problem.remedy}" for problem in found.problems),
        *(f"queue    {sentence}" for sentence in found.queue),
        "",
        table(["PROCESS", "PID", "MEMORY", "RUNS", "RESTARTS"], rows),
    ]
    return "\n".join(lines)
