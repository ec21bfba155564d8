"""Strangers' pictures, decoded in processes of their own, which may die of them.

Owns those processes, their limits and what is reported when one ends. Knows nothing of records. Run
as a module it is such a process: lengths and bytes of files come in, pixels or reasons go out.
"""

import contextlib
import io
import json
import os
import queue
import resource
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from PIL import Image

from rayjobs.images.container import UnreadableImage
from rayjobs.images.decode import FORMATS, MAX_PIXELS, NO_MEMORY, Picture, decode

MEMORY_BYTES = 8 * 2**30
TIMEOUT_S = 60.0
TRIES = 2
"""A picture is given up when it ended this many processes: one may have been ended by another."""
FATAL = "ends the process that decodes it; open it and save it again"


class Sandbox:
    """Decodes pictures, one at a time, in a process that is started again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(
        self, data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
    ) -> Picture:
        """As `rayjobs.images.decode.decode`. Raises UnreadableImage."""
        options = json.dumps({"max_pixels": max_pixels, "formats": formats}).encode()
        with self._lock:
            for _ in range(TRIES):
                picture = self._ask(options + b"\n" + data)
                if picture is not None:
                    return picture
        raise UnreadableImage(FATAL)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _ask(self, request: bytes) -> Picture | None:
        """The picture, or None when the process died or did not answer."""
        process = self._started()
        alarm = threading.Timer(TIMEOUT_S, process.kill)
        alarm.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            _send(process.stdin, request)
            head = json.loads(_receive(process.stdout))
            pixels = _receive(process.stdout)
        except (OSError, EOFError):
            self.close()
            return None
        finally:
            alarm.cancel()
        if "error" in head:
            raise UnreadableImage(head["error"])
        return _picture(tuple(head["size"]), pixels, head["has_alpha"])

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            root = Path(__file__).parents[2]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rayjobs.images.sandbox"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"},
            )
            weakref.finalize(self, _end, self._process)
        return self._process


class SandboxPool:
    """As many sandboxes as threads decode at once; each starts its process when it is needed."""

    def __init__(self, size: int) -> None:
        self._free: queue.LifoQueue[Sandbox] = queue.LifoQueue()
        for _ in range(size):
            self._free.put(Sandbox())

    def decode(
        self, data: bytes, max_pixels: int = MAX_PIXELS, formats: tuple[str, ...] = FORMATS
    ) -> Picture:
        """As `rayjobs.images.decode.decode`, after a wait for a free sandbox."""
        sandbox = self._free.get()
        try:
            return sandbox.decode(data, max_pixels, formats)
        finally:
            self._free.put(sandbox)


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer until there is nothing more to decode."""
    while True:
        try:
            request = _receive(source)
        except EOFError:
            return
        head, pixels = _answer(request)
        _send(sink, json.dumps(head).encode())
        _send(sink, pixels)


def _picture(size: tuple[int, int], pixels: bytes, has_alpha: bool) -> Picture:
    num_colours = 3 * size[0] * size[1]
    colours = Image.frombytes("RGB", size, pixels[:num_colours])
    return Picture(colours, Image.frombytes("L", size, pixels[num_colours:]) if has_alpha else None)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what is left in it has no reader
                pipe.close()


def _answer(request: bytes) -> tuple[dict[str, Any], bytes]:
    """A request is its options as one line of JSON, then the file."""
    options, _, data = request.partition(b"\n")
    try:
        picture = decode(data, **json.loads(options))
        pixels = picture.colours.tobytes()
        alpha = b"" if picture.alpha is None else picture.alpha.tobytes()
        head = {"size": picture.colours.size, "has_alpha": picture.alpha is not None}
        return head, pixels + alpha
    except UnreadableImage as error:
        return {"error": str(error)}, b""
    except MemoryError:
        return {"error": NO_MEMORY}, b""


def _send(sink: IO[bytes], data: bytes) -> None:
    sink.write(struct.pack("<Q", len(data)) + data)
    sink.flush()


def _receive(source: IO[bytes]) -> bytes:
    head = source.read(8)
    if len(head) < 8:
        raise EOFError
    (length,) = struct.unpack("<Q", head)
    data = source.read(length)
    if len(data) < length:
        raise EOFError
    return data


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = sys.stdout.buffer
    # Whatever a decoder prints must not come between the pixels.
    sys.stdout = io.TextIOWrapper(open("/dev/null", "wb"))  # noqa: SIM115
    serve(sys.stdin.buffer, out)


if __name__ == "__main__":
    main()
