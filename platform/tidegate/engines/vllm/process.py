"""The replica's end of the process in which vLLM runs.

One thread, the engine's, starts it and exchanges frames with it; `exit_code` may be asked on any. It lives
no longer than the replica: it sees the socket close, and whoever closes the engine kills its session.
"""

from __future__ import annotations

import importlib.util
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import msgspec

from tidegate.engines.base import EngineLoadError
from tidegate.engines.frames import receive, send
from tidegate.engines.transformers.memory import usable_cores
from tidegate.engines.vllm import worker
from tidegate.engines.vllm.messages import TO_REPLICA, Failed, Load, Loaded, Stepped, Turn
from tidegate.messages.codec import encode_open
from tidegate.replica_args import VllmArgs
from tidegate.sources.servable import UNSUPPORTED

PYTHON_VARIABLE = "TG_VLLM_PYTHON"
LOAD_SECONDS = 3600.0  # compiling and reading hundreds of gigabytes included
METRICS_SECONDS = 2.0  # in which metrics come, or are told the next time
END_SECONDS = 10.0  # of a process that closed its end
# Of our environment: paths that vLLM's interpreter must not look in, and where our metrics would be.
NOT_ITS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "PROMETHEUS_MULTIPROC_DIR")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # its engine in that very process
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the other takes no logits processors
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PROMETHEUS_DISABLE_CREATED_SERIES": "1",
}
# What whoever starts the replica may set otherwise.
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # Cores are not bound: other replicas on this machine would be bound to the same ones.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class ProcessEnded(Exception):
    """The process is gone, or cannot go on."""


class VllmProcess:
    def __init__(self, args: VllmArgs) -> None:
        """Start it. Raises `EngineLoadError` where there is no vLLM."""
        self._lane, theirs = socket.socketpair()
        self._metrics, their_metrics = socket.socketpair()
        self._is_asked_for_metrics = False
        self._asking = threading.Lock()  # for metrics
        with theirs, their_metrics:
            ends = (theirs.fileno(), their_metrics.fileno())
            self._process = subprocess.Popen(  # noqa: S603  # our own module
                [find_python(os.environ), "-P", str(Path(worker.__file__)), *map(str, ends)],
                env=environment(os.environ, args),
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # `close` reaches what vLLM starts, and no Ctrl-C does
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def load(self, load: Load) -> Loaded:
        """Raises `EngineLoadError`."""
        self._lane.settimeout(LOAD_SECONDS)
        try:
            send(self._lane, encode_open(load))
            answer = self._answer()
        except (ProcessEnded, OSError) as error:
            if self.exit_code() == -signal.SIGKILL:
                raise EngineLoadError(
                    "OutOfMemory",
                    f"vLLM did not load the model ({error}: killed, as where memory runs out): "
                    "give the replica more memory, or lower engine.kvCacheBytes.",
                ) from error
            raise EngineLoadError(
                "WeightsWrong", f"vLLM did not load the model ({error}); the replica's log says why."
            ) from error
        self._lane.settimeout(None)  # the replica watches over the time of steps
        if isinstance(answer, Failed):
            raise EngineLoadError(answer.reason, answer.message)
        assert isinstance(answer, Loaded)
        return answer

    def ask(self, turn: Turn) -> None:
        """Raises `ProcessEnded`."""
        try:
            send(self._lane, encode_open(turn))
        except OSError as error:
            raise ProcessEnded(self._how_ended()) from error

    def answer(self) -> Stepped:
        """Wait for what came of the turn. Raises `ProcessEnded`."""
        answer = self._answer()
        if isinstance(answer, Failed):
            raise ProcessEnded(answer.message)
        assert isinstance(answer, Stepped)
        return answer

    def metrics(self, labels: Mapping[str, str]) -> bytes:
        """Return vLLM's metrics with these labels, as encoded families; empty where they do not come soon.
        On any thread."""
        with self._asking:
            try:
                if not self._is_asked_for_metrics:
                    send(self._metrics, msgspec.json.encode(labels))
                    self._is_asked_for_metrics = True
                if not select.select([self._metrics], [], [], METRICS_SECONDS)[0]:
                    return b""
                frame = receive(self._metrics)
            except (OSError, ValueError):  # its process has ended, or this is closed
                return b""
            self._is_asked_for_metrics = False
            return frame or b""

    def exit_code(self) -> int | None:
        return self._process.poll()

    def close(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        self._process.wait()
        self._lane.close()
        with self._asking:  # whoever waited for the process has seen its end
            self._metrics.close()

    def _answer(self) -> Loaded | Stepped | Failed:
        try:
            frame = receive(self._lane)
        except ConnectionError:
            frame = None
        if frame is None:
            raise ProcessEnded(self._how_ended())
        answer: Loaded | Stepped | Failed = TO_REPLICA.decode(frame)
        return answer

    def _how_ended(self) -> str:
        try:
            return f"its process ended with {self._process.wait(END_SECONDS)}"
        except subprocess.TimeoutExpired:
            return "its process closed its socket and did not end"


def find_python(environ: Mapping[str, str]) -> str:
    """Return the interpreter that has vLLM: the one that is named, or this one. Raises `EngineLoadError`."""
    if named := environ.get(PYTHON_VARIABLE):
        if os.access(named, os.X_OK):
            return named
        raise EngineLoadError(
            UNSUPPORTED,
            f"{PYTHON_VARIABLE} names {named}, which is no program that can be started: set it to the python "
            "of the environment that vLLM is installed in.",
        )
    if importlib.util.find_spec("vllm") is not None:
        return sys.executable
    raise EngineLoadError(
        UNSUPPORTED,
        "vLLM is not installed here: use an image that has it (the Dockerfile's target ray-vllm), or install "
        f"it into an environment of its own and set {PYTHON_VARIABLE} to that one's python.",
    )


def environment(environ: Mapping[str, str], args: VllmArgs) -> dict[str, str]:
    """Return the variables of the process."""
    kept = {name: value for name, value in environ.items() if name not in NOT_ITS}
    threads = args.threads or default_threads(kept, usable_cores())
    made = DEFAULTS | kept | ENVIRONMENT | {"OMP_NUM_THREADS": str(threads)}
    if args.enforce_eager:
        made["TORCHDYNAMO_DISABLE"] = "1"  # vLLM compiles some functions all the same
    return made


def default_threads(environ: Mapping[str, str], cores: int) -> int:
    """Return what OMP_NUM_THREADS grants, less the core that replica and gateway need: threads that wait for
    one that is not running cost more than it computes. vLLM keeps as many for its own front end."""
    granted = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    most = max(1, cores - 1)
    return max(1, min(int(granted), most)) if granted.isdigit() else most
