"""What the demo serves: the models of this package, and the embedding model where its package is."""

from pathlib import Path

import pytest

from tidegate import demo
from tidegate.cli.lifecycle import welcome
from tidegate.control.resource_files import load_resources
from tidegate.local.home import Home, Running, record_of
from tidegate.local.lifecycle import default_paths
from tidegate.sources.checkpoint import read_checkpoint


def test_the_embedding_model_is_built_last_and_asleep_when_nobody_asks(tmp_path: Path) -> None:
    *_, last = load_resources(default_paths(Home(tmp_path / "home"))).models
    assert (last.metadata.name, last.spec.scaling.min_replicas) == ("minilm", 0)
    assert last.spec.source is not None
    checkpoint = read_checkpoint(Path(last.spec.source.uri.removeprefix("file://")))
    assert checkpoint.task == "embed"


def test_a_second_start_leaves_the_watched_file_alone(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    default_paths(home)
    before = home.demo.stat()
    assert default_paths(home)[-1] == home.demo
    assert home.demo.stat().st_ino == before.st_ino


def test_without_its_package_the_demo_is_what_tidegate_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "EMBEDDING_PACKAGE", "tidegate_has_no_such_package")
    assert default_paths(Home(tmp_path / "home")) == [demo.resource_file()]
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ("generate", "chat/completions"),
        ("embed", "embeddings"),
        ("score", "rerank"),
        ("classify", "classify"),
    ],
)
def test_the_call_to_paste_is_one_that_the_model_answers(task: str, path: str) -> None:
    running = Running(record_of("host", 1), url="http://127.0.0.1:1", key="tg-k")
    assert f"curl -N http://127.0.0.1:1/v1/{path} " in welcome(running, "m", task)
