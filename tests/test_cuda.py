"""On a GPU: the default commands, bf16 against the CPU's float32, and a step that waits for nothing."""
import glob
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from model import DualDiffusion
from sample import SHIPPED, answer, caption, infill, text_to_image

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FEW = ["--steps", "20", "--pool", "256"]


def run(*args, launch=()):
    done = subprocess.run([sys.executable, *launch, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_default_command_of_each_stage_and_its_resumption(tmp_path):
    """Stage 1 under torchrun."""
    for stage in ("0", "1", "2", "2hr", "3"):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"] if stage == "1" else []
        command = ["train.py", "--stage", stage, "--out", tmp_path, *FEW, "--save-minutes", "0"]
        assert "barrier()" not in run(*command, launch=launch)  # as torch warns where one has no device
        folder = tmp_path / f"stage{stage}"
        shutil.rmtree(train.checkpoints(folder / "checkpoints")[-1])
        (folder / "model.safetensors").rename(folder / "before.safetensors")
        assert "19/20" in run(*command, launch=launch)
        lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        assert lines[-1]["step"] == 20 and np.isfinite([v for v in lines[-1].values() if v is not None]).all()
        a, b = (DualDiffusion.load(str(folder / name)).state_dict() for name in ("before.safetensors",
                                                                                 "model.safetensors"))
        far = sum((a[n].double() - b[n].double()).square().sum() for n in a) / sum(
            a[n].double().square().sum() for n in a)
        assert far ** 0.5 < 1e-2, stage  # GPUs do not add in the same order every time


@pytest.fixture(scope="module")
def systems():
    """The shipped model on the CPU in float32 and on the GPU in bf16; unseen scenes."""
    world = data.World(9)
    pixels = torch.from_numpy(data.to_pixels([world.image(i) for i in range(32)]))
    return (DualDiffusion.load(SHIPPED), DualDiffusion.load(SHIPPED, device="cuda:0", dtype=torch.bfloat16), pixels,
            world)


def test_bf16_on_the_gpu_against_float32_on_the_cpu(systems):
    cpu, gpu, pixels, world = systems
    a, b = (dd.encode_image(pixels).float().cpu() for dd in (cpu, gpu))
    assert ((a - b).norm() / a.norm()) < 2e-2
    rng = np.random.default_rng(0)
    texts = [world.caption(i, rng) for i in range(32)]
    tokens = torch.tensor([cpu.tokenizer.encode(text, 24) for text in texts])
    outs = [dd.ddit(a.to(dd.device), torch.full((32,), 0.5, device=dd.device), dd.t5(tokens.to(dd.device)))
            for dd in (cpu, gpu)]
    for x, y in zip(*outs):
        y = y.float().cpu()
        assert ((x - y).norm() / x.norm()) < 3e-2


def test_the_four_uses_give_what_the_cpu_gives(systems):
    cpu, gpu, pixels, world = systems
    rng = np.random.default_rng(1)
    questions = [world.question(i, rng)[0] for i in range(32)]
    blanks = [world.caption(i, rng).replace(" red", " _").replace(" circle", " _") for i in range(32)]
    for use in (lambda dd: answer(dd, pixels, questions, generator=torch.Generator().manual_seed(0)),
                lambda dd: caption(dd, pixels, generator=torch.Generator().manual_seed(0)),
                lambda dd: infill(dd, pixels, blanks, generator=torch.Generator().manual_seed(0))):
        right = sum(a == b for a, b in zip(use(cpu), use(gpu)))
        assert right >= 30, right  # a near tie may fall the other way
    texts = [world.caption(i, rng) for i in range(32)]
    a, b = (text_to_image(dd, texts, cfg=3.0, generator=torch.Generator().manual_seed(0)).cpu() for dd in (cpu, gpu))
    assert (a - b).abs().mean() < 0.05


def test_offload(systems):
    _, gpu, pixels, world = systems
    off = DualDiffusion.load(SHIPPED, device="cuda:0", dtype=torch.bfloat16, offload=True)
    assert next(off.t5.parameters()).device.type == "cpu" and next(off.ddit.parameters()).device.type == "cuda"
    questions = [world.question(i, np.random.default_rng(i))[0] for i in range(32)]
    a, b = (answer(dd, pixels, questions, generator=torch.Generator().manual_seed(0)) for dd in (gpu, off))
    assert sum(x == y for x, y in zip(a, b)) >= 30


def test_kept_latents_are_the_cpu_s(tmp_path):
    for device in ("cpu", "cuda"):
        run("train.py", "--stage", "1", "--out", tmp_path / device, "--device", device, *FEW, "--steps", "1")
    a, b = (np.load(glob.glob(str(tmp_path / device / "latents-*.npy"))[0]).astype(float) for device in ("cpu", "cuda"))
    assert np.abs(a - b).max() < 4e-3 * np.abs(a).max() and np.linalg.norm(a - b) < 1e-3 * np.linalg.norm(a)


def test_a_step_waits_for_nothing(tmp_path, monkeypatch):
    """Steps 6 to 15 of a run, with every wait of the program for the GPU an error."""
    calls, losses = [], train.training_losses

    def watch(*args):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if 6 <= len(calls) <= 15 else "default")
        return losses(*args)
    monkeypatch.setattr(train, "training_losses", watch)
    monkeypatch.setattr(sys, "argv", ["train.py", "--stage", "1", "--out", str(tmp_path), *FEW])
    try:
        train.main()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) >= 20


def test_a_picture_from_the_command_line(tmp_path):
    run("sample.py", "--t2i", "a small red circle", "--out", tmp_path / "x.png")
    assert Image.open(tmp_path / "x.png").size == (64, 64)
