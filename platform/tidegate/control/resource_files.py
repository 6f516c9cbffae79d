"""Read `Model` and `Pool` resources from YAML files and folders.

Each file stands alone: a broken one does not hide the others, so a watcher can keep what ran of it.
Every refusal names the file, the document in it, the field, the value and the remedy, in printable characters
and at a bounded length, whatever the file holds. Nothing but regular files is opened: a pipe would keep its
reader for ever.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tidegate.control.bounded_yaml import YamlRefused, load_documents
from tidegate.control.resources import API_VERSION, DEFAULT_POOL, Model, Pool
from tidegate.control.schema_types import LABEL, SERVICE_LABEL
from tidegate.errors import ConfigError, FieldProblem

SUFFIXES = (".yaml", ".yml")
MAX_FILE_BYTES = 1024 * 1024
MAX_FILES = 2000  # of one folder
MAX_SHOWN_CHARACTERS = 120
MAX_NAME_CHARACTERS = 64  # of a field or resource as a refusal names it
MAX_PROBLEMS = 20  # of one document
_KINDS: Mapping[str, type[Model] | type[Pool]] = {"Model": Model, "Pool": Pool}


@dataclass(frozen=True, slots=True)
class ResourceFile:
    """The contents of one file. With `problems` the file is refused whole and the lists are empty."""

    path: Path
    models: tuple[Model, ...] = ()
    pools: tuple[Pool, ...] = ()
    problems: tuple[FieldProblem, ...] = ()


@dataclass(frozen=True, slots=True)
class ResourceSet:
    """All resources in reading order: files as given, a folder's files by name, documents from the top."""

    models: tuple[Model, ...] = ()
    pools: tuple[Pool, ...] = ()
    origins: Mapping[str, Path] = field(default_factory=dict)  # model name -> the file that defines it


def load_resources(paths: Path | str | Iterable[Path | str]) -> ResourceSet:
    """Read files and folders. Raises `ConfigError` with every problem found in any of them."""
    files = read_files(_as_paths(paths))
    resources, duplicates = combine(files)
    problems = [problem for file in files for problem in file.problems] + list(duplicates)
    if problems:
        raise config_error(problems)
    return resources


def config_error(problems: Sequence[FieldProblem]) -> ConfigError:
    return ConfigError("; ".join(map(str, problems)), list(problems))


def read_files(paths: Sequence[Path]) -> list[ResourceFile]:
    """Read each file on its own; a missing path is a file with a problem."""
    return [*(read_file(file) for file in resource_paths(paths)), *_folder_problems(paths)]


def resource_paths(paths: Sequence[Path]) -> list[Path]:
    """The files behind `paths`: a folder stands for its YAML files, sorted by name, hidden ones left out, the
    first `MAX_FILES` of them."""
    found: dict[Path, None] = {}
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises where a folder above it is locked
            found.update(dict.fromkeys(_real(path / name) for name in _inside(path)[:MAX_FILES]))
        else:
            found[_real(path)] = None
    return list(found)


def read_file(path: Path) -> ResourceFile:
    """Read one YAML file with any number of documents. Raises nothing: what is wrong becomes a problem."""
    try:
        documents = load_documents(_text(path))
    except FileNotFoundError:
        return _refused(path, "no such file or folder", "give a YAML file or a folder of them")
    except _NotRead as refusal:
        return _refused(path, *refusal.args)
    except OSError as error:
        return _refused(path, "cannot be read", error.strerror or str(error))
    except UnicodeDecodeError as error:
        return _refused(path, "cannot be read", f"byte {error.start} is not UTF-8; save the file as UTF-8")
    except YamlRefused as refusal:
        return _refused(path, "not valid YAML", str(refusal))
    models: list[Model] = []
    pools: list[Pool] = []
    problems: list[FieldProblem] = []
    for number, document in enumerate(documents, start=1):
        if document is None:
            continue
        name = _printable(path.name)
        where = name if len(documents) == 1 else f"{name} document {number}"
        resource = parse_resource(document, where)
        if isinstance(resource, Model):
            models.append(with_absolute_source(resource, path.parent))
        elif isinstance(resource, Pool):
            pools.append(resource)
        else:
            problems += resource
    if problems:
        return ResourceFile(path, problems=tuple(problems))
    return ResourceFile(path, tuple(models), tuple(pools))


def parse_resource(document: Any, where: str) -> Model | Pool | list[FieldProblem]:
    """One document, checked; `where` begins the field path of each problem."""
    if not isinstance(document, dict):
        return [
            FieldProblem(where, _shown(document), "write a mapping with apiVersion, kind, metadata, spec")
        ]
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        return [FieldProblem(f"{where}: kind", _shown(kind), "use Model or Pool")]
    if document.get("apiVersion") != API_VERSION:
        return [
            FieldProblem(f"{where}: apiVersion", _shown(document.get("apiVersion")), f"use {API_VERSION}")
        ]
    try:
        return _KINDS[kind].model_validate(document)
    except ValidationError as error:
        name = document["metadata"].get("name") if isinstance(document.get("metadata"), dict) else None
        place = f"{where}: {kind} {_printable(name)}" if isinstance(name, str) else f"{where}: {kind}"
        found = [_problem(_KINDS[kind], item, place) for item in error.errors()[:MAX_PROBLEMS]]
        problems = list({problem.field: problem for problem in found}.values())  # a union names each branch
        if (more := error.error_count() - len(found)) > 0:
            problems.append(FieldProblem(place, f"{more} more mistakes", "mend those above first"))
        return problems


def combine(files: Sequence[ResourceFile]) -> tuple[ResourceSet, tuple[FieldProblem, ...]]:
    """One set of all files' resources. The first definition of a name holds; later ones are problems."""
    models: dict[str, Model] = {}
    pools: dict[str, Pool] = {}
    origins: dict[str, Path] = {}
    problems: list[FieldProblem] = []
    for file in files:
        for pool in file.pools:
            if pool.name in pools:
                problems.append(_duplicate(file.path, "Pool", pool.name))
            pools.setdefault(pool.name, pool)
        for model in file.models:
            if model.name in models:
                problems.append(_duplicate(file.path, "Model", model.name, origins[model.name]))
            models.setdefault(model.name, model)
            origins.setdefault(model.name, file.path)
    known = set(pools) | {DEFAULT_POOL}
    for model in list(models.values()):
        if model.spec.pool not in known:
            problems.append(
                FieldProblem(
                    f"{_printable(origins[model.name].name)}: Model {model.name} spec.pool",
                    repr(model.spec.pool),
                    "no such Pool; known: " + ", ".join(sorted(known)),
                )
            )
            del models[model.name]
    return ResourceSet(tuple(models.values()), tuple(pools.values()), origins), tuple(problems)


def _as_paths(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _refused(path: Path, value: str, remedy: str) -> ResourceFile:
    shown = _printable(str(path), MAX_SHOWN_CHARACTERS * 2)
    remedy = _printable(remedy, MAX_SHOWN_CHARACTERS * 4)
    return ResourceFile(path, problems=(FieldProblem(shown, value, remedy),))


class _NotRead(Exception):
    """Say what was found in the place of a file, and the remedy."""


def _text(path: Path) -> str:
    """The text of a regular file. Raises `_NotRead`, `OSError`, `UnicodeDecodeError`."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise _NotRead("its name is not UTF-8", "rename it") from error
    if not stat.S_ISREG(path.stat().st_mode):
        raise _NotRead("not a regular file", "give a YAML file, not a folder, pipe, socket or device")
    # Without waiting: it may have become a pipe since.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise _NotRead("not a regular file", "give a YAML file, not a folder, pipe, socket or device")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise _NotRead(f"more than {MAX_FILE_BYTES} bytes", "split it into several files")
    return content.decode("utf-8-sig")


def _real(path: Path) -> Path:
    """`path` without links. Unlike `Path.resolve` it does not fail where links lead in a circle."""
    return Path(os.path.realpath(path))


def _inside(folder: Path) -> list[str]:
    """Names of a folder's YAML files; none where it has gone or is locked."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 - names, not 100,000 paths
    except OSError:
        return []
    return sorted(name for name in names if name.endswith(SUFFIXES) and not name.startswith("."))


def _folder_problems(paths: Iterable[Path]) -> list[ResourceFile]:
    """A refusal for each folder that cannot be listed or of which not all files are read."""
    found: list[ResourceFile] = []
    for path in paths:
        if not os.path.isdir(path):  # noqa: PTH112
            continue
        if not os.access(path, os.R_OK | os.X_OK):
            found.append(_refused(path, "cannot be read", "let this user list the folder"))
        elif (number := len(_inside(path))) > MAX_FILES:
            found.append(_refused(path, f"{number} files", f"keep at most {MAX_FILES} in one folder"))
    return found


def _duplicate(path: Path, kind: str, name: str, first: Path | None = None) -> FieldProblem:
    also = f" in {_printable(first.name)}" if first is not None else ""
    return FieldProblem(
        f"{_printable(path.name)}: {kind} {name} metadata.name",
        repr(name),
        f"already defined{also}; give each {kind} a name of its own",
    )


def with_absolute_source(model: Model, folder: Path) -> Model:
    """A relative path is meant relative to the file that says it."""
    source = model.spec.source
    if source is None or "://" in source.uri:
        return model
    # os.path: unlike pathlib's, these two do not fail for an unknown ~user or for links in a circle.
    uri = os.path.realpath(folder / os.path.expanduser(source.uri))  # noqa: PTH111
    absolute = source.model_copy(update={"uri": uri})
    return model.model_copy(update={"spec": model.spec.model_copy(update={"source": absolute})})


def _problem(kind: type[BaseModel], item: ErrorDetails, place: str) -> FieldProblem:
    path = ".".join(_printable(str(part)) for part in item["loc"] if part not in _UNION_BRANCHES)
    remedy = _REMEDIES.get(item["type"]) or item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        remedy = _unknown_field_remedy(kind, item["loc"])
    elif item["type"] == "missing":
        return FieldProblem(f"{place} {path}", "missing", "add it")
    elif _UNION_BRANCHES.intersection(item["loc"]):
        remedy = "use text, a number, true or false"
    elif item["type"] == "literal_error":
        remedy = "use " + str(item.get("ctx", {}).get("expected", ""))
    elif item["type"] == "string_pattern_mismatch":
        remedy = _PATTERNS.get(item.get("ctx", {}).get("pattern", ""), remedy)
    value = item.get("input")
    if item["type"] == "string_type" and isinstance(value, bool | int | float):
        remedy = "write text: put the value in quotes"
    shown = "fields that do not fit" if isinstance(value, dict) else _shown(value)
    return FieldProblem(f"{place} {path}".rstrip(), shown, remedy)


# What pydantic adds to a location for the branch of a union that it tried.
_UNION_BRANCHES = frozenset({"bool", "int", "float", "str", "constrained-str", "[key]"})


# Our words for what pydantic says of a Python type.
_REMEDIES: Mapping[str, str] = {
    "string_type": "write text",
    "int_type": "write a whole number",
    "int_parsing": "write a whole number",
    "int_from_float": "write a whole number",
    "float_type": "write a number",
    "float_parsing": "write a number",
    "finite_number": "write a finite number",
    "bool_type": "write true or false",
    "bool_parsing": "write true or false",
    "list_type": "write a list",
    "tuple_type": "write a list",
    "dict_type": "write a mapping",
    "model_type": "write a mapping",
    "model_attributes_type": "write a mapping",
    "invalid_key": "its name must be text: put it in quotes",
}
_PATTERNS: Mapping[str, str] = {
    LABEL: "use lower-case letters, digits and '-', with a letter or digit first and last",
    SERVICE_LABEL: "use a letter, then lower-case letters, digits and '-', with a letter or digit last",
}


def _unknown_field_remedy(kind: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known = sorted(_field_names(kind, location[:-1]))
    close = difflib.get_close_matches(str(location[-1])[:MAX_NAME_CHARACTERS], known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return "no such field; known: " + ", ".join(known) + hint


def _field_names(kind: type[BaseModel], location: Iterable[int | str]) -> Iterator[str]:
    """Names on the wire of the class that `location` leads to from `kind`."""
    current = kind
    for part in location:
        if isinstance(part, int):  # an item of the list whose class was found before
            continue
        info = next((f for f in current.model_fields.values() if f.alias == part), None)
        nested = next((t for t in _classes(info.annotation) if t is not None), None) if info else None
        if nested is None:
            return
        current = nested
    yield from (info.alias or name for name, info in current.model_fields.items())


def _classes(annotation: Any) -> Iterator[type[BaseModel]]:
    options = getattr(annotation, "__args__", None) or (annotation,)
    return (option for option in options if isinstance(option, type) and issubclass(option, BaseModel))


def _shown(value: object) -> str:
    """The value as Python writes it, cut. Long ones are cut first: all of a document is a value too."""
    if isinstance(value, str):
        value = value[: MAX_SHOWN_CHARACTERS * 2]
    elif isinstance(value, list | dict | tuple | set | bytes) and len(value) > MAX_SHOWN_CHARACTERS:
        return f"{len(value)} items"
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"


def _printable(text: str, most: int = MAX_NAME_CHARACTERS) -> str:
    """`text` as a refusal names it: escapes for what a terminal would act on, and cut."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: most + 1])
    return shown if len(text) <= most else shown[: most - 1] + "…"
