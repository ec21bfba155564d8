"""The command line: parse, load the configuration, import the job, run it, tell how it went.

Owns the commands and the exit codes. Imports a job only when it is to be run, so that help is
instant.
"""

import argparse
import os
import sys
from collections.abc import Callable

DONE, FAILED, BAD_INPUT, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done, 2 bad input (nothing started), 3 finished with failed records, 130 interrupted
    (resumable), 1 anything else.
    """
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    from rayjobs.config import BadInput
    from rayjobs.storage import StorageError

    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (BadInput, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this stopped", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayjobs", description="Image diffusion jobs on Ray, for SDXL and its family."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    generate = commands.add_parser("generate", help="make a data set of images from prompts")
    generate.add_argument("--limit", type=int, metavar="N", help="only the first N records' shards")
    generate.set_defaults(command=_generate)
    show = commands.add_parser("show", help="print a job's configuration with every default")
    show.set_defaults(command=_show)
    for command in (generate, show):
        command.add_argument("config", metavar="CONFIG", help="a YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="as in sampler.steps=40"
        )
    report = commands.add_parser("report", help="write a data set's index.html again")
    report.add_argument("uri", metavar="URI", help="the data set's folder, local or s3://")
    report.set_defaults(command=_report)
    return parser


def _generate(options: argparse.Namespace) -> int:
    from rayjobs.config import BadInput, load_config
    from rayjobs.generation.config import GenerateConfig

    config = load_config(GenerateConfig, options.config, options.overrides)
    if options.limit is not None and options.limit < 1:
        raise BadInput(f"--limit is {options.limit}; it must be at least 1")
    from rayjobs.generation import job

    summary = job.run(config, options.limit)
    rate = summary.num_made / summary.seconds
    if summary.num_made:
        done = f"made {summary.num_made:,} images in {summary.seconds:.0f} s ({rate:.2f}/s)"
    else:
        done = "nothing to do"
    failed = f", {summary.num_failed:,} failed" if summary.num_failed else ""
    print(f"{done}{failed}; look at {summary.output_uri.rstrip('/')}/index.html")
    return SOME_FAILED if summary.num_failed else DONE


def _show(options: argparse.Namespace) -> int:
    import yaml

    from rayjobs.config import load_config
    from rayjobs.generation.config import GenerateConfig

    config = load_config(GenerateConfig, options.config, options.overrides)
    values = config.model_dump(mode="json")
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return DONE


def _report(options: argparse.Namespace) -> int:
    from rayjobs import storage
    from rayjobs.config import BadInput
    from rayjobs.generation import report
    from rayjobs.generation.lock import read_lock

    storage.check(options.uri)
    if read_lock(options.uri) is None:
        raise BadInput(f"{options.uri} is no data set: it has no spec.lock.json")
    print(report.write(options.uri))
    return DONE
