"""`tidegate rollout`: how a changed model goes out, and what a person may ask of it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from tidegate.cli.changes import DryRunOption, make
from tidegate.cli.control_client import action, asked, open_control
from tidegate.cli.output import Column, CommandFailed, Format, OutputOption, age, say, show_list, show_record

if TYPE_CHECKING:
    from tidegate.messages.rollouts import RevisionView, Verb

ABORTED, TIMED_OUT = 1, 2  # exit codes of `status`

commands = typer.Typer(no_args_is_help=True, help="Watch and steer how a changed model goes out.")

ModelArgument = Annotated[str, typer.Argument(help="A model that `tidegate models` lists.")]

ACTIONS: dict[Verb, str] = {
    "pause": "Hold the rollout where it is. Its gates go on judging and may still abort it.",
    "resume": "Go on after a pause, one that a step asks for too.",
    "promote": "End what this step waits for: time, requests, a person. Gates that fail still abort it.",
    "abort": "Give all requests back to the stable revision. The other is refused until `retry` or a change.",
    "retry": "Begin an aborted rollout again.",
    "recheck": "Look whether the model's source has other bytes by now; these are a new revision.",
}


def seconds(text: str) -> float:
    """`90s`, `10m`, `1h30m`; a plain number is seconds."""
    parts = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not text or parts is None:
        raise typer.BadParameter(f"{text!r} is no time; write it as in 90s, 10m or 1h30m.")
    hours, minutes, seconds = (int(part or 0) for part in parts.groups())
    return float(hours * 3600 + minutes * 60 + seconds)


@commands.command()
def status(
    model: ModelArgument,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Draw it again and again until the rollout ends.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="TIME", help="Wait for the end, so long at most: 90s, 10m, 1h30m."
        ),
    ] = None,
    output: OutputOption = Format.table,
) -> None:
    """Show a model's rollout: steps, weights, gates with their evidence, and what it waits for.

    With --watch or --timeout the exit status tells how it ended: 0 rolled out, 1 aborted, or
    an undo that its source refused, 2 not in time.
    """
    from tidegate.cli.rollout_drawing import draw_model, record_of
    from tidegate.cli.rollout_watch import follow, outcome

    waits = watch or timeout is not None
    if waits:
        until = time.monotonic() + timeout if timeout is not None else None
        found = follow(model, until, output, shows=watch)
    else:
        found = asked(lambda control: control.model(model))
    if not watch:
        show_record(record_of(found), output, draw_model(found, time.time(), is_wide=output is Format.wide))
    if not waits or (ended := outcome(found)) == "rolled out":
        return
    if ended == "under way":
        say(f"The rollout of {model} has not ended in time.")
    raise typer.Exit(ABORTED if ended == "aborted" else TIMED_OUT)


@commands.command()
def history(model: ModelArgument, output: OutputOption = Format.table) -> None:
    """List a model's revisions, the newest first: what `undo` can bring back."""
    now = time.time()
    columns = (
        Column("NUMBER", lambda it: str(it["number"])),
        Column("REVISION", lambda it: it["revision"]),
        Column("AGE", lambda it: age(now - it["created"])),
        Column("WEIGHT", lambda it: f"{it['weight']} %" if it["weight"] else "", only_wide=True),
        Column("AUTHOR", lambda it: it["author"]),
        Column("CAUSE", lambda it: it["cause"]),
        Column("STATE", lambda it: it["state"]),
        Column("SOURCE", lambda it: it["source"], only_wide=True),
        Column("COMMIT", lambda it: it["commit"], only_wide=True),
        Column("DIGEST", lambda it: it["digest"], only_wide=True),
        Column("MESSAGE", lambda it: it["message"], only_wide=True),
    )
    revisions = asked(lambda control: control.revisions(model))
    records = [msgspec.to_builtins(revision) for revision in revisions]
    show_list(records, columns, output, f"{model} has no revision yet; `tidegate models {model}` says why.")


@commands.command()
def diff(
    model: ModelArgument,
    old: Annotated[
        str, typer.Argument(help="A number or name that `history` shows; none: the one before the newest.")
    ] = "",
    new: Annotated[str, typer.Argument(help="Another one; none: the newest.")] = "",
    output: OutputOption = Format.table,
) -> None:
    """Show what differs between two revisions of a model: fields of its spec, and the bytes of its source."""
    revisions = asked(lambda control: control.revisions(model))
    after = find_revision(model, revisions, new) if new else _newest(model, revisions)
    before = find_revision(model, revisions, old) if old else _before(model, revisions, after)
    differences = [
        {"field": field, "before": was, "after": is_now}
        for field, (was, is_now) in differing(_compared(before), _compared(after)).items()
    ]
    say(f"{model}: from {before.number} ({before.revision}) to {after.number} ({after.revision})")
    columns = (
        Column("FIELD", lambda it: it["field"]),
        Column("BEFORE", lambda it: _shown(it["before"])),
        Column("AFTER", lambda it: _shown(it["after"])),
    )
    show_list(differences, columns, output, "They do not differ.")


def _action(verb: Verb, what: str) -> None:
    """Add the command of an action that needs no more than its model."""

    @commands.command(name=verb, help=what)
    def command(
        model: ModelArgument, dry_run: DryRunOption = False, output: OutputOption = Format.table
    ) -> None:
        with open_control() as control:
            make(control, model, action(model, verb), output, is_dry_run=dry_run)


for _verb, _what in ACTIONS.items():
    _action(_verb, _what)


@commands.command()
def undo(
    model: ModelArgument,
    to_revision: Annotated[
        str,
        typer.Option(help="A number or name that `history` shows; none: the one before.", metavar="REVISION"),
    ] = "",
    dry_run: DryRunOption = False,
    output: OutputOption = Format.table,
) -> None:
    """Bring back an earlier revision, the same bytes. Your files stay; their next change ends it."""
    with open_control() as control:
        known = control.revisions(model) if to_revision else []
        revision = find_revision(model, known, to_revision).revision if to_revision else ""
        make(control, model, action(model, "undo", revision), output, is_dry_run=dry_run)


def find_revision(model: str, revisions: Sequence[RevisionView], named: str) -> RevisionView:
    """Return the revision of this number, or whose name begins so. Raises `CommandFailed`."""
    found = [it for it in revisions if named == str(it.number)] or [
        it for it in revisions if it.revision.startswith(named)
    ]
    if len(found) == 1:
        return found[0]
    what = "begins the names of several revisions" if found else "is no revision"
    raise CommandFailed(f"{named!r} {what} of {model}; `tidegate rollout history {model}` lists them.")


def differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Return what each field was and is, by its path, for those that differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in {**old, **new}:
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= differing(before, after, f"{prefix}{name}.")
        elif before != after:
            found[prefix + name] = before, after
    return found


def _newest(model: str, revisions: Sequence[RevisionView]) -> RevisionView:
    if not revisions:
        raise CommandFailed(f"{model} has no revision yet; `tidegate models {model}` says why.")
    return max(revisions, key=lambda it: it.number)


def _before(model: str, revisions: Sequence[RevisionView], new: RevisionView) -> RevisionView:
    older = [it for it in revisions if it.number < new.number]
    if not older:
        raise CommandFailed(f"{model} has no revision before {new.number}; name the other one too.")
    return max(older, key=lambda it: it.number)


def _compared(revision: RevisionView) -> dict[str, Any]:
    return {"spec": revision.spec, "source": {"commit": revision.commit, "digest": revision.digest}}


def _shown(value: Any) -> str:
    return "" if value is None or value == "" else msgspec.json.encode(value).decode()
