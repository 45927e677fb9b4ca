"""Two "nodes" on one machine: two network namespaces joined by a virtual cable, one training job over both.

    sudo python tests/two_nodes.py

Runs the tiny configuration on one node, then over two namespaces by torchrun and by ``deepspeed --hostfile``,
and compares the loss traces (1e-5 relative, fp32). Needs iproute2 and the right to make namespaces; says so
plainly and exits 3 where it has not. Exits 1 where a trace differs.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.assets import make_shards, make_text_encoder, tiny_config  # noqa: E402
from tests.distributed.harness import trace, worst_difference  # noqa: E402

NODES = {"deco-node0": ("deco-veth0", "192.0.2.1"), "deco-node1": ("deco-veth1", "192.0.2.2")}
"""Addresses of TEST-NET-1, which belong to nobody."""
NOT_PERMITTED = 3
TOLERANCE = 1e-5
TIMEOUT_S = 300


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def two_nodes() -> Iterator[None]:
    """Two namespaces that see each other and nothing else."""
    try:
        for name in NODES:
            ip("netns", "add", name)
        (veth0, _), (veth1, _) = NODES.values()
        ip("link", "add", veth0, "type", "veth", "peer", "name", veth1)
        for name, (veth, address) in NODES.items():
            ip("link", "set", veth, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", veth)
            ip("-n", name, "link", "set", veth, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def command(launcher: str, node: int, config: Path, hostfile: Path, engine: str) -> list[str]:
    master = NODES["deco-node0"][1]
    binary = str(Path(sys.executable).with_name(launcher))
    train = [str(ROOT / "launcher" / "train.py"), "--config", str(config), f"parallel.engine={engine}"]
    if launcher == "torchrun":
        place = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
        return [binary, *place, "--master_addr", master, "--master_port", "29700", *train]
    place = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node)]
    return [binary, *place, "--master_addr", master, "--master_port", "29701", *train]


def train_on_both(launcher: str, config: Path, hostfile: Path, engine: str) -> None:
    """Start one launcher in each namespace and wait for both."""
    started = []
    for number, (name, (veth, _)) in enumerate(NODES.items()):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": veth,
            "TP_SOCKET_IFNAME": veth,
        }
        inside = ["ip", "netns", "exec", name, *command(launcher, number, config, hostfile, engine)]
        started.append(
            subprocess.Popen(inside, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    codes = [process.returncode for process in started]
    if codes != [0, 0]:
        raise RuntimeError(f"{launcher} ended with {codes}:\n" + "\n".join(o[-3000:] for o in outputs))


def main() -> int:
    if shutil.which("ip") is None:
        print("not run: iproute2 (the command ip) is not installed")
        return NOT_PERMITTED
    probe = subprocess.run(["ip", "netns", "add", "deco-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        print(f"not run: network namespaces are not permitted here ({probe.stderr.strip()})")
        return NOT_PERMITTED
    ip("netns", "del", "deco-probe")
    failed = 0
    with tempfile.TemporaryDirectory() as scratch, two_nodes():
        folder = Path(scratch)
        shards, encoder = make_shards(folder / "data"), make_text_encoder(folder / "encoder")
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for _, address in NODES.values()))

        def write(name: str) -> Path:
            path = folder / f"{name}.yaml"
            path.write_text(yaml.safe_dump(tiny_config(folder / name, shards, encoder)))
            return path

        alone = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(write("one"))]
        subprocess.run(alone, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        for launcher, engine in (("torchrun", "fsdp"), ("deepspeed", "deepspeed")):
            train_on_both(launcher, write(launcher), hostfile, engine)
            found = trace(folder / launcher)
            worst = worst_difference(found, trace(folder / "one"))
            good = len(found) == 12 and worst < TOLERANCE
            failed += not good
            print(f"{launcher} over two nodes: {len(found)} steps, {worst:.1e} {'ok' if good else 'FAIL'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
