"""Read `Model` and `Pool` resources from YAML files and folders.

Each file stands alone: a broken one does not hide the others, so a watcher can keep what ran of it.
Every refusal names the file, the document in it, the field, the value and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tidegate.control.resources import API_VERSION, DEFAULT_POOL, Model, Pool
from tidegate.errors import ConfigError, FieldProblem

SUFFIXES = (".yaml", ".yml")
MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_SHOWN_CHARACTERS = 120
_KINDS: Mapping[str, type[Model] | type[Pool]] = {"Model": Model, "Pool": Pool}


@dataclass(frozen=True, slots=True)
class ResourceFile:
    """What one file holds. With `problems` the file is refused whole and the lists are empty."""

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
    return [read_file(file) for file in resource_paths(paths)]


def resource_paths(paths: Sequence[Path]) -> list[Path]:
    """The files behind `paths`: a folder stands for its YAML files, sorted by name, hidden ones left out."""
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith("."))
            found.update(dict.fromkeys(p.resolve() for p in inside))
        else:
            found[path.resolve()] = None
    return list(found)


def read_file(path: Path) -> ResourceFile:
    """Read one YAML file with any number of documents."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            return _refused(path, f"{path.stat().st_size} bytes", f"keep it under {MAX_FILE_BYTES} bytes")
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return _refused(path, "no such file or folder", "give a YAML file or a folder of them")
    except (OSError, UnicodeDecodeError) as error:
        return _refused(path, "cannot be read", str(error))
    except (yaml.YAMLError, RecursionError) as error:
        return _refused(path, "not valid YAML", " ".join(str(error).split()))
    models: list[Model] = []
    pools: list[Pool] = []
    problems: list[FieldProblem] = []
    for number, document in enumerate(documents, start=1):
        if document is None:
            continue
        where = path.name if len(documents) == 1 else f"{path.name} document {number}"
        resource = parse_resource(document, where)
        if isinstance(resource, Model):
            models.append(_with_absolute_source(resource, path.parent))
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
        place = f"{where}: {kind} {name}" if isinstance(name, str) else f"{where}: {kind}"
        found = [_problem(_KINDS[kind], item, place) for item in error.errors()]
        return list({problem.field: problem for problem in found}.values())  # a union names each branch


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
                    f"{origins[model.name].name}: Model {model.name} spec.pool",
                    repr(model.spec.pool),
                    "no such Pool; known: " + ", ".join(sorted(known)),
                )
            )
            del models[model.name]
    return ResourceSet(tuple(models.values()), tuple(pools.values()), origins), tuple(problems)


def _as_paths(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _refused(path: Path, value: str, remedy: str) -> ResourceFile:
    return ResourceFile(path, problems=(FieldProblem(str(path), value, remedy),))


def _duplicate(path: Path, kind: str, name: str, first: Path | None = None) -> FieldProblem:
    also = f" in {first.name}" if first is not None else ""
    return FieldProblem(
        f"{path.name}: {kind} {name} metadata.name",
        repr(name),
        f"already defined{also}; give each {kind} a name of its own",
    )


def _with_absolute_source(model: Model, folder: Path) -> Model:
    """A relative path is meant relative to the file that says it."""
    source = model.spec.source
    if source is None or "://" in source.uri:
        return model
    absolute = source.model_copy(update={"uri": str((folder / Path(source.uri).expanduser()).resolve())})
    return model.model_copy(update={"spec": model.spec.model_copy(update={"source": absolute})})


def _problem(kind: type[BaseModel], item: ErrorDetails, place: str) -> FieldProblem:
    path = ".".join(str(part) for part in item["loc"] if part not in _UNION_BRANCHES)
    remedy = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        remedy = _unknown_field_remedy(kind, item["loc"])
    elif item["type"] == "missing":
        return FieldProblem(f"{place} {path}", "missing", "add it")
    elif _UNION_BRANCHES.intersection(item["loc"]):
        remedy = "use text, a number, true or false"
    elif item["type"] == "literal_error":
        remedy = "use " + str(item.get("ctx", {}).get("expected", ""))
    value = item.get("input")
    shown = "fields that do not fit" if isinstance(value, dict) else _shown(value)
    return FieldProblem(f"{place} {path}".rstrip(), shown, remedy)


# What pydantic adds to a location for the branch of a union that it tried.
_UNION_BRANCHES = frozenset({"bool", "int", "float", "str", "constrained-str", "[key]"})


def _unknown_field_remedy(kind: type[BaseModel], location: tuple[int | str, ...]) -> str:
    known = sorted(_field_names(kind, location[:-1]))
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
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
    text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…"
