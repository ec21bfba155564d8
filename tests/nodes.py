"""What tests of whole clusters share: the nodes' Python, the code, waiting for what comes.

Knows no cluster; each is started by the tests that need one of its kind.
"""

import shutil
import subprocess
import sysconfig
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def bare_python(folder: Path) -> str:
    """A Python that has this one's libraries, and not the project."""
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return str(folder / "bin" / "python")


def install(python: str, repository: Path) -> None:
    """Give such a Python the project, as cluster.yaml does; its libraries are there."""
    pip = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    subprocess.run([python, *pip, repository], check=True)


def copy_repository(target: Path) -> None:
    """What git knows or would take."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def wait_for(ready: Callable[[], Any], seconds: float) -> Any:
    """What `ready` answers, once that is true. What is not there yet may raise meanwhile."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if answer := ready():
                return answer
        except (OSError, KeyError):
            pass
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)
