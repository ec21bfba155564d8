"""Strangers' pictures, decoded in a process of their own, which may die of them.

Owns that process, its limits and what is told when it ends. Knows nothing of records. Run as a
module it is that process: lengths and bytes of files come in, pixels or reasons go out.
"""

import contextlib
import io
import json
import os
import resource
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Any

from PIL import Image

from rayjobs.images.decode import open_image

MEMORY_BYTES = 8 * 2**30
TIMEOUT_S = 60.0
TRIES = 2
"""A picture is given up when it ended this many processes: one may have been ended by another."""


class Decoder:
    """Decodes pictures, one at a time, in a process that is started again when it dies."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def decode(self, data: bytes) -> Image.Image:
        """An upright RGB image. Raises ValueError saying what is wrong with it."""
        with self._lock:
            for _ in range(TRIES):
                answer = self._ask(data)
                if answer is not None:
                    return answer
        raise ValueError("init image cannot be read: it ends the process that decodes it")

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _ask(self, data: bytes) -> Image.Image | None:
        """The image, or None when the process died or did not answer."""
        if self._process is None:
            command = [sys.executable, "-m", "rayjobs.images.sandbox"]
            root = Path(__file__).parents[2]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}"},
            )
            weakref.finalize(self, _end, self._process)
        alarm = threading.Timer(TIMEOUT_S, self._process.kill)
        alarm.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            _send(self._process.stdin, data)
            head = json.loads(_receive(self._process.stdout))
            pixels = _receive(self._process.stdout)
        except (OSError, EOFError):
            self.close()
            return None
        finally:
            alarm.cancel()
        if "error" in head:
            raise ValueError(head["error"])
        return Image.frombytes("RGB", tuple(head["size"]), pixels)


def serve(source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer until there is nothing more to decode."""
    while True:
        try:
            data = _receive(source)
        except EOFError:
            return
        head, pixels = _decode(data)
        _send(sink, json.dumps(head).encode())
        _send(sink, pixels)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what is left in it has no reader
                pipe.close()


def _decode(data: bytes) -> tuple[dict[str, Any], bytes]:
    try:
        image = open_image(data)
        return {"size": image.size}, image.tobytes()
    except ValueError as error:
        return {"error": str(error)}, b""
    except MemoryError:
        return {"error": "init image cannot be read: it is too large for this machine"}, b""


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
