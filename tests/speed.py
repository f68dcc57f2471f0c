"""One stacked pass for both losses against two passes with the full vocabulary head (as the authors' script does):
`python tests/speed.py` prints, for every size, whether the gradients agree, the ratio of time and of memory, and how
much of the rate of a large matrix product, measured in the same run, a step reaches (its model FLOPs are those of
on_paper.py). On a GPU it also measures the full size in bf16, with and without torch.compile. Random weights; medians
of several steps, taken in turn. Before that: how fast one process reads images, and makes rows of a batch."""
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
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from on_paper import activation_bytes, model_flops

from data import Batches, Mapped, Records, Subset, World
from losses import (
    ImageHalf,
    TextHalf,
    flat_positions,
    flow_matching_loss,
    joint_loss,
    logit_normal_times,
    mask_tokens,
    masked_diffusion_loss,
    noise_latents,
    stratified_times,
)
from model import PRESETS, Config, DDiT, DDiTConfig, DualDiffusion
from sample import SHIPPED
from t5 import T5Config, T5Encoder
from train import RECIPES, make_mesh, parallelize

MIDDLE = Config(DDiTConfig(depth=8, width=512, heads=8, text_dim=512, pos_size=64),
                T5Config(d_model=512, num_layers=6, num_heads=8, d_kv=64, d_ff=1024))
SIZES = {"tiny": (PRESETS["tiny"], replace(RECIPES["tiny"]["1"], learn_t5="no"), 64),
         "middle": (MIDDLE, replace(RECIPES["sd3-medium"]["1"], size=128), 4),
         "full": (PRESETS["sd3-medium"], RECIPES["sd3-medium"]["1"], 64)}


def two_passes(ddit, t5, images, texts, text_weight):
    """Both heads over everything in both passes; what is not wanted is thrown away."""
    noisy = noise_latents(images.latents, images.noise, images.t)
    velocity, _ = ddit(noisy, images.t, t5(images.captions))
    _, logits = ddit(texts.latents, torch.zeros_like(texts.t), t5(texts.noisy))
    image_loss = flow_matching_loss(velocity, images.latents, images.noise)
    return image_loss + text_weight * masked_diffusion_loss(logits, texts.tokens, texts.masked, texts.t)


def one_pass(*args):
    return joint_loss(*args)[0]


def random_halves(config, recipe, batch, device):
    """What a step of that many rows learns from, in random numbers -> ImageHalf, TextHalf."""
    side, vocab = recipe.size // config.vae.factor, config.ddit.vocab
    latents = torch.randn(batch, config.vae.latent_channels, side, side, device=device)
    captions, tokens = torch.randint(vocab - 1, (2, batch, recipe.length))
    t = stratified_times(batch)
    noisy, masked = mask_tokens(tokens, t, torch.ones_like(tokens, dtype=torch.bool), vocab - 1)
    images = ImageHalf(latents, captions, torch.randn(latents.shape), logit_normal_times(batch))
    texts = TextHalf(latents, tokens, noisy, flat_positions(masked), t)
    return ImageHalf(*(x.to(device) for x in images)), TextHalf(*(x.to(device) for x in texts))


def matmul_rate(device, dtype):
    """The best of ten large matrix products, in FLOPs per second."""
    n = 8192 if device.type == "cuda" else 1024
    x, w = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(seconds(lambda: F.linear(x, w), device) for _ in range(10))


def seconds(run, device):
    """How long run() takes."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(run, device):
    """Bytes: of the GPU at the most; on a CPU, of what is saved for the backward pass."""
    if device.type != "cuda":
        return activation_bytes(run)
    torch.cuda.reset_peak_memory_stats()
    run().backward()
    return torch.cuda.max_memory_allocated()


def measure(name, device, dtype, compiled, rounds):
    config, recipe, batch = SIZES[name]
    torch.manual_seed(0)
    with device:
        ddit, t5 = DDiT(config.ddit), T5Encoder(config.t5).to(dtype).requires_grad_(False)
    for p in ddit.parameters():  # zero heads and gates would hide mistakes
        torch.nn.init.normal_(p, std=0.02)
    parallelize(ddit, make_mesh(device, "ddp"), dtype, compiled)
    halves = random_halves(config, recipe, batch, device)

    def loss(way):
        ddit.zero_grad()
        return way(ddit, t5, *halves, recipe.text_weight)

    def gradients(way):
        loss(way).backward()
        return [p.grad.to_local() for p in ddit.parameters()]

    ways = one_pass, two_passes
    one, two = map(gradients, ways)
    apart = sum((a - b).double().square().sum() for a, b in zip(one, two)) / sum(b.double().square().sum() for b in two)
    del one, two
    memory = [peak_memory(lambda: loss(way), device) for way in ways]
    times = [[seconds(lambda: loss(way).backward(), device) for way in ways] for _ in range(rounds)]
    fast, slow = map(statistics.median, zip(*times))
    rate = matmul_rate(device, dtype)
    share = model_flops(config, recipe) * batch / fast / rate
    print(f"{name}{', compiled' if compiled else ''}: gradients apart {apart.item() ** 0.5:.1e}; a step of {batch} in "
          f"{fast:.3f} s ({batch / fast:.1f} a second), {slow / fast:.2f} times as fast as two passes; activations "
          f"{memory[0] / 1e9:.2f} GB, {memory[1] / 1e9:.2f} in two passes; {share:.0%} of the {rate / 1e12:.2f} "
          f"TFLOP/s of a large product", flush=True)


def image_rate():
    """How many photographs a process can bring to 256 pixels per second: JPEGs of 512 x 384 out of a shard."""
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


def row_rate():
    """How many rows of stage 3 in the built-in world a process can make per second, latents at hand."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(os.path.join(folder, "latents.npy"), np.zeros((25_000, 2, 16, 8, 8), np.float16))
        recipe = RECIPES["tiny"]["3"]
        subset = Subset(World(), np.arange(25_000), Mapped(os.path.join(folder, "latents.npy")))
        batches = Batches(subset, subset, DualDiffusion.load(SHIPPED).tokenizer, recipe, 0, slice(0, recipe.batch))
        times = []
        for step in range(100):
            start = time.perf_counter()
            batches[step]
            times.append(time.perf_counter() - start)
        print(f"one process makes {recipe.batch / statistics.median(times):.0f} tiny rows a second", flush=True)


def main():
    image_rate()
    row_rate()
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
