"""Checks each finished image with a safety classifier, where one is configured.

Owns the threshold, and the order of the images that wait for it. Which of a classifier's labels are
unsafe is decided in `rayjobs.quality`.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from PIL.Image import Image

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.modules.side import beside_steps
from serve.config import SafetyConfig


class Safety:
    """Raises BadInput when the classifier cannot be loaded or has no unsafe label."""

    def __init__(self, uri: str, threshold: float, device: str = "cpu"):
        import torch

        from rayjobs.quality import safety  # seconds, which a server without a classifier saves

        self.threshold, self.device = threshold, device
        try:
            self._classifier = safety.Safety(storage.to_local(uri), device, torch.float32)
        except ValueError as error:
            raise BadInput(f"safety.uri: {error}") from None

    def allows(self, image: Image) -> bool:
        return self._classifier.score(image) <= self.threshold


def build(config: SafetyConfig) -> Safety | None:
    if config.uri is None:
        return None
    import torch

    return Safety(config.uri, config.threshold, "cuda" if torch.cuda.is_available() else "cpu")


class Checks:
    """Finished images in the order in which they were made, each told of once it is checked.

    On a GPU they are checked beside the steps; `wake` is called, in any thread, as one is done.
    """

    def __init__(self, safety: Safety | None, wake: Callable[[], None]):
        self._safety, self._wake = safety, wake
        self._executor = beside_steps("cpu" if safety is None else safety.device, "safety")
        self._waiting: deque[tuple[Future[bool], Callable[[bool], None]]] = deque()

    def put(self, image: Image | None, report: Callable[[bool], None]) -> None:
        """`report` hears whether the image is safe, when it and all before it are checked; without
        an image there is nothing unsafe, and the turn is kept."""
        is_safe = self._executor.submit(self._is_safe, image)
        self._waiting.append((is_safe, report))
        is_safe.add_done_callback(lambda _: self._wake())

    def report(self) -> None:
        while self._waiting and self._waiting[0][0].done():
            is_safe, report = self._waiting.popleft()
            report(is_safe.result())

    def _is_safe(self, image: Image | None) -> bool:
        """An image that the checker fails on counts as unsafe."""
        try:
            return image is None or self._safety is None or self._safety.allows(image)
        except RuntimeError:
            return False
