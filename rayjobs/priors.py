"""Class images for a DreamBooth run: which are wanted, and the job that makes what is missing.

The one place that knows both jobs. Owns how the settings of one become those of the other.
"""

import sys

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import read_lock
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data.photos import find_photos
from rayjobs.generation import prior
from rayjobs.generation.prior import PriorConfig
from rayjobs.models.facts import find_weights


def ready(config: DreamBoothConfig) -> DreamBoothConfig:
    """The configuration with class images that are there: found, or made by the prior job.

    Raises BadInput when a folder of the user's own has too few, JobFailed when they cannot be made.
    """
    if config.prior.mode == "none":
        return config
    uri = config.prior.uri or storage.join(config.output.uri, "prior")
    placed = config.model_copy(update={"prior": config.prior.model_copy(update={"uri": uri})})
    lock = read_lock(uri)
    if lock is None and config.prior.uri and storage.list_files(uri):
        _check_own(placed, uri)
        return placed
    if lock is not None:
        _warn_of_other_model(config, uri)
        if config.prior.uri and _count(uri) >= config.prior.num_images:
            return placed
    prior.run(_prior_job(config, uri))
    return placed


def _prior_job(config: DreamBoothConfig, uri: str) -> PriorConfig:
    asked = config.prior
    side = config.train.resolution
    return PriorConfig.model_validate(
        {
            "model": {
                "uri": config.model.uri,
                "config": config.model.config,
                "device": config.model.device,
                "attention": config.model.attention,
            },
            "prompts": {"inline": [asked.prompt]},
            "num_images": asked.num_images,
            "job_seed": config.train.seed,
            "sampler": {"steps": asked.steps, "guidance_scale": asked.guidance_scale},
            "image": {"width": side, "height": side},
            "output": {"uri": uri, "images_per_shard": 16},
            "workers": config.workers.shared,
        }
    )


def _count(uri: str) -> int:
    return len(find_photos(uri, ""))


def _check_own(config: DreamBoothConfig, uri: str) -> None:
    there, wanted = len(find_photos(uri, str(config.prior.prompt))), config.prior.num_images
    if there < wanted:
        raise BadInput(
            f"prior.uri {uri} has {there} pictures, but prior.num_images is {wanted}; add some, "
            "or lower it, or leave prior.uri out to have them made"
        )


def _warn_of_other_model(config: DreamBoothConfig, uri: str) -> None:
    made_by = read_lock(uri)
    sha256 = find_weights(config.model.uri).sha256
    if made_by is not None and made_by.segments[0].model_sha256 != sha256:
        print(
            f"warning: the class images in {uri} were made by another model than {config.model.uri}"
            ": they will pull it towards that one, and some licences (Playground v2.5's among "
            "them) forbid to improve other models with a model's pictures",
            file=sys.stderr,
        )
