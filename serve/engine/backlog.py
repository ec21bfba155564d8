"""What a replica's engines still have to do, in seconds.

Owns the requests in progress and the estimates of their work. Measures nothing: what steps take is
`forecast`'s.
"""

import math

from serve.engine.fairness import Shape
from serve.engine.forecast import Forecast, Key
from serve.engine.models import LoadedModel, ModelCache
from serve.engine.request_state import RequestState, estimate
from serve.protocol import Failed, ImagesRequest
from serve.registry import Weights

OWN_AREA = 1.25
"""Up to so many times a model's own size it is always drawn: an edit of another shape is as large.
"""


class Backlog:
    """The requests in progress; any thread may ask, the engine's changes them."""

    def __init__(self, models: ModelCache, forecast: Forecast):
        self.models = models
        self.forecast = forecast
        self.states: dict[RequestState, None] = {}
        """In order of arrival."""

    def work_s(self, request: ImagesRequest, weights: Weights) -> float:
        """Seconds of work of a request that the engine has not seen yet."""
        loaded = self.models.loaded.get(weights)
        side, scale = 1024, 8
        if loaded is not None:
            side, scale = loaded.engine.model.default_side, loaded.engine.model.vae_scale
        shape, slot_steps = estimate(request, side, scale)
        return self.forecast.work_s((weights, shape), slot_steps, len(request.seeds))

    def too_long(self, loaded: LoadedModel, shape: Shape, slots: int) -> Failed | None:
        """Why an image of this latent shape is not made: everybody would wait for its steps.

        A model's own size is always made, whatever it takes.
        """
        own = loaded.own_shape
        if shape[-1] * shape[-2] <= OWN_AREA * own[-1] * own[-2]:
            return None
        limit_s = max(
            self.forecast.max_step_s, self.forecast.known_step_s(loaded.key(own), slots) or 0.0
        )
        step_s = self.forecast.known_step_s(loaded.key(shape), slots)
        if step_s is None or step_s <= limit_s:
            return None
        scale = loaded.engine.model.vae_scale
        size = f"{shape[-1] * scale}x{shape[-2] * scale}"
        message = (
            f"a step of {size} takes about {step_s:.2g} s here, and others would wait longer than "
            f"the {limit_s:.2g} s that they may; request a smaller size"
        )
        return Failed("invalid", message, "size")

    def pending_s(self) -> float:
        """Seconds until all requests are done, in batches as full as these requests make them."""
        total, by_key = 0.0, dict[Key, list[tuple[int, int]]]()
        for state in list(self.states):
            if state.left and not state.over:
                rows = by_key.setdefault(state.loaded.key(state.shape), [])
                left = (math.ceil(each / state.slots) for each in list(state.left.values()))
                rows += [(steps, state.slots) for steps in left]
            elif not state.over:
                total += self.work_s(state.request, state.loaded.weights)
        return total + sum(self.forecast.drain_s(key, rows) for key, rows in by_key.items())

    def until_started_s(self, state: RequestState) -> float:
        """Seconds until its first step: beyond `max_rows`, rows start as earlier ones end."""
        active = [other for other in list(self.states) if other.left]
        shapes = len({(other.loaded.weights, other.shape) for other in active})
        same = [other for other in active if other.shape == state.shape]
        key = state.loaded.key(state.shape)
        round_s = max(1, shapes) * self.forecast.step_s(key, self.forecast.bound(key))
        before = [other for other in same if other.arrived_s < state.arrived_s]
        beyond = sum(len(o.left) for o in before) + len(state.left) - self.models.config.max_rows
        if beyond <= 0 or not before:
            return round_s
        slot_steps = sum(o.slot_steps for o in before) / sum(len(o.left) for o in before)
        return round_s * (slot_steps / 2) * beyond / self.models.config.max_rows
