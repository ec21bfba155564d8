"""A model's files before they are fetched: all that loading would refuse, from headers alone.

Owns the stand-in for a model on S3: its small files, and of its weights the headers, which is what
`rayjobs.diffusion.weights` looks at. Reads no weights.
"""

import re
import struct
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

from rayjobs import storage
from rayjobs.config import BadInput
from rayjobs.diffusion.files.folder import STEMS
from rayjobs.diffusion.files.header import read_header
from rayjobs.diffusion.weights import Source, Weights, locate
from rayjobs.models.options import SourceConfig
from rayjobs.storage.door import find, open_fs
from rayjobs.storage.patience import translate_errors

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
HEADER_BYTES = 2**20
MOST_HEADER_BYTES = 100 * 2**20
"""More is what a damaged file says; the library's own limit."""
SDXL = {"unet": 2_567_463_684, "text": 817_720_320, "vae": 83_653_863}
"""Parameters of SDXL's parts, for a model that is not at hand."""


@contextmanager
def found(config: SourceConfig, key: str = "model.uri") -> Generator[Weights | None]:
    """The files of a model, or None of a hub id, or one that stands on such, never fetched here.

    Raises BadInput, as loading it would, and StorageError.
    """
    local = _from_hub(config) if is_hub_id(config.uri) else config.uri
    base = config.base
    if local is None or (base is not None and not Path(base).is_dir()):
        yield None
        return
    remote = storage.is_remote(local)
    with TemporaryDirectory() if remote else nullcontext("") as folder:
        uri = _stand_in(local, Path(folder)) if remote else local
        revision = config.revision if uri == config.uri else None
        source = Source(
            uri=uri, base=base, revision=revision, prediction_type=config.prediction_type
        )
        try:
            weights = locate(source)
        except BadInput:
            raise
        except ValueError as error:
            raise BadInput(f"{key}: {str(error).replace(uri, config.uri)}") from None
        yield weights


def num_parameters(weights: Weights | None) -> dict[str, int]:
    """Numbers of the UNet (`unet`), the text encoders (`text`) and the autoencoder (`vae`).

    Of an unknown model, and of parts that a single file lacks, those of SDXL.
    """
    if weights is None:
        return dict(SDXL)
    if weights.single is not None:
        path = weights.path if weights.path.is_file() else next(weights.path.glob("*.safetensors"))
        sizes = {n: tensor.size for n, tensor in read_header(path).tensors.items()}
        counted = dict.fromkeys(SDXL, 0)
        for name, size in sizes.items():
            counted[_part(name)] += size
        return {part: count or SDXL[part] for part, count in counted.items()}
    counted = dict.fromkeys(SDXL, 0)
    for part, variant in weights.variants.items():
        wanted = f"{STEMS.get(part, 'model')}{'' if variant is None else f'.{variant}'}.safetensors"
        for file in (weights.path / part).glob("*.safetensors"):
            if re.sub(r"-\d+-of-\d+", "", file.name) == wanted:
                of = "text" if part.startswith("text") else part
                counted[of] += sum(tensor.size for tensor in read_header(file).tensors.values())
    return counted


def _part(name: str) -> str:
    """Which part a tensor of a single file is of."""
    if name.startswith("first_stage_model"):
        return "vae"
    return "text" if name.startswith(("conditioner", "cond_stage_model")) else "unet"


def is_hub_id(uri: str) -> bool:
    return bool(HUB_ID.fullmatch(uri)) and not Path(uri).exists()


def _from_hub(config: SourceConfig) -> str | None:
    """The copy of a hub's model that is on this machine, if one is; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(config.uri, "model_index.json", revision=config.revision)
    return str(Path(file).parent) if isinstance(file, str) else None


def _stand_in(uri: str, folder: Path) -> str:
    """A local folder or file like the one at `uri`, in which weights are headers and holes."""
    fs, root = open_fs(uri)
    listed = find(uri)
    if not listed:
        raise storage.NotThere(f"{uri}: nothing is there")
    for name, facts in listed.items():
        relative = Path(root).name if name == root else name.removeprefix(f"{root}/")
        file = folder / relative
        file.parent.mkdir(parents=True, exist_ok=True)
        with translate_errors(f"s3://{name}"):
            if file.suffix in (".json", ".txt"):
                fs.get_file(name, str(file))
                continue
            head = b""
            if file.suffix == ".safetensors":
                head = fs.cat_file(name, start=0, end=min(HEADER_BYTES, facts["size"]))
                whole = _header_bytes(head)
                if len(head) < whole:
                    head = fs.cat_file(name, start=0, end=min(whole, facts["size"]))
        with file.open("wb") as out:
            out.write(head)
            out.truncate(facts["size"])
    return str(folder / Path(root).name) if list(listed) == [root] else str(folder)


def _header_bytes(head: bytes) -> int:
    length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
    return 8 + length if length <= MOST_HEADER_BYTES else 0
