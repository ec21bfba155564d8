"""Which kind of file is to be checked, and in what order its parts are.

Owns `check`. A cluster file or a manifest beside a configuration says where its workers must fit.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from rayjobs import keys, starting, written
from rayjobs.check import job, kuberay, launcher
from rayjobs.check.nodes import NodeType
from rayjobs.check.report import Report
from rayjobs.config import BadInput, load_config

IN_IMAGE = "/opt/rayjobs/configs/"
"""Where the image has the configurations that are shipped."""


def check(path: str, overrides: list[str], cluster: str | None = None) -> Report:
    """All that is wrong with the file; with a job's also what does not fit the `cluster` file.

    Raises BadInput for a file that cannot be read at all.
    """
    report = Report()
    machines = [] if cluster is None else _cluster(cluster, report)
    documents = _documents(path)
    if any(_is_manifest(each) or _is_launcher(each) for each in documents):
        if overrides:
            raise BadInput(f"{path} is no configuration; {overrides[0]} overrides nothing in it")
        _cluster(path, report)
        return report
    with report.catching():
        kind, config = keys.load(path, overrides)
        if kind == "serve" and not overrides:
            _check_public(path)
        job.check(kind, config, report, machines)
    return report


def _check_public(path: str) -> None:
    """What is beside a serving application's own keys. Raises BadInput as the server does."""
    serving = import_module("serve.file")  # named, since nothing here stands on serving
    file = load_config(serving.ServeFile, path)
    for app in file.applications:
        serving.check_public(file.http_options.host, app.args)


def _cluster(path: str, report: Report) -> list[NodeType]:
    """The machines of a cluster file or of the manifests in a file, each checked."""
    found: list[NodeType] = []
    for values in _documents(path):
        if _is_launcher(values):
            found += launcher.check(path, values, report)
        elif _is_manifest(values):
            metadata = values.get("metadata")
            name = metadata.get("name") if isinstance(metadata, dict) else None
            where = f"{path}: {values['kind']} {name}: "
            machines = kuberay.check(values, report, where)
            if machines is not None:
                _work(values, report, where, machines)
                found += machines
    if not found:
        report.tell(f"not looked at: the machines of {path}, which are not known from it")
    return found


def _work(values: dict[str, Any], report: Report, where: str, machines: list[NodeType]) -> None:
    """The job that a manifest's command names, or the applications that it serves."""
    text = (values.get("spec") or {}).get("serveConfigV2")
    inner = Report(places=report.places)
    if text is not None:
        with inner.catching("serveConfigV2: "):
            job.check(*keys.of_values(_read(str(text)), [], "it"), inner, machines)
    elif (command := kuberay.entrypoint(values)) is not None:
        with inner.catching("entrypoint: "):
            _command(command, inner, machines)
    report.find(inner.findings, where)
    for fact in inner.facts:
        report.tell(where + fact)


def _command(command: str, report: Report, machines: list[NodeType]) -> None:
    try:
        words = kuberay.arguments_of(command)
    except ValueError as error:
        raise BadInput(f"no shell takes it: {error}") from None
    if words is None:
        report.tell(f"not looked at: the entrypoint, which does not begin with rayjobs: {command}")
        return
    kind, *rest = words or [""]
    if kind not in keys.FILES:
        raise BadInput(f"rayjobs {kind!r} is no job; jobs are {', '.join(keys.FILES)}")
    given = [word for word in rest if not word.startswith("--")]
    if not given:
        raise BadInput(f"rayjobs {kind} needs a configuration")
    path = _here(given[0])
    if not Path(path).is_file():
        report.tell(f"not looked at: {given[0]}, which is not on this machine")
        return
    found, config = keys.load(path, given[1:])
    if found != kind:
        raise BadInput(f"{given[0]} is for {found}, and the command is rayjobs {kind}")
    job.check(kind, config, report, machines)


def _here(path: str) -> str:
    """The path on this machine of a configuration that is in the image."""
    return str(starting.CONFIGS / path.removeprefix(IN_IMAGE)) if IN_IMAGE in path else path


def _documents(path: str) -> list[dict[str, Any]]:
    """The mappings in a YAML file. Raises BadInput where it cannot be read."""
    try:
        found = list(yaml.safe_load_all(Path(path).read_text("utf-8")))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    return [each for each in found if isinstance(each, dict)]


def _read(text: str) -> dict[str, Any]:
    try:
        values = written.load(text)
    except (yaml.YAMLError, written.Twice) as error:
        raise BadInput(f"not valid YAML: {' '.join(str(error).split())}") from None
    return values if isinstance(values, dict) else {}


def _is_manifest(values: dict[str, Any]) -> bool:
    is_ray = str(values.get("apiVersion")).startswith("ray.io/")
    return is_ray and values.get("kind") in kuberay.SPECS


def _is_launcher(values: dict[str, Any]) -> bool:
    return "cluster_name" in values or "available_node_types" in values
