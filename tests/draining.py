"""What a spot notice does to a Ray cluster: a node is to be taken away soon."""

import subprocess
import sys
from pathlib import Path
from typing import Any


def drain(address: str, node: Any, seconds: int) -> None:
    """`ray drain-node`, as an autoscaler or a cloud's notice would call it."""
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "drain-node", "--address", address, "--node-id", node.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", str(seconds)]
    subprocess.run(command, check=True, capture_output=True)
