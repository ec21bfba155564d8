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


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from rayjobs.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'pydantic', 'pyarrow', 'numpy'}\n"
        "raise SystemExit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def test_the_door_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "import rayjobs\n"
        "heavy = {'torch', 'ray', 'diffusers', 'transformers', 'pydantic', 'pyarrow', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from rayjobs import Request\n"
        "assert 'torch' not in sys.modules\n"
        "from rayjobs import Engine, build_processor, load_model\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
