from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.serving.rig import replica_args
from tests.unit.sources.builders import write
from tidegate.engines.base import EngineLoadError
from tidegate.errors import ConfigError
from tidegate.replica_args import parse_args
from tidegate.serving.__main__ import parse_command_line
from tidegate.serving.process import check_content, configure_logs
from tidegate.sources.checkpoint import read_checkpoint


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("tidegate")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    for handler in logger.handlers:
        if handler not in before[0]:
            handler.close()
    logger.handlers[:], logger.level, logger.propagate = before


def test_other_content_than_the_revision_was_made_from_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "checkpoint")
    digest = read_checkpoint(folder).digest("c")
    engine = {"name": "simulated", "path": str(folder)}
    args = parse_args(replica_args("unix:///x", "p", engine=engine, commit="c", digest=digest))
    check_content(args)
    (folder / "config.json").write_bytes((folder / "config.json").read_bytes() + b"\n")
    with pytest.raises(EngineLoadError, match="tidegate rollout recheck") as refused:
        check_content(args)
    assert refused.value.reason == "SourceChanged"
    (folder / "config.json").unlink()
    check_content(args)  # the engine says what is missing


def test_an_unknown_or_wrong_argument_is_named() -> None:
    with pytest.raises(ConfigError, match="no_such"):
        parse_args(replica_args("unix:///x", "p", no_such=1))
    with pytest.raises(ConfigError, match="lease_seconds"):
        parse_args(replica_args("unix:///x", "p", lease_seconds="long"))
    with pytest.raises(ConfigError, match="lease_seconds"):
        parse_command_line(
            ["--model", "m", "--revision", "r", "--redis-url", "unix:///x", "--lease-seconds", "long"]
        )


def test_the_command_line_gives_the_same_arguments() -> None:
    words = "--model m --revision r1 --redis-url unix:///x --key-prefix p --slots 8 --lease-seconds 1"
    found = parse_command_line([*words.split(), "--drain-seconds", "5", "--args", '{"step_ms": 2.0}'])
    assert found == parse_args(replica_args("unix:///x", "p"))


def test_engine_arguments_that_are_no_json_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_command_line(["--model", "m", "--revision", "r", "--redis-url", "unix:///x", "--args", "{"])
    assert "--args: '{': give JSON" in capsys.readouterr().err


def test_logs_are_json_lines_in_the_models_file(logger: logging.Logger, tmp_path: Path) -> None:
    configure_logs(parse_args(replica_args("unix:///x", "p", log_dir=str(tmp_path / "logs"))))
    logging.getLogger("tidegate.serving.replica").info("hello")
    (line,) = (tmp_path / "logs" / "replica-m.log").read_text().splitlines()
    assert json.loads(line)["message"] == "hello"


def test_a_replica_of_the_simulated_engine_imports_no_torch() -> None:
    code = (
        "import sys, tidegate.serving.__main__; from tidegate.engines.create import create_engine; "
        "from tidegate.replica_args import EngineSpec; create_engine(EngineSpec('simulated')); "
        "print([name for name in ('torch', 'transformers', 'ray', 'fastapi') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
