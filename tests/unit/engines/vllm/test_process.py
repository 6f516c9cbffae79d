import pytest

from tidegate.engines.vllm.process import default_threads, environment
from tidegate.replica_args import VllmArgs


@pytest.mark.parametrize(
    ("granted", "cores", "threads"),
    [
        (None, 8, 7),
        (None, 1, 1),
        ("8", 8, 7),  # Ray and the laptop platform grant all cores, which the replica's loop has to share
        ("4", 8, 4),
        ("4,2", 8, 4),  # OpenMP's form for nested regions
        ("0", 8, 1),
        ("many", 8, 7),
    ],
)
def test_a_core_stays_for_replica_and_gateway(granted: str | None, cores: int, threads: int) -> None:
    environ = {} if granted is None else {"OMP_NUM_THREADS": granted}
    assert default_threads(environ, cores) == threads


def test_the_threads_that_a_model_names_are_taken() -> None:
    assert environment({"OMP_NUM_THREADS": "2"}, VllmArgs(threads=5))["OMP_NUM_THREADS"] == "5"


def test_of_our_environment_the_paths_of_packages_stay_here() -> None:
    made = environment({"PYTHONPATH": "/ours", "VLLM_LOGGING_LEVEL": "INFO", "HOME": "/home"}, VllmArgs())
    assert "PYTHONPATH" not in made
    assert (made["VLLM_LOGGING_LEVEL"], made["HOME"]) == ("INFO", "/home")
