"""From events to responses: JSON, or server-sent events of OpenAI's types.

Owns the encoding of images in threads, their order, and usage. Those threads wait for nothing:
storage has its own. Knows nothing of how images are finished.
"""

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.sse import format_sse_event

from rayjobs.diffusion.passes import final_size
from rayjobs.provenance.keys import Provenance
from serve import errors, images
from serve.errors import ApiError
from serve.ingress.marks import Marks
from serve.ingress.results import ResultsStore
from serve.ingress.schemas import GenerateBody, ImageOut, ImagesOut, TokenDetails, Usage
from serve.protocol import Event, Failed, Finished, ImagesRequest, Partial, Pixels, Step, Waiting

PATCH = 16
"""Pixels along a side of a patch that counts as one token."""
TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class ResponseEncoder:
    """Encodes the events of a request as a response."""

    def __init__(self, results: ResultsStore, marks: Marks | None = None, threads: int = 4):
        self.results = results
        self.marks = marks or Marks(Provenance())
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="images")

    async def whole(
        self, body: GenerateBody, request: ImagesRequest, events: AsyncIterator[Event]
    ) -> dict[str, Any]:
        """The response in one piece. Raises ApiError."""
        finished: dict[int, Finished] = {}
        async for event in events:
            if isinstance(event, Failed):
                raise errors.translate_failure(event)
            if isinstance(event, Finished):
                finished[event.image] = event
        ordered = [finished[number] for number in range(len(request.seeds))]
        data = await asyncio.gather(*(self._image(body, request, event) for event in ordered))
        size = f"{ordered[0].pixels.width}x{ordered[0].pixels.height}"
        out = ImagesOut(
            created=int(time.time()),
            data=list(data),
            output_format=body.output_format or "png",
            size=size,
            usage=usage(request, ordered),
        )
        return out.model_dump(exclude_none=True)

    async def stream(
        self, body: GenerateBody, request: ImagesRequest, events: AsyncIterator[Event], kind: str
    ) -> AsyncGenerator[bytes]:
        """Server-sent events, image after image; `kind` is image_generation or image_edit."""
        finished: list[Finished] = []
        try:
            async for event in _in_order(events):
                if isinstance(event, Failed):
                    yield sse("error", errors.translate_failure(event).body)
                    return
                if isinstance(event, Finished):
                    finished.append(event)
                for name, data in await self._encode_event(body, request, event, kind):
                    yield sse(name, data)
        except ApiError as error:
            yield sse("error", error.body)

    async def _encode_event(
        self, body: GenerateBody, request: ImagesRequest, event: Event, kind: str
    ) -> list[tuple[str, dict[str, Any]]]:
        if isinstance(event, Waiting | Step) and not body.progress:
            return []
        if isinstance(event, Waiting):
            name = "rayjobs.waiting"
            data: dict[str, Any] = {"position": event.position, "seconds": event.seconds}
        elif isinstance(event, Step):
            name = "rayjobs.step"
            data = {"image_index": event.image, "step": event.done, "steps": event.total}
            data["seconds_left"] = event.seconds_left
        elif isinstance(event, Partial):
            name = f"{kind}.partial_image"
            first = (request.width or event.pixels.width, request.height or event.pixels.height)
            size = final_size(request.passes, *first)
            text = await self._run(_partial_text, body, event.pixels, size)
            data = _image_fields(body, text, size)
            data |= {"partial_image_index": event.index, "image_index": event.image}
        elif isinstance(event, Finished):
            name = f"{kind}.completed"
            size = (event.pixels.width, event.pixels.height)
            image_id, text = await self._run(self._text, body, request, event)
            data = _image_fields(body, text, size)
            data |= {} if image_id is None else {"image_id": image_id}
            data |= {"usage": usage(request, [event]).model_dump(), "image_index": event.image}
            data |= {"seed": event.seed, "warnings": [*request.warnings, *event.warnings]}
        else:
            return []
        return [(name, {"type": name, **data})]

    async def _image(self, body: GenerateBody, request: ImagesRequest, event: Finished) -> ImageOut:
        out = ImageOut(seed=event.seed, warnings=[*request.warnings, *event.warnings])
        if body.response_format == "url":
            out.image_id, data = await self._run(self._file, body, request, event)
            out.url = await self.results.put(data, body.output_format or "png")
        else:
            out.image_id, out.b64_json = await self._run(self._text, body, request, event)
        return out

    def _file(
        self, body: GenerateBody, request: ImagesRequest, event: Finished
    ) -> tuple[str | None, bytes]:
        """A finished picture's id and file, with all that it is to carry."""
        image_id = self.marks.image_id(request, event.seed)
        data = _encoded(body, self.marks.mark(event.pixels, image_id))
        return image_id, self.marks.sign(data, image_id, request.model)

    def _text(
        self, body: GenerateBody, request: ImagesRequest, event: Finished
    ) -> tuple[str | None, str]:
        image_id, data = self._file(body, request, event)
        return image_id, base64.b64encode(data).decode()

    async def _run(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _image_fields(body: GenerateBody, text: str, size: tuple[int, int]) -> dict[str, Any]:
    return {
        "b64_json": text,
        "created_at": int(time.time()),
        "output_format": body.output_format or "png",
        "size": f"{size[0]}x{size[1]}",
        "background": "opaque",
        "quality": "auto",
    }


def _partial_text(body: GenerateBody, pixels: Pixels, size: tuple[int, int]) -> str:
    return base64.b64encode(_encoded(body, images.fitted(pixels, *size))).decode()


def _encoded(body: GenerateBody, pixels: Pixels) -> bytes:
    compression = 100 if body.output_compression is None else body.output_compression
    return images.encode(pixels, body.output_format or "png", compression)


def sse(name: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=name, data_str=json.dumps(data, ensure_ascii=False))


def usage(request: ImagesRequest, finished: list[Finished]) -> Usage:
    text = finished[0].text_tokens
    image = 0 if request.init is None else _patches(request.init)
    output = sum(_patches(event.pixels) for event in finished)
    return Usage(
        input_tokens=text + image,
        input_tokens_details=TokenDetails(image_tokens=image, text_tokens=text),
        output_tokens=output,
        total_tokens=text + image + output,
    )


def _patches(pixels: Pixels) -> int:
    return -(-pixels.width // PATCH) * -(-pixels.height // PATCH)


async def _in_order(events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """All of the first image's events, then the second's: OpenAI's events have no image number.

    Waiting and step events are passed on at once, and so is a failure.
    """
    current, held = 0, list[Event]()
    async for event in events:
        if not isinstance(event, Partial | Finished):
            yield event
            continue
        held.append(event)
        due = [each for each in held if getattr(each, "image", None) == current]
        while due:
            held = [each for each in held if each not in due]
            for each in due:
                yield each
            if not isinstance(due[-1], Finished):
                break
            current += 1
            due = [each for each in held if getattr(each, "image", None) == current]
