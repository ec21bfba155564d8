"""Adapter files as tools write them, each with what its format says of the weights.

A format is a function of a model's layers that returns the file's tensors, its metadata, and for
each layer the changed weight and bias as functions of the scale.
"""

from collections.abc import Callable
from types import ModuleType

from tests.diffusion.adapters import formats_kohya, formats_peft
from tests.diffusion.adapters.made import Made


def _of(module: ModuleType) -> list[Callable[[Made], None]]:
    return [
        made
        for name, made in vars(module).items()
        if getattr(made, "__module__", "") == module.__name__ and not name.startswith(("_", "put_"))
    ]


FORMATS = _of(formats_kohya) + _of(formats_peft)
