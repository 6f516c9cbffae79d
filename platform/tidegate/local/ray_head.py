"""`python -m tidegate.local.ray_head OPTIONS`: start a Ray head on loopback, print where it is, and end.

What `ray start --head` does, without what a single machine has no use for. On 2 cores `ray start` took 7 s
alone and 32 s beside other work; this takes 3 to 4 s. The difference is the autoscaler's monitor, the Ray
client server, and the dashboard, of which only the module with Serve's REST API is started instead of nine
processes. Uses `ray._private`, which is why the installed Ray version is pinned.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec

# Not 127.0.0.1: Ray replaces that with the machine's outward address when a driver connects.
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


class RayOptions(msgspec.Struct, frozen=True):
    temporary: str
    dashboard_port: int
    cpus: int
    gpus: int
    object_store_bytes: int


class RayHead(msgspec.Struct, frozen=True):
    """`processes` maps Ray's names of its parts to process ids."""

    address: str
    dashboard_url: str
    session: str
    processes: dict[str, int]


def start(options: RayOptions) -> RayHead:
    """Start the processes and leave them running."""
    import ray._private.node
    import ray._private.services
    from ray._private.parameter import RayParams

    begin = ray._private.services.start_ray_process

    def begin_lean(command: list[str], process_type: str, *rest: Any, **named: Any) -> Any:
        if process_type == "dashboard":
            command = [*command, "--modules-to-load=ServeHead"]
        return begin(command, process_type, *rest, **named)

    ray._private.services.start_ray_process = begin_lean
    params = RayParams(
        node_ip_address=LOOPBACK,
        node_name="tidegate",
        gcs_server_port=0,
        dashboard_host="127.0.0.1",
        dashboard_port=options.dashboard_port,
        dashboard_agent_listen_port=0,
        include_dashboard=True,
        include_log_monitor=False,
        no_monitor=True,
        num_cpus=options.cpus,
        num_gpus=options.gpus,
        object_store_memory=options.object_store_bytes,
        temp_dir=options.temporary,
    )
    node = ray._private.node.Node(params, head=True, shutdown_at_exit=False, spawn_reaper=False)
    return RayHead(
        address=node.address,
        dashboard_url=f"http://{node.address_info['webui_url']}",
        session=node.get_session_dir_path(),
        processes={name: found[0].process.pid for name, found in node.all_processes.items() if found},
    )


def main() -> int:
    options = msgspec.json.decode(sys.argv[1], type=RayOptions)
    head = start(options)
    sys.stdout.write(msgspec.json.encode(head).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
