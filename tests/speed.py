"""One stacked pass for both losses against two passes with the full vocabulary head (as the authors' script does):
`python tests/speed.py` prints, for every size, whether the gradients agree, and the ratio of time and of memory.
On a GPU it also measures the full size in bf16, with and without torch.compile, and how much of the rate of a large
matrix product, measured in the same run, the step reaches. Random weights; medians of several steps, taken in turn."""
import os
import statistics
import sys
import tarfile
import tempfile
import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from on_paper import kept_for_backward

from data import Mapped, Records, World
from losses import (
    Corruption,
    flow_matching_loss,
    joint_loss,
    logit_normal_times,
    mask_tokens,
    masked_diffusion_loss,
    noise_latents,
    stratified_times,
)
from model import PRESETS, Config, DDiT, DDiTConfig, DualDiffusion, T5Config, T5Encoder
from sample import SHIPPED
from train import RECIPES, Feed, Stream, make_mesh, matmul_rate, model_flops, parallelize

MIDDLE = Config(DDiTConfig(depth=8, width=512, heads=8, text_dim=512, pos_size=64),
                T5Config(d_model=512, num_layers=6, num_heads=8, d_kv=64, d_ff=1024))
SIZES = {"tiny": (PRESETS["tiny"], replace(RECIPES["tiny"]["1"], learn_t5="no"), 64),
         "middle": (MIDDLE, replace(RECIPES["sd3-medium"]["1"], size=128), 4),
         "full": (PRESETS["sd3-medium"], RECIPES["sd3-medium"]["1"], 64)}


def two_passes(ddit, t5, latents, captions, tokens, c, text_weight):
    """Both heads over everything in both passes; what is not wanted is thrown away."""
    velocity, _ = ddit(noise_latents(latents, c.noise, c.image_t), c.image_t, t5(captions))
    _, logits = ddit(latents, torch.zeros_like(c.image_t), t5(c.noisy))
    image_loss = flow_matching_loss(velocity, latents, c.noise)
    return image_loss + text_weight * masked_diffusion_loss(logits, tokens, c.masked, c.text_t)


def one_pass(*args, text_weight):
    return joint_loss(*args, text_weight)[0]


def measure(name, device, dtype, compiled, rounds):
    config, recipe, batch = SIZES[name]
    torch.manual_seed(0)
    with device:
        ddit, t5 = DDiT(config.ddit), T5Encoder(config.t5).to(dtype).requires_grad_(False)
    for p in ddit.parameters():  # zero heads and gates would hide mistakes
        torch.nn.init.normal_(p, std=0.02)
    parallelize(ddit, make_mesh(device, "ddp"), dtype, compiled)
    side, vocab = recipe.size // config.vae.factor, config.ddit.vocab
    latents = torch.randn(batch, config.vae.latent_channels, side, side, device=device)
    captions, tokens = torch.randint(vocab - 1, (2, batch, recipe.length))
    t = stratified_times(batch)
    noisy, masked = mask_tokens(tokens, t, torch.ones_like(tokens, dtype=torch.bool), vocab - 1)
    c = Corruption(*(x.to(device) for x in (logit_normal_times(batch), torch.randn(latents.shape), t, noisy, masked)))
    captions, tokens = captions.to(device), tokens.to(device)

    def step(loss):
        total = loss(ddit, t5, latents, captions, tokens, c, text_weight=recipe.text_weight)
        total.backward()
        gradients = [p.grad.to_local() for p in ddit.parameters()]
        for p in ddit.parameters():
            p.grad = None
        if device.type == "cuda":
            torch.cuda.synchronize()
        return gradients

    def memory(loss):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(loss)
            return torch.cuda.max_memory_allocated()
        return kept_for_backward(lambda: loss(ddit, t5, latents, captions, tokens, c, text_weight=recipe.text_weight))

    ways, took = (one_pass, two_passes), {one_pass: [], two_passes: []}
    one, two = map(step, ways)
    apart = sum((a - b).double().square().sum() for a, b in zip(one, two)) / sum(b.double().square().sum() for b in two)
    del one, two
    used = [memory(loss) for loss in ways]
    for _ in range(rounds):
        for loss in ways:
            start = time.perf_counter()
            step(loss)
            took[loss].append(time.perf_counter() - start)
    fast, slow = (statistics.median(took[loss]) for loss in ways)
    rate = matmul_rate(device, dtype, *([8192] * 3 if device.type == "cuda" else [1024] * 3))
    reached = model_flops(config, recipe) * batch / fast / rate
    print(f"{name}{', compiled' if compiled else ''}: gradients apart {apart.item() ** 0.5:.1e}; a step of {batch} in "
          f"{fast:.3f} s ({batch / fast:.1f} a second), {slow / fast:.2f} times as fast as two passes; activations "
          f"{used[0] / 1e9:.2f} GB, {used[1] / 1e9:.2f} in two passes; {reached:.0%} of the {rate / 1e12:.2f} "
          f"TFLOP/s of a large product", flush=True)


def reading():
    """How many photographs a process can bring to 256 pixels in a second: JPEGs of 512 x 384 out of a shard."""
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(os.path.join(folder, "x.tar"), "w") as tar:
            for k in range(100):
                noise = Image.effect_noise((64, 48), 80).resize((512, 384), Image.Resampling.BICUBIC).convert("RGB")
                noise.save(os.path.join(folder, f"{k}.jpg"), quality=90)
                with open(os.path.join(folder, f"{k}.txt"), "w") as f:
                    f.write("noise")
                for name in (f"{k}.jpg", f"{k}.txt"):
                    tar.add(os.path.join(folder, name), name)
        records = Records(os.path.join(folder, "x.tar"), 256, folder)
        start = time.perf_counter()
        for k in range(len(records)):
            records.image(k)
            records.caption(k, np.random.default_rng(k))
        print(f"one process reads {len(records) / (time.perf_counter() - start):.0f} images a second", flush=True)


def making_rows():
    """How many rows of stage 3 in the built-in world a process can make in a second, latents at hand."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(os.path.join(folder, "latents.npy"), np.zeros((25_000, 2, 16, 8, 8), np.float16))
        recipe = RECIPES["tiny"]["3"]
        feed = Feed(World(), np.arange(25_000), Mapped(os.path.join(folder, "latents.npy")))
        stream = Stream(feed, feed, DualDiffusion.load(SHIPPED).tokenizer, recipe, 0, slice(0, recipe.batch))
        took = []
        for step in range(100):
            start = time.perf_counter()
            stream[step]
            took.append(time.perf_counter() - start)
        print(f"one process makes {recipe.batch / statistics.median(took):.0f} tiny rows a second", flush=True)


def main():
    reading()
    making_rows()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0,
                            world_size=1)
    for name in ("tiny", "middle"):
        measure(name, device, torch.float32, compiled=False, rounds=5)
    if device.type == "cuda":
        for compiled in (False, True):
            measure("full", device, torch.bfloat16, compiled, rounds=10)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
