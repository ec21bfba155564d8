"""What is pinned in a worker, and how a model is held, as locks tell it."""

from typing import Any

import pytest
import torch
import torch._inductor.config as inductor

from rayjobs.config import Workers
from rayjobs.dataset.lock import Segment
from rayjobs.generation.config import GenerateConfig
from rayjobs.generation.spec import determinism
from rayjobs.generation.spec.lock import config_of, job_part


def config(**model: Any) -> GenerateConfig:
    return GenerateConfig.model_validate(
        {
            "model": {"uri": "starter", **model},
            "prompts": {"inline": ["a star"]},
            "output": {"uri": "/nowhere"},
        }
    )


def test_the_compiler_does_not_choose_by_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "deterministic", False)
    monkeypatch.delenv("TORCHINDUCTOR_DETERMINISTIC", raising=False)
    threads = torch.get_num_threads()
    determinism.pin(Workers(num_cpus=threads))
    assert inductor.deterministic is True
    assert "compiler" not in determinism.current(config())
    assert determinism.current(config(compile="full"))["compiler"] == "deterministic"


def test_a_gpu_that_holds_a_model_otherwise_is_of_another_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(determinism, "_device", lambda _: "H200 (9.0), CUDA 13")
    assert determinism.current(config())["layout"] == "contiguous"
    for before in (config(channels_last=True), config(channels_last=False)):
        assert "layout" not in determinism.current(before)
    assert "vae" in determinism.current(config(dtype="float16"))
    assert "vae" not in determinism.current(config(dtype="float16", vae_dtype="float32"))
    monkeypatch.setattr(determinism, "_device", lambda _: "AMD")
    assert not {"layout", "vae"} & determinism.current(config(dtype="float16")).keys()


def test_locks_have_the_default_as_they_had_it_before() -> None:
    told = {"auto": True, True: "true", False: False}
    for layout, in_lock in told.items():
        mine = config(channels_last=layout, compile_cache="/somewhere")
        job = job_part(mine)
        assert repr(job["model"]["channels_last"]) == repr(in_lock)
        assert "compile_cache" not in job["model"]
        segment = Segment.model_construct(job=job)
        again = config_of(segment, "/nowhere", mine)
        assert again.model.channels_last == layout
        assert again.model.compile_cache == "/somewhere"
