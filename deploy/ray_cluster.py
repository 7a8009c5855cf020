"""A Ray cluster of several nodes on this machine, each in a network namespace of its own, to try what several machines do.

    sudo make cluster                                  # or: python -m deploy.ray_cluster up --nodes 3 --cpus 1
    RAY_AUTH_MODE=token python -m training.independent … --ray 10.77.0.1:6379
    python -m deploy.ray_cluster kill 2                # node 2 is gone, without a word
    python -m deploy.ray_cluster down

Ray listens on every interface of this machine, so the cluster asks for a token (~/.ray/auth_token, made here if there is none). Needs root, iproute2, procps and the
extra `ray`. The command itself runs outside of the namespaces, on a node without CPUs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

BRIDGE, NET, PORT = "modepath0", "10.77.0", 6379
HEAD = f"{NET}.1:{PORT}"
FOLDER = "/tmp/modepath-ray"  # it marks the processes of this cluster
AUTHENTICATED = {"RAY_AUTH_MODE": "token"}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Ray nodes in network namespaces of this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    begin = commands.add_parser("up", help="start the nodes")
    begin.add_argument("--nodes", type=int, default=3)
    begin.add_argument("--cpus", type=int, default=1, help="of each node")
    one = commands.add_parser("kill", help="kill a node")
    one.add_argument("node", type=int)
    commands.add_parser("down", help="stop all nodes and remove the namespaces")
    args = parser.parse_args()
    if args.command == "up":
        up(args.nodes, args.cpus)
        print(f"{args.nodes} nodes: RAY_AUTH_MODE=token python -m training.independent … --ray {HEAD}")
    elif args.command == "kill":
        kill(args.node)
    else:
        down()


def up(nodes: int, cpus: int) -> None:
    """Start a node without CPUs here, and the others in namespaces."""
    down()
    subprocess.run([ray_command(), "get-auth-token", "--generate"], capture_output=True, check=True)
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    head = [
        "--head",
        f"--port={PORT}",
        f"--node-ip-address={NET}.1",
        "--num-cpus=0",
        "--include-dashboard=false",
        f"--temp-dir={FOLDER}",
    ]
    ray([], *head)
    for number in range(1, nodes + 1):
        space, outer, address = f"modepath-{number}", f"modepath-{number}", f"{NET}.{10 + number}"
        ip("netns", "add", space)
        ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", outer, "master", BRIDGE, "up")
        for inner in (["addr", "add", f"{address}/24", "dev", "eth0"], ["link", "set", "eth0", "up"], ["link", "set", "lo", "up"]):  # fmt: skip
            ip("-n", space, *inner)
        # A folder of its own, so that nodes share no disk, and what each says is shown once.
        private = f'mkdir -p {FOLDER} && mount -t tmpfs none {FOLDER} && exec "$@"'
        ray(
            ["ip", "netns", "exec", space, "sh", "-c", private, "sh"],
            f"--address={HEAD}",
            f"--node-ip-address={address}",
            f"--num-cpus={cpus}",
        )


def kill(number: int) -> None:
    """Kill every process of a node at once, as when its machine fails."""
    found = subprocess.run(["ip", "netns", "pids", f"modepath-{number}"], capture_output=True, text=True, check=True)
    for pid in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def down() -> None:
    """Stop all nodes, and remove what `up` made."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout.split()
    for space in (one for one in listed if one.startswith("modepath-")):
        kill(int(space.removeprefix("modepath-")))
        ip("netns", "del", space)
    subprocess.run(["pkill", "-KILL", "-f", FOLDER], capture_output=True, check=False)
    for link in Path("/sys/class/net").glob("modepath-*"):  # of a namespace that its last process still holds
        ip("link", "del", link.name)
    if Path(f"/sys/class/net/{BRIDGE}").exists():
        ip("link", "del", BRIDGE)


def ip(*arguments: str) -> None:
    """Run `ip`, or end with what it says."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"ip {' '.join(arguments)}: {done.stderr.strip()}. Network namespaces need root.")


def ray(before: list[str], *options: str) -> None:
    """Run `ray start`, in a namespace if `before` says so."""
    done = subprocess.run(
        [*before, ray_command(), "start", "--disable-usage-stats", *options], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **AUTHENTICATED},
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"ray start {' '.join(options)}: {done.stdout[-1000:]}{done.stderr[-1000:]}")


def ray_command() -> str:
    """The `ray` of this environment."""
    return str(Path(sys.executable).parent / "ray")


if __name__ == "__main__":
    main()
