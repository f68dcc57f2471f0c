"""Learning: the stages of the paper, from nothing or from pretrained parts, in one loop.

    python train.py --stage 0      the tokenizer and the VAE; only where no pretrained parts exist
    python train.py --stage 1      dual diffusion on captions (`torchrun train.py --stage 1` is the same)
    python train.py --stage 2      the mask token's embedding
    python train.py --stage 3      question answering, mixed with captions; the image loss stays
    python train.py --eval assets/tiny.safetensors      judge a checkpoint on unseen scenes

With no other argument this is the `tiny` preset on the built-in world. Everything a stage writes is in
OUT/stageN/: model.safetensors (for sample.py), metrics.jsonl, sheets of samples, and the checkpoint that the same
command resumes from. The order of data and every random draw are functions of the seed and the step alone, so a
resumed run repeats what an uninterrupted one does.

References: Li et al., D-DiT, arXiv 2501.00289, section 4 and Table 6; Jordan et al., Muon, 2024 (torch.optim.Muon).
"""
import argparse
import copy
import hashlib
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from losses import corrupt, joint_loss
from model import DTYPES, PRESETS, DualDiffusion, add_parts
from sample import SHIPPED, Parser, answer, caption, existing_device, fail, text_to_image, warn
from t5 import Tokenizer

UNSEEN = 1_000_000  # added to the seed for scenes that training never draws
READING = {"order": "random", "temperature": 0.0}  # judged as sample.py reads by default


@dataclass
class Recipe:
    """The numbers of one stage, each a default that a flag of the same name overrides. They are Table 6's where it has
    them."""
    steps: int = 60_000
    batch: int = 512               # over all processes
    rate: float = 5e-5             # AdamW's learning rate
    muon: float = 0.0              # Muon's, for the matrices inside the blocks; 0: AdamW learns them too
    warmup: int = 5000             # steps of linear rise
    schedule: str = "constant"     # after it; "linear" falls to zero at the last step
    beta2: float = 0.999
    weight_decay: float = 1e-2
    clip: float = 2.0              # largest gradient norm
    ema: float = 0.0               # decay of a running average of the weights, which is what the stage leaves; 0: none
    length: int = 64               # tokens of text
    text_weight: float = 0.2       # of the text loss in Eq. 9
    image_weight: float = 1.0      # of the image loss; 0: no image is drawn in training (Table 10)
    time_mean: float = 0.0         # of the image times' logit: above 0, more noise is seen
    time_std: float = 1.0
    drop: float = 0.1              # share of captions that the image half sees empty, for guidance
    questions: float = 0.0         # share of the text half that are questions with answers
    learn_t5: str = "no"           # "mask": the mask token's row alone; "all"
    pool: int = 25_000             # scenes of the built-in world, encoded once and reused
    vocab: int = 412               # pieces of the tokenizer that stage 0 makes, at most


# Pictures of plain shapes stay readable under much noise: what goes where is settled at t > 0.9, which a logit of mean
# 0 would draw once in seventy times.
_tiny = Recipe(steps=600, batch=64, rate=2e-3, muon=0.02, warmup=50, beta2=0.98, length=24, text_weight=1.0,
               time_mean=1.5, time_std=1.2, learn_t5="all")
_paper = Recipe(ema=0.9995)
_later = replace(_paper, rate=3e-5, warmup=1000)
RECIPES = {
    "tiny": {"0": replace(_tiny, steps=2000, batch=16, schedule="linear"), "1": _tiny,
             "2": replace(_tiny, steps=40, learn_t5="mask"),
             "3": replace(_tiny, steps=2700, questions=0.7, schedule="linear")},
    "sd3-medium": {"1": _paper, "2": replace(_later, steps=200_000, length=256, learn_t5="mask"),
                   "3": replace(_later, steps=50_000, length=128, text_weight=1.0, questions=0.5)},
}


class Cast(nn.Module):
    """Runs a module with its parameters cast to `dtype`. The parameters themselves, their gradients and the optimizer
    stay in float32 (the "master weights"): a bf16 weight could not take a step smaller than 1/256 of itself."""
    def __init__(self, module, dtype):
        super().__init__()
        self.module, self.dtype = module, dtype

    def forward(self, *args, **kwargs):
        if self.dtype == torch.float32:
            return self.module(*args, **kwargs)
        weights = {name: p.to(self.dtype) for name, p in self.module.named_parameters()}
        return functional_call(self.module, weights, args, kwargs)


def autoencoding_loss(vae, pixels, noise):
    """Stage 0: reconstruction + 3e-5 KL, per value. Pixels (B,3,H,W) far from their picture's mean colour count four
    times, or small objects on a plain ground are learned last. -> total, reconstruction, KL."""
    decoded, mean, logvar = vae(pixels, noise)
    stands_out = (pixels - pixels.mean((2, 3), keepdim=True)).abs().amax(1, keepdim=True) > 0.3
    reconstruction = ((1 + 3 * stands_out) * (decoded.float() - pixels).square()).mean()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()
    return reconstruction + 3e-5 * kl, reconstruction, kl


def learning_rate(recipe, step):
    """The factor on every learning rate at a step (0-based)."""
    rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
    return rise * (1 - step / recipe.steps if recipe.schedule == "linear" else 1.0)


def make_optimizers(modules, recipe):
    """AdamW, and where the recipe says so Muon for the matrices inside blocks -> optimizers, [(parameter, view)].

    Muon wants matrices and a convolution's weight is 4-D, so Muon is given a view of it, (out, in * k * k), on the
    same memory; the loop hands the gradient over likewise."""
    named = [(name, p) for module in modules.values() for name, p in module.named_parameters() if p.requires_grad]
    inside = ("joint_blocks", "encoder.block", "encoder.down", "encoder.mid", "decoder.up", "decoder.mid")
    views = [(p, p if p.ndim == 2 else nn.Parameter(p.data.flatten(1))) for name, p in named
             if recipe.muon and p.ndim >= 2 and any(block in name for block in inside) and "bias" not in name]
    by_muon, decayed, plain = {id(p) for p, _ in views}, [], []
    for name, p in named:
        if id(p) not in by_muon:  # vectors and the embedding table do not decay
            (decayed if p.ndim >= 2 and "shared" not in name else plain).append(p)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.rate, betas=(0.9, recipe.beta2))]
    if views:  # T5 has neither 1/sqrt(d) on its attention scores nor norms on q and k: at the full rate they explode
        of_t5 = {id(p) for p in modules["t5"].parameters()} if "t5" in modules else set()
        groups = [{"params": [view for p, view in views if (id(p) in of_t5) == slow], "lr": recipe.muon * rate}
                  for slow, rate in ((False, 1.0), (True, 0.2))]
        groups = [group for group in groups if group["params"]]
        optimizers.append(torch.optim.Muon(groups, lr=recipe.muon, weight_decay=recipe.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers, views


def draw_rows(seed, first, count, total):
    """Which records rows first .. first+count of the endless stream are: each epoch a permutation of its own."""
    stream = np.arange(first, first + count)
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(total) for epoch in np.unique(stream // total)}
    return [int(order[at // total][at % total]) for at in stream]


def readable(source, path):
    """Try every image once -> the indices of those that can be read, kept in `path`; the others are named in a list
    beside it. More than one in ten bad among a thousand: something else is wrong, and the run ends."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        good, bad = [], {}
        for i in tqdm(range(len(source)), desc="checking images once", unit="image"):
            try:
                source.image(i)
                good.append(i)
            except (ValueError, OSError) as error:
                bad[i] = str(error)
                if sum(j > i - 1000 for j in bad) > 100:
                    fail(f"more than 100 bad images among the last thousand, the last: {error}")
        if bad:
            with open(f"{path}.bad.txt", "w") as f:
                f.writelines(f"{line}\n" for line in bad.values())
            warn(f"{len(bad)} of {len(source)} images cannot be read and are left out: {path}.bad.txt names them")
        np.save(path, good)
    return np.load(path).tolist()


def encode_pool(dd, source, ids, path):
    """Encode images once; later stages and runs read them from `path` -> memory-mapped array (max(ids)+1,2,C,h,w)
    float16 of means and log-variances, filled in at `ids`."""
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        side = len(source.image(ids[0])) // dd.config.vae.factor
        pool = np.lib.format.open_memmap(f"{path}.partial", "w+", np.float16,
                                         (max(ids) + 1, 2, dd.config.vae.latent_channels, side, side))
        with torch.inference_mode():
            for part in in_batches("encoding images once", list(ids), 100):
                pixels = torch.from_numpy(data.to_pixels([source.image(i) for i in part]))
                pool[part] = torch.stack(dd.vae.encode(pixels.to(dd.device)), 1).float().cpu().numpy()
        pool.flush()
        os.replace(f"{path}.partial", path)
    return np.load(path, mmap_mode="r")


def batch_texts(dd, source, rows, recipe, seed, first):
    """-> captions (B,L) for the image half, tokens (B,L) and maskable (B,L) for the text half."""
    tok, length = dd.tokenizer, recipe.length
    captions, tokens, maskable = [], [], []
    for at, i in enumerate(rows, first):
        rng = np.random.default_rng([seed, 1, at])
        text = source.caption(i, rng)
        asked = source.question(i, rng) if rng.random() < recipe.questions else None
        captions.append(tok.encode("" if rng.random() < recipe.drop else text, length))
        ids, free = data.question_ids(tok, *asked, length) if asked else data.caption_ids(tok, text, length)
        tokens.append(ids)
        maskable.append(free)
    return torch.tensor(captions), torch.tensor(tokens), torch.tensor(maskable)


def save_state(path, step, modules, optimizers, averages):
    """The checkpoint a run resumes from, atomically: written beside, flushed to disk, renamed."""
    state = {"step": step, "modules": {k: m.state_dict() for k, m in modules.items()},
             "optimizers": [o.state_dict() for o in optimizers], "averages": averages}
    with open(f"{path}.partial", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.partial", path)


# ---------------------------------------------------------------- judging and showing


def interval(right, total):
    """Wilson's 95% interval of a share, in per cent."""
    z, n, p = 1.96, max(total, 1), right / max(total, 1)
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return tuple(100 * min(max((middle + sign * half) / (1 + z * z / n), 0), 1) for sign in (-1, 1))


def in_batches(desc, items, size=250):
    return tqdm([items[at:at + size] for at in range(0, len(items), size)], desc=desc, leave=False)


def answers_right(dd, source, asked, generator):
    """asked: [(index, question, answer)] -> list of bool."""
    right = []
    for part in in_batches("answering", asked):
        pixels = torch.from_numpy(data.to_pixels([source.image(i) for i, _, _ in part]))
        given = answer(dd, pixels, [q for _, q, _ in part], generator=generator, **READING)
        right += [g.strip().lower() == a.strip().lower() for g, (_, _, a) in zip(given, part)]
    return right


def judge(dd, source, indices, seed=0, questions=True):
    """Score on data it has not seen -> {what: (right, asked)}. Answers must equal the one right answer. On the built-in
    world captions may be any true telling, and drawings are read back by data.read_scene; on the user's data a caption
    must equal the given one. Without a transformer (stage 0) it is the reconstructions that are read back."""
    rng, generator, scores = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed), {}
    world, settings = isinstance(source, data.World), dd.config.settings

    def read_right(images):
        right = [sorted(data.read_scene(image)) == sorted(source.scene(i)[0]) for i, image in zip(indices, images)]
        return sum(right), len(right)

    if world:
        scores["reader, true scenes"] = read_right(source.image(i) for i in indices)
    if dd.ddit is None:
        images = [source.image(i) for i in indices]
        seen = reconstruct(dd, images)
        error = np.square(np.stack(images) / 255.0 - seen / 255.0).mean()
        print(f"reconstruction of {len(images)} unseen images: {-10 * np.log10(error):.1f} dB")
        return scores | ({"scenes read back": read_right(seen)} if world else {})

    asked = [(i, kind) for i in indices for kind in (data.KINDS if world else ["all"])] if questions else []
    asked = [(kind, (i, *qa)) for i, kind in asked
             if (qa := source.question(i, rng, kind) if world else source.question(i, rng))]
    if asked:
        right = answers_right(dd, source, [q for _, q in asked], generator)
        scores["answers"] = (sum(right), len(right))
    if asked and world:
        for kind in data.KINDS:
            of_kind = [r for r, (k, _) in zip(right, asked) if k == kind]
            scores[f"  {kind}"] = (sum(of_kind), len(of_kind))
        held = data.World(source.seed, pairs="held")
        right = answers_right(dd, held, [(i, *held.question(i, rng)) for i in indices], generator)
        scores["answers, held-out pairs"] = (sum(right), len(right))

    told = []
    for part in in_batches("captioning", indices):
        pixels = torch.from_numpy(data.to_pixels([source.image(i) for i in part]))
        for i, text in zip(part, caption(dd, pixels, generator=generator, **READING)):
            told.append(data.telling_holds(text, source.scene(i)[0]) if world else text == source.caption(i, rng))
    scores["captions"] = (sum(told), len(told))

    if world:
        objects, scenes = [], []
        for part in in_batches("drawing", [source.caption(i, rng) for i in indices], 100):
            drawn = text_to_image(dd, part, cfg=settings.cfg, shift=settings.shift, generator=generator)
            for text, image in zip(part, data.to_images(drawn)):
                seen, wanted = data.read_scene(image), data.understand(text)[0]
                objects += [noun in map(str, seen) for noun in wanted]
                scenes.append(data.telling_holds(text, seen))
        scores["objects drawn"], scores["scenes drawn"] = (sum(objects), len(objects)), (sum(scenes), len(scenes))
    return scores


def report(scores):
    return "\n".join("{:26s}{:6.1f}%  [{:.1f}, {:.1f}]  {}/{}".format(
        what, 100 * right / max(total, 1), *interval(right, total), right, total)
        for what, (right, total) in scores.items())


def reconstruct(dd, images):
    """Images -> what is left of them after the VAE's round trip, uint8."""
    with torch.inference_mode():
        pixels = torch.from_numpy(data.to_pixels(images)).to(dd.device)
        return np.concatenate([data.to_images(dd.decode_image(dd.encode_image(part))) for part in pixels.split(64)])


def show(dd, source, indices, path, seed=0):
    """A sheet: eight images drawn from captions, eight unseen images with the caption and the answer given to them.
    In stage 0, images beside their reconstructions."""
    rng, generator, settings = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed), dd.config.settings
    if dd.ddit is None:
        images = [source.image(i) for i in indices[:8]]
        pairs = zip(images, reconstruct(dd, images))
        return data.sheet(path, [cell for true, seen in pairs for cell in ((true, "true"), (seen, "seen"))])
    texts = [source.caption(i, rng) for i in indices[:8]]
    drawn = text_to_image(dd, texts, cfg=settings.cfg, shift=settings.shift, generator=generator)
    images = [source.image(i) for i in indices[-8:]]
    pixels = torch.from_numpy(data.to_pixels(images))
    asked = [(source.question(i, rng) or ("what is this?",))[0] for i in indices[-8:]]
    read = zip(images, caption(dd, pixels, generator=generator, **READING), asked,
               answer(dd, pixels, asked, generator=generator, **READING))
    data.sheet(path, [*zip(data.to_images(drawn), texts), *((im, f"{c}\n{q}\n> {a}") for im, c, q, a in read)])


# ---------------------------------------------------------------- the loop


@contextmanager
def rank_0_first(rank, processes):
    """What rank 0 writes in this block, the others find when they enter it."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0 and processes > 1:
        dist.barrier()


def faster_dtype(device, stage):
    """bf16 on a GPU. Some processors multiply bf16 fast (AMX), others slowly: try, and take what wins. (Narrow
    convolutions, stage 0, never gain on a CPU.)"""
    if device.type == "cuda":
        return "bf16"
    if stage == "0":
        return "fp32"
    took = {}
    for name, dtype in DTYPES.items():
        x, w = torch.randn(4096, 128, dtype=dtype), torch.randn(512, 128, dtype=dtype)
        for _ in range(10):
            start = time.perf_counter()
            F.gelu(F.linear(x, w))
            took[name] = min(took.get(name, 1e9), time.perf_counter() - start)
    return min(took, key=took.get)


def starting_point(args, recipe, source, train_ids):
    """-> the system, and the parts of it that learn in this stage, {name: module}."""
    if args.stage == "0":
        texts = []
        for k in range(5000):
            rng = np.random.default_rng([args.seed, 4, k])
            i = train_ids[int(rng.integers(len(train_ids)))]
            texts += [source.caption(i, rng), "Q: {} A: {}".format(*source.question(i, rng) or ("", ""))]
        dd = DualDiffusion.build(copy.deepcopy(PRESETS[args.preset]), Tokenizer.train(texts, recipe.vocab), ["vae"])
        return dd, {"vae": dd.vae}
    before = os.path.join(args.out, f"stage{int(args.stage) - 1}", "model.safetensors")
    from_nothing = args.stage == "1" and not args.init and not os.path.exists(before)
    if from_nothing and args.preset != "tiny":
        fail(f"--preset {args.preset} needs pretrained parts: give --init")
    dd = DualDiffusion.load(args.init or (SHIPPED if from_nothing else before), args.t5, args.vae, args.spiece)
    if from_nothing or dd.ddit is None or dd.t5 is None:  # stage 0's parts are taken, the rest starts at random
        config = replace(copy.deepcopy(PRESETS[args.preset]), vae=dd.config.vae)
        fresh = DualDiffusion.build(config, dd.tokenizer, ["ddit", "t5"])
        fresh.vae = dd.vae
        dd = fresh
    dd.requires_grad_(False)
    modules = {"ddit": dd.ddit.requires_grad_()}
    if recipe.learn_t5 == "all":
        modules["t5"] = dd.t5.requires_grad_()
    elif recipe.learn_t5 == "mask":  # the table learns, but only one of its rows ever has a gradient
        modules["t5"] = dd.t5
        only = (torch.arange(dd.config.t5.vocab_size) == dd.tokenizer.mask_id)[:, None]
        dd.t5.shared.weight.requires_grad_().register_hook(lambda grad: grad * only.to(grad.device))
    return dd, modules


def main():
    args, recipe = parse_args()
    if args.eval:
        dd = DualDiffusion.load(args.eval, args.t5, args.vae, args.spiece, args.device, DTYPES[args.dtype or "fp32"])
        source = data.Records(args.data, dd.config.settings.size) if args.data else data.World(UNSEEN + args.seed)
        print(report(judge(dd, source, range(min(args.judge or 1000, len(source))), args.seed)))
        return

    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if recipe.batch % processes:
        fail(f"--batch {recipe.batch} cannot be shared equally by {processes} processes")
    if processes > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    # On the CPU the backward pass of bf16 flash attention is slow: fall back on plain matrix products there.
    torch.backends.cuda.enable_flash_sdp(device.type == "cuda")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    torch.manual_seed(args.seed)
    share = recipe.batch // processes
    mine = slice(rank * share, (rank + 1) * share)

    # What is learned from: the world's first `pool` scenes, or the user's records without those kept for judging.
    size = PRESETS[args.preset].settings.size
    if args.data:
        source = unseen = data.Records(args.data, size)
        with rank_0_first(rank, processes):
            ids = readable(source, kept_path(args, source, "images"))
        if len(ids) < 20:
            fail(f"{' '.join(args.data)}: holds {len(ids)} images; training wants 20 or more")
        pictures = list(dict.fromkeys(source.rows[i].image for i in ids))  # one may have several rows: all go one way
        kept = set(pictures[::max(20, -(-len(pictures) // (args.judge or 250)))])
        unseen_ids = [i for i in ids if source.rows[i].image in kept]
        train_ids = [i for i in ids if source.rows[i].image not in kept]
    else:
        source, unseen = data.World(args.seed, kinds=args.kinds), data.World(UNSEEN + args.seed)
        unseen_ids, train_ids = range(args.judge or 250), range(recipe.pool)

    dd, modules = starting_point(args, recipe, source, train_ids)
    dd.config.settings.size, dd.config.settings.length = size, recipe.length  # it is to be used as it was trained
    dd.to(device)
    folder = os.path.join(args.out, f"stage{args.stage}")
    os.makedirs(folder, exist_ok=True)
    with rank_0_first(rank, processes):
        dtype = keep_settings(folder, args, recipe, device, rank)
    frozen = {} if args.stage == "0" else {"t5": dd.t5}
    nets = {name: Cast(module, dtype) for name, module in (frozen | modules).items()}
    if processes > 1:
        nets |= {name: DistributedDataParallel(nets[name]) for name in modules}
    optimizers, views = make_optimizers(modules, recipe)
    learned = [p for module in modules.values() for p in module.parameters() if p.requires_grad]

    if args.stage == "0":
        def objective(rows, step, generator):
            pixels = torch.from_numpy(data.to_pixels([source.image(i) for i in rows[mine]])).to(device)
            side = size // dd.config.vae.factor
            noise = torch.randn(recipe.batch, dd.config.vae.latent_channels, side, side, generator=generator)
            return autoencoding_loss(nets["vae"], pixels, noise[mine].to(device, dtype))
        names = ("reconstruction", "kl")
    else:
        with rank_0_first(rank, processes):
            path = kept_path(args, source, "latents", len(train_ids), dd.vae)
            pool = encode_pool(dd, source, train_ids, path)

        def objective(rows, step, generator):
            mean, logvar = torch.from_numpy(pool[rows].astype(np.float32)).unbind(1)
            latents = dd.vae.normalize(mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=generator))
            captions, tokens, maskable = batch_texts(dd, source, rows, recipe, args.seed, step * recipe.batch)
            corruption = corrupt(latents.shape, tokens, maskable, dd.tokenizer.mask_id, generator,
                                 recipe.time_mean, recipe.time_std).rows(mine)
            return joint_loss(nets["ddit"], nets["t5"], latents[mine].to(device), captions[mine].to(device),
                              tokens[mine].to(device), corruption, recipe.text_weight, recipe.image_weight)
        names = ("image_loss", "text_loss")

    # Go on from the checkpoint, if this command left one.
    checkpoint, metrics = os.path.join(folder, "checkpoint.pt"), os.path.join(folder, "metrics.jsonl")
    averages = [p.detach().clone() for p in learned] if recipe.ema else []
    start = load_state(checkpoint, modules, optimizers, averages, device)
    if rank == 0 and os.path.exists(metrics):  # forget what was logged after that checkpoint
        with open(metrics) as f:
            kept = [line for line in f if line.endswith("}\n") and json.loads(line)["step"] <= start]
        with open(metrics, "w") as f:
            f.writelines(kept)
    stop = []  # Ctrl-C and a polite kill end the run soon, with a checkpoint
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: stop.append(number))

    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=f"stage {args.stage}",
               disable=rank > 0, mininterval=1)
    log, since = [], time.perf_counter()
    for step in bar:
        rows = [train_ids[k] for k in draw_rows(args.seed, step * recipe.batch, recipe.batch, len(train_ids))]
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        loss, *parts = objective(rows, step, generator)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learned, recipe.clip)
        for p, view in views:
            view.grad = p.grad.flatten(1) if p.grad is not None else None
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(recipe, step)
            optimizer.step()
        for p in learned:
            p.grad = None
        for average, p in zip(averages, learned):
            average.lerp_(p.detach(), 1 - recipe.ema)
        log.append(torch.stack([*parts, norm]).detach())

        done = step + 1
        ending = bool(stop)
        if processes > 1:  # a signal reaches the processes at different steps: every 20, they agree on one to stop at
            agreed = torch.tensor(float(ending), device=device)
            if done % 20 == 0:
                dist.all_reduce(agreed, dist.ReduceOp.MAX)
            ending = done % 20 == 0 and agreed.item() > 0
        report_now = done % 20 == 0 or done == recipe.steps  # here and at checkpoints the loop waits for the device
        save_now = done % args.save_every == 0 or done == recipe.steps or ending
        if rank == 0 and (report_now or save_now) and not torch.isfinite(loss + norm):
            fail(f"the loss or its gradient is not a number at step {done}; the last checkpoint is from before it. "
                 f"Lower --rate or --muon")
        if rank == 0 and report_now:
            *losses, mean_norm = torch.stack(log).mean(0).tolist()
            speed, log, since = len(log) * recipe.batch / (time.perf_counter() - since), [], time.perf_counter()
            bar.set_postfix({n: f"{x:.4f}" for n, x in zip(names, losses)}
                            | {"rate": f"{optimizers[0].param_groups[0]['lr']:.1e}", "images/s": f"{speed:.0f}"})
            with open(metrics, "a") as f:
                f.write(json.dumps({"step": done, **dict(zip(names, losses)), "grad_norm": mean_norm,
                                    "rate": optimizers[0].param_groups[0]["lr"], "images_per_s": speed}) + "\n")
        if rank == 0 and save_now:
            save_state(checkpoint, done, modules, optimizers, averages)
        if rank == 0 and done % args.show_every == 0 and done < recipe.steps:
            show(dd, unseen, unseen_ids, os.path.join(folder, f"samples-{done:06d}.png"))
            since = time.perf_counter()
        if ending:
            bar.close()
            sys.exit(f"stopped after step {done}; the same command goes on from there")
    bar.close()

    for average, p in zip(averages, learned):
        p.data.copy_(average)
    if rank == 0:
        finish(args, recipe, dd, source, train_ids, unseen, unseen_ids, folder)
    if processes > 1:
        dist.destroy_process_group()


def finish(args, recipe, dd, source, train_ids, unseen, unseen_ids, folder):
    """The end of a stage: the file for sample.py, the judged scores, a last sheet."""
    path = os.path.join(folder, "model.safetensors")
    if args.stage == "0":  # bring latents to mean 0 and deviation 1, which the transformer expects
        pixels = torch.from_numpy(data.to_pixels([source.image(i) for i in train_ids[:512]]))
        with torch.inference_mode():
            z = torch.cat([dd.vae.encode(part.to(dd.device))[0] for part in pixels.split(64)])
        dd.config.vae.shift, dd.config.vae.scale = z.mean().item(), 1 / z.std().item()
    dd.save(path, dtype=torch.float16)
    scores = judge(dd, unseen, unseen_ids, args.seed, questions=recipe.questions > 0)
    print(report(scores))
    with open(os.path.join(folder, "scores.json"), "w") as f:
        json.dump(scores, f)
    show(dd, unseen, unseen_ids, os.path.join(folder, "samples.png"))
    print(f"wrote {path}")


def load_state(path, modules, optimizers, averages, device):
    """-> the step to go on from; 0 where there is no checkpoint."""
    if not os.path.exists(path):
        return 0
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        fail(f"{path}: cannot be read ({str(error)[:80] or type(error).__name__}); delete it to start this stage anew")
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    for average, saved in zip(averages, state["averages"], strict=True):
        average.copy_(saved)
    return state["step"]


def kept_path(args, source, what, count=0, vae=None):
    """A file's name that changes with whatever its content depends on: the images, when they were last changed, how
    many there are and of what size; and for latents the VAE."""
    stamp = ([(row, os.stat(row.file).st_mtime_ns) for row in source.rows], source.size) if args.data else source.seed
    key = hashlib.sha256(repr((stamp, count)).encode())
    for tensor in vae.state_dict().values() if vae else ():
        key.update(tensor.cpu().numpy().tobytes())
    return os.path.join(args.out, f"{what}-{key.hexdigest()[:12]}.npy")


def keep_settings(folder, args, recipe, device, rank):
    """A folder holds one run: note its settings, and refuse to go on from its checkpoint with others -> the dtype to
    compute in. Only a run at a constant rate may be made longer."""
    path = os.path.join(folder, "run.json")
    given = {name: vars(args)[name] for name in ("preset", "data", "kinds", "init", "t5", "vae", "spiece", "seed")}
    settings = given | asdict(recipe)
    if rank == 0 and not os.path.exists(os.path.join(folder, "checkpoint.pt")):
        with open(path, "w") as f:
            json.dump(settings | {"dtype": args.dtype or faster_dtype(device, args.stage)}, f, indent=1)
    with open(path) as f:
        kept = json.load(f)
    changed = [f"{k} {kept.get(k)} is now {v}" for k, v in settings.items()
               if kept.get(k) != v and not (k == "steps" and recipe.schedule == "constant")]
    if changed:
        fail(f"{folder} holds a run with other settings ({', '.join(changed)}); delete it or give another --out")
    return DTYPES[kept["dtype"]]


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["0", "1", "2", "3"])
    parser.add_argument("--eval", metavar="FILE", help="judge this checkpoint instead of training")
    parser.add_argument("--judge", type=int, help="images to judge on (1000 with --eval, 250 at the end of a stage; "
                        "of the user's data at most one in twenty)")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    parser.add_argument("--data", nargs="+", help="images and texts: .json, .jsonl, .tar or folders; default: the "
                        "built-in world")
    parser.add_argument("--kinds", nargs="+", choices=data.KINDS, default=list(data.KINDS), metavar="KIND", help="of "
                        f"questions in the built-in world, of {', '.join(data.KINDS)}; one given twice is asked twice "
                        "as often")
    parser.add_argument("--init", help="checkpoint to start from; default: the stage before")
    add_parts(parser)
    parser.add_argument("--out", default="runs", help="where stageN/ folders are made")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=existing_device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="to compute in; default: the faster one")
    parser.add_argument("--save-every", type=int, default=200)
    parser.add_argument("--show-every", type=int, default=500)
    numbers = parser.add_argument_group("numbers of a stage, with defaults by preset and stage")
    for field in fields(Recipe):
        numbers.add_argument("--" + field.name.replace("_", "-"), type=field.type)
    args = parser.parse_args()
    if args.eval:
        return args, None
    if args.stage is None:
        fail("give --stage 0, 1, 2 or 3, or --eval FILE")
    if args.stage not in RECIPES[args.preset]:
        fail(f"--preset {args.preset} has no stage {args.stage}")
    given = {f.name: v for f in fields(Recipe) if (v := getattr(args, f.name)) is not None}
    recipe = replace(RECIPES[args.preset][args.stage], **given)
    for name in ("steps", "batch", "length", "pool", "save_every", "show_every"):
        if (vars(args) | vars(recipe))[name] < 1:
            fail(f"--{name.replace('_', '-')} must be at least 1")
    return args, recipe


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
