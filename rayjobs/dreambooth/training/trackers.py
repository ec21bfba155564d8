"""Where a run's curves go: TensorBoard always, W&B and MLflow where they are trackers for.

Owns the choice of Lightning's loggers. Their files are stored with the checkpoints.
"""

import os
import re
from pathlib import Path
from typing import Any

from pytorch_lightning import loggers

from rayjobs import storage
from rayjobs.dreambooth.config import DreamBoothConfig
from rayjobs.dreambooth.data import rng

FOLDER = "logs"
MLFLOW_RUN = "mlflow-run-id.txt"
STORED = re.compile(r"(.*/)?events\.out\.|wandb/|mlruns/")
"""Files of trackers, by their names below the local folder."""


def build(config: DreamBoothConfig, folder: Path) -> list[Any]:
    """Loggers for the first worker; what they write to files goes to the local `folder`.

    A run that is started again goes on in the same run of W&B and MLflow.
    """
    trackers = config.trackers
    active: list[Any] = [loggers.TensorBoardLogger(str(folder), name=None, version="")]
    if trackers.wandb is not None:
        active.append(loggers.WandbLogger(**_wandb_settings(config, folder)))
    if trackers.mlflow is not None:
        active.append(_mlflow(config, folder))
    return active


def _wandb_settings(config: DreamBoothConfig, folder: Path) -> dict[str, Any]:
    given = config.trackers.wandb or {}
    mine = {"name": config.run.name, "save_dir": str(folder)}
    if "version" not in given:
        mine["id"] = f"{rng.key(config.output.uri, config.run.name):016x}"
    return mine | given


def _mlflow(config: DreamBoothConfig, folder: Path) -> Any:
    given = {"run_name": config.run.name, "save_dir": str(folder)} | (config.trackers.mlflow or {})
    has_server = bool(given.get("tracking_uri") or os.environ.get("MLFLOW_TRACKING_URI"))
    note = storage.join(config.output.uri, FOLDER, MLFLOW_RUN)
    if has_server and "run_id" not in given and storage.exists(note):
        given["run_id"] = storage.read_bytes(note).decode()
    logger: Any = loggers.MLFlowLogger
    made = logger(**given)
    if has_server:
        storage.write_bytes(note, str(made.run_id).encode())
    return made


def flush(active: list[Any]) -> None:
    """Have what was logged written to files, where a tracker has files."""
    for logger in active:
        if isinstance(logger, loggers.TensorBoardLogger):
            logger.experiment.flush()


def close(active: list[Any]) -> None:
    """End what trackers write; W&B's files are whole only then."""
    for logger in active:
        if isinstance(logger, loggers.WandbLogger):
            logger.experiment.finish()


def store(output_uri: str, folder: Path) -> None:
    """Copy what was written so far to the run's folder: events, and offline runs of W&B."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not path.is_symlink() and STORED.match(name):
            storage.put_file(storage.join(output_uri, FOLDER, name), path)
