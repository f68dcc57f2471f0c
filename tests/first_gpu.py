"""The first minutes on a GPU, with nothing to decide: `python tests/first_gpu.py` runs four parts, the most valuable
first. Each is a program of its own with a time limit, prints as it goes, and can be run alone by its name. Together
they take at most nine minutes.

    tests        tests/test_cuda.py
    steps        a training step of every stage at full size: time, memory, share of the bf16 rate measured beside it
    use          drawing, captioning, encoding and decoding at full size, at 1, 4, 16 and 64 images at once
    diffusers    the same work as in diffusers and transformers, where these are installed (see speed.py)

All weights are random. fake_gpu.py runs `steps` and `use` on tensors without memory, where there is no GPU."""
import copy
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from functools import partial

import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
import train
from model import PARTS, PRESETS, DualDiffusion, make_part
from sample import SHIPPED, caption, text_to_image

LIMITS = {"tests": 120, "steps": 210, "use": 120, "diffusers": 80}  # seconds, 530 in all
PASSES = {"1": 16, "2": 32, "2hr": 96, "3": 16}  # of a step on one GPU
COUNTS = (1, 4, 16, 64)  # images at once
BF16 = torch.bfloat16


def row(*cells):
    print("|", " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells), "|", flush=True)


def full_size(path, t5, vae, tokenizer, device, dtypes):
    """In place of DualDiffusion.load: sd3-medium, with the few parts of a tokenizer that are used."""
    config, parts, tokenizer = copy.deepcopy(PRESETS["sd3-medium"]), {}, Namespace(
        vocab_size=32100, mask_id=32099, eos_id=1, encode=lambda text, length: [2] * length, decode=str,
        text_ids=lambda text, length, *prompts: ([2] * length, [True] * (length - 1) + [False]))
    for part in PARTS:
        torch.set_default_dtype(dtypes[part])
        with device:
            parts[part] = make_part(getattr(config, part))
    torch.set_default_dtype(torch.float32)
    return DualDiffusion(config, tokenizer, **parts).eval()


def learner_and_batch(preset, stage, rows, device, out, parallel="fsdp", checkpointing=True):
    """A Learner whose optimizers have their state, and a data.Batch of so many rows."""
    args = Namespace(seed=0, preset=preset, stage=stage, start=SHIPPED, init=SHIPPED, vae=None, text_encoder="t5",
                     files=(SHIPPED, None, None, None), caption_prompt=None, answer_suffix=None, parallel=parallel,
                     checkpointing=checkpointing, compile=False, keep=1, save_minutes=1e9, show_every=1e9)
    recipe = train.RECIPES[preset][stage]
    side = recipe.size // 8
    tokens, texts = torch.ones(rows, recipe.length).long(), data.Subset(data.World(), range(100))
    dd, modules = train.starting_point(args, recipe, texts, device, BF16)
    images = torch.rand(rows, 3, recipe.size, recipe.size)
    if preset == "tiny" and stage != "0":  # whose latents are stored
        images = torch.rand(rows, 2, dd.config.vae.latent_channels, side, side).half()
    text_images = images if stage == "2hr" else None
    batch = data.Batch(images, text_images, tokens, tokens, tokens > 0, slice(0, rows), 0)
    learner = train.Learner(dd, modules, recipe, args, BF16, out)
    for p in learner.parameters:  # a first step, after which the optimizer has its state
        p.grad = torch.zeros_like(p)
    run_step(learner, [])
    return learner, batch


def run_step(learner, batches):
    train.train(learner, [batches], Namespace(bar=range(1), recent=[]), [])


def ways(dd, size, length=256):
    """{name: a function that does it for n images at once}; drawing is one step, without the decoder."""
    side = size // dd.config.vae.factor

    def draw(n):
        decode, DualDiffusion.decode_image = DualDiffusion.decode_image, lambda dd, x: x
        try:
            text_to_image(dd, ["x"] * n, "", size, size, length, steps=1)
        finally:
            DualDiffusion.decode_image = decode
    return {"drawing": draw,
            "captioning": lambda n: caption(dd, torch.zeros(n, 3, size, size), length, 2, temperature=1.0),
            "encoding": lambda n: dd.encode_image(torch.zeros(n, 3, size, size)),
            "decoding": lambda n: dd.decode_image(torch.zeros(n, 16, side, side, device=dd.device))}


def rate(device):
    """The bf16 FLOPs per second of large matrix products, the best of five."""
    x = torch.randn(8192, 8192, device=device, dtype=BF16)
    return max(2 * 8192 ** 3 / seconds(lambda: x @ x) for _ in range(5))


def seconds(run):
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def steps(device):
    from torch.utils.flop_counter import FlopCounterMode
    train.DualDiffusion.load, train.find_parts = full_size, lambda *files: (PRESETS["sd3-medium"], {}, None)
    os.environ["LOCAL_WORLD_SIZE"] = "1"
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    row("stage", "rows per pass", "seconds per pass", "peak, GB", "TFLOP/s", "of the bf16 rate")
    row(*["---"] * 6)
    for stage, passes in PASSES.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        rows = train.RECIPES["sd3-medium"][stage].batch // passes
        with tempfile.TemporaryDirectory() as out:
            learner, batch = learner_and_batch("sd3-medium", stage, rows, device, out)
            with FlopCounterMode(display=False) as counter:
                run_step(learner, [batch])
            took = min(seconds(partial(run_step, learner, [batch])) for _ in range(2))
            speed, best = counter.get_total_flops() / took, rate(device)
            row(stage, rows, took, torch.cuda.max_memory_allocated() / 1e9, speed / 1e12, f"{speed / best:.0%}")
        del learner, batch


def use(device):
    dd = full_size(None, None, None, None, device, dict.fromkeys(PARTS, BF16))
    data.PIXELS["cuda"] = 2 ** 40  # no slices
    state = torch.cuda.memory_allocated()
    row("seconds per image, GB above the weights; at once", *COUNTS)
    row(*["---"] * 5)
    for size in (512, 256, 1024):
        for name, run in ways(dd, size).items():
            cells = []
            for count in COUNTS:
                torch.cuda.reset_peak_memory_stats()
                with torch.no_grad():
                    run(count)
                    took = seconds(lambda: run(count)) / count
                cells.append(f"{took:.3g}, {(torch.cuda.max_memory_allocated() - state) / 1e9:.3g}")
            row(f"{name}, {size} pixels", *cells)


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    if sys.argv[1:] in (["steps"], ["use"]):
        {"steps": steps, "use": use}[sys.argv[1]](torch.device("cuda", 0))
        return
    python = [sys.executable, "-u"]
    commands = {"tests": [*python, "-m", "pytest", "-q", f"{here}/test_cuda.py"],
                "steps": [*python, __file__, "steps"], "use": [*python, __file__, "use"],
                "diffusers": [*python, f"{here}/speed.py", "diffusers"]}
    for name in sys.argv[1:] or commands:
        start = time.perf_counter()
        print(f"\n# {name}: at most {LIMITS[name]} s", flush=True)
        try:
            status = subprocess.run(commands[name], timeout=LIMITS[name]).returncode
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
        print(f"# {name}: {status}, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
