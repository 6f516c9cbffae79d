"""Read YAML that somebody else wrote, within bounds that hold before anything is built of it; and write it.

The text is parsed twice: first to events, which cost memory one at a time, and only where their number,
depth and what aliases stand for are within bounds, to values. An alias counts as all that it stands for, so
a file of 1 kB that unfolds to millions of values is refused by its sum. Numbers have a bound of their own:
Python's whole numbers have none, and what cannot be shown again must not come in.

The values are those of JSON. A date is text, as it is for Kubernetes. PyYAML is alone in reading `1e-5` and
`0o17` as text: to kubectl, Helm and whatever else is not PyYAML they are numbers, here both ways, so a file
says the same to a laptop and to a cluster, and what is written quotes text of that look.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

MAX_VALUES = 100_000  # of all documents of a text, what aliases stand for included
MAX_DEPTH = 50
MAX_NUMBER_CHARACTERS = 40
MAX_DIRECTIVES = 8  # libyaml compares each with all others

# Numbers to Go's YAML (gopkg.in/yaml.v2, resolve.go; `_` may stand in them) and text to PyYAML.
_NUMBERS = {
    "tag:yaml.org,2002:float": re.compile(r"[-+]?(?:\.[0-9_]+|[0-9][0-9_]*(?:\.[0-9_]*)?)[eE][-+]?[0-9]+\Z"),
    "tag:yaml.org,2002:int": re.compile(r"[-+]?0[oO][0-7_]+\Z"),
}
_FIRST_OF_NUMBERS = list("-+.0123456789")

_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster where libyaml is there


class YamlRefused(ValueError):
    """The text is not YAML, or is beyond a bound. The message says where and what to do."""


def load_documents(text: str) -> list[Any]:
    """All documents of `text`. Raises `YamlRefused`, and nothing else, whatever it holds."""
    if sum(line.startswith("%") for line in text.splitlines()) > MAX_DIRECTIVES:
        raise YamlRefused(f"more than {MAX_DIRECTIVES} lines begin with %; remove these directives")
    try:
        _check_bounds(text)
        return list(yaml.load_all(text, Loader=_Loader))
    except YamlRefused:
        raise
    except yaml.YAMLError as error:
        raise YamlRefused(" ".join(str(error).split())) from error
    except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        # PyYAML's constructors let through what Python says of a value that its tag does not fit.
        raise YamlRefused(f"a value does not fit its tag: {error}; remove the tag or quote it") from error


def _check_bounds(text: str) -> None:
    """Raise `YamlRefused` where the values would be too many or too deep."""
    sums: dict[str, int] = {}  # by anchor of this document: the values that an alias to it stands for
    open_anchors: list[str | None] = []
    begun: list[int] = []  # the count at the start of each open collection
    count = 0
    for event in yaml.parse(text, Loader=_Base):
        if isinstance(event, yaml.DocumentStartEvent):
            sums = {}
        elif isinstance(event, yaml.AliasEvent):
            anchor = event.anchor or ""
            if anchor in open_anchors:
                raise YamlRefused(f"{_at(event)}: *{anchor[:40]} holds itself; write it out")
            count += sums.get(anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor:
                sums[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append(event.anchor)
            begun.append(count)
            count += 1
            if len(begun) > MAX_DEPTH:
                raise YamlRefused(f"{_at(event)}: nested more than {MAX_DEPTH} deep; no resource is")
        elif isinstance(event, yaml.CollectionEndEvent):
            closed, first = open_anchors.pop(), begun.pop()
            if closed:
                sums[closed] = count - first
        if count > MAX_VALUES:
            raise YamlRefused(
                f"{_at(event)}: more than {MAX_VALUES} values, aliases counted as what they stand for; "
                "split the file, or write less"
            )


def _at(event: yaml.Event) -> str:
    return f"line {event.start_mark.line + 1}" if event.start_mark is not None else "the text"


class _Loader(_Base):  # type: ignore[misc]  # chosen at run time
    """The safe loader without dates, with bounded numbers, and without a key given twice."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _Base.yaml_implicit_resolvers.items()
    }

    def construct_bounded_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_yaml_int(_bounded(node)))

    def construct_bounded_float(self, node: yaml.ScalarNode) -> float:
        return float(self.construct_yaml_float(_bounded(node)))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: set[tuple[str, str]] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                    continue
                if (key.tag, key.value) in seen and id(node) not in self._merged:
                    raise YamlRefused(
                        f"line {key.start_mark.line + 1}: {key.value[:40]!r} is given twice; remove one"
                    )
                seen.add((key.tag, key.value))
        made: dict[Any, Any] = super().construct_mapping(node, deep=deep)
        return made

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        # A merged mapping then names again what its own fields override.
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            self._merged.add(id(node))
        super().flatten_mapping(node)

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._merged: set[int] = set()


def _bounded(node: yaml.ScalarNode) -> yaml.ScalarNode:
    if len(node.value) > MAX_NUMBER_CHARACTERS:
        raise YamlRefused(
            f"line {node.start_mark.line + 1}: a number of {len(node.value)} characters; write at most "
            f"{MAX_NUMBER_CHARACTERS}, or quote it where text is meant"
        )
    return node


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_bounded_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_bounded_float)


class Dumper(yaml.SafeDumper):
    """The safe dumper whose text is the same value to every reader; without anchors."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, _pattern, _FIRST_OF_NUMBERS)
    Dumper.add_implicit_resolver(_tag, _pattern, _FIRST_OF_NUMBERS)
# Truth values to some readers: written in quotes, and read as the text that they are to PyYAML.
Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]\Z"), list("yYnN"))


def dump(value: Any, **options: Any) -> str:
    """`value` (of JSON's kinds) as YAML, its fields in their order. `options`: PyYAML's."""
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, **options))
