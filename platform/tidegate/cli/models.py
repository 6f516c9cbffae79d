"""`tidegate models`: what can be asked, how each model is, and changes of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from typer.core import TyperGroup

from tidegate.cli.changes import DryRunOption, YesOption, make
from tidegate.cli.control_client import action, asked, new_bounds, new_spec, open_control
from tidegate.cli.output import (
    Column,
    CommandFailed,
    Format,
    OutputOption,
    Record,
    say,
    show_list,
    show_record,
    size,
    table,
)
from tidegate.messages.registry import ModelEntry
from tidegate.messages.rollouts import ENDED

if TYPE_CHECKING:
    from tidegate.control_api.views import ModelView, PlanView

# A model that the platform has not looked at yet.
NO_ENTRY = ModelEntry("", 0, "", "", "", "", {}, False, False, "", "")

ModelArgument = Annotated[str, typer.Argument(help="A model that `tidegate models` lists.")]

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
    Column("ROLLOUT", lambda model: rollout_cell(model["rollout"]), only_wide=True),
    Column("MESSAGE", lambda model: model["message"], only_wide=True),
)


class _ShowByDefault(TyperGroup):
    """`models`, `models NAME` and `models -o json` are `models show ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["show", *args]
        return super().parse_args(ctx, args)


commands = typer.Typer(cls=_ShowByDefault, help="List, show and change models.")


@commands.command()
def show(
    name: Annotated[str, typer.Argument(help="Show this model with its conditions.")] = "",
    output: OutputOption = Format.table,
) -> None:
    """List the models, or show one with its conditions. `show` may be left out."""
    records = [_record(model) for model in asked(lambda control: control.models())]
    if not name:
        show_list(records, COLUMNS, output, "No models; `tidegate up -f FILE` serves some.")
        return
    found = next((record for record in records if record["name"] == name), None)
    if found is None:
        known = ", ".join(record["name"] for record in records) or "none"
        raise CommandFailed(f"No model is called {name!r}; there is: {known}.")
    show_record(found, output, _details(found))


@commands.command(name="set")
def set_fields(
    name: ModelArgument,
    fields: Annotated[
        list[str],
        typer.Argument(
            help="Fields of the spec, as scaling.maxReplicas=2; the value is YAML, and none (field=) leaves "
            "the field out.",
            metavar="FIELD=VALUE...",
        ),
    ],
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Format.table,
) -> None:
    """Change fields of a model's spec. In a cluster where Git owns the spec, change it there."""
    with open_control() as control:
        model = control.model(name)
        change = new_spec(model, with_fields(model.spec, fields))
        asks = not (yes or dry_run) and is_outage(control.plan(change))
        question = f"{name} answers nobody until its new replicas do. Go on?" if asks else ""
        make(control, name, change, output, is_dry_run=dry_run, question=question)


@commands.command()
def scale(
    name: ModelArgument,
    least: Annotated[
        int | None, typer.Option("--min", min=0, help="Replicas at least; 0: none when idle.")
    ] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, help="Replicas at most.")] = None,
    dry_run: DryRunOption = False,
    output: OutputOption = Format.table,
) -> None:
    """Change how many replicas a model may have. Those that go end their requests first."""
    with open_control() as control:
        make(control, name, new_bounds(name, least, most), output, is_dry_run=dry_run)


@commands.command()
def restart(
    name: ModelArgument,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    output: OutputOption = Format.table,
) -> None:
    """Replace a model's replicas by fresh ones of the same revision, as its rollout strategy has it."""
    question = "" if yes else f"Replace all replicas of {name}?"
    with open_control() as control:
        make(control, name, action(name, "restart"), output, is_dry_run=dry_run, question=question)


@commands.command()
def drain(
    name: ModelArgument,
    end: Annotated[bool, typer.Option("--end", help="Let it take requests again.")] = False,
    yes: YesOption = False,
    output: OutputOption = Format.table,
) -> None:
    """Let a model take no new requests; those that it has still end. `--end` opens it again."""
    if not end and not yes:
        typer.confirm(f"Refuse new requests to {name} from now on?", abort=True, err=True)
    model = asked(lambda control: control.drain(name, is_on=not end))
    if output in (Format.json, Format.yaml):
        show_record(_record(model), output, "")
    left = f"{model.waiting + model.running} requests are left"
    say(f"{name} takes requests again." if end else f"{name} takes no new requests; {left}.")


def with_fields(spec: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return the spec with these fields, each `path=value`; a path begins below `spec`. Raises
    `CommandFailed`."""
    from tidegate.control.bounded_yaml import YamlRefused, load_documents

    changed = copy.deepcopy(dict(spec))
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        *outer, last = path.removeprefix("spec.").split(".")
        if not equals or not all((*outer, last)):
            raise CommandFailed(f"{assignment!r} is no FIELD=VALUE; write it as in scaling.maxReplicas=2.")
        inner: Any = changed
        for name in outer:
            if inner.get(name) is None:
                inner[name] = {}
            inner = inner[name]
            if not isinstance(inner, dict):
                raise CommandFailed(
                    f"{path}: {name} has no fields of its own; set it whole, as {name}=VALUE."
                )
        if not text:
            inner.pop(last, None)
            continue
        try:
            documents = load_documents(text)
        except YamlRefused as error:
            raise CommandFailed(f"{path}: {text!r} is not YAML ({error}); quote it.") from error
        if len(documents) != 1:
            raise CommandFailed(f"{path}: {text!r} is not one value; quote it.")
        inner[last] = documents[0]
    return changed


def is_outage(plan: PlanView) -> bool:
    """Tell whether the old replicas of a model go before its new ones come."""
    view = plan.rollout
    return view is not None and view.strategy == "Recreate" and view.phase not in ENDED


def rollout_cell(view: Record | None) -> str:
    """`Progressing 15 %`: the rollout in a table's cell."""
    if view is None:
        return ""
    return view["phase"] if view["phase"] in ENDED else f"{view['phase']} {view['weight']} %"


def _record(model: ModelView) -> dict[str, Any]:
    """One model as a flat record: what gateways know of it, and how it is now."""
    entry = model.entry or NO_ENTRY
    precision, quantization = entry.precision, entry.quantization
    now: dict[str, Any] = msgspec.to_builtins(model)
    own = ("entry", "spec", "resource_version")
    return {
        **msgspec.to_builtins(entry),
        **{field: value for field, value in now.items() if field not in own},
        "format": quantization if quantization not in ("", "none", "auto") else precision,
    }


def _details(model: Record) -> str:
    """The model's table line, its sentence, its conditions and its replicas."""
    parts = [table([c.title for c in COLUMNS[:10]], [[c.text(model) for c in COLUMNS[:10]]])]
    if model["message"]:
        parts.append(model["message"])
    if model["rollout"]:
        parts.append(f"rollout: {rollout_cell(model['rollout'])} (tidegate rollout status {model['name']})")
    if model["pinned"]:
        parts.append(f"An undo holds revision {model['pinned']}, until the spec changes.")
    if model["is_overlaid"]:
        parts.append("Its spec was set here and is not its file's; the file's next change ends that.")
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
