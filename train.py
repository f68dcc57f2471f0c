"""Learning: the stages of the paper, from nothing or from pretrained parts, in one loop.

    python train.py --stage 0      the tokenizer and the VAE; only where no pretrained parts exist
    python train.py --stage 1      dual diffusion on captions (`torchrun train.py --stage 1` is the same)
    python train.py --stage 2      the mask token's embedding
    python train.py --stage 2hr    high resolution, with other images for the text loss than for the image loss
    python train.py --stage 3      question answering, mixed with captions; the image loss stays
    python train.py --eval assets/tiny.safetensors      judge a checkpoint on unseen scenes

With no other argument this is the `tiny` preset on the built-in world. Everything a stage writes is in
OUT/stageN/: model.safetensors (for sample.py), metrics.jsonl, sheets of samples, and the checkpoints that the same
command resumes from. What is learned at a step is a function of the seed and the step alone, so a resumed run repeats
what an uninterrupted one does, on however many processes (`torchrun --nproc_per_node 8 train.py ...`).

References: Li et al., D-DiT, arXiv 2501.00289, section 4 and Tables 6, 9 and 10; Jordan et al., Muon, 2024
(torch.optim.Muon); Zhao et al., PyTorch FSDP, arXiv 2304.11277; Chowdhery et al., PaLM, arXiv 2204.02311, appendix B
(model FLOPs).
"""
import argparse
import copy
import fcntl
import gc
import hashlib
import io
import json
import logging
import math
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import time
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from glob import escape, glob
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch comes; sample.py says why

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
from data import one_line, replacing
from losses import (
    ImageHalf,
    TextHalf,
    autoencoding_loss,
    flat_positions,
    joint_loss,
    logit_normal_times,
    mask_tokens,
    stratified_times,
)
from model import DTYPES, PRESETS, DualDiffusion, JointBlock, add_parts, inspect
from sample import (
    PIXELS,
    SHIPPED,
    Parser,
    answer,
    caption,
    default_device,
    existing_device,
    fail,
    number,
    run_program,
    seed,
    text_to_image,
    warn,
)
from t5 import train_tokenizer

UNSEEN = 1_000_000  # added to the seed for scenes that training never draws


@dataclass
class Recipe:
    """The numbers of one stage, each a default that a flag of the same name overrides. Table 6 has steps, batch, rate,
    warmup, weight_decay, size, length and text_weight. Clipping, the running average, a tenth of empty captions and the
    text length of stage 3 are the authors' scripts'; Muon and the linear schedule are ours, for the tiny preset."""
    steps: int = 60_000
    batch: int = 512               # over all processes
    rate: float = 5e-5             # AdamW's learning rate
    muon: float = 0.0              # Muon's, for the matrices inside the blocks; 0: AdamW learns them too
    warmup: int = 5000             # steps of linear rise
    schedule: str = "constant"     # after it; "linear" falls towards zero at the last
    beta2: float = 0.999
    weight_decay: float = 1e-2
    clip: float = 2.0              # largest gradient norm
    ema: float = 0.0               # decay of a running average of the weights, which is what the stage leaves; 0: none
    size: int = 256                # side of the images, pixels
    length: int = 64               # tokens of text
    text_weight: float = 0.2       # of the text loss in Eq. 9
    image_weight: float = 1.0      # of the image loss; 0: no image is drawn in training (Table 10)
    time_mean: float = 0.0         # of the image times' logit: above 0, more noise is seen
    time_std: float = 1.0
    drop: float = 0.1              # share of captions that the image half sees empty, for guidance
    questions: float = 0.0         # share of the text half that are questions with answers
    learn_t5: str = "no"           # "mask": the mask token's row alone; "all"
    pool: int = 25_000             # images whose latents are encoded once and kept; more are encoded as they come
    vocab: int = 412               # pieces of the tokenizer that stage 0 makes, at most


# Pictures of plain shapes stay readable under much noise: what goes where is settled at t > 0.9, which a logit of mean
# 0 would draw once in seventy times.
_tiny = Recipe(steps=600, batch=64, rate=2e-3, muon=0.02, warmup=50, beta2=0.98, size=64, length=24, text_weight=1.0,
               time_mean=1.5, time_std=1.2, learn_t5="all")
_paper = Recipe(ema=0.9995)
_later = replace(_paper, rate=3e-5, warmup=1000, length=256)
RECIPES = {
    "tiny": {"0": replace(_tiny, steps=2000, batch=16, schedule="linear"), "1": _tiny,
             "2": replace(_tiny, steps=40, learn_t5="mask"),
             "2hr": replace(_tiny, steps=300),
             "3": replace(_tiny, steps=3000, questions=0.65, schedule="linear")},
    "sd3-medium": {"1": _paper, "2": replace(_later, steps=200_000, learn_t5="mask"),
                   "2hr": replace(_later, steps=80_000, batch=768, size=512),
                   "3": replace(_later, steps=50_000, length=128, text_weight=1.0, questions=0.5)},
}
RECIPES["end-to-end"] = RECIPES["sd3-medium"]

# ---------------------------------------------------------------- what is learned from


class Feed(NamedTuple):
    """What is learned from: some of a source's records, and where they are kept, their latents."""
    source: object                     # a data.World or data.Records
    ids: np.ndarray                    # which records
    latents: object = None             # a data.Mapped array; at [i]: (2,C,h,w), mean and log-variance of record i

    def look(self, k, bad):
        """-> which record the k-th of `ids` is, and its image: latents, or pixels (3,H,W) in [-1,1]. One that cannot be
        read is noted in `bad`, and the next takes its place."""
        for k in range(k, k + 1000):
            i = int(self.ids[k % len(self.ids)])
            if self.latents is not None:
                return i, torch.tensor(self.latents.array[i])
            try:
                return i, torch.from_numpy(data.to_pixels([self.source.image(i)])[0])
            except (ValueError, OSError) as error:
                bad.append(str(error))
        raise ValueError(f"a thousand bad images in a row, the last: {bad[-1]}")


def feeds(paths, args, recipe):
    """-> Feeds of what is learned from and of what is kept for judging: the user's records, or the built-in world."""
    if not paths:
        return (Feed(data.World(args.seed, kinds=args.kinds), np.arange(recipe.pool)),
                Feed(data.World(UNSEEN + args.seed, kinds=args.kinds), np.arange(args.judge or 250)))
    source = data.Records(paths, recipe.size, args.out)
    unseen, learned = source.split(250)  # whatever --judge says: what is learned must not depend on it
    unseen = [i for i in unseen if source.readable(i)][:args.judge]
    if len(source) < 20:
        fail(f"{' '.join(paths)}: holds {len(source)} images; training wants 20 or more")
    if not unseen:
        fail(f"{' '.join(paths)}: of the images that are kept apart for judging none can be read")
    if args.stage in ("1", "2", "2hr") and not source.captioned:
        fail(f"{' '.join(paths)}: no image has a caption, which stage {args.stage} learns from")
    if recipe.questions and not source.questioned:
        warn(f"{' '.join(paths)}: no image has a question; stage {args.stage} will learn captions alone")
    return Feed(source, learned), Feed(source, np.array(unseen))


def with_latents(feed, dd, folder, shape, most):
    """The feed with its images encoded, if they are not too many. Done once: later stages and runs find them in a file
    whose name changes with all that they depend on. Images that cannot be read are named in a list beside it, left out
    of the feed, and NaN in the file."""
    source, ids, _ = feed
    if len(ids) > most:
        return feed
    key = hashlib.sha256(repr((source.version(ids), shape)).encode())
    for tensor in dd.vae.state_dict().values():
        key.update(tensor.float().cpu().numpy().tobytes())
    path = os.path.join(folder, f"latents-{key.hexdigest()[:12]}.npy")
    latents = data.Mapped(path)
    with claim(os.path.join(folder, ".latents.lock"), wait=True):  # two stages may start at once
        try:
            latents.array
        except Exception:  # not there yet, or cut off by a power cut
            encode_once(source, ids, dd, shape, path)
    ids = ids[~np.isnan(latents.array[ids, 0, 0, 0, 0])]
    if not len(ids):
        fail(f"{path}.bad.txt: none of the images can be read")
    return Feed(source, ids, latents)


def encode_once(source, ids, dd, shape, path):
    bad, whole = [], (int(max(ids)) + 1, 2, *shape)
    if (needed := 2 * math.prod(whole)) > shutil.disk_usage(os.path.dirname(path) or ".").free:
        fail(f"{path} would take {needed / 1e9:.1f} GB, and the disk has less: free some, or give a smaller --pool")
    with replacing(path) as beside:
        latents = np.lib.format.open_memmap(beside, "w+", np.float16, whole)
        for part in in_batches("encoding images once", ids, at_once(shape[-1] * dd.config.vae.factor)):
            images = {}
            for i in part:
                try:
                    images[i] = source.image(int(i))
                except (ValueError, OSError) as error:
                    latents[i] = np.nan
                    bad.append((i, str(error)))
            not_too_many(bad, part[-1])
            if images:
                with torch.no_grad():
                    moments = dd.vae.encode(torch.from_numpy(data.to_pixels(images.values())).to(dd.device))
                latents[list(images)] = torch.stack(moments, 1).float().cpu().numpy()
        latents.flush()
        if bad:
            with open(f"{path}.bad.txt", "w", errors="backslashreplace") as f:
                f.writelines(f"{message}\n" for _, message in bad)
            warn(f"{len(bad)} of {len(ids)} images cannot be read and are left out: {path}.bad.txt names them")


def not_too_many(bad, at):
    """bad: [(place, message)] so far. More than a hundred within a thousand places: something else is wrong."""
    recent = [message for place, message in bad if place > at - 1000]
    if len(recent) > 100:
        fail(f"more than 100 bad images among the last thousand: mend the data; the last: {recent[-1]}")


class Batch(NamedTuple):
    """What one process computes in one pass of a step."""
    images: torch.Tensor       # (B,2,C,h,w) latents' mean and log-variance, or (B,3,H,W) pixels: for the image loss
    read: torch.Tensor | None  # the same for the text loss, where that is about other images
    captions: torch.Tensor     # (B,L) for the image half
    tokens: torch.Tensor       # (B,L) for the text half
    noisy: torch.Tensor        # (B,L) the same, some of them masked
    image_t: torch.Tensor      # (B,)
    text_t: torch.Tensor       # (B,)
    masked: torch.Tensor       # (N,) the masked positions, counted row by row
    noise_seed: int            # of this step
    first: int                 # the place of the first row in the whole batch of the step
    bad: list                  # messages about images that could not be read

    def to(self, device):
        """What DataLoader has pinned is sent while the program goes on."""
        return Batch(*(x.to(device, non_blocking=True) if torch.is_tensor(x) else x for x in self))


class Stream(Dataset):
    """stream[step] is what one process computes at a step: a list of `passes` Batches, together the rows `mine` of the
    whole batch. A row's words are drawn with a generator of its own, seeded by its place in the endless stream; times
    and masks are drawn for the whole batch, with one seeded by the step. So what is learned at a step depends neither
    on the number of processes nor on where a run was interrupted: losses can be compared, and any run resumed, bit for
    bit."""
    def __init__(self, images, texts, tokenizer, recipe, seed, mine, passes=1):
        self.images, self.texts, self.tokenizer = images, texts, tokenizer
        self.recipe, self.seed, self.mine, self.passes = recipe, seed, mine, passes

    def __getitem__(self, step):
        r, bad, first = self.recipe, [], step * self.recipe.batch + self.mine.start
        count = self.mine.stop - self.mine.start
        picture, text = (data.draw_rows(self.seed, first, count, len(feed.ids)) for feed in (self.images, self.texts))
        rows = [self.row(*row, bad) for row in zip(range(first, first + count), picture, text)]
        images, read, captions, ids, free = zip(*rows)

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        image_t = logit_normal_times(r.batch, r.time_mean, r.time_std, generator)
        text_t = stratified_times(r.batch, generator=generator)
        tokens, maskable = torch.zeros(r.batch, r.length, dtype=torch.long), torch.zeros(r.batch, r.length).bool()
        tokens[self.mine], maskable[self.mine] = torch.tensor(ids), torch.tensor(free)
        noisy, masked = mask_tokens(tokens, text_t, maskable, self.tokenizer.mask_id, generator)
        noise_seed = int(torch.randint(2 ** 62, (), generator=generator))

        columns = [torch.stack(images), torch.stack(read) if self.texts is not self.images else None,
                   torch.tensor(captions), *(x[self.mine] for x in (tokens, noisy, image_t, text_t, masked))]
        parts = zip(*(x.chunk(self.passes) if x is not None else [None] * self.passes for x in columns))
        return [Batch(*part, flat_positions(hidden), noise_seed, self.mine.start + k * count // self.passes, bad)
                for k, (*part, hidden) in enumerate(parts)]

    def row(self, place, picture, text, bad):
        """-> the image that is drawn, the image that is read, the caption's ids, the ids to write and which may be
        masked."""
        r, tok = self.recipe, self.tokenizer
        rng = np.random.default_rng([self.seed, 1, place])
        i, image = self.images.look(picture, bad)
        told = written = self.images.source.caption(i, rng)
        j, read = i, image
        if self.texts is not self.images:  # stage 2hr
            j, read = self.texts.look(text, bad)
            written = self.texts.source.caption(j, rng)
        asked = self.texts.source.question(j, rng) if rng.random() < r.questions or written is None else None
        captions = tok.encode("" if told is None or rng.random() < r.drop else told, r.length)
        ids, free = tok.question_ids(*asked, r.length) if asked else tok.caption_ids(written, r.length)
        return image, read, captions, ids, free


def step_noise(batch, shape, whole, device):
    """Standard normal noise for a Batch: to sample the VAE's posterior with, and for the image loss -> (2,B,*shape).
    Drawn where it is used and for the `whole` batch of the step, of which every process keeps its rows."""
    generator = torch.Generator(device).manual_seed(batch.noise_seed)
    noise = torch.randn(2, whole, *shape, generator=generator, device=device)
    return noise[:, batch.first:batch.first + len(batch.images)]


# ---------------------------------------------------------------- the system, its processes, its checkpoints


class MaskRow(nn.Module):
    """T5 of which nothing learns but one row of its table, the mask token's (stage 2). T5 is kept in a tuple: not being
    a submodule, it is neither sharded nor saved."""
    def __init__(self, t5, mask_id):
        super().__init__()
        self.t5, self.mask_id = (t5,), mask_id
        self.row = nn.Parameter(t5.shared.weight[mask_id].detach().float().clone())
        t5.shared.register_forward_hook(self.put_in)

    def put_in(self, table, tokens, embedded):
        return torch.where((tokens[0] == self.mask_id)[..., None], self.row.to(embedded), embedded)

    def forward(self, tokens):
        return self.t5[0](tokens)

    def settle(self):
        """Write the row into the table, where sample.py looks for it."""
        self.t5[0].shared.weight.data[self.mask_id] = self.row.detach()


def starting_file(args, noted):
    """The checkpoint that a stage begins with, found once: a run that goes on keeps the one that it began with. By
    default it is what the stage before left, for stage 1 else the shipped file, for its tokenizer and VAE."""
    stages = {"0": [], "1": ["0"], "2": ["1"], "2hr": ["2"], "3": ["2hr", "2"]}[args.stage]
    paths = [os.path.join(args.out, f"stage{stage}", "model.safetensors") for stage in stages]
    if args.init or not paths or os.path.exists(noted.get("start", "")):
        return args.init or noted.get("start", "")
    before = next(filter(os.path.exists, paths), paths[-1])
    if os.path.exists(before):
        return before
    if args.stage != "1":
        fail(f"{before}: no such checkpoint; run the stage before with the same --out, or give --init")
    if args.preset != "tiny" and not (args.text_encoder == "none" and args.vae):
        fail(f"--preset {args.preset} needs pretrained parts: give --init (or --vae, with --text-encoder none)")
    return args.vae or SHIPPED


def changed_at(path):
    return os.stat(path).st_mtime_ns if os.path.isfile(path) else None


def starting_point(args, recipe, feed, device, dtype):
    """-> the system, and the parts of it that learn in this stage, {name: module}, in float32. Those that do not learn
    are in `dtype`; None: as their file has them."""
    torch.manual_seed(args.seed)
    preset = copy.deepcopy(PRESETS[args.preset])
    if args.stage == "0":
        texts = []
        for k in range(5000):
            rng = np.random.default_rng([args.seed, 4, k])
            i = int(data.pick(rng, feed.ids))
            asked = feed.source.question(i, rng) or ("", "")
            texts += [feed.source.caption(i, rng) or "", "Q: {} A: {}".format(*asked)]
        dd = DualDiffusion.build(preset, train_tokenizer(texts, recipe.vocab), ["vae"]).to(device)
        return dd, {"vae": dd.vae}
    known = inspect(args.start, args.t5, args.vae, args.spiece)[0]
    learned_t5 = recipe.learn_t5 == "all" or not known.t5.num_layers
    # The VAE is small, and its rounding would stay in the latents for good: always float32.
    dtypes = {"ddit": torch.float32, "t5": torch.float32 if learned_t5 else dtype, "vae": dtype and torch.float32}
    dd = DualDiffusion.load(args.start, args.t5, args.vae, args.spiece, device, dtypes)
    anew = args.stage == "1" and args.start in (args.vae, SHIPPED) and not args.init
    if anew or dd.ddit is None or dd.t5 is None:  # stage 0's parts are taken, the rest starts at random
        if args.text_encoder == "none":
            places = max(recipe.length, preset.settings.length)  # of the longest texts of any stage
            preset.t5 = replace(preset.t5, d_model=preset.ddit.width, num_layers=0, places=places)
            preset.ddit.text_dim = preset.ddit.width
        fresh = DualDiffusion.build(replace(preset, vae=dd.config.vae), dd.tokenizer, ["ddit", "t5"])
        fresh.vae = dd.vae
        dd = fresh.to(device)
    dd.config.settings.size, dd.config.settings.length = recipe.size, recipe.length  # to be used as it was trained
    dd.requires_grad_(False)
    pass
    modules = {"ddit": dd.ddit.requires_grad_()}
    if recipe.learn_t5 == "all" or not dd.config.t5.num_layers:
        modules["t5"] = dd.t5.requires_grad_()
    elif recipe.learn_t5 == "mask":
        modules["t5"] = MaskRow(dd.t5, dd.tokenizer.mask_id)
    return dd, modules


def make_mesh(device, parallel):
    """How the processes hold the weights. ddp: every process holds everything. fsdp: the processes of a node share out
    gradients and optimizer state, and gather weights for a step (ZeRO-2); every node holds all of it. A lone process is
    a mesh of one. Made once: every mesh has communicators of its own."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if parallel == "fsdp" else 1
    shape = dist.get_world_size() // sharing, sharing
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(module, mesh, dtype, compiled=False):
    """Share a module out among the processes of a mesh, in place, by FSDP2 (`fully_shard`).

    In all cases it computes in `dtype`, while the weights themselves, their gradients' mean over the processes and the
    optimizer stay in float32 (the "master weights"): a bf16 weight could not take a step smaller than 1/256 of itself.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here changes one in place
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = [part for part in module.modules() if isinstance(part, JointBlock)]
    for part in [*blocks, module]:
        if compiled and part is not module:
            part.compile()
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for method in ("encode", "decode"):  # the VAE's: they too need its weights gathered
        if hasattr(module, method):
            register_fsdp_forward_method(module, method)


def make_optimizers(modules, recipe):
    """AdamW, and where the recipe says so Muon for the matrices inside blocks -> optimizers, [(parameter, view)].

    Muon wants plain matrices, so it is given a view of every weight, on the same memory, a convolution's as
    (out, in * k * k); the loop hands the gradient over likewise."""
    named = [(name, p) for module in modules.values() for name, p in module.named_parameters()]
    inside = ("joint_blocks", "encoder.block", "encoder.down", "encoder.mid", "decoder.up", "decoder.mid")
    views = [(p, nn.Parameter(p.data.to_local().flatten(1))) for name, p in named
             if recipe.muon and p.ndim >= 2 and any(block in name for block in inside) and "bias" not in name]
    by_muon, decayed, plain = {id(p) for p, _ in views}, [], []
    for name, p in named:
        if id(p) not in by_muon:  # vectors and the embedding table do not decay
            (decayed if p.ndim >= 2 and "shared" not in name else plain).append(p)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=recipe.rate, betas=(0.9, recipe.beta2),
                                    fused=True)]
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


def learning_rate(recipe, step):
    """The factor on every learning rate at a step (0-based)."""
    rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
    return rise * (1 - step / recipe.steps if recipe.schedule == "linear" else 1.0)


def checkpoints(folder):
    """The checkpoints that a run has left, oldest first. What a killed process was writing ends in .partial."""
    return sorted(glob(os.path.join(escape(folder), "step-" + "[0-9]" * 8)))


def training_state(step, modules, optimizers, averages):
    """All that a run must remember, tensors alone. They are the run's own, so that loading writes into them; sharded
    ones know their place in the whole, so that any number of processes can read what any other wrote."""
    return {"step": torch.tensor(step), "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizers": {str(k): o.state_dict()["state"] for k, o in enumerate(optimizers)},
            "averages": dict(enumerate(averages))}


def remove(path):
    """Whatever it is: a folder, a file, a link."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.remove(path)


def save_checkpoint(folder, state, keep, rank):
    """Atomically: every process writes its part beside, then rank 0 renames the folder. The last `keep` stay."""
    step = int(state["step"])
    path = os.path.join(folder, f"step-{step:08d}")
    if rank == 0:
        for leftover in (path, *glob(os.path.join(escape(folder), "step-*.partial"))):
            remove(leftover)
    try:
        dist.barrier()
        # A lone process saves without collectives: they would make gloo's threads start OpenMP teams of their own, and
        # once there are more threads than cores OpenMP lets them sleep between loops. Training took 1.6 times as long.
        dcp.save(state, checkpoint_id=f"{path}.partial", no_dist=dist.get_world_size() == 1)
    except (Exception, CheckpointException) as error:
        if "DataLoader worker" in str(error):  # another's death, of which torch tells whoever runs just then
            raise
        room = shutil.disk_usage(folder).free / 1e6
        shutil.rmtree(f"{path}.partial", ignore_errors=True)
        fail(f"{path}: could not be written, with {room:.0f} MB left on the disk ({one_line(error)}); the "
             f"checkpoints before it stand")
    if rank == 0:
        os.replace(f"{path}.partial", path)
        for old in [old for old in checkpoints(folder) if int(old[-8:]) <= step][:-keep]:
            remove(old)


class TensorsOnly(dcp.FileSystemReader):
    """Reads a checkpoint, lets it run no code, and takes no page that the disk has spoilt. Every tensor is a zip file,
    which torch reads safely but without looking at its checksum; what tells where they lie, `.metadata`, is a pickle,
    and one may name any function. Here it may name what a checkpoint of tensors needs."""
    ALLOWED = {"torch": {"Size"}, "torch.serialization": {"_get_layout"}, "pathlib": {"PosixPath"},
               "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
               "torch.distributed.checkpoint.metadata": {
                   "Metadata", "StorageMeta", "MetadataIndex", "TensorStorageMetadata", "TensorProperties",
                   "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"}}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
            if is_dtype or name in TensorsOnly.ALLOWED.get(module, ()):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which no checkpoint of ours does")

    def read_metadata(self):
        with open(os.path.join(self.path, ".metadata"), "rb") as f:
            metadata = self.Unpickler(f).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def _slice_file(self, file, where):
        file.seek(where.offset)
        tensor = io.BytesIO(file.read(where.length))
        if zipfile.ZipFile(tensor).testzip():
            raise ValueError(f"{where.relative_path} is damaged")
        tensor.seek(0)
        return tensor


def load_checkpoint(folder, modules, optimizers, averages, rank):
    """Take up the newest checkpoint that can be read -> its step; 0 where there is none. Those that cannot are moved
    aside, so that they do not count among those to keep."""
    logging.disable(logging.WARNING)  # torch.distributed.checkpoint would print tracebacks of what one line tells
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # see save_checkpoint: we mean it
    found, aside = checkpoints(folder), []
    if found:  # an optimizer has no state before its first step: one at rate 0, without gradients, changes nothing
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
    state = training_state(0, modules, optimizers, averages)
    for path in reversed(found):
        try:
            dcp.load(state, storage_reader=TensorsOnly(path), no_dist=dist.get_world_size() == 1)
            for unreadable in aside if rank == 0 else ():
                remove(f"{unreadable}.unreadable")
                os.replace(unreadable, f"{unreadable}.unreadable")
            return int(state["step"])
        except (Exception, CheckpointException) as error:
            if re.search("KeyboardInterrupt|MemoryError", one_line(error)):  # which torch wraps; not the file's fault
                raise KeyboardInterrupt if "Keyboard" in one_line(error) else MemoryError from None
            warn(f"{path}: cannot be read ({one_line(error)}); the one before it is tried")
            aside.append(path)
    if found:
        fail(f"{folder}: none of its checkpoints can be read; delete them to start this stage anew")
    return 0


@contextmanager
def rank_0_first(rank):
    """What rank 0 writes in this block, the others find when they enter it."""
    if rank > 0:
        dist.barrier()
    yield
    if rank == 0:
        dist.barrier()


def faster_dtype(device, stage):
    """bf16 on a GPU. Some processors multiply bf16 fast (AMX), others slowly: try, and take what wins. (Narrow
    convolutions, stage 0, never gain on a CPU.)"""
    if device.type == "cuda":
        return "bf16"
    if stage == "0":
        return "fp32"
    return max(DTYPES, key=lambda name: matmul_rate(device, DTYPES[name], 4096, 128, 512))


def matmul_rate(device, dtype, m, k, n):
    """The best of ten matrix products, in FLOPs a second."""
    x, w, took = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype), []
    for _ in range(10):
        start = time.perf_counter()
        F.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return 2 * m * k * n / min(took)


def model_flops(config, recipe):
    """FLOPs that one row of a step needs, whatever the implementation spends: 2 a weight and token, 4 a pair of tokens
    and channel in attention; twice that again for the gradients of what learns (PaLM, appendix B). Both halves; the
    text head at half of the text's positions. The VAE's are left out: latents are encoded once."""
    d, t, length = config.ddit, config.t5, recipe.length
    patches = (recipe.size // config.vae.factor // d.patch) ** 2
    halves = 1 + (recipe.image_weight > 0)
    stream = 12 * d.width ** 2  # qkv, proj and MLP of one stream's block
    block = 2 * stream * (patches + length) + 4 * (patches + length) ** 2 * d.width + 2 * 2 * 6 * d.width ** 2
    ends = 2 * d.width * ((2 * patches * d.channels * d.patch ** 2) + length * t.d_model)
    head = 2 * d.width * d.vocab * length / 2
    inner = t.num_heads * t.d_kv
    layer = 2 * length * (4 * t.d_model * inner + 3 * t.d_model * t.d_ff) + 4 * length ** 2 * inner
    back = {"no": 0, "mask": 1, "all": 2}[recipe.learn_t5]  # "mask": back through T5, but to no matrix of its own
    return 3 * (halves * (d.depth * block + ends) + head) + (1 + back) * halves * t.num_layers * layer


# ---------------------------------------------------------------- judging and showing


def interval(right, total):
    """Wilson's 95% interval of a share, in per cent."""
    z, n, p = 1.96, max(total, 1), right / max(total, 1)
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return tuple(100 * min(max((middle + sign * half) / (1 + z * z / n), 0), 1) for sign in (-1, 1))


def at_once(side):
    """How many images of that side, in pixels, go through the VAE together."""
    return max(1, PIXELS // side ** 2)


def in_batches(desc, items, size=250):
    return tqdm([items[at:at + size] for at in range(0, len(items), size)], desc=desc, leave=False)


def answers_right(dd, source, asked, generator):
    """asked: [(index, question, answer)] -> list of bool."""
    right = []
    for part in in_batches("answering", asked):
        pixels = torch.from_numpy(data.to_pixels([source.image(i) for i, _, _ in part]))
        given = answer(dd, pixels, [q for _, q, _ in part], generator=generator)
        right += [g.strip().lower() == a.strip().lower() for g, (_, _, a) in zip(given, part)]
    return right


def judge(dd, source, indices, seed=0, questions=True):
    """Score on data it has not seen -> {what: (right, asked)}. Answers must equal the one right answer. On the built-in
    world captions may be any true telling, and drawings are read back by data.read_scene; on the user's data a caption
    must equal the given one. Without a transformer (stage 0) it is the reconstructions that are read back."""
    rng, generator, scores = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed), {}
    world, settings = isinstance(source, data.World), dd.config.settings
    kinds = dict.fromkeys(source.kinds) if world else ()

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

    asked = [(i, kind) for i in indices for kind in (kinds if world else ["all"])] if questions else []
    asked = [(kind, (i, *qa)) for i, kind in asked
             if (qa := source.question(i, rng, kind) if world else source.question(i, rng))]
    if asked:
        right = answers_right(dd, source, [q for _, q in asked], generator)
        scores["answers"] = (sum(right), len(right))
    if asked and world:
        for kind in kinds:
            of_kind = [r for r, (k, _) in zip(right, asked) if k == kind]
            scores[f"  {kind}"] = (sum(of_kind), len(of_kind))
        held = data.World(source.seed, "held", source.kinds)
        right = answers_right(dd, held, [(i, *held.question(i, rng)) for i in indices], generator)
        scores["answers, held-out pairs"] = (sum(right), len(right))

    told, captioned = [], [i for i in indices if source.caption(i, np.random.default_rng(0)) is not None]
    for part in in_batches("captioning", captioned):
        pixels = torch.from_numpy(data.to_pixels([source.image(i) for i in part]))
        for i, text in zip(part, caption(dd, pixels, generator=generator)):
            told.append(data.telling_holds(text, source.scene(i)[0]) if world else
                        text.lower() == source.caption(i, rng).strip().lower())
    if captioned:
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
    with torch.no_grad():
        pixels = torch.from_numpy(data.to_pixels(images))
        parts = pixels.split(at_once(pixels.shape[-1]))
        return np.concatenate([data.to_images(dd.decode_image(dd.encode_image(part))) for part in parts])


def show(dd, source, indices, path=None, seed=0):
    """A sheet: eight images drawn from captions, eight unseen images with the caption and the answer given to them.
    In stage 0, images beside their reconstructions. Without a path, nothing is written: sharded weights are gathered by
    all processes together, so all must draw."""
    rng, generator, settings = np.random.default_rng([seed, 3]), torch.Generator().manual_seed(seed), dd.config.settings
    if dd.ddit is None:
        images = [source.image(i) for i in rng.permutation(indices)[:8]]
        pairs = zip(images, reconstruct(dd, images))
        return path and data.sheet(path, [cell for a, b in pairs for cell in ((a, "true"), (b, "seen"))])
    indices = rng.permutation(indices)  # of data sorted by kind, not the first kind alone
    texts = [source.caption(i, rng) or "" for i in indices[:8]]
    drawn = text_to_image(dd, texts, cfg=settings.cfg, shift=settings.shift, generator=generator)
    images = [source.image(i) for i in indices[-8:]]
    pixels = torch.from_numpy(data.to_pixels(images))
    asked = [(source.question(i, rng) or ("what is this?",))[0] for i in indices[-8:]]
    read = zip(images, caption(dd, pixels, generator=generator), asked,
               answer(dd, pixels, asked, generator=generator))
    cells = [*zip(data.to_images(drawn), texts), *((image, f"{c}\n{q}\n> {a}") for image, c, q, a in read)]
    return path and data.sheet(path, cells)


# ---------------------------------------------------------------- the loop


def evaluate(args):
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]  # as sample.py computes
    dd = DualDiffusion.load(args.eval, args.t5, args.vae, args.spiece, args.device, dtype)
    count, source = args.judge or 1000, data.World(UNSEEN + args.seed, kinds=args.kinds)
    indices = range(count)
    if args.data:
        source = data.Records(args.data, dd.config.settings.size)
        chosen = np.random.default_rng(args.seed).permutation(len(source))[:count]
        indices = [int(i) for i in chosen if source.readable(i)]
        if bad := len(chosen) - len(indices):
            warn(f"{bad} images cannot be read and are left out")
    print(report(judge(dd, source, indices, args.seed)))


def main():
    args, recipe = parse_args()
    if args.eval:
        return evaluate(args)
    device, rank, processes = args.device, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if recipe.batch % (processes * args.accumulate):
        fail(f"--batch {recipe.batch} cannot be shared equally by {processes} processes x {args.accumulate} passes")
    if args.parallel == "fsdp" and recipe.muon:
        fail("--parallel fsdp cuts up the matrices that Muon needs whole: give --muon 0, or --parallel ddp")
    alone = {} if processes > 1 else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:" \
        + dist.get_default_backend_for_device(device.type)
    dist.init_process_group(backend, timeout=timedelta(hours=3), **alone)
    # On the CPU the backward pass of bf16 flash attention is slow: fall back on plain matrix products there.
    torch.backends.cuda.enable_flash_sdp(device.type == "cuda")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    learned = learn(args, recipe, rank, processes, device)
    dist.destroy_process_group()
    gc.collect()  # what has learned is let go, before what it has left is loaded and judged
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if rank == 0:
        finish(args, recipe, device, *learned)


def learn(args, recipe, rank, processes, device):
    """One stage, from its start or its newest checkpoint to its last step -> what `finish` needs."""
    share = recipe.batch // processes
    mine = slice(rank * share, (rank + 1) * share)
    folder = os.path.join(args.out, f"stage{args.stage}")

    # What is learned from, and the system that learns.
    with rank_0_first(rank):
        noted = noted_settings(folder) if rank > 0 or has_begun(folder) else {}
        args.start = starting_file(args, noted)
        if args.stage == "3" and args.size is None and (args.data or args.image_data):  # after stage 2hr: 512
            recipe.size = inspect(args.start, args.t5, args.vae, args.spiece)[0].settings.size
        images, unseen_images = feeds(args.image_data or args.data, args, recipe)
        texts, unseen = images, unseen_images
        if args.image_data or args.text_data:
            texts, unseen = feeds(args.text_data or args.data, args, recipe)
        together = texts is images
        os.makedirs(folder, exist_ok=True)
        args.lock = claim(os.path.join(folder, ".lock")) if rank == 0 else None  # held as long as the process lives
        dtype = keep_settings(folder, noted, args, recipe, images, texts, device, rank)
    if args.data and args.start == SHIPPED and not args.init and rank == 0:
        warn("the shipped tokenizer and VAE are taken, which know only coloured shapes; for your own, first run "
             f"python train.py --stage 0 --data {' '.join(args.data)} --out {args.out}")
    dd, modules = starting_point(args, recipe, texts, device, dtype)
    side = recipe.size // dd.config.vae.factor
    shape = (dd.config.vae.latent_channels, side, side)
    if dd.ddit:
        dd.ddit.positions(side // dd.config.ddit.patch, side // dd.config.ddit.patch)  # refuses now what is too large
        with rank_0_first(rank):
            images = with_latents(images, dd, args.out, shape, recipe.pool)
            texts = images if together else with_latents(texts, dd, args.out, shape, recipe.pool)
    mesh = make_mesh(device, args.parallel)
    for module in modules.values():
        parallelize(module, mesh, dtype, args.compile)
    optimizers, views = make_optimizers(modules, recipe)
    learned = [p for module in modules.values() for p in module.parameters()]
    if rank == 0:
        print(f"{sum(p.numel() for p in learned):,} parameters learn from {len(texts.ids):,} images, in {dtype}, on "
              f"{processes} x {device.type}", file=sys.stderr)
    shown = DualDiffusion(dd.config, dd.tokenizer, dd.ddit, modules.get("t5", dd.t5), dd.vae)

    def to_latents(x, noise):
        with torch.no_grad():
            if x.ndim == 4:  # pixels, seen once: here the rounding of bf16 does not stay
                fast = device.type == "cuda" and dtype == torch.bfloat16
                with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                    mean, logvar = dd.vae.encode(x)
            else:
                mean, logvar = x.unbind(1)
            return dd.vae.normalize(dd.vae.sample(mean.float(), logvar.float(), noise))

    def objective(batch):
        """-> the loss to learn from, and two to look at. Nothing here waits for the device."""
        batch = batch.to(device)
        posterior, noise = step_noise(batch, shape, recipe.batch, device)
        if args.stage == "0":
            return autoencoding_loss(dd.vae, batch.images, posterior)
        latents = to_latents(batch.images, posterior)
        read = latents if together else to_latents(batch.read, posterior)
        n = len(latents) if recipe.image_weight else 0
        return joint_loss(dd.ddit, shown.t5, ImageHalf(latents[:n], batch.captions[:n], noise[:n], batch.image_t[:n]),
                          TextHalf(read, batch.tokens, batch.noisy, batch.masked, batch.text_t), recipe.text_weight,
                          recipe.image_weight)

    names = ("reconstruction", "kl") if args.stage == "0" else ("image_loss", "text_loss")
    stream = Stream(images, texts, dd.tokenizer, recipe, args.seed, mine, args.accumulate)
    judged = Stream(unseen_images, unseen, dd.tokenizer, recipe, UNSEEN, mine, args.accumulate)  # the same in every run

    def validate():
        """Both losses on pictures kept apart, with the same noise and masks every time and in every run."""
        steps = -(-min(256, len(unseen.ids)) // recipe.batch)
        with torch.no_grad():
            losses = [torch.stack(objective(batch)[1:]) for k in range(steps) for batch in judged[k]]
        return mean_over_processes(torch.stack(losses).mean(0))

    # Go on from the newest checkpoint, if this command left one.
    kept, metrics = os.path.join(folder, "checkpoints"), os.path.join(folder, "metrics.jsonl")
    averages = [p.detach().clone() for p in learned] if recipe.ema else []
    start = load_checkpoint(kept, modules, optimizers, averages, rank)
    if start > recipe.steps:
        if rank == 0:
            note_settings(folder, noted)
        fail(f"{folder} is already at step {start}, beyond --steps {recipe.steps}")
    if rank == 0 and os.path.exists(metrics):  # forget what was logged after it
        with open(metrics, errors="replace") as f:
            lines = [line for line in f if step_of(line) <= start]
        with replacing(metrics) as beside, open(beside, "w") as f:
            f.writelines(lines)
    signals = []  # Ctrl-C, a polite kill and a closed terminal end the run after the step, with a checkpoint
    handlers = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for kind, handler in handlers.items():
        if handler != signal.SIG_IGN:  # as nohup has it
            signal.signal(kind, lambda number, frame: signals.append(number))

    large = (8192,) * 3 if device.type == "cuda" else (1024,) * 3
    peak = matmul_rate(device, dtype, *large) * processes
    flops = 0 if args.stage == "0" else model_flops(dd.config, recipe)
    loader = DataLoader(stream, batch_size=None, sampler=range(start, recipe.steps),
                        num_workers=readers(images, device) if args.workers is None else args.workers,
                        pin_memory=device.type == "cuda")
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=f"stage {args.stage}",
               disable=rank > 0, mininterval=1)
    log, bad, named, since = [], [], set(), time.perf_counter()
    for step, passes in zip(bar, loader):
        done = step + 1
        for k, batch in enumerate(passes, 1):
            for module in modules.values():  # of several passes, the last exchanges gradients and lets weights go
                module.set_requires_gradient_sync(k == args.accumulate)
                module.set_reshard_after_backward(k == args.accumulate)
            loss, *parts = objective(batch)
            (loss / args.accumulate).backward()
            log.append(torch.stack(parts).detach())
        norm = nn.utils.clip_grad_norm_(learned, recipe.clip)
        for p, view in views:
            view.grad = p.grad.to_local().flatten(1)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(recipe, step)
            optimizer.step()
        for p in (*learned, *(view for _, view in views)):
            p.grad = None
        for average, p in zip(averages, learned):
            average.to_local().lerp_(p.detach().to_local(), 1 - recipe.ema)

        if found := passes[0].bad:
            with open(os.path.join(folder, f"bad-{rank}.txt"), "a", errors="backslashreplace") as f:
                f.writelines(f"{message}\n" for message in dict.fromkeys(found) if message not in named)
            bad, named = bad + [(done * share, message) for message in found], named.union(found)
            not_too_many(bad, done * share)
        ending, = mean_over_processes([torch.tensor(float(len(signals)))])  # on the CPU: no waiting for the GPU
        save_now = done % args.save_every == 0 or done == recipe.steps or ending
        show_now = done % args.show_every == 0 and done < recipe.steps
        if done % 20 == 0 or save_now or show_now:  # only here does the loop wait for the device
            *losses, norm = mean_over_processes([*torch.stack(log).mean(0), norm.full_tensor()])
            if not np.isfinite([*losses, norm]).all():
                fail(f"the loss or its gradient is not a number at step {done}; the last checkpoint is from before it. "
                     f"Lower --rate or --muon")
            speed = len(log) / args.accumulate * recipe.batch / (time.perf_counter() - since)
            line = {"step": done, **dict(zip(names, losses)), "grad_norm": norm,
                    "rate": optimizers[0].param_groups[0]["lr"], "images_per_s": speed,
                    "utilisation": speed * flops / peak, "memory_gb": memory_used(device) / 1e9, "bad": len(named)}
            if show_now or done == recipe.steps:
                line |= {f"val_{name}": loss for name, loss in zip(names, validate())}
            bar.set_postfix({name: f"{loss:.4f}" for name, loss in zip(names, losses)}
                            | {"rate": f"{line['rate']:.1e}", "images/s": f"{speed:.0f}"})
            if rank == 0:
                with open(metrics, "a") as f:
                    f.write(json.dumps(line) + "\n")
            if save_now:
                save_checkpoint(kept, training_state(done, modules, optimizers, averages), args.keep, rank)
            if show_now:
                sheet = os.path.join(folder, f"samples-{done:06d}.png")
                show(shown, unseen.source, unseen.ids, sheet if rank == 0 else None)
            log, since = [], time.perf_counter()
        if ending:
            status = 128 + (signals or [signal.SIGTERM])[0]
            if rank == 0:
                fail(f"stopped after step {done}; the same command goes on from there", status)
            sys.exit(status)
    bar.close()
    for kind, handler in handlers.items():
        signal.signal(kind, handler)

    for average, p in zip(averages, learned):
        p.data.copy_(average)
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = {name: get_model_state_dict(module, options=whole) for name, module in modules.items()}
    return weights, texts, unseen, folder, start < recipe.steps


def step_of(line):
    """The step that a line of metrics.jsonl tells of; of one that cannot be read, none that is ever reached."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def readers(images, device):
    """How many processes make batches: none on a CPU with latents at hand; a GPU must not wait for one core."""
    if device.type == "cpu" and (images.latents or isinstance(images.source, data.World)):
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(4, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def claim(path, wait=False):
    """-> a lock, held until it is closed, so that no two runs write the same: kill -9 on torchrun leaves its workers
    running."""
    lock = open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        fail(f"{os.path.dirname(path)}: another run is at work here; let it end, or stop its processes")
    return lock


def mean_over_processes(numbers):
    """A few numbers, each the mean of what all processes have there -> list."""
    x = torch.stack([*numbers]).cpu()
    dist.all_reduce(x)
    return (x / dist.get_world_size()).tolist()


def memory_used(device):
    """Peak so far, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def finish(args, recipe, device, weights, learned_from, unseen, folder, news):
    """The end of a stage: the file for sample.py, the scores of what was written there, a last sheet. Without `news`,
    where the same command is given again, the file stays, and so stays what has begun from it."""
    path, noted = os.path.join(folder, "model.safetensors"), noted_settings(folder)
    if news or not os.path.exists(path):
        write_model(args, recipe, weights, learned_from, noted, path)
    dd = DualDiffusion.load(path, device=device, dtype=DTYPES[noted["dtype"]])
    scores = judge(dd, unseen.source, unseen.ids, args.seed, questions=recipe.questions > 0)
    print(report(scores))
    with replacing(os.path.join(folder, "scores.json")) as beside, open(beside, "w") as f:
        json.dump(scores, f)
    show(dd, unseen.source, unseen.ids, os.path.join(folder, "samples.png"))
    print(f"wrote {path}")


def write_model(args, recipe, weights, learned_from, noted, path):
    """The file for sample.py: what has learned, and beside it the frozen parts of the start."""
    if changed_at(args.start) != noted["start changed at"]:
        fail(f"{args.start} has changed since this stage began, so what did not learn is lost: put it back, and the "
             f"same command ends the stage")
    # The frozen parts again as they were given, not as they were computed with.
    dd, modules = starting_point(args, recipe, learned_from, torch.device("cpu"), None)
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    if isinstance(modules.get("t5"), MaskRow):
        modules["t5"].settle()
    if args.stage == "0":  # bring latents to mean 0 and deviation 1, which the transformer expects
        images = [learned_from.look(k, [])[1] for k in range(min(512, len(learned_from.ids)))]
        with torch.no_grad():
            z = torch.cat([dd.vae.encode(part)[0] for part in torch.stack(images).split(at_once(recipe.size))])
        dd.config.vae.shift, dd.config.vae.scale = z.mean().item(), 1 / z.std().item()
    dd.save(path, dtype=torch.float16)


def has_begun(folder):
    """Whether a run has left something in this folder that must not be lost."""
    return checkpoints(os.path.join(folder, "checkpoints")) or os.path.exists(os.path.join(folder, "model.safetensors"))


def noted_settings(folder):
    """What run.json says of the run in this folder."""
    path = os.path.join(folder, "run.json")
    try:
        with open(path) as f:
            noted = json.load(f)
        if not isinstance(noted, dict) or noted.get("dtype") not in DTYPES:
            raise ValueError("no settings")
        return noted
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{path}: the settings of the run in this folder cannot be read ({one_line(error)}); give another --out")


def keep_settings(folder, noted, args, recipe, images, texts, device, rank):
    """A folder holds one run: note its settings, and refuse to go on from its checkpoints, or to overwrite what it has
    left, with others. Only a run at a constant rate may be made longer -> the dtype to compute in, the run's own where
    it has begun."""
    settings = {name: vars(args)[name] for name in ("preset", "init", "t5", "vae", "spiece", "text_encoder", "seed",
                                                    "start")}
    settings |= asdict(recipe) | {"start changed at": changed_at(args.start),  # a stage run anew is another start
                                  "data": [images.source.fingerprint, texts.source.fingerprint],
                                  "dtype": args.dtype or noted.get("dtype") or faster_dtype(device, args.stage)}
    free = {"steps": recipe.schedule == "constant", "pool": args.data, "start": True}  # files may be moved
    said = {"start changed at": f"{args.start} has been written since", "data": "the data are not the same"}
    changed = [said.get(k, f"{k} {noted.get(k)} is now {v}") for k, v in settings.items()
               if noted and noted.get(k) != v and not free.get(k)]
    if changed:
        fail(f"{folder} holds a run with other settings ({', '.join(changed)}); delete it or give another --out")
    if rank == 0:
        note_settings(folder, settings)
    return DTYPES[settings["dtype"]]


def note_settings(folder, settings):
    with replacing(os.path.join(folder, "run.json")) as beside, open(beside, "w") as f:
        json.dump(settings, f, indent=1)


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["0", "1", "2", "2hr", "3"])
    parser.add_argument("--eval", metavar="FILE", help="judge this checkpoint instead of training")
    parser.add_argument("--judge", type=number(int, 1, 10 ** 6), help="images to judge on: 1000 with --eval, 250 at "
                        "the end of a stage, and then of the user's data at most the one in twenty that is kept apart")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny")
    what = "images and texts: .json, .jsonl, .tar or folders; default: "
    parser.add_argument("--data", nargs="+", help=what + "the built-in world")
    parser.add_argument("--image-data", nargs="+", help=what + "--data. Of these the image loss learns")
    parser.add_argument("--text-data", nargs="+", help=what + "--data. Of these the text loss learns")
    parser.add_argument("--kinds", nargs="+", choices=[*data.KINDS, "same"], default=list(data.KINDS), metavar="KIND",
                        help=f"of questions in the built-in world: {', '.join(data.KINDS)}, same (a third of compare: "
                        "are two things alike?); one given twice is asked twice as often")
    parser.add_argument("--init", help="checkpoint to start from; default: the stage before")
    add_parts(parser)
    parser.add_argument("--text-encoder", choices=["t5", "none"], default="t5", help="none: learned embeddings of "
                        "tokens and places instead, and a transformer from nothing (Table 9)")
    parser.add_argument("--out", default="runs", help="where stageN/ folders are made")
    parser.add_argument("--seed", type=seed, default=0)
    run = parser.add_argument_group("how it runs; nothing here changes what is learned, but for rounding")
    run.add_argument("--device", type=existing_device, default=default_device())
    run.add_argument("--dtype", choices=list(DTYPES), help="to compute in; default: the faster one; "
                     "with --eval bf16 on a GPU, fp32 on a CPU, as in sample.py")
    run.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp", help="fsdp shares gradients and optimizer "
                     "state out among the processes of a node")
    run.add_argument("--accumulate", type=int, default=1, help="passes that make up a step, to save memory")
    run.add_argument("--checkpointing", action="store_true", help="compute activations twice, to save memory")
    run.add_argument("--compile", action="store_true", help="torch.compile every block")
    run.add_argument("--workers", type=number(int, 0, 1024),
                     help="processes that make batches, for each that learns; default: 4, or as many as there are "
                     "cores; on a CPU none, unless images are too many to keep their latents")
    run.add_argument("--save-every", type=int, default=200, help="steps")
    run.add_argument("--show-every", type=int, default=500,
                     help="steps from one sheet of samples, and validation, to the next")
    run.add_argument("--keep", type=int, default=3, help="checkpoints")
    numbers = parser.add_argument_group("numbers of a stage, with defaults by preset and stage")
    for field in fields(Recipe):
        choices = {"schedule": ["constant", "linear"], "learn_t5": ["no", "mask", "all"]}.get(field.name)
        numbers.add_argument("--" + field.name.replace("_", "-"), type=field.type, choices=choices)
    args = parser.parse_args()
    given = {f.name: v for f in fields(Recipe) if (v := getattr(args, f.name)) is not None}
    if args.eval:
        if given or args.stage:
            fail(f"--eval judges and does not train: leave out --{next(iter(given), 'stage').replace('_', '-')}")
        return args, None
    if args.stage is None:
        fail("give --stage 0, 1, 2, 2hr or 3, or --eval FILE")
    if args.text_encoder == "none" and args.stage == "1" and args.init:
        fail("--text-encoder none starts from nothing: give --vae and --spiece in place of --init")
    if bool(args.image_data) != bool(args.text_data) and not args.data:
        fail("--image-data and --text-data go together, or with --data for the other")
    if args.stage not in RECIPES[args.preset]:
        fail(f"--preset {args.preset} has no stage {args.stage}")
    recipe = replace(RECIPES[args.preset][args.stage], **given)
    given = vars(args) | vars(recipe)
    positive = ("steps", "pool", "save_every", "show_every", "keep")
    for names, low, high in ((positive, 1, 1e9), (("batch", "accumulate"), 1, 1e6), (("length",), 2, 16384),
                             (("clip", "time_std"), 1e-9, math.inf), (("time_mean",), -100, 100),
                             (("rate", "muon", "warmup", "weight_decay", "text_weight", "image_weight"), 0, math.inf),
                             (("beta2", "ema"), 0, 1 - 1e-9), (("drop", "questions"), 0, 1), (("vocab",), 100, 32000)):
        for name in names:
            if not low <= given[name] <= high or given[name] == math.inf:
                fail(f"--{name.replace('_', '-')} {given[name]} is out of its range, {low:g} to {high:g}")
    if not (args.data or args.image_data) and recipe.size != data.SIDE:
        fail(f"the built-in world has {data.SIDE} pixels a side, not {recipe.size}: bring --data")
    if recipe.size < 16 or recipe.size % 16:
        fail(f"--size {recipe.size}: sides are multiples of 16")
    return args, recipe


def program():
    try:
        main()
    except Exception as error:
        if "DataLoader worker" not in str(error):
            raise
        fail(f"a process that makes batches failed ({one_line(error)}); the same command goes on from the checkpoint")


if __name__ == "__main__":
    run_program(program, "stopped; the same command goes on from the last checkpoint", "--batch, or give --accumulate")
