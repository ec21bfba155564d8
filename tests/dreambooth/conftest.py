from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, picture: Callable[[int], Image.Image]) -> Path:
    """Two photographs below `subject`, three class images below `class`."""
    from tests.dreambooth.fitting import SIZES  # loads torch

    folder = tmp_path_factory.mktemp("photos")
    for name in ("subject", "class"):
        (folder / name).mkdir()
    for number, (name, size) in enumerate(SIZES.items()):
        picture(number).resize(size).save(folder / "subject" / name)
    for number in range(3):
        picture(10 + number).save(folder / "class" / f"{number}.png")
    return folder
