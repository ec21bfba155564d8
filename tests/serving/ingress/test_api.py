"""The API as clients and proxies meet it, with engines that need no model."""

import asyncio
import gzip
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest

from serve import images
from serve.config import ServeConfig
from serve.errors import ApiError
from serve.ingress import streams
from serve.ingress.images_api import UPLOADS_AT_ONCE, ImagesApi
from serve.protocol import Event, Finished, ImagesRequest, Pixels, Waiting
from tests.serving.asking import EDIT, GENERATE, PROMPT, ask, form, png
from tests.serving.in_process import CONFIG, QuickEngines, served, serving


@pytest.fixture(scope="module")
def engines() -> QuickEngines:
    return QuickEngines()


@pytest.fixture(scope="module")
def url(engines: QuickEngines) -> Iterator[str]:
    with serving(engines, aliases={"gpt-image-1": "starter"}) as found:
        yield found


class SilentEngines(QuickEngines):
    """Says nothing, or only that it waits, until it may go on."""

    def __init__(self, tells: bool) -> None:
        super().__init__()
        self.tells = tells
        self.go = threading.Event()

    async def events(self, request: ImagesRequest, streamed: bool) -> AsyncIterator[Event]:
        if self.tells:
            yield Waiting(0, 1.0)
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        yield Finished(0, 0, Pixels(8, 8, bytes(192)))


@pytest.mark.parametrize("tells", [True, False])
def test_a_stream_begins_before_its_first_event_and_is_never_silent(
    monkeypatch: pytest.MonkeyPatch, tells: bool
) -> None:
    monkeypatch.setattr(streams, "PING_S", 0.1)
    engines = SilentEngines(tells)
    with serving(engines) as url:
        request = urllib.request.Request(
            url + GENERATE,
            json.dumps(PROMPT | {"stream": True}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            assert [answer.readline() for _ in range(6)] == [b": ping\n", b"\n"] * 3
            engines.go.set()
            rest = answer.read().decode()
    events = [line for line in rest.splitlines() if line.startswith("event")]
    assert events == ["event: image_generation.completed"]


def test_a_stream_keeps_its_deadline() -> None:
    with serving(QuickEngines(step_s=5)) as url:
        _, _, data = ask(url, body=PROMPT | {"stream": True, "deadline_s": 0.3})
        (event,) = data.decode().strip().split("\n\n")
        assert event.startswith("event: error")
        assert "deadline_exceeded" in event


def test_fields_that_change_nothing_are_taken_whatever_they_say(url: str) -> None:
    body = PROMPT | {"quality": "ultra-2027", "safety_identifier": "me", "style": "new", "user": 7}
    assert ask(url, body=body | {"metadata": {"a": 1}})[0] == 200
    status, _, told = ask(url, body=PROMPT | {"num_inference_step": 3})
    assert (status, told["error"]["code"]) == (400, "unknown_parameter")


def test_clients_may_send_names_of_their_own(url: str, engines: QuickEngines) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    client.images.generate(model="gpt-image-1", prompt="a star")
    assert engines.asked[-1].model == "starter"
    client.images.generate(prompt="a star")
    assert client.models.retrieve("gpt-image-1").id == "starter"
    with pytest.raises(openai.NotFoundError):
        client.images.generate(model="dall-e-3", prompt="a star")


@pytest.mark.parametrize("names", [("image", "mask"), ("image[]", "mask[]"), ("image[0]", "mask")])
def test_a_form_s_names_may_have_brackets(
    url: str, engines: QuickEngines, names: tuple[str, str]
) -> None:
    sent = form((names[0], png()), (names[1], png(colour="white")), ("prompt", "a star"))
    assert ask(url, EDIT, **sent)[0] == 200
    assert engines.asked[-1].mask is not None


def test_of_several_images_the_first_is_used_and_told(url: str, engines: QuickEngines) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.images.edit(image=[png(), png(colour="blue")], prompt="a star")
    (image,) = answer.data or []
    assert "only the first image" in image.model_extra["warnings"][0]  # type: ignore[index]
    assert engines.asked[-1].init is not None
    assert engines.asked[-1].init.data[:3] == b"\xff\0\0"


BY_OBJECT = "loras[][name]=a loras[][scale]=0.5 loras[][name]=b loras[][scale]=2"
BY_FIELD = "loras[][name]=a loras[][name]=b loras[][scale]=0.5 loras[][scale]=2"
BY_NUMBER = "loras[0][name]=a loras[0][scale]=0.5 loras[1][name]=b loras[1][scale]=2"
AS_JSON = 'loras=[{"name":"a","scale":0.5},{"name":"b","scale":2}]'


@pytest.mark.parametrize("fields", [BY_OBJECT, BY_FIELD, BY_NUMBER, AS_JSON])
def test_lists_in_forms(fields: str) -> None:
    engines = QuickEngines()
    loras = [{"name": name, "uri": "starter"} for name in "ab"]
    with serving(engines, loras=loras) as url:
        parts = [tuple(part.split("=", 1)) for part in fields.split()]
        sent = form(("image", png()), ("prompt", "p"), *parts)  # type: ignore[arg-type]
        assert ask(url, EDIT, **sent)[0] == 200
    assert engines.asked[0].loras == (("a", 0.5), ("b", 2.0))


@pytest.mark.parametrize("fields", ["timesteps[]=900 timesteps[]=90", "timesteps=[900,90]"])
def test_lists_of_numbers_in_forms(url: str, engines: QuickEngines, fields: str) -> None:
    parts = [tuple(part.split("=", 1)) for part in fields.split()]
    sent = form(("image", png()), ("prompt", "p"), *parts)  # type: ignore[arg-type]
    assert ask(url, EDIT, **sent)[0] == 200
    assert engines.asked[-1].timesteps == (900, 90)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([("loras[][name]", "a"), ("loras[][name]", "b"), ("loras[][scale]", "2")], "unclear"),
        ([("loras[0][name]", "a"), ("loras[0][name]", "b")], "unclear"),
        ([("loras[0][name]", "a"), ("loras[][name]", "b")], "unclear"),
        ([("loras[][name]", "a"), ("loras", "[]")], "unclear"),
        ([("loras[][name]", "a"), ("loras[][typo]", "a")], "loras.0.typo"),
        ([("seed", "1"), ("seed", "2")], "given twice"),
        ([("timesteps", "[9]"), ("timesteps[]", "3")], "given twice"),
        ([("timesteps[]", "9"), ("timesteps", "[3]")], "given twice"),
        ([("sigmas", "9 to 0")], "It must be JSON, such as [14.6, "),
        ([("image", "text")], "must be a file"),
        ([("picture[]", b"x")], "Unknown parameter: 'picture[]'"),
        ([("mask[]", png()), ("mask[]", png())], "Send one mask"),
    ],
)
def test_forms_that_could_be_misread_are_refused(
    url: str, parts: list[tuple[str, Any]], told: str
) -> None:
    status, _, body = ask(url, EDIT, **form(("image", png()), ("prompt", "p"), *parts))
    assert status == 400
    assert told in body["error"]["message"]


def test_openai_s_client_sends_lists_of_objects_in_forms() -> None:
    engines = QuickEngines()
    loras = [{"name": name, "uri": "starter"} for name in "ab"]
    with serving(engines, loras=loras) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        uses = [{"name": "a", "scale": 0.5}, {"name": "b", "scale": 2.0}]
        client.images.edit(image=png(), prompt="p", extra_body={"loras": uses, "seed": 3})
        with pytest.raises(openai.BadRequestError, match="unclear"):
            client.images.edit(
                image=png(), prompt="p", extra_body={"loras": [*uses, {"name": "a"}]}
            )
    assert engines.asked[0].loras == (("a", 0.5), ("b", 2.0))


@pytest.mark.parametrize(
    ("headers", "body", "status", "told"),
    [
        ({"content_type": ""}, PROMPT, 415, "there is no content type"),
        ({"content_type": "Application/JSON; charset=utf-8"}, PROMPT, 200, ""),
        ({"content_encoding": "gzip"}, gzip.compress(b"{}", mtime=0), 415, "encoded with gzip"),
        ({}, b" " * (2**20 + 1), 413, "at most 1048576"),
    ],
)
def test_bodies(url: str, headers: dict[str, str], body: Any, status: int, told: str) -> None:
    found, _, answer = ask(url, body=body, **headers)
    assert found == status
    assert told in str(answer)


def test_a_body_too_long_is_refused_before_it_is_sent(url: str) -> None:
    head = (
        f"POST {GENERATE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        "content-length: 50000000\r\n\r\n"
    )
    place = url.removeprefix("http://").split(":")
    with socket.create_connection((place[0], int(place[1])), timeout=10) as connection:
        connection.sendall(head.encode())
        assert b" 413 " in connection.recv(100)


@pytest.mark.parametrize("path", [GENERATE, EDIT])
def test_who_still_sends_a_refused_body_reads_why(url: str, path: str) -> None:
    body = {"prompt": "a" * 20_000_000}
    assert ask(url, path, body=body)[0] == (413 if path == GENERATE else 415)


def test_a_body_that_pauses_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.ingress.bodies.IDLE_S", 0.2)
    place = url.removeprefix("http://").split(":")
    with socket.create_connection((place[0], int(place[1])), timeout=10) as connection:
        connection.sendall(
            f"POST {GENERATE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            'content-length: 50\r\n\r\n{"prompt"'.encode()
        )
        assert b" 408 " in connection.recv(100)


@pytest.mark.parametrize("path", ["/", "/health", "/web/app.js", "/v1/models"])
def test_what_answers_get_answers_head(url: str, path: str) -> None:
    status, headers, body = ask(url, path, method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) > 0
    assert headers["x-frame-options"] == "DENY"
    assert ask(url, GENERATE, method="HEAD")[0] == 405


def test_who_stops_refuses_new_requests() -> None:
    engines, config = QuickEngines(), ServeConfig.model_validate(CONFIG)
    api = ImagesApi(config, engines)
    with served(config, api) as url:
        assert ask(url, body=PROMPT)[0] == 200
        api.is_draining = True
        status, headers, _ = ask(url, body=PROMPT)
        assert status == 503
        assert headers["retry-after"]
        assert ask(url, "/ready", method="GET")[0] == 503
        assert ask(url, "/health", method="GET")[0] == 200
        assert len(engines.asked) == 1


def test_as_many_uploads_are_in_memory_as_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    now, most, lock = [0], [0], threading.Lock()

    def read_image(data: bytes, *_: Any) -> Pixels:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        now[0] -= 1
        return Pixels(16, 16, bytes(768))

    monkeypatch.setattr(images, "read_image", read_image)
    with serving() as url:
        statuses: list[int] = []
        sent = form(("image", png()), ("prompt", "p"))

        def edit() -> None:
            statuses.append(ask(url, EDIT, **sent)[0])
            assert ask(url, body=PROMPT)[0] == 200

        asking = [threading.Thread(target=edit) for _ in range(12)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert statuses == [200] * 12
    assert most[0] <= UPLOADS_AT_ONCE


def test_those_refused_together_do_not_come_again_together() -> None:
    waits = {ApiError(429, "", retry_after_s=10.0).headers["retry-after-ms"] for _ in range(20)}
    assert len(waits) > 10
    assert all(10_000 <= int(wait) <= 15_000 for wait in waits)


class LoadedEngines(QuickEngines):
    """Two replicas, of which one is idle."""

    async def states(self) -> dict[str, dict[str, Any]]:
        await super().states()
        idle: dict[str, Any] = {"facts": {}, "names": [], "load": {}}
        busy = idle | {"names": ["starter"], "load": {"starter": (3, 2)}}
        return {"a": busy, "b": idle}


def test_the_load_of_each_model_is_told_and_seldom_asked_for() -> None:
    engines = LoadedEngines()
    with serving(engines) as url:
        answers = [ask(url, "/v1/load", method="GET") for _ in range(3)]
    assert [status for status, _, _ in answers] == [200] * 3
    (model,) = answers[0][2]["data"]
    assert model == {"id": "starter", "in_progress": 3, "waiting": 2, "replicas": 1}
    assert engines.looks == 1


def test_the_description_of_the_api_needs_no_network(url: str) -> None:
    """Its files name none but this server's, and they are there."""
    status, headers, page = ask(url, "/docs", method="GET")
    assert (status, headers["x-frame-options"]) == (200, "DENY")
    named = re.findall(r'(?:src|href)="([^"]+)"', page.decode())
    assert {"openapi.json", "web/docs.js", "web/docs.css"} <= set(named)
    for name in set(named) - {"./"}:
        status, _, file = ask(url, f"/{name}", method="GET")
        assert status == 200
        assert b"https://" not in (file if isinstance(file, bytes) else b"")
