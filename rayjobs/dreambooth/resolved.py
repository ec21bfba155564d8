"""A run's entrance: whatever its configuration names is looked up here, once, and handed on.

Owns `ResolvedRun` and the checks that need to look at the model and the photographs. Nothing
further in looks for photographs, class images or paths again. Knows no torch and no Ray.
"""

import sys
from dataclasses import dataclass, field, replace
from typing import Any

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.weights import Weights
from rayjobs.dreambooth import checks
from rayjobs.dreambooth.config import (
    ConceptConfig,
    DreamBoothConfig,
    TrainConfig,
)
from rayjobs.dreambooth.config.identifier import identifier_in
from rayjobs.dreambooth.data import wording
from rayjobs.dreambooth.data.photos import (
    A_MASK,
    Photo,
    Subject,
    check_sizes,
    look_for_photos,
    shortened,
    tell_skipped,
)
from rayjobs.models.facts import find_weights, unpinned

MAX_IDENTIFIER_TOKENS = 4
COMMON_SHARE = 0.8
"""Of CLIP's vocabulary: tokens below are common words."""


@dataclass(frozen=True)
class ResolvedRun:
    """A run with its model, photographs and class images found. Every worker is handed the same."""

    config: DreamBoothConfig
    """With absolute URIs, whatever the working directory of those who read it."""
    model_sha256: str
    photos: tuple[Photo, ...]
    class_images: tuple[Photo, ...] = ()
    more: tuple[Subject, ...] = ()
    """Those of `concepts`, beside the instance."""
    held_out: tuple[Photo, ...] = ()
    """The photographs whose loss at fixed noise is measured."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Why a file beside the photographs is passed over, by its name."""

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """All that the run learns: the instance, then the concepts."""
        config = self.config
        first = Subject(
            config.instance.prompt,
            config.prior.prompt or "",
            self.photos,
            self.class_images_uri,
            config.prior.uri is not None,
            self.class_images,
            config.instance.repeats,
        )
        return (first, *self.more)

    @property
    def checkpoints_uri(self) -> str:
        return self.inside("checkpoints")

    @property
    def cache_uri(self) -> str:
        return self.inside("cache")

    @property
    def class_images_uri(self) -> str:
        """Where class images are, or are to be made."""
        return self.config.prior.uri or self.inside("prior")

    @property
    def export_uri(self) -> str:
        return self.inside("export")

    def with_class_images(self, images: dict[str, list[Photo]]) -> "ResolvedRun":
        """The run with class images, by their places."""
        for found in images.values():
            wording.check_syntax(self.config, found)
        uri = self.class_images_uri
        prior = self.config.prior.model_copy(update={"uri": uri})
        config = self.config.model_copy(update={"prior": prior})
        more = tuple(replace(x, class_images=tuple(images[x.class_uri])) for x in self.more)
        return replace(self, config=config, class_images=tuple(images[uri]), more=more)

    def inside(self, name: str) -> str:
        """A place in the run's folder."""
        return storage.join(self.config.output.uri, name)


def resolve(config: DreamBoothConfig) -> ResolvedRun:
    """Find what a configuration names, and check it; class images are for `composition` to add.

    Prints warnings. Raises BadInput or StorageError for what can be known to be wrong before any
    work.
    """
    config = _with_absolute_uris(config)
    storage.check(config.output.uri, write=True)
    checks.check_packages(config)
    checks.check_precision(config)
    checks.check_trackers(config)
    if config.validation.every_n_steps:
        checks.check_encoders(config.validation.encoders, "validation.encoders")
    weights = find_weights(config.model)
    warn(unpinned(config.model, weights))
    if weights.single is not None:
        _find_configurations(weights)
    config = _with_usual_steps(config, weights.usual.steps)
    checks.check_objective(weights)
    checks.check_blocks(config, weights)
    checks.check_token(config, _tokenizer(weights))
    found = look_for_photos(config.instance.uri, config.instance.prompt)
    run = ResolvedRun(config, weights.sha256, tuple(found.photos), skipped=found.skipped)
    for number, concept in enumerate(config.concepts, 2):
        run = _with_concept(run, concept, number)
    if config.train.masks == "files":
        used = {name: reason for name, reason in run.skipped.items() if reason != A_MASK}
        run = replace(run, skipped=used)
    warn(tell_skipped(run.skipped))
    warn(_check_masks(run))
    for subject in run.subjects:
        word = config.identifier if config.inversion.num_vectors else _identifier(subject)
        warn(wording.check_captions(config, subject.photos, word, _tokenizer(weights)))
        warn([] if config.inversion.num_vectors else _check_identifier(word, weights))
        warn(check_sizes(subject.photos, config.train.resolution or weights.default_side))
    warn(_check_average(config.train))
    run = _with_held_out(run)
    wording.check_syntax(config, run.held_out)
    for name in ("min_snr_gamma", "debiased"):
        if weights.is_edm and getattr(config.train, name):
            raise BadInput(
                f"train.{name} is not defined for an EDM model; leave it out: "
                "the EDM loss has its own weights"
            )
    return run


def _with_concept(run: ResolvedRun, concept: ConceptConfig, number: int) -> ResolvedRun:
    """The run with one more subject, the `number`-th."""
    found = look_for_photos(concept.uri, concept.prompt)
    words = concept.class_prompt or ""
    known = [each.class_uri for each in run.subjects if each.class_prompt == words]
    uri = concept.class_uri or (known[0] if known else run.inside(f"prior-{number}"))
    subject = Subject(
        concept.prompt,
        words,
        tuple(found.photos),
        uri,
        concept.class_uri is not None,
        repeats=concept.repeats,
    )
    return replace(run, more=(*run.more, subject), skipped=run.skipped | found.skipped)


def _with_held_out(run: ResolvedRun) -> ResolvedRun:
    validation = run.config.validation
    if not validation.loss_every_n_steps:
        return run
    if validation.loss_uri is None:
        photos = [photo for subject in run.subjects for photo in subject.photos]
    else:
        photos = look_for_photos(validation.loss_uri, run.config.instance.prompt).photos
        known = {photo.sha256 for subject in run.subjects for photo in subject.photos}
        both = [photo.name for photo in photos if photo.sha256 in known]
        if both:
            warn([f"validation.loss_uri holds what is trained on, too: {shortened(both)}"])
    return replace(run, held_out=tuple(photos))


def _identifier(subject: Subject) -> str:
    return identifier_in(subject.prompt, subject.class_prompt)


def _with_absolute_uris(config: DreamBoothConfig) -> DreamBoothConfig:
    def absolute(section: Any) -> Any:
        uri = section.uri
        return section if uri is None else section.model_copy(update={"uri": storage.absolute(uri)})

    def concept(given: ConceptConfig) -> ConceptConfig:
        uri = given.class_uri
        uri = None if uri is None else storage.absolute(uri)
        return absolute(given).model_copy(update={"class_uri": uri})

    names = ("instance", "prior", "output")
    changed: dict[str, Any] = {name: absolute(getattr(config, name)) for name in names}
    places = {name: getattr(config.model, name) for name in ("uri", "config", "base")}
    places = {name: storage.absolute_if_path(uri) for name, uri in places.items() if uri}
    changed["model"] = config.model.model_copy(update=places)
    if (uri := config.validation.loss_uri) is not None:
        update = {"loss_uri": storage.absolute(uri)}
        changed["validation"] = config.validation.model_copy(update=update)
    changed["concepts"] = tuple(map(concept, config.concepts))
    return config.model_copy(update=changed)


def _find_configurations(weights: Weights) -> None:
    try:
        weights.load_config_folder()
    except ValueError as error:
        raise BadInput(f"model.config: {error}") from None


def _with_usual_steps(config: DreamBoothConfig, steps: int) -> DreamBoothConfig:
    """Of class and validation images, where none were given."""
    given = {name: getattr(config, name) for name in ("prior", "validation")}
    usual = {"steps": steps}
    return config.model_copy(
        update={n: s.model_copy(update=usual) for n, s in given.items() if s.steps is None}
    )


def _check_identifier(word: str, weights: Weights) -> list[str]:
    """Warnings for an identifier that means something already, or is many tokens."""
    tokenizer = _tokenizer(weights)
    if not word or tokenizer is None:
        return []
    ids = tokenizer(word, add_special_tokens=False).input_ids
    if len(ids) > MAX_IDENTIFIER_TOKENS:
        return [f"the identifier {word!r} is {len(ids)} tokens; a rare one of up to 3 binds better"]
    # CLIP's byte pairs were learned in the order of how common they are.
    if len(ids) == 1 and ids[0] < COMMON_SHARE * len(tokenizer):
        return [f"the identifier {word!r} is a common word, whose meaning would be overwritten"]
    return []


def _tokenizer(weights: Weights) -> Any:
    """The model's first tokenizer; None where its files are not at hand."""
    folder = weights.path / "tokenizer"
    if not folder.is_dir():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _check_masks(run: ResolvedRun) -> list[str]:
    """Warnings for photographs whose loss counts everywhere although masks are asked for, or
    nowhere."""
    kind = run.config.train.masks
    if kind == "none":
        return []
    bare, black = [], []
    for photo in (photo for subject in run.subjects for photo in subject.photos):
        mask = photo.open_mask() if kind == "files" else photo.open_alpha()
        if mask is None:
            bare.append(photo.name)
        elif mask.getextrema()[1] == 0:
            black.append(photo.name)
    warnings = {"no mask, all of it counts": bare, "a mask without any white": black}
    return [f"train.masks={kind}: {x}: {shortened(y)}" for x, y in warnings.items() if y]


def _check_average(train: TrainConfig) -> list[str]:
    """A warning for an average that would reach further back than the run."""
    at_end = train.ema_decay_at(train.steps - 1)
    if train.ema_decay is None or at_end >= train.ema_decay:
        return []
    return [
        f"train.ema_decay {train.ema_decay} averages over more than the {train.steps} train.steps: "
        f"it is still warming up at the end, at {at_end:.2g}"
    ]


def warn(warnings: list[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
