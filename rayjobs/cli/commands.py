"""What each command does: load the configuration, import the job, run it, print its summary.

Owns the summaries and the exit codes. Imports a job only to run it, so that `--help` is instant.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayjobs.generation.config import GenerateConfig

DONE, FAILED, BAD_INPUT, SOME_FAILED, INTERRUPTED = 0, 1, 2, 3, 130


def init(options: argparse.Namespace) -> int:
    from rayjobs import starting

    path = options.file or f"{options.kind}.yaml"
    starting.write_starting(options.kind, path)
    print(f"wrote {path}")
    return DONE


def demo(_: argparse.Namespace) -> int:
    from rayjobs import starting
    from rayjobs.cli import main

    return main(["generate", starting.demo_config()])


def generate(options: argparse.Namespace) -> int:
    from rayjobs.config import BadInput

    config = _config(options)
    if options.limit is not None and options.limit < 1:
        raise BadInput(f"--limit is {options.limit}; it must be at least 1")
    from rayjobs.generation import job

    summary = job.run(
        config, options.limit, extend=options.extend, retry_failed=options.retry_failed
    )
    return _tell(summary)


def repair(options: argparse.Namespace) -> int:
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


def prior(options: argparse.Namespace) -> int:
    from rayjobs.config import load_config
    from rayjobs.generation import prior

    done = prior.run(load_config(prior.PriorConfig, options.config, options.overrides))
    refused = "".join(f", {count:,} {reason} replaced" for reason, count in done.refused.items())
    print(
        f"made {done.num_made:,} in {done.seconds:.0f} s{refused}; {done.num_images:,} class "
        f"images, diversity {done.diversity:.2f}; look at {done.output_uri.rstrip('/')}/index.html"
    )
    return DONE


def dreambooth(options: argparse.Namespace) -> int:
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


def evaluate(options: argparse.Namespace) -> int:
    from rayjobs.config import load_config
    from rayjobs.dreambooth.config.evaluate import EvaluateConfig

    config = load_config(EvaluateConfig, options.config, options.overrides)
    from rayjobs.dreambooth import composition, results

    done = composition.evaluate(config)
    for name, value in {**done.metrics, "joint_score": done.score}.items():
        print(f"{results.with_scale(name):46} {value:.3f}")
    print(f"of {done.num_pictures:,} pictures; they are in {done.output_uri}")
    return DONE


def export(options: argparse.Namespace) -> int:
    from rayjobs.generation.tools import export

    done = export.run(options.uri, export.load(options.overrides), options.repair)
    parts = "".join(f", {count:,} {name}" for name, count in done.splits.items())
    print(f"{done.num_records:,} records{parts}, in {done.seconds:.0f} s; {done.output_uri}")
    return DONE


def _config(options: argparse.Namespace) -> "GenerateConfig":
    from rayjobs.config import load_config
    from rayjobs.generation.config import GenerateConfig

    return load_config(GenerateConfig, options.config, options.overrides)


def plan(options: argparse.Namespace) -> int:
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


def check(options: argparse.Namespace) -> int:
    from rayjobs.check import files

    report = files.check(options.config, options.overrides, options.cluster)
    for line in (*report.facts, *report.findings):
        print(line)
    count = len(report.findings)
    wrong = f"{count} mistake{'' if count == 1 else 's'}" if count else "nothing is wrong"
    print(f"{options.config}: {wrong}")
    return BAD_INPUT if report.findings else DONE


def verify(options: argparse.Namespace) -> int:
    from rayjobs.generation.tools import picture, verify

    if picture.is_picture(options.uri):
        lines, is_well = picture.tell(options.uri, options.trust)
        print("\n".join(lines))
        return DONE if is_well else SOME_FAILED
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


def show(options: argparse.Namespace) -> int:
    import yaml

    from rayjobs import keys

    _, config = keys.load(options.config, options.overrides)
    values = config.model_dump(mode="json")
    print(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), end="")
    return DONE


def status(options: argparse.Namespace) -> int:
    from rayjobs import status

    status.tell(options.uri, again=options.watch, as_json=options.json)
    return DONE


def report(options: argparse.Namespace) -> int:
    from rayjobs import storage
    from rayjobs.config import BadInput
    from rayjobs.dataset.lock import read_lock
    from rayjobs.quality import duplicates, semantic
    from rayjobs.reports import dataset_report

    storage.check(options.uri)
    if read_lock(options.uri) is None:
        raise BadInput(f"{options.uri} is no data set: it has no spec.lock.json")
    counts = duplicates.write(options.uri)
    print(f"{counts['members']:,} pictures look like another, in {counts['groups']:,} groups")
    try:
        if shown := semantic.write(options.uri, options.alike):
            print(f"{shown['members']:,} show the same as another, in {shown['groups']:,} groups")
    except BadInput as error:  # the report needs no groups
        print(f"warning: {error}", file=sys.stderr)
    print(dataset_report.write(options.uri))
    return DONE
