"""Pictures decoded in processes of their own, which may die."""

import io
import threading

import pytest
from PIL import Image

from rayjobs.images.container import UnreadableImage
from rayjobs.images.decode import WEB_FORMATS, decode
from rayjobs.images.sandbox import FATAL, Sandbox, SandboxPool


def png(color: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGBA" if len(color) == 4 else "RGB", (5, 3), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_sandbox_decodes_as_this_process_does() -> None:
    sandbox = Sandbox()
    for data in (png((9, 8, 7)), png((9, 8, 7, 100))):
        there, here = sandbox.decode(data), decode(data)
        assert there.on_white().tobytes() == here.on_white().tobytes()
        assert there.mask().tobytes() == here.mask().tobytes()
    for options in ({"max_pixels": 14}, {"formats": WEB_FORMATS}):
        file = b"GIF89a" if "formats" in options else png((1, 2, 3))
        with pytest.raises(UnreadableImage) as here_error:
            decode(file, **options)
        with pytest.raises(UnreadableImage, match=str(here_error.value)):
            sandbox.decode(file, **options)
    sandbox.close()


@pytest.mark.parametrize(("bad", "timeout_s"), [(b"KILLED", 60.0), (b"HANGED", 0.5)])
def test_a_picture_that_ends_its_process_is_given_up_and_the_next_is_decoded(
    frail_decoders: None, monkeypatch: pytest.MonkeyPatch, bad: bytes, timeout_s: float
) -> None:
    sandbox = Sandbox()
    sandbox.decode(png((1, 2, 3)))
    monkeypatch.setattr("rayjobs.images.sandbox.TIMEOUT_S", timeout_s)
    with pytest.raises(UnreadableImage, match=FATAL):
        sandbox.decode(bad)
    monkeypatch.setattr("rayjobs.images.sandbox.TIMEOUT_S", 60.0)
    assert sandbox.decode(png((1, 2, 3))).colours.getpixel((0, 0)) == (1, 2, 3)
    sandbox.close()


def test_a_pool_gives_each_thread_its_own_answer() -> None:
    pool = SandboxPool(2)
    seen: dict[int, object] = {}

    def read(shade: int) -> None:
        seen[shade] = pool.decode(png((shade, 0, 0))).colours.getpixel((0, 0))

    threads = [threading.Thread(target=read, args=(shade,)) for shade in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {shade: (shade, 0, 0) for shade in range(12)}
