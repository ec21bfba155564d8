"""How a job goes, told from its output folder alone: no cluster is asked, and none need be there.

Owns which kind of output a folder is, and the looking again. What is known of each kind is
`dataset`'s and `training`'s.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.dataset.lock import lock_uri
from rayjobs.dreambooth.lock import FILE
from rayjobs.status.dataset import DataSetStatus, DataSetWatch
from rayjobs.status.training import RunStatus, look_at_run

WATCH_S = 5.0
CLEAR = "\x1b[H\x1b[J"
Status = DataSetStatus | RunStatus


def watch(uri: str) -> Callable[[], Status]:
    """What looks at the folder again at each call. Raises BadInput for one that is no output."""
    storage.check(uri)
    if storage.exists(lock_uri(uri)):
        return DataSetWatch(uri).look
    if storage.exists(storage.join(uri, FILE)):
        return lambda: look_at_run(uri)
    raise BadInput(
        f"{uri} is neither a data set (it has no spec.lock.json) nor a training run (no {FILE}); "
        "give the output.uri of a job that has begun"
    )


def tell(uri: str, again: bool = False, as_json: bool = False) -> None:
    """Print how the job goes; with `again` until it is done. JSON is one line a look."""
    look = watch(uri)
    while True:
        status = look()
        if as_json:
            print(json.dumps({"uri": uri, **asdict(status)}, ensure_ascii=False), flush=True)
        else:
            clear = CLEAR if again and sys.stdout.isatty() else ""
            print(f"{clear}{status.text(uri)}", flush=True)
        if not again or status.state == "done":
            return
        time.sleep(WATCH_S)
