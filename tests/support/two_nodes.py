"""Two "nodes" on one machine: two network namespaces on a virtual switch, one training job over both.

    sudo python tests/support/two_nodes.py

Runs the tiny configuration on one node, then over two namespaces by torchrun and by ``deepspeed --hostfile``,
and compares the loss traces (1e-5 relative, fp32). Needs iproute2 and the right to make namespaces; says so
plainly and exits 3 where it has not. Exits 1 where a trace differs.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from deco_scale.yaml import dump_yaml  # noqa: E402
from tests.support.assets import make_shards, make_text_encoder, tiny_config  # noqa: E402
from tests.support.namespaces import INTERFACE, Nodes, why_not  # noqa: E402
from tests.support.process_groups import trace, worst_difference  # noqa: E402

NOT_PERMITTED = 3
TOLERANCE = 1e-5
TIMEOUT_S = 300


def command(launcher: str, node: int, master: str, config: Path, hostfile: Path, engine: str) -> list[str]:
    binary = str(Path(sys.executable).with_name(launcher))
    train = [str(ROOT / "launcher" / "train.py"), "--config", str(config), f"parallel.engine={engine}"]
    if launcher == "torchrun":
        place = ["--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(node)]
        return [binary, *place, "--master_addr", master, "--master_port", "29700", *train]
    place = ["--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node)]
    return [binary, *place, "--master_addr", master, "--master_port", "29701", *train]


def train_on_both(nodes: Nodes, launcher: str, config: Path, hostfile: Path, engine: str) -> None:
    """Start one launcher in each namespace and wait for both."""
    started = []
    for number in range(2):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TP_SOCKET_IFNAME": INTERFACE,
        }
        inside = nodes.inside(number, command(launcher, number, nodes.addresses[0], config, hostfile, engine))
        started.append(
            subprocess.Popen(inside, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    codes = [process.returncode for process in started]
    if codes != [0, 0]:
        raise RuntimeError(f"{launcher} ended with {codes}:\n" + "\n".join(o[-3000:] for o in outputs))


def main() -> int:
    refused = why_not()
    if refused is not None:
        print(f"not run: {refused}")
        return NOT_PERMITTED
    failed = 0
    with tempfile.TemporaryDirectory() as scratch, Nodes(2) as nodes:
        folder = Path(scratch)
        shards, encoder = make_shards(folder / "data"), make_text_encoder(folder / "encoder")
        hostfile = folder / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in nodes.addresses))

        def write(name: str) -> Path:
            path = folder / f"{name}.yaml"
            path.write_text(dump_yaml(tiny_config(folder / name, shards, encoder)))
            return path

        alone = [sys.executable, str(ROOT / "launcher" / "train.py"), "--config", str(write("one"))]
        subprocess.run(alone, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
        for launcher, engine in (("torchrun", "fsdp"), ("deepspeed", "deepspeed")):
            train_on_both(nodes, launcher, write(launcher), hostfile, engine)
            found = trace(folder / launcher)
            worst = worst_difference(found, trace(folder / "one"))
            good = len(found) == 12 and worst < TOLERANCE
            failed += not good
            print(f"{launcher} over two nodes: {len(found)} steps, {worst:.1e} {'ok' if good else 'FAIL'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
