"""Write the reference pages that follow from code: resources, settings and the CLI.

`make docs` runs it; `tests/integration/test_docs.py` fails where a committed page is not what it writes.
"""

from __future__ import annotations

import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from jinja2 import Template
from pydantic import BaseModel, WithJsonSchema
from pydantic.fields import FieldInfo

from tidegate.cli.main import app
from tidegate.control import resources
from tidegate.control.desired import REVISION_FIELDS
from tidegate.control.reasons import CONDITION_TYPES, Reason
from tidegate.engines.transformers.formats import RECOGNISED_BY, read_format, template_of
from tidegate.replica_args import CHAT_FORMATS
from tidegate.settings import PREFIX, ProcessSettings, Settings, variables
from tidegate_operator.crd_status import ModelStatus, PoolStatus
from tidegate_operator.settings import OperatorSettings

REFERENCE = Path(__file__).parent / "reference"
GENERATED = (
    "<!-- Written by platform/docs/generate.py (`make docs`); edit the code it describes instead. -->\n\n"
)


def main() -> None:
    for name, text in pages().items():
        (REFERENCE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Each generated page of `reference/` by file name."""
    return {
        "model.md": GENERATED
        + _resource(resources.Model, resources.ModelSpec, MODEL_INTRO)
        + _strategies()
        + _status(ModelStatus),
        "pool.md": GENERATED
        + _resource(resources.Pool, resources.PoolSpec, POOL_INTRO)
        + _status(PoolStatus),
        "reasons.md": GENERATED + _reasons(),
        "chat-formats.md": GENERATED + _chat_formats(),
        "settings.md": GENERATED + _settings(),
        "cli.md": GENERATED + _cli(),
    }


MODEL_INTRO = """\
# Model

One model that clients ask by its name. `tidegate serve -f` and `tidegate up -f` read it from YAML files;
a file may hold several, separated by `---`; in a cluster `kubectl apply -f` takes the same. There
`kubectl get models` (short `tgm`) shows its state, and `kubectl scale` sets `minReplicas`.

```yaml
apiVersion: tidegate.dev/v1alpha1
kind: Model
metadata:
  name: my-model
spec:
  source:
    uri: ./my-checkpoint
```

Only `metadata.name` and, except for the simulated engine, `spec.source.uri` are required. An unknown field
is refused by name. A meaning that begins with "Cluster:" is one of a field that acts in a cluster only; a
laptop takes it and does nothing. A quantity is written as Kubernetes does: `10Gi`, `500M`, `2`.

## Revisions

A revision is named by ten hex digits over the fields marked ° and the content of its source. Changing one
of these fields makes a new one, and so does other content under the same address: new replicas start
beside the old ones, which serve until the new ones have proved themselves. The other fields act in place.

The source is looked at when a spec is new, when `tidegate rollout recheck` asks for it, and every
`spec.source.recheckSeconds`; the same content restarts nothing. What is compared of the weights:

| source | its content is known by |
| --- | --- |
| `hf://` | the sha256 of each file, by which the hub's cache names it |
| `s3://`, `gs://` | entity tags and sizes of the objects |
| a folder, `pvc://` | sizes, the names and places of all tensors, and pages of each tensor |

Of a folder's tensors 4 KiB at the start, in the middle and at the end are read (a smaller tensor whole;
where there are more than 2,048, of every second, third, ...): single values that change between those are
not seen. Configuration, tokenizer and templates are compared whole; files that nothing loads (a README,
other formats of the weights) do not count.

The newest revisions are kept (`spec.rollout.historyLimit`, else ten), and all that stand: number, time,
cause, who did it (whose admin key, or the field manager that changed the spec), commit and digest of the
source, and the whole spec. `tidegate rollout history` shows them; in a cluster they are
ControllerRevisions of the Model, on a laptop files in the home's `data/revisions`. A revision that comes
back is the one that it was, with its number.

Each replica compares as well, before it loads. One that finds other content than its revision's does not
start (`SourceChanged`), and the source is looked at again at once: so nobody gets other weights under an
old name.

An undo asks the source for the old content first (the recorded commit of the hub; of a bucket what it or
the weight cache still has; of a folder the same digest) and is refused with `SourceChanged` where it is
gone. It holds until the spec changes; a later look at the source ends it only where that holds content
which has not been tried.

## Fields

Fields marked ° make a new revision.
"""

SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}  # of the examples
CHAT_FORMATS_INTRO = """\
# Chat formats

A chat model was trained on conversations in one form, and answers badly in another. Most checkpoints bring
theirs as a chat template, and need nothing. For one that brings none, `spec.chatTemplate` of its Model names
one of these, or holds the text of a template:

```yaml
spec:
  source:
    uri: hf://lmsys/vicuna-7b-v1.5
  chatTemplate: vicuna
```

It goes before the checkpoint's own. Nothing is guessed from a model's name. Until it is set, chat is
refused, and the message of the Model's condition `Degraded` says so.

A built-in format begins as the tokenizer begins any text, and ends an answer at its stop strings, beside the
model's end tokens and what the client asks for; not with `ignore_eos`. A stop string that is one special
token of the tokenizer stops by its id. A system message comes first, in the place of the format's own.

A template of one's own is Jinja as in a tokenizer's `chat_template`, with `messages`,
`add_generation_prompt`, `bos_token`, `eos_token` and `raise_exception`. It writes its start token itself. It
is tried when the model loads, and the same message says where it is broken; it is rendered in a sandbox,
within bounds of CPU time and memory.
"""

RESPONSE_FORMATS_INTRO = """\
## How answers are read

Calls of tools and reasoning are told from the content of an answer by the checkpoint's own
`response_template` (transformers'), or by the format that its chat template shows. Of several the first row
counts; the answers of a template that shows none of them are content as a whole.

| format | models | recognised by |
| --- | --- | --- |"""

STRATEGIES_INTRO = """
## What a rollout guarantees

With any `spec.rollout`:

- The shares of both revisions sum to 100. One grows only where no gate fails, nothing that the step asks for
  is missing, and the replicas for it are ready.
- A session stays on the revision that it has come to. No request is lost, and none is answered twice.
- The surge bound holds, also where several Models of a Pool roll: the later ones wait in line.
- A revision that was refused never comes back by itself.

[Change a model: watch, abort, undo](../guides/rollouts.md) shows it, [Reading a gate](../guides/gates.md)
explains the judgement. Each strategy beside that:

"""

STRATEGIES = [
    (
        "(no `rollout`)",
        "the new revision has everything once a replica has proved itself",
        "what both scale to",
        "its load and self-check; it is tried again for ever",
        "nothing to go back from: the old revision serves until then",
    ),
    (
        "`Canary`",
        "each step's share and no more; the stable one keeps its replicas, or with `stableScalesDown` gives "
        "them up as its share shrinks, never below `minAvailable`",
        "what the stable one had, and the part of it that the share needs",
        "all gates; at every share below 100 against the stable one, and at 100 errors and abnormal ends "
        "against what that did before",
        "all requests back at once; with `stableScalesDown` its replicas may have to start again",
    ),
    (
        "`BlueGreen`",
        "everything at once, with as many replicas ready as the stable one had",
        "twice what the stable one had",
        "load, self-check, probes, restarts, limits, the shadow step where there is one, and errors and "
        "abnormal ends against what the stable one did before; times by limits alone",
        "all requests back at once",
    ),
    (
        "`Recreate`",
        "the old revision stops first; requests wait until the new one has proved itself",
        "what the stable one had",
        "as `BlueGreen`, without a shadow step",
        "the old revision has to load again; requests wait",
    ),
]


def _strategies() -> str:
    titles = ("strategy", "while it rolls", "replicas of both at most", "judged by", "an abort")
    return STRATEGIES_INTRO + _table(titles, STRATEGIES)


POOL_INTRO = """\
# Pool

The machines that run replicas: on a laptop the one local Ray, in a cluster one Ray cluster with its worker
groups. On a laptop a Pool named `default` exists without being written; define it to change its bounds. In a
cluster every Pool is applied, and `kubectl get pools` (short `tgp`) shows its state.

```yaml
apiVersion: tidegate.dev/v1alpha1
kind: Pool
metadata:
  name: default
spec:
  maxLiveRevisions: 20
```

A meaning that begins with "Cluster:" is one of a field that acts in a cluster only; a laptop takes it and
does nothing. A quantity is written as Kubernetes does: `10Gi`, `500M`, `2`, `500m`. `podOverrides` and
`volumes` are parts of a pod's own spec; Kubernetes checks them when it makes the pods.

`maxLiveRevisions`, `maxUnbuilt`, the bounds on workers and `workerIdleSeconds` change in place, unless the
head's memory, which follows from the first two in whole GiB, is another one then. Everything else needs new
pods; `upgrade` says how they come.
"""


def _makes_a_revision(path: str) -> bool:
    return path.split(".")[1] in REVISION_FIELDS and path != "spec.source.recheckSeconds"


def _resource(kind: type[BaseModel], spec: type[BaseModel], intro: str) -> str:
    name = kind.model_fields["metadata"]
    rows = [("metadata.name", "string", "required", _described(_inner(name)["name"]))]
    rows += [
        (
            path + ("°" if _makes_a_revision(path) else ""),
            "quantity" if _is_quantity(info) else _type(info.annotation),
            _default(info),
            " ".join(filter(None, (_described(info), _bounds(info)))),
        )
        for path, info in _leaves(spec, "spec.")
    ]
    return intro + "\n" + _table(("field", "type", "default", "meaning"), rows)


def _status(status: type[BaseModel]) -> str:
    rows = [
        (f"status.{info.alias}", _type(info.annotation), _described(info))
        for info in status.model_fields.values()
    ]
    return STATUS_INTRO + "\n" + _table(("field", "type", "meaning"), rows)


STATUS_INTRO = """
## Status in a cluster

Written by the operator. Conditions are as Kubernetes has them (`type`, `status`, `reason`, `message`,
`observedGeneration`, `lastTransitionTime`); [Troubleshooting](../guides/troubleshooting.md) lists the
reasons.
"""


def _reasons() -> str:
    titles = ("reason", "meaning", "outlook")
    sections = [
        f"## {kind}\n\n"
        + _table(titles, [(f"`{it}`", it.sentence, it.outlook) for it in Reason if it.kind == kind])
        for kind in CONDITION_TYPES
    ]
    return "\n".join([REASONS_INTRO, *sections])


REASONS_INTRO = """\
# Reasons

The whole list of reasons that conditions of a Model or a Pool carry, by the condition that each tells of.
`Ready` repeats the reason of what is in the way. A reason never changes its meaning: scripts may compare it.

What `passes` ends by itself, or is meant to be so, and is no Warning among the Events; what is `trouble` is
one where it keeps a condition from holding. [Troubleshooting](../guides/troubleshooting.md) says what to do.
"""


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Every field by its path, `[]` behind a list. A list has a row too, and so has what may be absent."""
    for info in model.model_fields.values():
        path = f"{prefix}{info.alias}"
        nested = _nested(info.annotation)
        if nested is None:
            yield path, info
            continue
        is_list = get_origin(info.annotation) is tuple
        if is_list or not isinstance(info.annotation, type):
            yield path, info
        yield from _leaves(nested, f"{path}[]." if is_list else f"{path}.")


def _inner(info: FieldInfo) -> dict[str, FieldInfo]:
    """The fields of a nested resource class; none for a plain value."""
    nested = _nested(info.annotation)
    return dict(nested.model_fields) if nested else {}


def _nested(annotation: Any) -> type[BaseModel] | None:
    """The resource class that a field holds: itself, as a choice, or as a list's items."""
    for option in (annotation, *get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _described(info: FieldInfo) -> str:
    if info.description:
        return info.description
    return next(
        (text for part in get_args(info.annotation) if (text := getattr(part, "description", None))), ""
    )


def _is_quantity(info: FieldInfo) -> bool:
    schemas = (part.json_schema or {} for part in info.metadata if isinstance(part, WithJsonSchema))
    return any("x-kubernetes-int-or-string" in schema for schema in schemas)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" if value else "empty" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments if part is not type(None))
    if origin is dict:
        return "map"
    if origin in (tuple, list):
        return "list"
    if hasattr(annotation, "__metadata__"):
        return _type(arguments[0])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "object"
    return {str: "string", int: "integer", float: "number", bool: "boolean", Path: "path"}.get(
        annotation, getattr(annotation, "__name__", str(annotation))
    )


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True, validated_data={})
    if value in (None, "", {}, ()):
        return "none"
    if isinstance(value, tuple):
        items = [item.model_dump(by_alias=True, exclude_defaults=True) for item in value]
        return f"`{json.dumps(items)}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def _bounds(info: FieldInfo) -> str:
    found = [
        f"{sign} {getattr(part, name):,}"
        for part in info.metadata
        for name, sign in _SIGNS.items()
        if getattr(part, name, None) is not None
    ]
    return f"({', '.join(found)})" if found else ""


def _chat_formats() -> str:
    lines = [CHAT_FORMATS_INTRO]
    turns = [("system", "{system}"), ("user", "{question}"), ("assistant", "{answer}"), ("user", "{next}")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for name in CHAT_FORMATS:
        form = read_format(name)
        written = Template(template_of(name)).render(
            messages=messages, add_generation_prompt=True, **SPECIAL_TOKENS
        )
        stops = ", ".join(f"`{json.dumps(stop)[1:-1]}`" for stop in form.stop)
        lines.append(f"## {name}\n\n{form.models}." + f" Stops at {stops}." * bool(stops))
        lines.append(f"\n```text\n{written}\n```\n")
    lines.append(RESPONSE_FORMATS_INTRO)
    for name in dict.fromkeys(name for name, _ in RECOGNISED_BY):
        marks = [" and ".join(map(_code, marks)) for known, marks in RECOGNISED_BY if known == name]
        lines.append(f"| {name} | {read_format(name).models} | {', or '.join(marks)} |")
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """Write a text as code in the cell of a table."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def _settings() -> str:
    return "\n".join(
        (
            SETTINGS_INTRO,
            _variables(Settings),
            OPERATOR_SETTINGS_INTRO,
            _variables(OperatorSettings),
        )
    )


def _variables(kind: type[ProcessSettings]) -> str:
    rows = [
        (
            f"`{PREFIX}{name.upper()}`",
            _type(info.annotation),
            "the user's data folder" if name == "home" else _default(info).replace("none", "empty"),
            f"{info.description} {_bounds(info)}".strip(),
        )
        for name, info in variables(kind).items()
    ]
    return _table(("variable", "type", "default", "meaning"), rows)


SETTINGS_INTRO = """\
# Settings

Environment variables, read once when a process starts. A wrong value, or a `TIDEGATE_` variable that is not
in this list, stops the start and is named. `REDIS_URL` is read where `TIDEGATE_REDIS_URL` is not set.
"""

OPERATOR_SETTINGS_INTRO = """\
## The operator's

The chart sets them from its values; `operator.settings` takes those that have no value of their own.
"""


def _cli() -> str:
    root = typer.main.get_command(app)
    sections = [CLI_INTRO]
    for path, command in [("tidegate", root), *_commands(root, "tidegate")]:
        usage = " ".join(_usage(parameter) for parameter in command.params if _is_shown(parameter))
        sections.append(f"## {path}\n\n{(command.help or '').strip()}\n\n    {path} {usage}".rstrip() + "\n")
        rows = [
            (
                ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
                if parameter.param_type_name == "option"
                else f"`{_argument_name(parameter)}`",
                (getattr(parameter, "help", "") or "").strip(),
            )
            for parameter in command.params
            if _is_shown(parameter)
        ]
        if rows:
            sections.append(_table(("argument", "meaning"), rows))
    return "\n".join(sections)


CLI_INTRO = """\
# The tidegate command

Data goes to stdout, everything for people to stderr. The exit status is 0 for success, 1 where a command
could not do what was asked (one sentence says why), 2 for a wrong command line and 130 after Ctrl-C.
`rollout status` has its own meanings of 1 and 2.
`-o json` and `-o yaml` give every command's answer to programs.
"""


def _commands(group: Any, path: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def _argument_name(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name or "").upper()


def _is_shown(parameter: Any) -> bool:
    return parameter.name not in ("help", "install_completion", "show_completion")


def _usage(parameter: Any) -> str:
    if parameter.param_type_name == "option":
        name = max(parameter.opts, key=len)
        return (
            f"[{name}]"
            if getattr(parameter, "is_flag", False)
            else f"[{name} {(parameter.name or '').upper()}]"
        )
    name = _argument_name(parameter).rstrip(".") + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _table(titles: tuple[str, ...], rows: list[Any]) -> str:
    lines = [titles, tuple("---" for _ in titles), *rows]
    return (
        "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
        + "\n"
    )


if __name__ == "__main__":
    main()
