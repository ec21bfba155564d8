"""Generates records: one engine is fed with their requests and gives their finished rows.

Owns the way from a record to its row: init image, request, encoded picture, columns, identity.
Knows nothing of shards, of storage layout or of Ray.
"""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rayjobs import storage
from rayjobs.dataset.records import ENGINE_VERSION, SYNTAX, Row, image_id, scores_asked
from rayjobs.diffusion.engine import Engine
from rayjobs.diffusion.model import Model
from rayjobs.diffusion.modules.side import beside_steps
from rayjobs.diffusion.passes import Pass
from rayjobs.diffusion.request import Lora, Request, Result
from rayjobs.diffusion.sampler import resolve
from rayjobs.diffusion.text.syntax import spoken
from rayjobs.generation.config import GenerateConfig, QualityConfig, economy_of
from rayjobs.generation.spec.records import Record, all_sizes_of
from rayjobs.generation.worker.controls import JobControls
from rayjobs.generation.worker.ip_adapters import JobIpAdapters
from rayjobs.generation.worker.pictures import NO_SOURCES, PictureReader, Sources
from rayjobs.images import watermark
from rayjobs.images.encode import encode_picture
from rayjobs.images.parameters import parameters_text
from rayjobs.models import loading, warming
from rayjobs.quality import kinds, pixels

BATCHES_AHEAD = 2
"""Init images are read and decoded this much ahead, and finished pictures wait this much."""


class RecordGenerator:
    """Holds the model and generates records; rows come in the order in which they finish.

    `guided` says whether any record may use guidance: it decides the shape of every UNet call.
    """

    def __init__(self, config: GenerateConfig, model_name: str, guided: bool):
        self.config = config
        self.model_name = model_name
        self.model = loading.load(config.model)
        size = config.engine.batch_size
        self.engine = Engine(self.model, size, slots=2 * size if guided else size)
        self.loras = tuple(
            Lora(path=str(storage.fetch(lora.uri)), scale=lora.scale) for lora in config.model.loras
        )
        self.controls = JobControls(config, self.engine)
        self.ip_adapters = JobIpAdapters(config, self.engine)
        uses = [(lora.path, lora.scale) for lora in self.loras]
        self.is_fused = config.engine.fuse_loras and bool(uses)
        bank = self.engine.loras
        use = bank.fuse(uses) if self.is_fused else bank.use_of(uses)
        sizes = all_sizes_of(config, self.model.default_side)
        warming.warm(self.engine, config.model.compile_cache, sizes)
        self.passes = tuple(self._pass(each.asked) for each in config.passes)
        self.is_marked = config.output.provenance.watermark
        self.lora_ids = [list(each) for each in use]
        self._changes = self.engine.loras.sampler_changes(use)
        self.scorer = load_scorer(config.quality, self.model)
        self._scoring = beside_steps(self.model.device, "scoring")
        self._ahead = BATCHES_AHEAD * size
        self._pictures = PictureReader()
        threads = max(1, min(4, int(config.workers.num_cpus)))
        self._encoding = ThreadPoolExecutor(threads, thread_name_prefix="encoding")

    def generate(self, records: Iterable[Record]) -> Iterator[tuple[Record, Row]]:
        """Generate `records`, read only as the engine has room; failed ones are rows too."""
        pending: dict[Request, tuple[Record, Sources]] = {}
        rows: deque[Future[tuple[Record, Row]]] = deque()
        for result in self.engine.generate(self._requests(records, pending)):
            record, sources = pending.pop(result.request)
            scores = self._scoring.submit(self._score, record, result)
            rows.append(self._encoding.submit(self._row, record, sources, result, scores))
            while rows and (rows[0].done() or len(rows) > self._ahead):
                yield rows.popleft().result()
        for row in rows:
            yield row.result()

    def image_id(self, record: Record, sources: Sources) -> str:
        """Over everything that decides the pixels, and nothing else."""
        sampler, model = self.config.sampler, self.config.model
        sampler_class, options = resolve(
            self._sampler(record), sampler.options, self.model.prediction
        )
        changes = {key: value for key, value in self._changes.items() if key != "_class_name"}
        init_sha256 = None if sources.init is None else sources.init.sha256
        side = self.model.default_side if init_sha256 is None else None
        syntax = record.prompt_syntax or "plain"
        return image_id(
            ({} if syntax == "plain" else {"prompt_syntax": syntax})
            | ({"fused": True} if self.is_fused else {})
            | economy_of(record.economy)
            | ({"watermark": watermark.VERSION} if self.is_marked else {})
            | self.controls.identity(sources)
            | self.ip_adapters.identity(sources)
            | ({"passes": [self._pass_id(each) for each in self.passes]} if self.passes else {})
            | {
                "prompt": record.prompt,
                "negative_prompt": record.negative_prompt,
                "seed": record.seed,
                "sampler": sampler_class.__name__,
                "sampler_options": changes | options,
                "steps": self._steps(record),
                "guidance_scale": self._guidance(record),
                "guidance_rescale": record.guidance_rescale,
                "clip_skip": record.clip_skip,
                "width": record.width or side,
                "height": record.height or side,
                "strength": None if init_sha256 is None else record.strength,
                "init_sha256": init_sha256,
                "model_sha256": self.model.sha256,
                "loras": self.lora_ids,
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "vae": [str(self.model.vae.dtype), model.vae_slicing, model.vae_tiling],
                "batch_size": self.config.engine.batch_size,
                "places": self.engine.num_slots,
                "engine": ENGINE_VERSION,
            }
        )

    def _requests(
        self, records: Iterable[Record], pending: dict[Request, tuple[Record, Sources]]
    ) -> Iterator[Request]:
        """What the engine is asked for, with pictures read ahead."""
        waiting: deque[tuple[Record, Future[Sources] | None]] = deque()

        def ready() -> Request:
            record, future = waiting.popleft()
            sources = NO_SOURCES if future is None else future.result()
            request = self._request(record, sources)
            pending[request] = (record, sources)
            return request

        for record in records:
            reading = self._pictures.begin(record)
            waiting.append((record, reading))
            if reading is None or len(waiting) > self._ahead:
                yield ready()
        while waiting:
            yield ready()

    def _pass(self, each: Pass) -> Pass:
        """With its own model, if it names one, on this machine and loaded."""
        if each.model is None:
            return each
        path = str(storage.to_local(each.model))
        self.engine.refiners.load(path)
        return replace(each, model=path)

    def _pass_id(self, each: Pass) -> dict[str, Any]:
        """What of a pass decides pixels, beside the record's own settings."""
        own = {"scale": each.scale, "strength": each.own_strength, "via": each.via, **each.own}
        if each.model is not None:
            own["model_sha256"] = self.engine.refiners.load(each.model).model.sha256
        if each.denoising_start is not None:
            own["denoising_start"] = each.denoising_start
        if each.sampler is None:
            return own
        kind, options = resolve(each.sampler, each.sampler_options or {}, self.model.prediction)
        return own | {"sampler": kind.__name__, "sampler_options": options}

    def _request(self, record: Record, sources: Sources) -> Request:
        return Request(
            prompt=record.prompt,
            negative_prompt=record.negative_prompt,
            prompt_syntax=record.prompt_syntax or "plain",
            seed=record.seed,
            steps=record.steps,
            sampler=record.sampler,
            sampler_options=self.config.sampler.options,
            guidance_scale=record.guidance_scale,
            guidance_rescale=record.guidance_rescale,
            clip_skip=record.clip_skip,
            **{name: _fixed(value) for name, value in economy_of(record.economy).items()},
            width=record.width,
            height=record.height,
            init_image=None if sources.init is None else sources.init.pixels,
            strength=record.strength,
            loras=self.loras,
            controls=self.controls.of_request(sources),
            ip_adapters=self.ip_adapters.of_request(sources),
            passes=self.passes,
        )

    def _score(self, record: Record, result: Result) -> Row:
        if self.scorer is None or result.image is None:
            return {}
        prompt = spoken(record.prompt, record.prompt_syntax)
        scores: Row = self.scorer.score(result.image, prompt)
        return scores

    def _row(
        self, record: Record, sources: Sources, result: Result, scores: Future[Row]
    ) -> tuple[Record, Row]:
        error = sources.error or result.error
        row = self.columns(record, sources) | scores.result()
        row["warnings"] = "; ".join(result.warnings) or None
        if result.image is None or error:
            return record, row | {"status": "failed", "error": error}
        image, output = result.image, self.config.output
        if self.is_marked:
            image = watermark.mark(image, row["image_id"])
        row |= {"width": image.width, "height": image.height}
        row |= pixels.measure(image)
        text = parameters_text(row) if output.image_format == "png" else None
        data = encode_picture(image, output.image_format, output.quality, text)
        row["image"] = {"bytes": data, "path": None}
        row["image_sha256"] = hashlib.sha256(data).hexdigest()
        return record, row | self.controls.columns(sources, image.size)

    def columns(self, record: Record, sources: Sources = NO_SOURCES) -> Row:
        """The row of a record as far as it is known before its picture is."""
        side = None if sources.init is not None else self.model.default_side
        return {
            "image": None,
            "image_id": self.image_id(record, sources),
            "image_sha256": None,
            "record": record.number,
            "prompt": record.prompt,
            "negative_prompt": record.negative_prompt,
            "seed": record.seed,
            "sampler": self._sampler(record),
            "steps": self._steps(record),
            "guidance_scale": self._guidance(record),
            "guidance_rescale": record.guidance_rescale,
            "clip_skip": record.clip_skip,
            "strength": record.strength if record.init_image is not None else None,
            "width": record.width or side,
            "height": record.height or side,
            "init_image": record.init_image,
            "model": self.model_name,
            "model_sha256": self.model.sha256,
            "status": "ok",
            "error": None,
            **({SYNTAX.name: record.prompt_syntax} if record.prompt_syntax else {}),
            **{k: list(v) if isinstance(v, tuple) else v for k, v in record.economy.items()},
            **{
                name: list(getattr(record, name))
                for name in ("control_images", "ip_adapter_images")
                if getattr(record, name)
            },
            **record.passed_through,
        }

    def _sampler(self, record: Record) -> str:
        own = self._changes.get("_class_name", type(self.model.scheduler).__name__)
        return record.sampler or own

    def _steps(self, record: Record) -> int:
        return self.model.usual.steps if record.steps is None else record.steps

    def _guidance(self, record: Record) -> float:
        given = record.guidance_scale
        return self.model.default_guidance_scale if given is None else given


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def load_scorer(config: QualityConfig, model: Model) -> Any:
    """The encoders that a configuration names, or None."""
    asked = {name: getattr(config, name) for name in scores_asked(dict(config))}
    if not asked:
        return None
    from rayjobs.quality.scores import Asked, Scorer

    local: dict[str, Any] = {
        k: storage.to_local(uri) if k in kinds.MODELS else uri for k, uri in asked.items()
    }
    return Scorer(Asked(**local), str(model.device), model.dtype)
