"""What the API server itself says to Tidegate's resources: every sample is taken, every bad one refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.cluster.bad_resources import BAD_RESOURCES, Bad
from tests.cluster.cluster import Cluster

SAMPLES = Path(__file__).parents[2] / "helm" / "samples"
FILES = sorted(SAMPLES.rglob("*.yaml"))


def test_there_are_enough_of_both() -> None:
    assert FILES
    assert len(BAD_RESOURCES) >= 40


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_sample_is_taken(api_server: Cluster, file: Path) -> None:
    with api_server.api() as api:
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            if document["apiVersion"].startswith("tidegate.dev/"):
                answer = create(api, document)
                assert answer.status_code == 201, answer.json()["message"]


@pytest.mark.parametrize("bad", BAD_RESOURCES, ids=lambda bad: f"{bad.document['kind']}: {bad.name}")
def test_every_bad_resource_is_refused_by_the_name_of_its_field(api_server: Cluster, bad: Bad) -> None:
    with api_server.api() as api:
        answer = replace(api, bad.before, bad.document) if bad.before else create(api, bad.document)
    assert answer.status_code in (400, 422), answer.text
    assert bad.says in answer.json()["message"]


def create(api: httpx.Client, document: dict[str, Any], *, is_kept: bool = False) -> httpx.Response:
    """As `kubectl create --dry-run=server`: validated and defaulted, but not kept."""
    options = {"fieldValidation": "Strict"} | ({} if is_kept else {"dryRun": "All"})
    return api.post(path_of(document), json=document, params=options)


def replace(api: httpx.Client, before: dict[str, Any], document: dict[str, Any]) -> httpx.Response:
    """The answer to a change of `before`, which exists meanwhile."""
    path = f"{path_of(before)}/{before['metadata']['name']}"
    made = create(api, before, is_kept=True)
    assert made.status_code == 201, made.text
    try:
        metadata = document["metadata"] | {"resourceVersion": made.json()["metadata"]["resourceVersion"]}
        changed = document | {"metadata": metadata}
        return api.put(path, json=changed, params={"fieldValidation": "Strict", "dryRun": "All"})
    finally:
        api.delete(path).raise_for_status()


def path_of(document: dict[str, Any]) -> str:
    return f"/apis/{document['apiVersion']}/namespaces/default/{document['kind'].lower()}s"
