"""A job as a draft: checked, resolved, and with local snapshots of what it reads.

Owns the checks that need no worker, and what a job's segment says. Knows neither locks that are
there already nor how records are made.
"""

import hashlib
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.formats import check_schema
from rayjobs.dataset.lock import (
    Segment,
)
from rayjobs.diffusion import weights
from rayjobs.diffusion.adapters import notes
from rayjobs.diffusion.facts import Usual, adapter_usual, file_name
from rayjobs.diffusion.files.beside import lora_file
from rayjobs.diffusion.files.header import read_header
from rayjobs.diffusion.request import check_strength
from rayjobs.diffusion.sampler_names import check_schedule_taken
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.prompts.snapshot import (
    ImageNames,
    Snapshot,
    check_numbers,
    list_pictures,
    write_names,
    write_snapshot,
)
from rayjobs.generation.resolved import ResolvedConfig, model_name
from rayjobs.generation.spec import passes, scorers
from rayjobs.generation.spec.keys import named
from rayjobs.generation.spec.lock import (
    job_part,
    record_schema,
)
from rayjobs.generation.spec.records import Pictured, Spec, pictured
from rayjobs.images.decode import open_control, open_reference
from rayjobs.images.edges import check_preprocess
from rayjobs.models import exports
from rayjobs.models.facts import find_weights, unpinned


@dataclass(frozen=True)
class JobDraft:
    """A resolved job, its segment as if it stood alone, and local snapshots of what it reads."""

    config: ResolvedConfig
    segment: Segment
    prompts: Path
    names: Path | None
    """Of init images, where there are any."""

    def spec(self, first_prompt: int = 0, first_seed: int = 0) -> Spec:
        names = () if self.names is None else ImageNames(str(self.names))
        return Spec(self.config, Snapshot(str(self.prompts)), names, first_prompt, first_seed)


@contextmanager
def open_draft(config: ResolvedConfig, confirmed: bool = False) -> Generator[JobDraft]:
    """Check a job and write its snapshots, which are gone afterwards; `confirmed` is of any size.

    Raises BadInput or StorageError naming the key that is to be changed.
    """
    storage.check(config.output.uri, write=True)
    loras = [lora.uri for lora in config.model.loras]
    scoring = scorers.named(config.quality).values()
    controls = [uri for each in config.controls for uri in (each.uri, each.image)]
    controls += [it for each in config.ip_adapters for it in (each.uri, each.encoder, each.image)]
    controls += [each.model for each in config.passes]
    uris = (config.prompts.uri, config.init.uri, config.model.uri, *loras, *scoring, *controls)
    for uri in uris:
        if uri is not None and storage.is_remote(uri):
            storage.check(uri)
    model = _check_model(config)
    loras_sha256, usual = _check_loras(config, model)
    config = _with_usual(config, usual)
    _warn_of_use(config, usual)
    controls_sha256 = _check_controls(config, model)
    ip_adapters_sha256 = _check_ip_adapters(config, model)
    passes_sha256 = passes.check(config, model)
    scorers_sha256 = scorers.check(config.quality)
    with tempfile.TemporaryDirectory() as folder:
        prompts, names = Path(folder) / "prompts.parquet", Path(folder) / "names.parquet"
        num_prompts = write_snapshot(config.prompts, str(prompts), model.family)
        if config.init.uri is not None:
            write_names(list_pictures(config.init.uri), str(names))
        rows = Snapshot(str(prompts))
        _check_sampler_column(config, rows, model)
        _check_picture_columns(config, rows)
        scorers.check_columns(config, rows.columns)
        spec = Spec(config, rows, ImageNames(str(names)) if names.exists() else ())
        if not confirmed:
            _check_size(config, spec.num_records)
        check_schema(config.output.format, record_schema(config, rows))
        if config.output.format != "parquet":
            check_numbers(str(prompts))
        segment = Segment(
            job=job_part(config),
            prompts_sha256=weights.sha256_of(prompts),
            num_prompts=num_prompts,
            init_sha256=weights.sha256_of(names) if names.exists() else None,
            model_name=model_name(config.model.uri),
            model_sha256=named(
                "model.words", lambda: exports.identity(model.sha256, config.model.words)
            ),
            loras_sha256=loras_sha256,
            controls_sha256=controls_sha256,
            ip_adapters_sha256=ip_adapters_sha256,
            passes_sha256=passes_sha256,
            scorers_sha256=scorers_sha256,
            guided=_is_guided(config, rows),
            num_records=spec.num_records,
            num_shards=spec.num_shards,
        )
        yield JobDraft(config, segment, prompts, names if names.exists() else None)


def _check_size(config: GenerateConfig, num_records: int) -> None:
    limit = config.output.most_images
    if num_records > limit:
        raise BadInput(
            f"the job has {num_records:,} images, more than output.most_images, {limit:,}; "
            f"look at it with `plan`, then set output.most_images={num_records} to confirm"
        )


def _is_guided(config: GenerateConfig, rows: Snapshot) -> bool:
    """Whether any record may use guidance."""
    if "guidance_scale" in rows.columns:
        return True
    scales = config.parameters.guidance_scale or (config.sampler.guidance_scale,)
    scales += tuple(each.guidance_scale for each in config.passes if each.guidance_scale)
    return any(scale is None or scale > 1 for scale in scales)


def _check_model(config: GenerateConfig) -> weights.Weights:
    model = find_weights(config.model)
    for warning in unpinned(config.model, model):
        print(f"warning: {warning}", file=sys.stderr)
    if model.needs_mask:
        raise BadInput(
            f"model.uri: {config.model.uri} only makes masked parts of pictures anew, and jobs "
            "have no masks; serve it, where edits may have one, or take another model"
        )
    own = config.sampler.name or model.scheduler_name
    axis = config.parameters.sampler
    for key, name in [("parameters.sampler", n) for n in axis] or [("sampler", own)]:
        named(key, partial(_check_sampler, name, config, model))
    if model.single is not None:
        named("model.config", model.load_config_folder)
    return model


def _check_sampler_column(config: GenerateConfig, rows: Snapshot, model: weights.Weights) -> None:
    if "sampler" not in rows.columns:
        return
    for name in filter(None, rows.distinct("sampler")):
        check = partial(_check_sampler, name, config, model)
        named(f"prompts.uri: column sampler of {config.prompts.uri}", check)


def _check_sampler(name: str, config: GenerateConfig, model: weights.Weights) -> None:
    """Raise ValueError or ImportError where a sampler cannot draw the model as the job asks."""
    from rayjobs.diffusion.sampler import resolve

    resolve(name, config.sampler.options, model.prediction)
    given = [key for key in ("timesteps", "sigmas") if getattr(config.sampler, key) is not None]
    for schedule in given:
        check_schedule_taken(name, schedule, model.prediction)
    own, steps = model.usual.timesteps, config.parameters.steps or (config.sampler.steps,)
    if own is not None and not given and {None, len(own)}.intersection(steps):
        check_schedule_taken(name, "timesteps", model.prediction, own)


def _check_loras(config: GenerateConfig, model: weights.Weights) -> tuple[tuple[str, ...], Usual]:
    """Hash and scale of each adapter, and the steps and guidance to use with them.

    Raises BadInput for an adapter that does not fit the model.
    """
    if not config.model.loras:
        return (), model.usual
    from rayjobs.diffusion.adapters import fit

    paths = [storage.fetch(lora.uri) for lora in config.model.loras]
    named("model.loras", lambda: fit.check(paths, model))
    said, known = [], []
    for lora, path in zip(config.model.loras, paths, strict=True):
        file = lora_file(path)
        said.append(f"{notes.file_sha256(file)} x {lora.scale:g}")
        title = notes.title_of(read_header(file).metadata)
        known.append(adapter_usual(f"{file_name(lora.uri)} {title}"))
    return tuple(said), next(filter(None, known), model.usual)


def _check_controls(config: GenerateConfig, model: weights.Weights) -> tuple[str, ...]:
    """Hash and settings of each control; of the picture, too, that all records follow.

    Raises BadInput for a ControlNet that does not fit the model, and for a picture that is not one.
    """
    if not config.controls:
        return ()
    from rayjobs.diffusion.control import files

    said = []
    for number, control in enumerate(config.controls):
        path = storage.fetch(control.uri)
        (net,) = named(f"controls.{number}.uri", partial(files.check, [path], model))
        followed = _checked_picture(f"controls.{number}", control, open_control)
        named(f"controls.{number}.preprocess", partial(check_preprocess, control.preprocess))
        drawn = f" {control.preprocess}" if control.preprocess else ""
        said.append(
            f"{net} x {control.scale:g} {control.start:g}-{control.end:g} {followed}{drawn}"
        )
    return tuple(said)


def _check_ip_adapters(config: GenerateConfig, model: weights.Weights) -> tuple[str, ...]:
    """The same of IP-Adapters, with their encoders."""
    if not config.ip_adapters:
        return ()
    from rayjobs.diffusion.ip_adapter import files

    said = []
    for number, each in enumerate(config.ip_adapters):
        pair = storage.fetch(each.uri), storage.fetch(each.encoder)
        (net,) = named(f"ip_adapters.{number}", partial(files.check, [pair], model))
        followed = _checked_picture(f"ip_adapters.{number}", each, open_reference)
        said.append(f"{net} x {each.scale:g} {followed}")
    return tuple(said)


def _checked_picture(key: str, use: Pictured, opened: Callable[[bytes], object]) -> str:
    """The hash of the picture that all records have, or the column with each one's own."""
    if use.image is None:
        return f"column {use.column}"
    data = storage.read_bytes(use.image)
    named(f"{key}.image", partial(opened, data))
    return hashlib.sha256(data).hexdigest()


def _check_picture_columns(config: GenerateConfig, rows: Snapshot) -> None:
    kinds = {field.name: field.type for field in rows.passed_through}
    for key, use in pictured(config):
        kind = kinds.get(use.column or "", pa.string())
        if kind != pa.string():
            raise BadInput(
                f"{key}.column: {use.column} of {config.prompts.uri} holds {kind}, "
                "not the names of pictures"
            )


def _with_usual(config: ResolvedConfig, usual: Usual) -> ResolvedConfig:
    """The job with the steps that the model is made for, where it gives none.

    A distilled model's guidance is written down too: it was another one before they were known.
    """
    sampler = config.sampler
    own = sampler.own_steps
    steps = usual.steps if own is None else own
    guidance = sampler.guidance_scale
    if usual.kind is not None and None in (own, guidance):
        made_for = f"{usual.steps} steps and guidance {usual.guidance_scale:g}"
        print(f"a {usual.kind} model: {made_for} where the job gives none", file=sys.stderr)
        guidance = usual.guidance_scale if guidance is None else guidance
    if config.init.uri is not None and not config.parameters.steps:
        weakest = min(config.parameters.strength or (config.init.strength,))
        named("init.strength", lambda: check_strength(weakest, steps))
    given = {"steps": steps, "guidance_scale": guidance}
    return config.model_copy(update={"sampler": sampler.model_copy(update=given)})


def _warn_of_use(config: ResolvedConfig, usual: Usual) -> None:
    """Print what a distilled model, or one that an adapter makes one, is not made for."""
    guidance = config.sampler.guidance_scale
    guidance = usual.guidance_scale if guidance is None else guidance
    warning = usual.warning(config.sampler.own_steps or usual.steps, guidance)
    if warning is not None:
        print(f"warning: sampler: {warning}", file=sys.stderr)
