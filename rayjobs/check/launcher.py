"""A cluster file of Ray's launcher, offline: its keys, its nodes by EC2's own names, its files.

Owns what can be wrong with it and what machines it may start. Asks no cloud.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rayjobs.check import nodes, schema
from rayjobs.check.nodes import NodeType
from rayjobs.check.report import Report

COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
PLACEHOLDER = re.compile(r"ami-0+")
REGION = re.compile(r"AWS_(?:DEFAULT_)?REGION=([\w-]+)")
BASH_S = 10


def check(path: str, values: dict[str, Any], report: Report) -> list[NodeType]:
    """The machines that the file may start."""
    where = f"{path}: "
    report.find(schema.mistakes(values, schema.of_launcher()), where)
    types = values.get("available_node_types")
    if types is None or not schema.has_shape(values, schema.of_launcher()):
        return []
    report.find(_counts(values, types), where)
    report.find(_files(values, Path(path).parent), where)
    report.find(_commands(values), where)
    provider = values.get("provider")
    if not isinstance(provider, dict) or provider.get("type") != "aws":
        report.tell(f"not looked at: node_config of {path}, which is not for AWS")
        return []
    report.find(_aws(provider, types), where)
    report.find(_credentials(), where)
    return machines(values)


def machines(values: dict[str, Any]) -> list[NodeType]:
    """The nodes of a file for AWS, no more of them than it allows; the first type's come first."""
    left, found = int(values.get("max_workers", 2)), []
    head = values.get("head_node_type")
    for name, node_type in values["available_node_types"].items():
        most = 1 if name == head else min(left, int(node_type.get("max_workers", left)))
        left -= 0 if name == head else most
        kind = str(node_type.get("node_config", {}).get("InstanceType"))
        found.append(_as_told(nodes.of_ec2(name, kind, most), node_type.get("resources") or {}))
    return found


def _as_told(node: NodeType, told: dict[str, Any]) -> NodeType:
    """What the file says of a node's resources goes before what its type has."""
    cpus, gpus = told.get("CPU", node.num_cpus), told.get("GPU", node.num_gpus)
    return NodeType(node.name, cpus, gpus, node.most, node.gpu_gib)


def _counts(values: dict[str, Any], types: dict[str, Any]) -> Iterator[str]:
    head, most = values.get("head_node_type"), values.get("max_workers", 2)
    if head not in types:
        yield f"head_node_type is {head!r}; available_node_types has {', '.join(types)}"
    for name, node_type in types.items():
        key, fewest = f"available_node_types.{name}", node_type.get("min_workers", 0)
        own = node_type.get("max_workers", most)
        if fewest > own:
            yield f"{key}.min_workers is {fewest}, above its max_workers, {own}"
        if name != head and own > most:
            yield f"{key}.max_workers is {own}, above max_workers of the whole, {most}"


def _files(values: dict[str, Any], folder: Path) -> Iterator[str]:
    for target, source in (values.get("file_mounts") or {}).items():
        path = Path(os.path.expanduser(str(source)))
        if not (folder / path).exists():
            token = "; make it by `ray get-auth-token --generate`" if "token" in path.name else ""
            yield f"file_mounts.{target}: there is no {source} here{token}"
    key = (values.get("auth") or {}).get("ssh_private_key")
    if key and not Path(os.path.expanduser(key)).is_file():
        yield f"auth.ssh_private_key: there is no {key} here"


def _commands(values: dict[str, Any]) -> Iterator[str]:
    """Commands that no shell takes, and those for another region."""
    region = (values.get("provider") or {}).get("region")
    for kind in COMMANDS:
        for number, command in enumerate(values.get(kind) or ()):
            key, text = f"{kind}[{number}]", str(command)
            shell = ["bash", "-n"]
            done = subprocess.run(shell, input=text, capture_output=True, text=True, timeout=BASH_S)
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no reason given"]
                yield f"{key}: no shell takes it: {lines[0]}"
            for told in REGION.findall(text):
                if region and told != region:
                    yield f"{key} sets the region {told}, but provider.region is {region}"


def _aws(provider: dict[str, Any], types: dict[str, Any]) -> Iterator[str]:
    region, zones = provider.get("region"), provider.get("availability_zone") or ""
    known = _ec2()[0]
    if region not in known:
        yield f"provider.region is {region!r}, which is none of EC2's; its regions: {known[0]}, ..."
    for zone in filter(None, (each.strip() for each in zones.split(","))):
        if not zone.startswith(f"{region}"):
            yield f"provider.availability_zone: {zone} is not in {region}"
    for name, node_type in types.items():
        config, key = node_type.get("node_config") or {}, f"available_node_types.{name}.node_config"
        for mistake in node_mistakes(config):
            yield f"{key}.{mistake}"
        if "InstanceType" not in config:
            yield f"{key}.InstanceType: required, but not given"
        if PLACEHOLDER.fullmatch(str(config.get("ImageId"))):
            yield f"{key}.ImageId is {config['ImageId']}, a placeholder; give your region's image"


@cache
def _ec2() -> tuple[list[str], Any]:
    """EC2's regions, and what a request for an instance looks like."""
    import botocore.session

    session = botocore.session.get_session()
    run = session.get_service_model("ec2").operation_model("RunInstances")
    return session.get_available_regions("ec2"), run.input_shape


def node_mistakes(node_config: dict[str, Any]) -> list[str]:
    """What the EC2 API has no name for in a request for such an instance."""
    return list(_of_shape(node_config, _ec2()[1]))


def _of_shape(value: Any, shape: Any, name: str = "") -> Iterator[str]:
    if shape.type_name == "structure":
        if not isinstance(value, dict):
            yield f"{name} is {value!r}; it must have keys: {', '.join(list(shape.members)[:5])}"
            return
        for key, part in value.items():
            inner = f"{name}.{key}".lstrip(".")
            if key in shape.members:
                yield from _of_shape(part, shape.members[key], inner)
            else:
                yield f"{inner} is unknown"
    elif shape.type_name == "list":
        for part in value if isinstance(value, list) else [value]:
            yield from _of_shape(part, shape.member, name)
    elif value not in (getattr(shape, "enum", None) or [value]):
        yield f"{name} is {value!r}"


def _credentials() -> Iterator[str]:
    import botocore.session
    from botocore.exceptions import BotoCoreError

    try:
        found = botocore.session.get_session().get_credentials()
    except BotoCoreError as error:
        yield f"provider: AWS credentials cannot be read here: {error}"
        return
    if found is None:
        yield "provider: no AWS credentials here, which `ray up` needs; set them by `aws configure`"
