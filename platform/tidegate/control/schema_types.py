"""The parts of which `resources.py` and `pool_schema.py` are made: names, quantities, rules.

pydantic checks local files, an API server checks what is applied to a cluster. Bounds of single fields mean
the same in both. A rule over several fields is written twice, side by side: as a validator, and as a `Rule`
in CEL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.alias_generators import to_camel
from pydantic.config import JsonDict

LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
SERVICE_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"
SUBDOMAIN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"
# Neither takes zero: no machine part has none of it, and "unset" is the empty text.
BYTES = r"[1-9][0-9]{0,15}([.][0-9]{1,3})?(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
CORES = r"[1-9][0-9]{0,5}m?|[1-9][0-9]{0,3}[.][0-9]{1,3}|0[.]([1-9][0-9]{0,2}|0[1-9][0-9]?|00[1-9])"
MAX_QUANTITY_CHARACTERS = 24
# Of a quantity without a unit: as many digits as the patterns take.
MOST_CORES = 10**6 - 1
MOST_BYTES = 10**15


class Strict(BaseModel):
    """Base of every resource class: frozen, camelCase on the wire, unknown fields refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=to_camel, allow_inf_nan=False, str_strip_whitespace=True
    )


class Open(Strict):
    """Part of a pod as Kubernetes knows it: the fields named here are checked, the others pass unread."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule that the API server keeps: `holds` is CEL over the value that carries the rule.

    `field` is the path below that value which the refusal names (".source"); empty: the value itself.
    """

    holds: str
    message: str
    field: str = ""

    def on_wire(self) -> JsonDict:
        rule: JsonDict = {"rule": self.holds, "message": self.message}
        return rule | {"fieldPath": self.field} if self.field else rule


def rules(*given: Rule) -> JsonDict:
    """Schema extras that carry rules."""
    return {"x-kubernetes-validations": [rule.on_wire() for rule in given]}


def keyed_by(name: str) -> JsonDict:
    """Schema extras of a list whose items differ in `name`."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [name]}


def refuse_repeats(names: Sequence[str], field: str) -> None:
    """Check what `keyed_by` says, for pydantic."""
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{field} {', '.join(map(repr, repeated))} is given twice; each must differ")


def size_bytes(quantity: str) -> int:
    """Bytes that a quantity says ("10Gi", "500M"); 0 for the empty text."""
    number = quantity.rstrip("kKMGTPi")
    scale = _BYTE_SCALES[quantity[len(number) :]]
    return int(float(number) * scale) if "." in number else int(number or 0) * scale


def cpu_cores(quantity: str) -> float:
    """Cores that a quantity says ("2", "0.5", "500m"); 0 for the empty text."""
    return float(quantity.removesuffix("m") or 0) / (1000 if quantity.endswith("m") else 1)


_BYTE_SCALES = {"": 1} | {
    letter + binary: (1024 if binary else 1000) ** power
    for power, letter in enumerate("kMGTP", start=1)
    for binary in ("", "i")
}
_BYTE_SCALES["Ki"] = _BYTE_SCALES.pop("ki")


def _integer_as_text(value: Any) -> Any:
    """YAML reads `cpus: 2` as a number; Kubernetes takes that for a quantity too."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _quantity(pattern: str, most: int) -> Any:
    """Annotations of a quantity: for pydantic, and the form in which Kubernetes takes a number or text."""
    return (
        BeforeValidator(_integer_as_text),
        Field(pattern=pattern, max_length=MAX_QUANTITY_CHARACTERS),
        WithJsonSchema(
            {
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": True,
                "pattern": pattern,
                "maxLength": MAX_QUANTITY_CHARACTERS,
                "minimum": 1,
                "maximum": most,
            }
        ),
    )


ResourceName = Annotated[
    str,
    Field(
        pattern=LABEL,
        min_length=1,
        max_length=52,
        description="Lower-case letters, digits and '-' (a DNS-1123 label), at most 52 characters.",
    ),
]
# A Ray cluster and its Services are named after the Pool, with a generation behind it.
PoolName = Annotated[
    str,
    Field(
        pattern=SERVICE_LABEL,
        min_length=1,
        max_length=40,
        description="A letter, then lower-case letters, digits and '-' (a DNS-1035 label), at most 40 "
        "characters.",
    ),
]
ObjectName = Annotated[str, Field(pattern=SUBDOMAIN, min_length=1, max_length=253)]
Cores = Annotated[str, *_quantity(f"^({CORES})$", MOST_CORES)]
Bytes = Annotated[str, *_quantity(f"^({BYTES})$", MOST_BYTES)]
BytesOrEmpty = Annotated[str, *_quantity(f"^({BYTES})?$", MOST_BYTES)]
