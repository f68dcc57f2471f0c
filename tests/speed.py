"""How fast it is, beside how fast it could be: `python tests/speed.py` prints three Markdown tables, in some minutes.

1. What a user feels: training, answers, captions, pictures, the start of the program, memory. Each stands beside its
   floor. Where the networks run, this is the FLOPs of their matrix products and convolutions at the best rate that this
   machine has shown. Where they do not, it is what no such program can do without: to import torch, to read the file.
2. Texts as the paper samples them, beside ours: time, and how many are right.
3. Our networks beside diffusers' and transformers' of equal size, where these two are installed.

Times are medians of several runs; what is compared runs in turn. A GPU is used if there is one. Memory is read from
Linux's /proc.
"""
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch comes; sample.py says why

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import make_golden
from evaluate import caption_holds
from metrics import interval

from data import World, slices, to_pixels
from losses import (
    ImageHalf,
    TextHalf,
    joint_loss,
    logit_normal_times,
    mask_tokens,
    noise_latents,
    stratified_times,
)
from model import DTYPES, DDiT, DDiTConfig, DualDiffusion, find_parts
from sample import SHIPPED, answer, caption, revealed_share, text_ids, text_to_image
from t5 import T5Config, T5Encoder
from train import RECIPES
from vae import VAE, VAEConfig

TOP = Path(__file__).resolve().parents[1]
TINY = find_parts(SHIPPED)[0]  # the preset, with the shipped tokenizer's vocabulary
QUESTION = ["sample.py", "--vqa", "assets/scene.png", "what color is the circle?"]


# ---------------------------------------------------------------- how to measure


def seconds(run, device):
    """How long run() takes."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_rate(device, dtype):
    """The most FLOPs per second of ten large matrix products and ten large convolutions. On a CPU these come from two
    libraries, MKL and oneDNN, and on AMD's processors the first reaches half of the second in fp32."""
    n = 8192 if device.type == "cuda" else 1024
    x, w = torch.randn(2, n, n, device=device, dtype=dtype)
    image, kernel = torch.randn(1, 256, 64, 64).to(x), torch.randn(256, 256, 3, 3).to(x)
    product = min(seconds(lambda: F.linear(x, w), device) for _ in range(10))
    convolution = min(seconds(lambda: F.conv2d(image, kernel, padding=1), device) for _ in range(10))
    return max(2 * n ** 3 / product, 2 * 64 * 64 * 9 * 256 * 256 / convolution)


def in_turn(*runs, device, rounds=5):
    """The median of the seconds that each of the runs takes."""
    return [statistics.median(times) for times in zip(*([seconds(run, device) for run in runs] for _ in range(rounds)))]


def beside_floor(flops, *runs, device, dtype, rounds=5):
    """-> floor, why, and the median of the seconds that each of the runs takes. The floor: how long that many FLOPs
    take at the best rate, which is measured in turn with them."""
    rates = []
    _, *times = in_turn(lambda: rates.append(best_rate(device, dtype)), *runs, device=device, rounds=rounds)
    return flops / max(rates), f"{flops / 1e9:.3g} GFLOP at {max(rates) / 1e9:.3g} GFLOP/s", *times


def flops_of(run):
    """The FLOPs of the matrix products and convolutions in run(). On a CPU, attention is by plain products, for torch's
    counter does not know its kernel."""
    plain = nullcontext() if torch.cuda.is_available() else sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, plain:
        run()
    return counter.get_total_flops()


def memory(code):
    """The most bytes that a Python process holds while it runs this code. (ru_maxrss would begin with ours.)"""
    code += "\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, check=True, text=True, stdout=subprocess.PIPE)
    return 1024 * int(done.stdout.split()[-1])


def program(args):
    """The code that runs one of our programs, for `memory`."""
    return f"import runpy, sys; sys.argv = {args}; runpy.run_path(sys.argv[0], run_name='__main__')"


# ---------------------------------------------------------------- what a user feels


def row(*cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def header(*names):
    print()
    row(*names)
    row(*["---"] * len(names))


def time_row(what, took, floor, why, count=None):
    """took, floor: seconds; count: of what was done in that time."""
    rate = f", {count / took:.0f} a second" if count else ""
    row(what, f"{took:.3g} s{rate}", f"{floor:.3g} s: {why}", f"{floor / took:.0%}")


def training_row(device, *flags):
    """train.py itself, in the type that it chooses -> the most memory that it held."""
    recipe = RECIPES["tiny"]["1"]
    with tempfile.TemporaryDirectory() as out:
        peak = memory(program(["train.py", "--stage", "1", "--steps", "80", "--pool", "640", "--out", out, *flags]))
        folder = Path(out, "stage1")
        rates = [json.loads(line)["images_per_s"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        dtype = json.loads((folder / "run.json").read_text())["dtype"]
    took = recipe.batch / statistics.median(rates[1:])  # the first steps are slow
    ddit, t5, halves = DDiT(TINY.ddit), T5Encoder(TINY.t5), random_halves(TINY, recipe, recipe.batch, "cpu")
    flops = flops_of(lambda: joint_loss(ddit, t5, *halves, recipe.text_weight)[0].backward())
    floor = beside_floor(flops, device=device, dtype=DTYPES[dtype])
    what = ", ".join(["a training step, stage 1", f"{recipe.batch} images", dtype, *flags])
    time_row(what, took, *floor, recipe.batch)
    return peak


def use_rows(device, dtype):
    """The shipped model, on scenes that it has not seen."""
    dd, world, rng = DualDiffusion.load(SHIPPED, device=device, dtype=dtype), World(10 ** 6), np.random.default_rng(0)
    pixels = torch.from_numpy(to_pixels([world.image(i) for i in range(256)]))
    questions = [world.question(i, rng)[0] for i in range(256)]
    prompts = [world.caption(i, rng) for i in range(32)]
    for what, count, run in (("answers", 256, lambda: answer(dd, pixels, questions)),
                             ("captions", 256, lambda: caption(dd, pixels)),
                             ("pictures, 28 steps with guidance", 32, lambda: text_to_image(dd, prompts))):
        *floor, took = beside_floor(flops_of(run), run, device=device, dtype=dtype, rounds=3)  # flops_of warms up
        time_row(f"{count} {what}", took, *floor, count)


@torch.no_grad()
def as_the_paper(dd, pixels, texts, steps):
    """Ancestral sampling step by step, at temperature 0: in each a pass of every row, with the text head at every
    position, and every mask is revealed with the same chance (Eq. 5). texts: ids, maskable -> list of str."""
    share, lines = revealed_share(steps), []
    for part in slices(len(pixels), *pixels.shape[2:], dd.device):
        latents, (tokens, maskable) = dd.encode_image(pixels[part]), map(torch.tensor, zip(*texts[part]))
        tokens[maskable] = dd.tokenizer.mask_id
        for chance in (share.diff() / (1 - share[:-1])).tolist():
            states, times = dd.t5(tokens.to(dd.device)), torch.zeros(len(tokens), device=dd.device)
            ids = dd.ddit(latents, times, states, image_rows=0)[1][..., :-1].argmax(-1).cpu()
            reveal = (tokens == dd.tokenizer.mask_id) & (torch.rand(tokens.shape) < chance)
            tokens[reveal] = ids[reveal]
        lines += [dd.tokenizer.decode(row[free]) for row, free in zip(tokens, maskable)]
    return lines


def sampler_rows(device, dtype, count=1000):
    """The paper's way of sampling texts beside ours."""
    dd, world, rng = DualDiffusion.load(SHIPPED, device=device, dtype=dtype), World(10 ** 6), np.random.default_rng(0)
    pixels = torch.from_numpy(to_pixels([world.image(i) for i in range(count)]))
    asked, truths = zip(*(world.question(i, rng) for i in range(count)))
    header(f"{count} texts", "takes", "right")
    for kind, steps, texts, ours, right in (
            ("answers", 16, [(question, "") for question in asked], lambda **how: answer(dd, pixels, asked, **how),
             lambda k, text: text == truths[k]),
            ("captions", 23, [""] * count, lambda **how: caption(dd, pixels, **how),
             lambda k, text: caption_holds(text, world.scene(k)[0]))):
        texts = [text_ids(dd, text) for text in texts]
        for way, run in ((f"as in the paper, {steps} steps", lambda: as_the_paper(dd, pixels, texts, steps)),
                         (f"random order, {steps} steps", lambda: ours(steps=steps)), ("by entropy", ours)):
            written = []
            took = seconds(lambda: written.extend(run()), device)
            scores = [right(k, text) for k, text in enumerate(written)]
            low, high = interval(scores)
            row(f"{kind}, {way}", f"{took:.3g} s", f"{sum(scores) / count:.1%} [{low:.1f}, {high:.1f}]")


def start_rows(device, dtype):
    programs = [[sys.executable, *QUESTION], [sys.executable, "-c", "import torch"]]
    runs = [lambda args=args: subprocess.run(args, cwd=TOP, check=True, stdout=subprocess.DEVNULL) for args in programs]
    time_row("`python sample.py --vqa ...`, from start to answer", *in_turn(*runs, device=device), "to import torch")
    took, floor = in_turn(lambda: DualDiffusion.load(SHIPPED, device=device, dtype=dtype),
                          lambda: Path(SHIPPED).read_bytes(), device=device)
    size = os.path.getsize(SHIPPED)
    why = f"to read {size / 1e6:.1f} MB at {size / floor / 1e9:.1f} GB/s"
    time_row("of that, loading the checkpoint", took, floor, why)


def memory_rows(training):
    imported = memory("import torch")
    weights = sum(w.nbytes for w in DualDiffusion.load(SHIPPED).state_dict().values())
    why = f"torch, and {weights / 1e6:.0f} MB of weights in fp32"
    for what, peak in (("answering, peak memory", memory(program(QUESTION))), ("training, peak memory", training)):
        floor = imported + weights
        row(what, f"{peak / 1e9:.2f} GB", f"{floor / 1e9:.2f} GB: {why}", f"{floor / peak:.0%}")


# ---------------------------------------------------------------- beside diffusers and transformers


def same_work(device, dtype):
    """-> what, our way, their way. As in SD3 and T5-XXL, but 4 blocks of width 512, and a VAE of half the width; images
    of 256 pixels (the VAE's: 128), texts of 256 tokens. Our text head is left out, and their last block made whole."""
    from diffusers.models.attention import JointTransformerBlock
    config = DDiTConfig(depth=4, width=512, heads=8), T5Config(d_model=512, num_layers=4, num_heads=8, d_ff=1280), \
        VAEConfig(channels=64)
    ours = DDiT(config[0]), T5Encoder(config[1]), VAE(config[2])
    states = [make_golden.random_state({k: w.shape for k, w in module.state_dict().items()}) for module in ours]
    for module, state in zip(ours, states):
        module.load_state_dict(state)
    states[0] |= make_golden.random_state(make_golden.y_embedder(512))
    ddit, t5, vae, sd3, their_t5, their_vae = (module.to(device, dtype).eval() for module in (*ours, *(
        build(state, c) for build, state, c in zip(
            (make_golden.sd3_transformer, make_golden.t5_encoder, make_golden.autoencoder), states, config))))
    sd3.transformer_blocks[-1] = JointTransformerBlock(512, 8, 64, context_pre_only=False).to(device, dtype)

    def random(*shape):
        return torch.randn(shape, device=device, dtype=dtype)
    x, text, pooled, t = random(2, 16, 32, 32), random(2, 256, 4096), random(2, 2048), torch.rand(2, device=device)
    tokens, pixels, z = torch.randint(32000, (2, 256), device=device), random(1, 3, 128, 128), random(1, 16, 16, 16)
    no_text = torch.zeros(2, 256, dtype=torch.bool)  # no logits are wanted
    yield ("`DDiT`, forward and backward: `SD3Transformer2DModel`",
           lambda: ddit(x, t, text, no_text)[0].mean().backward(),
           lambda: sd3(x, text, pooled, 1000 * t).sample.mean().backward())
    with torch.no_grad():
        yield ("`DDiT`: `SD3Transformer2DModel`", lambda: ddit(x, t, text, no_text),
               lambda: sd3(x, text, pooled, 1000 * t))
        yield "`T5Encoder`: `T5EncoderModel`", lambda: t5(tokens), lambda: their_t5(tokens)
        yield "`VAE.encode`: `AutoencoderKL`", lambda: vae.encode(pixels), lambda: their_vae.encode(pixels)
        yield "`VAE.decode`: `AutoencoderKL`", lambda: vae.decode(z), lambda: their_vae.decode(z)


def compare(device, dtype):
    header("the same work: ours, theirs", "ours", "theirs", "theirs / ours", "floor of ours", "reached")
    for what, ours, theirs in same_work(device, dtype):
        theirs()  # to warm up
        floor, why, our_time, their_time = beside_floor(flops_of(ours), ours, theirs, device=device, dtype=dtype)
        row(what, f"{our_time:.3g} s", f"{their_time:.3g} s", f"{their_time / our_time:.2f}", f"{floor:.3g} s: {why}",
            f"{floor / our_time:.0%}")


def random_halves(config, recipe, batch, device):
    """What a step of that many rows learns from, in random numbers -> ImageHalf, TextHalf."""
    side, vocab = recipe.size // config.vae.factor, config.ddit.vocab
    latents, noise = torch.randn(2, batch, config.vae.latent_channels, side, side, device=device)
    captions, tokens = torch.randint(vocab - 1, (2, batch, recipe.length))
    image_t, t = logit_normal_times(batch).to(device), stratified_times(batch)
    noisy, masked = mask_tokens(tokens, t, torch.ones_like(tokens, dtype=torch.bool), vocab - 1)
    images = ImageHalf(latents, noise, noise_latents(latents, noise, image_t), image_t, captions.to(device))
    return images, TextHalf(latents, tokens, noisy.to(device), masked, t)


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.processor()


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # as sample.py computes
    print(f"{machine()}, threads: {torch.get_num_threads()}, torch {torch.__version__}, {str(dtype)[6:]} if not said")
    header("what", "takes", "floor", "reached")
    training = training_row(device)
    training_row(device, "--compile")
    use_rows(device, dtype)
    start_rows(device, dtype)
    if device.type == "cpu":
        memory_rows(training)
    sampler_rows(device, dtype)
    if all(map(importlib.util.find_spec, ("diffusers", "transformers"))):
        compare(device, dtype)


if __name__ == "__main__":
    main()
