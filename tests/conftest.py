"""Small random models of each family, built in process, and the starter model, loaded once."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EDMDPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rayjobs import storage
from rayjobs.diffusion.model import Model, load_model
from rayjobs.starter import components

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The endpoint of an S3 server (moto) in a process of its own, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh bucket's URI; the standard AWS variables name its server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    client = botocore.session.get_session().create_client("s3")
    client.create_bucket(Bucket=name)
    storage.forget_connections()
    yield f"s3://{name}"
    storage.forget_connections()


CEPH_CONF = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon},v1:127.0.0.1:{old}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
keyring = {folder}/keyring
mon data = {folder}/mon
osd data = {folder}/osd
rgw data = {folder}/rgw
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon cluster log file = {folder}/cluster.log
mon allow pool size one = true
mon data avail crit = 1
osd pool default size = 1
osd pool default pg num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
bluestore block create = true
bluestore block size = 4294967296
bluestore cache size = 67108864
osd memory target = 402653184
[client.rgw.a]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
"""
CEPH_CAPS = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.rgw.a": {"mon": "allow rw", "osd": "allow rwx"},
}


class Ceph:
    """A Ceph cluster of one monitor, one disk and one S3 gateway, all in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.access_key, self.secret_key = "writer", "writer-secret"
        with contextlib.ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(3)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            self._mon, self._old, self._gateway = (p.getsockname()[1] for p in probes)
        self.endpoint = f"http://127.0.0.1:{self._gateway}"
        self._daemons: list[subprocess.Popen[bytes]] = []

    def boot(self) -> None:
        fsid, disk = str(uuid.uuid4()), str(uuid.uuid4())
        ports = {"mon": self._mon, "old": self._old, "gateway": self._gateway}
        conf = CEPH_CONF.format(fsid=fsid, folder=self.folder, **ports)
        (self.folder / "ceph.conf").write_text(conf)
        for name in ("mon", "osd", "rgw"):
            (self.folder / name).mkdir()
        keyring, monmap = str(self.folder / "keyring"), str(self.folder / "monmap")
        for name, caps in CEPH_CAPS.items():
            allowed = [word for pair in caps.items() for word in ("--cap", *pair)]
            new = [] if Path(keyring).exists() else ["--create-keyring"]
            self._tool("ceph-authtool", keyring, *new, "--gen-key", "-n", name, *allowed)
        addresses = f"[v2:127.0.0.1:{self._mon},v1:127.0.0.1:{self._old}]"
        self._tool("monmaptool", "--create", "--fsid", fsid, "--addv", "a", addresses, monmap)
        self._tool("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._daemon("ceph-mon", "-i", "a")
        key = self._tool("ceph-authtool", keyring, "-n", "osd.0", "-p").strip()
        secrets = self.folder / "secrets.json"
        secrets.write_text(json.dumps({"cephx_secret": key}))
        self._tool("ceph", "osd", "new", disk, "-i", str(secrets))
        self._tool("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", disk)
        self._daemon("ceph-osd", "-i", "0")
        self._tool("ceph", "auth", "import", "-i", keyring)
        self.start()
        for user in (self.access_key, "owner"):
            keys = (f"--access-key={user}", f"--secret={user}-secret")
            self._tool(
                "radosgw-admin", "user", "create", f"--uid={user}", f"--display-name={user}", *keys
            )

    def start(self) -> None:
        """Bring the gateway up, also again after `stop`."""
        gateway = self._daemon("radosgw", "-n", "client.rgw.a")
        for _ in range(600):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._gateway), 1).close()
                return
            assert gateway.poll() is None, "radosgw ended; its log is in the folder"
            time.sleep(0.1)
        raise TimeoutError("radosgw does not listen")

    def stop(self) -> None:
        """Take the gateway away at once; what is stored stays."""
        self._end(self._daemons.pop())

    def close(self) -> None:
        while self._daemons:
            self._end(self._daemons.pop())

    def make_bucket(self, name: str) -> str:
        """The URI of a new bucket that the writer may do everything with."""
        self._client(self.access_key).create_bucket(Bucket=name)
        return f"s3://{name}"

    def read_only_bucket(self, name: str) -> str:
        """The URI of another user's new bucket, which the writer may list and read."""
        owner = self._client("owner")
        owner.create_bucket(Bucket=name)
        statement = {
            "Effect": "Allow",
            "Principal": {"AWS": [f"arn:aws:iam:::user/{self.access_key}"]},
            "Action": ["s3:ListBucket", "s3:GetObject"],
            "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"],
        }
        policy = {"Version": "2012-10-17", "Statement": [statement]}
        owner.put_bucket_policy(Bucket=name, Policy=json.dumps(policy))
        return f"s3://{name}"

    def _client(self, user: str) -> Any:
        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=user,
            aws_secret_access_key=f"{user}-secret",
        )

    def _tool(self, *command: str) -> str:
        named = {**os.environ, "CEPH_CONF": str(self.folder / "ceph.conf")}
        return subprocess.run(
            command, env=named, check=True, timeout=120, capture_output=True, text=True
        ).stdout

    def _daemon(self, *command: str) -> subprocess.Popen[bytes]:
        # A daemon ends with us even when we are killed.
        ends = ("setpriv", "--pdeathsig", "KILL")
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            daemon = subprocess.Popen(
                [*ends, *command, "-f", "-c", str(self.folder / "ceph.conf")],
                stdout=log,
                stderr=log,
            )
        self._daemons.append(daemon)
        return daemon

    @staticmethod
    def _end(daemon: subprocess.Popen[bytes]) -> None:
        daemon.kill()
        daemon.wait()


@pytest.fixture(scope="session")
def ceph() -> Iterator[Ceph]:
    """A Ceph S3 server of our own: real signatures, policies and races. Up in about 20 s."""
    tools = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "setpriv")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)} (radosgw ceph-mon ceph-osd ceph-common)")
    with tempfile.TemporaryDirectory(prefix="ceph-", ignore_cleanup_errors=True) as folder:
        server = Ceph(Path(folder))
        try:
            server.boot()
            yield server
        finally:
            server.close()


@pytest.fixture(scope="session")
def picture() -> Callable[[int], Image.Image]:
    """A smooth random picture of 64x64 for each number."""

    def make(number: int) -> Image.Image:
        coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3), np.uint8)
        return Image.fromarray(coarse).resize((64, 64), Image.Resampling.BICUBIC)

    return make


@pytest.fixture(scope="session")
def starter() -> Model:
    return load_model("starter")


@pytest.fixture(scope="session", params=["sdxl", "sd", "playground"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A diffusers folder with random weights for each family, by name."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for name in ("sdxl", "sd", "playground"):
        torch.manual_seed(0)
        build_pipeline(name, root).save_pretrained(root / name)
        made[name] = root / name
    return made


def build_pipeline(name: str, root: Path) -> StableDiffusionXLPipeline | StableDiffusionPipeline:
    xl = name != "sd"
    tokenizers = [
        components.save_tokenizer(root / f"tokenizer-{pad[:1]}", pad)
        for pad in (components.END, "!")
    ]
    parts = {
        "vae": _vae(edm=name == "playground"),
        "unet": _unet(xl),
        "tokenizer": tokenizers[0],
        "text_encoder": CLIPTextModel(_text_config(tokenizers[0])),
    }
    if not xl:
        betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
        scheduler = PNDMScheduler(**betas, skip_prk_steps=True, steps_offset=1)
        return StableDiffusionPipeline(
            **parts,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    scheduler = (
        EDMDPMSolverMultistepScheduler()
        if name == "playground"
        else EulerDiscreteScheduler.from_config(components.build_scheduler().config)
    )
    second = CLIPTextModelWithProjection(_text_config(tokenizers[1]))
    return StableDiffusionXLPipeline(
        **parts,
        text_encoder_2=second,
        tokenizer_2=tokenizers[1],
        scheduler=scheduler,
        add_watermarker=False,
    )


def _text_config(tokenizer: components.CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=32,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(edm: bool) -> AutoencoderKL:
    kinds = {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    normal = (
        {
            "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
            "scaling_factor": 0.5,
            "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
        }
        if edm
        else {}
    )
    return AutoencoderKL(
        block_out_channels=[16, 16, 16, 16],
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        **kinds,
        **normal,
    )


def _unet(xl: bool) -> UNet2DConditionModel:
    extra = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        }
        if xl
        else {}
    )
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=xl,
        cross_attention_dim=64 if xl else 32,
        norm_num_groups=8,
        **extra,
    )
