"""The machines of a cluster: how many there may be, their processors, their GPUs and its memory.

Owns what is known of instance types and GPUs by name, and whether workers fit. Asks no cloud.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rayjobs.config import Workers

GPU_GIB = {
    "T4": 15, "V100": 16, "A10": 22, "A10G": 22, "L4": 22, "L40S": 44, "A100": 40, "H100": 80,
    "H200": 140, "B200": 179,
}  # fmt: skip
"""Memory as programs see it, of the smallest card of that name."""
FAMILIES = {
    "p3": "V100", "g4dn": "T4", "g5": "A10G", "g6": "L4", "gr6": "L4", "g6e": "L40S",
    "p4d": "A100", "p4de": "A100", "p5": "H100", "p5e": "H200", "p5en": "H200", "p6-b200": "B200",
}  # fmt: skip
"""EC2's families with NVIDIA GPUs."""
NUM_GPUS = {
    "p3": {"2xlarge": 1, "8xlarge": 4, "16xlarge": 8},
    "p4d": {"24xlarge": 8},
    "p4de": {"24xlarge": 8},
    "p5": {"4xlarge": 1, "48xlarge": 8},
    "p5e": {"48xlarge": 8},
    "p5en": {"48xlarge": 8},
    "p6-b200": {"48xlarge": 8},
    "g4dn": {"12xlarge": 4, "metal": 8},
    "g5": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
    "g6e": {"12xlarge": 4, "24xlarge": 4, "48xlarge": 8},
}
"""Of sizes that do not have one."""
OWN_GIB = {"p4de": 80}


@dataclass(frozen=True)
class NodeType:
    """Machines of one kind, as Ray sees them."""

    name: str
    num_cpus: float | None
    """None where it is not known, as of an instance type that is not in the table."""
    num_gpus: float
    most: int
    gpu_gib: float | None = None

    @property
    def resources(self) -> dict[str, Any]:
        return {"Alive": True, "Resources": {"CPU": self.num_cpus or 0, "GPU": self.num_gpus}}


def of_ec2(name: str, instance_type: str, most: int) -> NodeType:
    """A node type on an EC2 instance, its CPUs and GPUs as the type's name says."""
    family, _, size = instance_type.partition(".")
    number = re.fullmatch(r"(\d*)xlarge", size)
    cpus = 4.0 * int(number[1] or 1) if number else 2.0 if size == "large" else None
    card = FAMILIES.get(family)
    if card is None:
        return NodeType(name, cpus, 0, most)
    num_gpus = NUM_GPUS.get(family, {}).get(size, 1)
    return NodeType(name, cpus, num_gpus, most, OWN_GIB.get(family) or GPU_GIB[card])


def memory_of(product: str) -> float | None:
    """GiB of a GPU by what its vendor or cloud calls it, as NVIDIA-A100-SXM4-80GB or nvidia-l4."""
    told = re.search(r"(\d+)\s*gi?b", product, re.IGNORECASE)
    if told:
        return float(told[1])
    words = re.split(r"[^A-Z0-9]+", product.upper())
    return next((float(GPU_GIB[word]) for word in words if word in GPU_GIB), None)


def lack_of(
    workers: Workers, count: int, nodes: Sequence[NodeType], key: str = "workers"
) -> Iterator[str]:
    """Why so many workers have no room on such a cluster, if so."""
    if any(node.num_cpus is None for node in nodes):
        return
    from rayjobs import room

    machines = [node.resources for node in nodes for _ in range(node.most)]
    fitting = room.num_fitting(workers, machines)
    if fitting < count:
        yield f"{key}: {room.describe_lack(workers, count, fitting, machines)}"
        return
    if _most_left(workers, fitting, nodes) < 1:
        yield (
            f"{key}.num_cpus is {workers.num_cpus:g}, which leaves no CPU of a node free; Ray "
            "Data's own tasks need one beside the workers, so ask for less, or for larger nodes"
        )


def _most_left(workers: Workers, fitting: int, nodes: Sequence[NodeType]) -> float:
    """CPUs that workers leave: of a node where GPUs bound them, else of all nodes together."""
    from rayjobs import room

    if not workers.num_gpus:
        count = min(workers.max_workers, fitting)
        return sum((node.num_cpus or 0) * node.most for node in nodes) - count * workers.num_cpus
    held = [(node, room.num_fitting(workers, [node.resources])) for node in nodes]
    return max((node.num_cpus or 0) - count * workers.num_cpus for node, count in held if count)
