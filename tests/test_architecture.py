"""The house's rules: import contracts, small folders, and imports that are quick."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_import_contracts_are_kept() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_no_room_is_too_full() -> None:
    folders = [p.parent for top in ("rayjobs", "serve") for p in ROOT.glob(f"{top}/**/__init__.py")]
    full = {
        str(folder.relative_to(ROOT)): len(modules)
        for folder in folders
        if len(modules := set(folder.glob("*.py")) - {folder / "__init__.py"}) > 12
    }
    assert full == {}


HEAVY = {"torch", "ray", "diffusers", "transformers", "pydantic", "pyarrow", "numpy"}
STARTS = [
    ("import rayjobs", HEAVY),
    (
        "import rayjobs.cli as c, contextlib as x\nwith x.suppress(SystemExit): c.main(['-h'])",
        HEAVY,
    ),
    ("from rayjobs import Request", {"torch", "ray", "diffusers"}),
    ("import rayjobs.generation.job", {"torch", "ray", "pandas"}),
    ("import rayjobs.generation.worker.pool", {"torch", "diffusers", "transformers"}),
    ("import serve.app", {"torch", "diffusers", "transformers"}),
    ("import rayjobs.dreambooth.composition", {"pytorch_lightning", "diffusers"}),
]
"""What is started and what it must not import; all in one process, the lightest first."""


def test_what_starts_without() -> None:
    """Help, requests and the jobs' drivers start without what takes seconds to import."""
    lines = ["import sys", "def check(heavy): return ', '.join(heavy & set(sys.modules))"]
    for code, heavy in STARTS:
        lines += [code, f"if found := check({heavy}): sys.exit({code!r} + ' imports ' + found)"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_s_own_names() -> None:
    from rayjobs import Engine, Request, build_processor, load_model

    assert all(map(callable, (Engine, Request, build_processor, load_model)))
