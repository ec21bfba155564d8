"""Where a run's curves go: TensorBoard always, W&B and MLflow where they are asked for.

Owns the choice of Lightning's loggers. Their files are stored with the checkpoints.
"""

import importlib.util
from pathlib import Path
from typing import Any

from pytorch_lightning import loggers

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dreambooth.config import DreamBoothConfig

FOLDER = "logs"


def check(config: DreamBoothConfig) -> None:
    """Raise BadInput when a tracker's package is not installed."""
    for name in ("wandb", "mlflow"):
        asked = getattr(config.trackers, name) is not None
        if asked and importlib.util.find_spec(name) is None:
            raise BadInput(f"trackers.{name} needs the package {name}; install it on every node")


def build(config: DreamBoothConfig, folder: Path) -> list[Any]:
    """Loggers for the first worker; TensorBoard's events go to the local `folder`."""
    asked = config.trackers
    wandb: Any = loggers.WandbLogger
    mlflow: Any = loggers.MLFlowLogger
    found: list[Any] = [loggers.TensorBoardLogger(str(folder), name=None, version="")]
    if asked.wandb is not None:
        found.append(wandb(**{"name": config.run.name, **asked.wandb}))
    if asked.mlflow is not None:
        found.append(mlflow(**{"run_name": config.run.name, **asked.mlflow}))
    return found


def flush(found: list[Any]) -> None:
    """Have what was logged written to files, where a tracker has files."""
    for logger in found:
        if isinstance(logger, loggers.TensorBoardLogger):
            logger.experiment.flush()


def store(output_uri: str, folder: Path) -> None:
    """Copy the events written so far to the run's folder."""
    for path in sorted(folder.rglob("events.out.*")):
        storage.put_file(storage.join(output_uri, FOLDER, path.name), path)
