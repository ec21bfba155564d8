"""The command line: parse, load the configuration, import the job, run it, print its summary.

Owns the commands and the exit codes. Imports a job only to run it, so that `--help` is instant.
"""

import argparse
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayjobs.generation.config import GenerateConfig

KINDS = ("generate", "prior", "dreambooth", "evaluate", "serve")
DONE, FAILED, BAD_INPUT, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit code.

    0 done, 2 bad input or storage that this process cannot use, 3 finished with failed records, 130
    interrupted (resumable), 1 anything else.
    """
    options = _parse(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(signal.SIGHUP, _interrupt)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    gc.set_threshold(50_000)  # importing torch makes a million objects, and no garbage
    from rayjobs.config import BadInput, JobFailed
    from rayjobs.storage import StorageError

    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (BadInput, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        print("what is finished is kept; the same command continues", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("interrupted; the same command continues where this stopped", file=sys.stderr)
        return INTERRUPTED


def _interrupt(number: int, _: object) -> None:
    """What ends a job from outside is an interruption, like Ctrl-C.

    Once: `timeout` and others send it to the process and then to its group, while this ends.
    """
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """Overrides may also stand behind options, where argparse does not look for them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(text[0] == "-" for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rayjobs", description="Image diffusion jobs on Ray, for SDXL and its family."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def job(name: str, run: Callable[[argparse.Namespace], int], help: str) -> Any:
        command = commands.add_parser(name, help=help)
        command.add_argument("config", metavar="CONFIG", help="a YAML file")
        command.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="as in sampler.steps=40"
        )
        command.set_defaults(command=run)
        return command

    def reader(name: str, run: Callable[[argparse.Namespace], int], help: str) -> Any:
        command = commands.add_parser(name, help=help)
        command.add_argument("uri", metavar="URI", help="the data set's folder, local or s3://")
        command.set_defaults(command=run)
        return command

    init = commands.add_parser("init", help="write a commented starting configuration")
    init.add_argument("kind", metavar="KIND", choices=KINDS, help=", ".join(KINDS))
    init.add_argument("file", metavar="FILE", nargs="?", help="its name; without it KIND.yaml")
    init.set_defaults(command=_init)
    demo = commands.add_parser("demo", help="make a small data set with the starter model")
    demo.set_defaults(command=_demo)
    _of_generate(job("generate", _generate, "make a data set of images from prompts"))
    job("prior", _prior, "make class images for DreamBooth: what is missing, good ones only")
    job("dreambooth", _dreambooth, "teach a model a subject from a few photographs")
    job("evaluate", _evaluate, "measure a tuned model: likeness, preservation, diversity")
    plan = job("plan", _plan, "check a configuration and count what it would make")
    plan.add_argument("--record", type=int, metavar="K", help="print record K and nothing else")
    plan.add_argument("--rate", type=float, metavar="R", help="images per second of one worker")
    plan.add_argument("--probe", action="store_true", help="measure the rate with a few images")
    plan.add_argument(
        "--price", type=float, metavar="P", help="of a GPU's hour, else a worker's, for the cost"
    )
    job(
        "check", _check, "look for mistakes in a configuration, cluster.yaml or RayJob"
    ).add_argument("--cluster", metavar="FILE", help="whose machines the workers must fit")
    job("show", _show, "print any configuration with every default")
    _readers(reader)
    from rayjobs.submission import commands as on_a_cluster

    on_a_cluster.add(commands, KINDS[:-1], _of_generate)
    return parser


def _of_generate(command: Any) -> None:
    command.add_argument("--limit", type=int, metavar="N", help="only the first N records' shards")
    command.add_argument("--extend", action="store_true", help="append a changed job")
    command.add_argument("--retry-failed", action="store_true", help="make failed records again")


def _readers(reader: Callable[..., Any]) -> None:
    """What works on an output that is there."""
    status = reader("status", _status, "tell how a job goes, from its output alone")
    status.add_argument("--watch", action="store_true", help="look again until it is done")
    status.add_argument("--json", action="store_true", help="a line of JSON for each look")
    reader("report", _report, "write a data set's index.html again")
    verify = reader("verify", _verify, "read a data set again and check every hash")
    verify.add_argument("--regenerate", type=int, default=0, metavar="K", help="make K again")
    repair = reader("repair", _repair, "make again what verify finds damaged")
    repair.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as in workers.min=2")
    export = reader("export", _export, "copy a data set: filtered, converted, resized, split")
    export.add_argument("overrides", nargs="+", metavar="KEY=VALUE", help="as in output.uri=...")
    export.add_argument("--repair", action="store_true", help="export damaged shards again")


def _init(options: argparse.Namespace) -> int:
    from rayjobs import starting

    path = options.file or f"{options.kind}.yaml"
    starting.write_starting(options.kind, path)
    print(f"wrote {path}")
    return DONE


def _demo(_: argparse.Namespace) -> int:
    from rayjobs import starting

    return main(["generate", starting.demo_config()])


def _generate(options: argparse.Namespace) -> int:
    from rayjobs.config import BadInput

    config = _config(options)
    if options.limit is not None and options.limit < 1:
        raise BadInput(f"--limit is {options.limit}; it must be at least 1")
    from rayjobs.generation import job

    summary = job.run(
        config, options.limit, extend=options.extend, retry_failed=options.retry_failed
    )
    return _tell(summary)


def _repair(options: argparse.Namespace) -> int:
    from rayjobs.generation import job

    return _tell(job.repair(options.uri, options.overrides))


def _tell(summary: Any) -> int:
    if summary.num_made:
        from rayjobs.reports import figures

        rate = figures.rate(summary.num_made / max(summary.making_s, 1e-3))
        in_all = f"{summary.seconds:.0f} s with the start and the page"
        done = f"made {summary.num_made:,} images in {summary.making_s:.1f} s ({rate}/s); {in_all}"
    else:
        done = "nothing to do"
    failed = f", {summary.num_failed:,} failed" if summary.num_failed else ""
    print(f"{done}{failed}; look at {summary.output_uri.rstrip('/')}/index.html")
    return SOME_FAILED if summary.num_failed else DONE


def _prior(options: argparse.Namespace) -> int:
    from rayjobs.config import load_config
    from rayjobs.generation import prior

    done = prior.run(load_config(prior.PriorConfig, options.config, options.overrides))
    refused = "".join(f", {count:,} {reason} replaced" for reason, count in done.refused.items())
    print(
        f"made {done.num_made:,} in {done.seconds:.0f} s{refused}; {done.num_images:,} class "
        f"images, diversity {done.diversity:.2f}; look at {done.output_uri.rstrip('/')}/index.html"
    )
    return DONE


def _dreambooth(options: argparse.Namespace) -> int:
    from rayjobs.config import load_config
    from rayjobs.dreambooth.config import DreamBoothConfig

    config = load_config(DreamBoothConfig, options.config, options.overrides)
    from rayjobs.dreambooth import composition

    done = composition.train(config)
    if done.was_finished:
        print(f"nothing to do; the weights are in {done.export_uri}")
        return DONE
    from rayjobs.reports import figures

    rate = figures.rate(done.steps / max(done.training_s, 1e-3))
    trained = f"{done.steps:,} steps in {done.training_s:.1f} s ({rate}/s)"
    page = "" if done.report_uri is None else f"; look at {done.report_uri}"
    print(
        f"{trained if done.steps else 'no step was left'}; {done.seconds:.0f} s with the start and "
        f"the export; the weights are in {done.export_uri}{page}"
    )
    return DONE


def _evaluate(options: argparse.Namespace) -> int:
    from rayjobs.config import load_config
    from rayjobs.dreambooth.config.evaluate import EvaluateConfig

    config = load_config(EvaluateConfig, options.config, options.overrides)
    from rayjobs.dreambooth import composition, results

    done = composition.evaluate(config)
    for name, value in {**done.metrics, "joint_score": done.score}.items():
        print(f"{results.with_scale(name):46} {value:.3f}")
    print(f"of {done.num_pictures:,} pictures; they are in {done.output_uri}")
    return DONE


def _export(options: argparse.Namespace) -> int:
    from rayjobs.generation.tools import export

    done = export.run(options.uri, export.load(options.overrides), options.repair)
    parts = "".join(f", {count:,} {name}" for name, count in done.splits.items())
    print(f"{done.num_records:,} records{parts}, in {done.seconds:.0f} s; {done.output_uri}")
    return DONE


def _config(options: argparse.Namespace) -> "GenerateConfig":
    from rayjobs.config import load_config
    from rayjobs.generation.config import GenerateConfig

    return load_config(GenerateConfig, options.config, options.overrides)


def _plan(options: argparse.Namespace) -> int:
    import json

    from rayjobs import keys
    from rayjobs.config import BadInput

    kind, loaded = keys.load(options.config, options.overrides)
    if kind != "generate":
        if options.record is not None or options.rate is not None or options.probe:
            raise BadInput(f"{options.config} is for {kind}; --record, --rate and --probe are not")
        print(_counts(kind, loaded))
        return DONE
    from rayjobs.generation.spec import plan

    config, rate = _config(options), options.rate
    if options.record is not None:
        print(json.dumps(plan.record(config, options.record), indent=2, ensure_ascii=False))
        return DONE
    if options.probe:
        from rayjobs.generation import job

        rate = job.measure_rate(config)
    print(plan.describe(plan.plan(config, rate=rate, price=options.price)))
    return DONE


def _counts(kind: str, config: Any) -> str:
    """What a job other than `generate` would make; checks what it reads."""
    if kind == "prior":
        from rayjobs.generation import prior

        return prior.describe(config)
    if kind in ("dreambooth", "evaluate"):
        from rayjobs.dreambooth import composition

        describe = composition.describe if kind == "dreambooth" else composition.describe_evaluation
        return describe(config)
    names = ", ".join(model.name for model in config.models)
    return f"an image API with {names}; every key is known"


def _check(options: argparse.Namespace) -> int:
    from rayjobs.check import files

    report = files.check(options.config, options.overrides, options.cluster)
    for line in (*report.facts, *report.findings):
        print(line)
    count = len(report.findings)
    wrong = f"{count} mistake{'' if count == 1 else 's'}" if count else "nothing is wrong"
    print(f"{options.config}: {wrong}")
    return BAD_INPUT if report.findings else DONE


def _verify(options: argparse.Namespace) -> int:
    from rayjobs.generation.tools import verify

    findings = verify.verify(options.uri, options.regenerate)
    for fault in findings.faults[: verify.MAX_FAULTS_SHOWN]:
        print(fault)
    again = f", {findings.num_regenerated:,} made again" if options.regenerate else ""
    missing = f", {findings.num_missing:,} shards not finished" if findings.num_missing else ""
    wrong = f"{len(findings.faults):,} faults" if findings.faults else "all is well"
    print(
        f"{findings.num_shards:,} shards, {findings.num_records:,} records{again}{missing}: {wrong}"
    )
    if findings.faults:
        print(f"to make it whole again: {findings.way_out}")
    return SOME_FAILED if findings.faults else DONE


def _show(options: argparse.Namespace) -> int:
    import yaml

    from rayjobs import keys

    _, config = keys.load(options.config, options.overrides)
    values = config.model_dump(mode="json")
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return DONE


def _status(options: argparse.Namespace) -> int:
    from rayjobs import status

    status.tell(options.uri, again=options.watch, as_json=options.json)
    return DONE


def _report(options: argparse.Namespace) -> int:
    from rayjobs import storage
    from rayjobs.config import BadInput
    from rayjobs.dataset.lock import read_lock
    from rayjobs.quality import duplicates
    from rayjobs.reports import dataset_report

    storage.check(options.uri)
    if read_lock(options.uri) is None:
        raise BadInput(f"{options.uri} is no data set: it has no spec.lock.json")
    counts = duplicates.write(options.uri)
    print(f"{counts['members']:,} pictures look like another, in {counts['groups']:,} groups")
    print(dataset_report.write(options.uri))
    return DONE
