"""The arguments of every command.

Owns their names and help. Knows of the commands only which function each one is.
"""

import argparse
from collections.abc import Callable
from typing import Any

from rayjobs.cli import commands

Command = Callable[[argparse.Namespace], int]
KINDS = ("generate", "prior", "dreambooth", "evaluate", "serve")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides may also stand behind options, where argparse does not look for them."""
    parser = build()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(text[0] == "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _cosine(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no cosine of what is alike; give 0.9 or so")
    return value


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: Any,
        values: Any,
        option_string: Any = None,
    ) -> None:
        from importlib.metadata import version

        print(f"rayjobs {version('rayjobs')}")
        parser.exit()


def build() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayjobs", description="Image diffusion jobs on Ray, for SDXL and its family."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def job(name: str, run: Command, help: str) -> Any:
        command = subparsers.add_parser(name, help=help)
        command.add_argument("config", metavar="CONFIG", help="a YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="as in sampler.steps=40"
        )
        command.set_defaults(command=run)
        return command

    def reader(name: str, run: Command, help: str) -> Any:
        command = subparsers.add_parser(name, help=help)
        command.add_argument("uri", metavar="URI", help="the data set's folder, local or s3://")
        command.set_defaults(command=run)
        return command

    init = subparsers.add_parser("init", help="write a commented starting configuration")
    init.add_argument("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    init.add_argument("file", metavar="FILE", nargs="?", help="its name; without it KIND.yaml")
    init.set_defaults(command=commands.init)
    demo = subparsers.add_parser("demo", help="make a small data set with the starter model")
    demo.set_defaults(command=commands.demo)
    _of_generate(job("generate", commands.generate, "make a data set of images from prompts"))
    job("prior", commands.prior, "make class images for DreamBooth: what is missing, good ones")
    job("dreambooth", commands.dreambooth, "teach a model a subject from a few photographs")
    job("evaluate", commands.evaluate, "measure a tuned model: likeness, preservation, diversity")
    plan = job("plan", commands.plan, "check a configuration and count what it would make")
    plan.add_argument("--record", type=int, metavar="K", help="print record K and nothing else")
    plan.add_argument("--rate", type=float, metavar="R", help="images per second of one worker")
    plan.add_argument("--probe", action="store_true", help="measure the rate with a few images")
    plan.add_argument(
        "--price", type=float, metavar="P", help="of a GPU's hour, else a worker's, for the cost"
    )
    job(
        "check", commands.check, "look for mistakes in a configuration, cluster.yaml or RayJob"
    ).add_argument("--cluster", metavar="FILE", help="whose machines the workers must fit")
    job("show", commands.show, "print any configuration with every default")
    _readers(reader)
    from rayjobs.submission import commands as on_a_cluster

    on_a_cluster.add(subparsers, KINDS[:-1], _of_generate)
    return parser


def _of_generate(command: Any) -> None:
    command.add_argument("--limit", type=int, metavar="N", help="only the first N records' shards")
    command.add_argument("--extend", action="store_true", help="append a changed job")
    command.add_argument("--retry-failed", action="store_true", help="make failed records again")


def _readers(reader: Callable[..., Any]) -> None:
    """What works on an output that is there."""
    status = reader("status", commands.status, "tell how a job goes, from its output alone")
    status.add_argument("--watch", action="store_true", help="look again until it is done")
    status.add_argument("--json", action="store_true", help="a line of JSON for each look")
    report = reader("report", commands.report, "write a data set's index.html again")
    report.add_argument("--alike", type=_cosine, metavar="COSINE", help="in place of quality.alike")
    verify = reader("verify", commands.verify, "check a data set's hashes, or a picture's marks")
    verify.add_argument("--trust", metavar="PEM", help="certificates that vouch for signers")
    verify.add_argument("--regenerate", type=int, default=0, metavar="K", help="make K again")
    repair = reader("repair", commands.repair, "make again what verify finds damaged")
    repair.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in workers.min=2")
    export = reader("export", commands.export, "copy a data set: filtered, converted, split")
    export.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as in output.uri=...")
    export.add_argument("--repair", action="store_true", help="export damaged shards again")
