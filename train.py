"""Training: the stages of the paper, one after another, in one loop.

    python train.py --stage 0      the tokenizer and the VAE; only where no pretrained parts exist
    python train.py --stage 1      dual diffusion on captions
    python train.py --stage 2      the same, in the paper with better captions; of T5 only the mask's embedding learns
    python train.py --stage 2hr    between 2 and 3, optional: higher resolution
    python train.py --stage 3      question answering, mixed with captions; the image loss stays

With no other argument this is the `tiny` preset on the built-in world. A stage writes into OUT/stageN/, and the same
command goes on from there. `torchrun --nproc_per_node N train.py ...` takes the same steps; N has to divide the batch.
References: Li et al., D-DiT, 2501.00289, section 4; Jordan et al., Muon, 2024; Zhao et al., FSDP, 2304.11277
"""
import argparse
import copy
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from glob import escape, glob

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch comes; sample.py says why

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import losses
import sample
import t5
import vae
from data import one_line
from model import DTYPES, PRESETS, DualDiffusion, JointBlock, find_parts, missing_parts
from sample import SHIPPED, fail


def setting(default, meaning):
    return field(default=default, metadata={"help": meaning})


@dataclass
class Recipe:
    """The numbers of one stage. A flag of the same name overrides each. Table 6 has steps, batch, rate, warmup,
    weight_decay, size, length and text_weight. Clipping, the running average, the empty captions and the text length of
    stage 3 come from the authors' scripts. Muon and the linear schedule are ours."""
    steps: int = setting(60_000, "optimizer steps")
    batch: int = setting(512, "rows per step, over all processes")
    rate: float = setting(5e-5, "AdamW's learning rate after the warm-up")
    muon: float = setting(0.0, "Muon's learning rate, for the matrices inside the blocks; 0: AdamW learns them too")
    warmup: int = setting(5000, "steps in which the rates rise from 0")
    schedule: str = setting("constant", "of the learning rates; linear: falling to nearly 0")
    beta2: float = setting(0.999, "AdamW's decay of the squared gradients, per step")
    weight_decay: float = setting(1e-2, "weight decay of matrices")
    clip: float = setting(2.0, "largest norm of the gradient")
    ema: float = setting(0.9995, "decay per step of the weights' running average, which is saved; 0: none")
    size: int = setting(256, "pixels of an image's side")
    length: int = setting(64, "tokens of a text")
    text_weight: float = setting(0.2, "weight of the text loss in Eq. 9")
    image_weight: float = setting(1.0, "weight of the image loss; 0: the text loss alone, as in Table 10")
    time_mean: float = setting(0.0, "mean of the image times' logit; above 0: more noise")
    time_std: float = setting(1.0, "deviation of the image times' logit")
    drop: float = setting(0.1, "share of captions left empty in the image half, for guidance")
    questions: float = setting(0.0, "share of the text half that is questions with answers, not captions")
    learn_t5: str = setting("no", "what learns in T5; mask: the mask token's embedding alone")
    pool: int = setting(25_000, "images of the built-in world to learn from")
    vocab: int = setting(412, "pieces, at most, of the tokenizer that stage 0 makes")


# Plain shapes stay readable under much noise: the layout is settled at t > 0.9, which mean 0 rarely draws.
_tiny = Recipe(steps=600, batch=64, rate=2e-3, muon=0.02, warmup=50, beta2=0.98, ema=0.0, size=64, length=24,
               text_weight=1.0, time_mean=1.5, time_std=1.2, learn_t5="all")
RECIPES = {
    "tiny": {"0": replace(_tiny, steps=2000, batch=16, schedule="linear"),
             "1": _tiny,
             "2": replace(_tiny, steps=40, learn_t5="mask"),
             "2hr": replace(_tiny, steps=300),
             "3": replace(_tiny, steps=3000, questions=0.65, schedule="linear")},
    "sd3-medium": {"1": Recipe(),  # whose defaults are the paper's
                   "2": Recipe(steps=200_000, rate=3e-5, warmup=1000, length=256, learn_t5="mask"),
                   "2hr": Recipe(steps=80_000, batch=768, rate=3e-5, warmup=1000, length=256, size=512),
                   "3": Recipe(steps=50_000, rate=3e-5, warmup=1000, length=128, text_weight=1.0, questions=0.5)},
}
RECIPES["end-to-end"] = RECIPES["sd3-medium"]


def training_losses(dd, batch, recipe):
    """-> total, image loss, text loss (scalars). batch: a data.Batch, its images as moments: mean and log-variance of
    the VAE's Gaussian. All random numbers are drawn for the whole batch, from the step's seed, and a process uses those
    of its own rows. So any number of processes takes the same step."""
    rows, generator = batch.rows, torch.Generator().manual_seed(batch.seed)
    image_t = losses.logit_normal_times(recipe.batch, recipe.time_mean, recipe.time_std, generator)[rows]
    text_t = losses.stratified_times(recipe.batch, generator=generator)[rows]
    vae_noise, noise = batch_noise(2, recipe.batch, batch.images.shape[2:], generator, dd.device)[:, rows]
    noisy, masked = losses.mask_tokens(batch.tokens, text_t, batch.maskable, dd.tokenizer.mask_id,
                                       skip_rows(generator, rows, recipe.length))

    # Copy the inputs to the network's device in the background. (`nonzero` runs before: on a GPU it would stall.)
    captions, tokens, noisy, image_t, text_t, *masked = (x.to(dd.device, non_blocking=True) for x in (
        batch.captions, batch.tokens, noisy, image_t, text_t, *masked.nonzero(as_tuple=True)))
    latents = text_latents = dd.vae.normalize(dd.vae.sample(*batch.images.unbind(1), vae_noise))
    if batch.text_images is not None:  # the text half is about other images (--text-data)
        text_latents = dd.vae.normalize(dd.vae.sample(*batch.text_images.unbind(1), vae_noise))
    n = len(latents) if recipe.image_weight else 0  # Table 10: no image half
    return losses.joint_loss(
        dd.ddit, dd.t5, losses.ImageHalf(latents[:n], captions[:n], noise[:n], image_t[:n]),
        losses.TextHalf(text_latents, tokens, noisy, tuple(masked), text_t), recipe.text_weight, recipe.image_weight)


def train(learner, loader, log, signals, validation, sheet, args, recipe):
    """The loop, to the last step. loader gives a list of data.Batch per step; signals are those that have come in;
    validation() gives the losses on images that are held out; sheet(step) draws samples."""
    for step, batches in zip(log.bar, loader):
        for k, batch in enumerate(batches, 1):  # several, if one does not fit in memory
            loss, *parts = learner.forward(batch)  # encodes images, if they are not yet, and calls training_losses
            learner.backward(loss / len(batches), last=k == len(batches))
            log.window.append(torch.stack(parts).detach())
        norm = learner.step(step)

        done = step + 1
        asked = torch.tensor([float(len(signals)), learner.save_is_due()])  # what one process asks for, all do
        stop, save_now = (share > 0 for share in mean_over_processes(asked))
        save_now = save_now or stop or done == recipe.steps
        show_now = done % args.show_every == 0 and done < recipe.steps
        if done % 20 == 0 or save_now or show_now:  # only here does the loop wait for the device
            log.write(done, norm, learner, validation() if show_now or done == recipe.steps else ())
        if save_now:
            learner.save(done)
        if show_now:
            sheet(done)
        if stop:
            fail(f"stopped after step {done}; the same command goes on from there", 128 + (signals or [15])[0])


# ------------------------------------------------- the chapter ends here; what follows makes it practical

BLOCKS = JointBlock, t5.Block, vae.Level, vae.ResnetBlock, vae.AttnBlock
UNSEEN = 1_000_000  # added to the seed for scenes that training never draws


def warn(message):
    if os.environ.get("RANK", "0") == "0":  # of all the processes of torchrun, one speaks
        data.warn(message)


def batch_noise(count, batch, shape, generator, device):
    """(count, batch, *shape) standard normal, made on the device that needs it: at full size 50 million numbers."""
    seed = int(torch.randint(2 ** 62, (), generator=generator))
    return torch.randn(count, batch, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def skip_rows(generator, rows, length):
    """The generator, past the numbers that mask the rows before these."""
    torch.rand(rows.start, length, generator=generator)
    return generator


def autoencoder_losses(dd, batch, recipe):
    """What a step of stage 0 learns from -> total, reconstruction, KL."""
    pixels, factor = batch.images.to(dd.device, non_blocking=True), dd.config.vae.factor
    shape = dd.config.vae.latent_channels, pixels.shape[2] // factor, pixels.shape[3] // factor
    noise = batch_noise(1, recipe.batch, shape, torch.Generator().manual_seed(batch.seed), dd.device)[0, batch.rows]
    return losses.autoencoding_loss(dd.vae, pixels, noise)


# ---------------------------------------------------------------- where a stage starts

def subsets(paths, args, recipe):
    """-> data.Subsets of the user's records or of the built-in world: to learn from, and held out."""
    if not paths:
        unseen = data.World(UNSEEN + args.seed), np.arange(min(250, recipe.pool // 20 + 1))
        return data.Subset(data.World(args.seed), np.arange(recipe.pool)), data.Subset(*unseen)
    source, names = data.Records(paths, recipe.size, args.out), " ".join(paths)
    if source.incomplete:
        warn(f"{names}: {source.incomplete} records cannot be used and are left out; {source.first_incomplete[0]}")
    unseen, ids = source.split(250)
    unseen = [i for i in unseen if data.readable(source, i) is not None]
    if not unseen or not len(ids):
        fail(f"{names}: holds too few images that can be read: one in twenty, at least one, is held out")
    if args.stage in ("1", "2", "2hr") and not source.captioned:
        fail(f"{names}: no image has a caption, which stage {args.stage} learns from")
    if recipe.questions and not source.questioned:
        warn(f"{names}: no image has a question; stage {args.stage} will learn captions alone")
    return data.Subset(source, ids), data.Subset(source, np.array(unseen))


def starting_file(args):
    """The checkpoint that a stage begins with: what the stage before left; for stage 1, else, the shipped file."""
    for stage in {"0": [], "1": ["0"], "2": ["1"], "2hr": ["2"], "3": ["2hr", "2"]}[args.stage]:
        before = os.path.join(args.out, f"stage{stage}", "model.safetensors")
        if os.path.exists(before):
            for other in filter(None, (args.init, args.t5, args.vae, args.spiece)):
                if not os.path.samefile(before, other):
                    warn(f"{other} is taken, not what {before} holds")
            return args.init or before
    if args.init or args.stage == "0":
        return args.init or ""
    if args.stage != "1":
        fail(f"{before}: no such checkpoint; run the stage before it with the same --out, or give --init")
    if args.preset != "tiny" and not (args.text_encoder == "none" and args.vae):
        fail(f"--preset {args.preset} needs pretrained parts: give --init (or --vae, with --text-encoder none)")
    return args.vae or SHIPPED


def starting_point(args, recipe, texts, device, dtype):
    """-> the system, and what learns of it in this stage, {name: module}, in float32. All else is in `dtype`, or as the
    file has it."""
    torch.manual_seed(args.seed)
    preset = copy.deepcopy(PRESETS[args.preset])
    if args.stage == "0":
        tokenizer = t5.train_tokenizer(tokenizer_texts(texts, args.seed), recipe.vocab)
        dd = DualDiffusion.build(preset, tokenizer, ["vae"]).to(device)
        return dd, {"vae": dd.vae}
    found = find_parts(args.start, args.t5, args.vae, args.spiece)[0].t5
    learns_all = recipe.learn_t5 == "all" or isinstance(found, t5.EmbeddingsConfig)
    # The VAE is small, and its rounding would stay in the stored latents: always float32.
    dtypes = {"ddit": torch.float32, "t5": torch.float32 if learns_all else dtype, "vae": dtype and torch.float32}
    dd = DualDiffusion.load(args.start, args.t5, args.vae, args.spiece, device, dtypes)
    anew = args.stage == "1" and args.start in (args.vae, SHIPPED) and not args.init or dd.ddit is dd.t5 is None
    if args.stage == "1" and args.text_encoder == "none" and not anew:
        fail("--text-encoder none starts from nothing: give --vae and --spiece, but no --init")
    if anew and dd.tokenizer:  # tokenizer and VAE are taken, the rest starts at random
        if args.text_encoder == "none":
            positions = max(recipe.length, preset.settings.length)  # for the longest texts of any stage
            preset.t5 = t5.EmbeddingsConfig(preset.ddit.width, positions)
            preset.ddit.text_dim, learns_all = preset.ddit.width, True
        fresh = DualDiffusion.build(replace(preset, vae=dd.config.vae), dd.tokenizer, ["ddit", "t5"])
        fresh.vae = dd.vae
        dd = fresh.to(device)
    if missing := missing_parts(dd):
        fail(f"{args.start}: holds no {' and no '.join(missing)}")
    dd.config.settings.size, dd.config.settings.length = recipe.size, recipe.length  # to be used as it was trained
    dd.requires_grad_(False)
    modules = {"ddit": dd.ddit.requires_grad_()}
    if learns_all:
        modules["t5"] = dd.t5.requires_grad_()
    elif recipe.learn_t5 == "mask":
        modules["t5"] = MaskRow(dd.t5, dd.tokenizer.mask_id)
    return dd, modules


def tokenizer_texts(subset, seed, count=5000):
    """Texts that stage 0 makes a vocabulary from."""
    for k in range(count):
        rng = np.random.default_rng([seed, 4, k])
        i = int(data.pick(rng, subset.ids))
        question = subset.source.question(i, rng) or ("", "")
        yield subset.source.caption(i, rng) or ""
        yield "Q: {} A: {}".format(*question)


class MaskRow(nn.Module):
    """The one embedding of a frozen T5 that learns in stage 2, the mask token's."""
    def __init__(self, encoder, mask_id):
        super().__init__()
        self.mask_id, self.row = mask_id, nn.Parameter(encoder.shared.weight[mask_id].detach().float().clone())
        encoder.shared.register_forward_hook(lambda table, tokens, embedded: self(tokens[0], embedded))

    def forward(self, tokens, embedded):
        return torch.where((tokens == self.mask_id)[..., None], self.row.to(embedded), embedded)


# ---------------------------------------------------------------- processes, optimizers, checkpoints

def make_mesh(device, parallel):
    """How the processes hold the weights. ddp: every process holds everything. fsdp: the processes of a node share out
    gradients and optimizer state, and gather weights for a step (ZeRO-2); every node holds all of it."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if parallel == "fsdp" else 1
    shape = dist.get_world_size() // sharing, sharing
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(module, mesh, dtype):
    """Share a module out among the processes of a mesh, in place, by FSDP2 (`fully_shard`). From then on its parameters
    are DTensors: `p.to_local()` is what this process holds, which in ddp is all of it.
    The network computes in `dtype`. The weights themselves, their gradients' mean over the processes and the optimizer
    stay in float32 (the "master weights"): a bf16 weight could not take a step smaller than 1/256 of itself."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing here changes one in place
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for part in [*(part for part in module.modules() if isinstance(part, JointBlock)), module]:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def make_optimizers(modules, recipe):
    """modules: {"ddit", "t5" or "vae": module} -> optimizers, [(parameter, view)].

    Muon, where the recipe has it, learns the matrices inside the blocks: a view of each, on the same memory, and a
    convolution's as (out, in * k * k). AdamW learns all else, with decay for matrices alone."""
    decayed, plain, views, muon_groups = [], [], [], []
    for name, module in modules.items():
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        blocks = [part for part in module.modules() if isinstance(part, BLOCKS)]
        matrices, in_blocks = {id(layer.weight) for layer in layers}, {id(p) for b in blocks for p in b.parameters()}
        # T5 has neither 1/sqrt(d) on its attention scores nor norms on q and k: at Muon's full rate they explode.
        muon_groups.append({"params": [], "peak": recipe.muon * (0.2 if name == "t5" else 1.0)})
        for p in module.parameters():
            if recipe.muon and id(p) in matrices & in_blocks:
                views.append((p, nn.Parameter(p.data.to_local().flatten(1))))
                muon_groups[-1]["params"].append(views[-1][1])
            else:
                (decayed if id(p) in matrices else plain).append(p)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay, "peak": recipe.rate},
              {"params": plain, "weight_decay": 0.0, "peak": recipe.rate}]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), fused=True)]
    if views:
        optimizers.append(torch.optim.Muon(muon_groups, weight_decay=recipe.weight_decay))
    return optimizers, views


def learning_rate(recipe, step):
    """The factor on every learning rate at a step (0-based)."""
    rise = min(1.0, (step + 1) / max(recipe.warmup, 1))
    return rise * (1 - step / recipe.steps if recipe.schedule == "linear" else 1.0)


class Learner:
    """What learns in a stage: modules of the system dd, {name: module}, shared out among the processes, with their
    optimizers, running averages and checkpoints."""
    def __init__(self, dd, modules, recipe, args, dtype, folder):
        self.dd, self.modules, self.recipe, self.args, self.saved = dd, modules, recipe, args, time.monotonic()
        self.autocast = dd.device.type == "cuda" and dtype == torch.bfloat16
        self.folder = os.path.join(folder, "checkpoints")
        mesh = make_mesh(dd.device, args.parallel)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # see `save`: we mean it
        for block in [m for m in dd.modules() if isinstance(m, JointBlock | t5.Block)]:
            if args.compile:  # not block.compile(), which around checkpoint and FSDP's hooks compiles nothing
                block.forward = torch.compile(block.forward)
            if args.checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        for module in modules.values():
            parallelize(module, mesh, dtype)
        self.optimizers, self.views = make_optimizers(modules, recipe)
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.averages = [p.detach().clone() for p in self.parameters] if recipe.ema else []

    def moments(self, images):
        """Images of a batch -> the moments (B,2,C,h,w) of their latents, on the device: stored ones, or pixels encoded
        now. These are used once and not stored, so bf16 may round them."""
        images = images.to(self.dd.device, non_blocking=True)
        if images.ndim == 4:
            with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, self.autocast):
                images = torch.stack(self.dd.vae.encode(images), 1)
        return images.float()

    def forward(self, batch):
        """-> the loss to learn from, and two to look at. Nothing here waits for the device."""
        if self.dd.ddit is None:
            return autoencoder_losses(self.dd, batch, self.recipe)
        images, text_images = (x if x is None else self.moments(x) for x in (batch.images, batch.text_images))
        return training_losses(self.dd, batch._replace(images=images, text_images=text_images), self.recipe)

    def backward(self, loss, last):
        """Only a step's last pass all-reduces gradients and frees gathered weights; fsdp reduce-scatters in each."""
        for module in self.modules.values():
            module.set_requires_all_reduce(last)
            module.set_reshard_after_backward(last)
        loss.backward()

    def step(self, step):
        """Let the optimizers take this step -> the gradient's norm before clipping."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        for p, view in self.views:
            view.grad, p.grad = p.grad.to_local().flatten(1), None
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate(self.recipe, step)
            optimizer.step()
            optimizer.zero_grad()
        for average, p in zip(self.averages, self.parameters):
            average.to_local().lerp_(p.detach().to_local(), 1 - self.recipe.ema)
        return norm.full_tensor()

    def weights(self):
        """-> {name: state dict}, whole and on the CPU: what the stage leaves."""
        for average, p in zip(self.averages, self.parameters):
            p.data.copy_(average)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {name: get_model_state_dict(module, options=whole) for name, module in self.modules.items()}

    def state(self, step):
        """All that a run must remember. Loading writes into these very tensors. A shard knows its place in the whole,
        so any number of processes can read what any other number wrote."""
        return {"step": torch.tensor(step), "files": torch.tensor(dist.get_world_size()),  # each process writes one
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "optimizers": {str(k): o.state_dict()["state"] for k, o in enumerate(self.optimizers)},
                "averages": dict(enumerate(self.averages))}

    def save(self, step):
        """Write a checkpoint atomically: every process writes its part beside, then rank 0 renames the folder."""
        path, first = os.path.join(self.folder, f"step-{step:08d}"), dist.get_rank() == 0
        try:
            barrier()
            # A lone process saves without collectives, in which gloo's threads start OpenMP teams of their own: then
            # there are more threads than cores, and training took 1.6 times as long.
            writer = HuggingFaceStorageWriter(f"{path}.partial", save_distributed=True)
            dcp.save(self.state(step), storage_writer=writer, no_dist=dist.get_world_size() == 1)
        except (Exception, CheckpointException) as error:
            shutil.rmtree(f"{path}.partial", ignore_errors=True)
            fail(f"{path}: could not be written ({one_line(error)}); the checkpoints before it stand")
        if first:
            os.replace(f"{path}.partial", path)
            for old in checkpoints(self.folder)[:-self.args.keep]:
                shutil.rmtree(old)
        self.saved = time.monotonic()

    def save_is_due(self):
        return time.monotonic() - self.saved >= 60 * self.args.save_minutes

    def load(self):
        """Load the newest readable checkpoint -> its step; 0 if there is none. Unreadable ones are moved aside."""
        logging.disable(logging.WARNING)  # torch.distributed.checkpoint would print tracebacks of what one line says
        for leftover in glob(f"{escape(self.folder)}/*.partial") if dist.get_rank() == 0 else ():
            shutil.rmtree(leftover)  # of a kill
        if not checkpoints(self.folder):
            return 0
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        self.step(-1)  # optimizers have no state before their first step; one at rate 0 changes nothing
        state = self.state(0)
        for path in reversed(checkpoints(self.folder)):
            try:
                dcp.load(state, storage_reader=HuggingFaceStorageReader(path), no_dist=dist.get_world_size() == 1)
                if (files := len(os.listdir(path))) != state["files"]:  # the reader notices no missing one
                    raise ValueError(f"{files} files, not {state['files']}")
                return int(state["step"])
            except (Exception, CheckpointException) as error:
                warn(f"{path}: cannot be read ({one_line(error)}); an older one is tried")
                barrier()
                if dist.get_rank() == 0:
                    os.replace(path, f"{path}.unreadable")
        fail(f"{self.folder}: none of its checkpoints can be read")


def checkpoints(folder):
    """The checkpoints that a run has left, oldest first. What a killed process was writing ends in .partial."""
    return sorted(glob(os.path.join(escape(folder), "step-" + "[0-9]" * 8)))


# ---------------------------------------------------------------- what a run says of itself

class Log:
    """The progress bar, and metrics.jsonl, in which a run that goes on forgets what came after `start`."""
    def __init__(self, folder, names, start, steps):
        self.names, self.window, self.since = names, [], time.perf_counter()
        self.step, self.rank, self.metrics = start, dist.get_rank(), os.path.join(folder, "metrics.jsonl")
        if self.rank == 0 and os.path.exists(self.metrics):
            with open(self.metrics) as f:
                matches = [re.match(r'{"step": (\d+),.*}\n', line) for line in f]  # None: cut off by a power cut
            with data.replacing(self.metrics) as beside, open(beside, "w") as f:
                f.writelines(match[0] for match in matches if match and int(match[1]) <= start)
        self.bar = tqdm(range(start, steps), os.path.basename(folder), initial=start, total=steps, mininterval=1,
                        disable=self.rank > 0)

    def write(self, done, norm, learner, validation):
        """A line of metrics, means over the steps since the last one. Raises ValueError if a loss is not finite."""
        *parts, norm = mean_over_processes([*torch.stack(self.window).mean(0), norm])
        if not np.isfinite([*parts, norm]).all():
            raise ValueError(f"the loss or its gradient is not a number at step {done}, so nothing of it was saved. "
                             f"Lower --rate or --muon")
        images = (done - self.step) * learner.recipe.batch
        line = {"step": done, **dict(zip(self.names, parts)), "grad_norm": norm,
                "rate": learner.optimizers[0].param_groups[0]["lr"],
                "images_per_s": images / (time.perf_counter() - self.since)}
        line |= {f"val_{name}": loss for name, loss in zip(self.names, validation)}
        self.bar.set_postfix({name: f"{loss:.4f}" for name, loss in zip(self.names, parts)}
                             | {"rate": f"{line['rate']:.1e}", "images/s": f"{line['images_per_s']:.0f}"})
        if self.rank == 0:
            with open(self.metrics, "a") as f:
                f.write(json.dumps(line) + "\n")
        self.window, self.step, self.since = [], done, time.perf_counter()


def mean_over_processes(numbers):
    """A few numbers -> list of their means over all processes."""
    x = torch.stack([*numbers]).cpu()
    dist.all_reduce(x)
    return (x / dist.get_world_size()).tolist()


def barrier():
    """Let all processes wait for each other, on the CPU."""
    dist.all_reduce(torch.zeros(1))


@contextmanager
def noted_signals():
    """-> a list. Ctrl-C and SIGTERM do nothing but add their number to it."""
    signals = []
    handlers = {kind: signal.signal(kind, lambda number, frame: signals.append(number))
                for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


def own_session(worker):
    """Shield a process that makes batches from signals to the whole program: the step before the end needs it."""
    os.setsid()


def show(dd, subset, path=None):
    """A sheet: eight images drawn from captions, eight with the model's caption and answer; in stage 0, images beside
    their reconstructions. All processes must draw, as they gather weights; the one with a path writes."""
    source, rng, generator = subset.source, np.random.default_rng([0, 3]), torch.Generator().manual_seed(0)
    ids = rng.permutation(subset.ids)  # or sorted data would show one class alone
    images = [source.image(i) for i in ids[-8:]]
    pixels = torch.from_numpy(data.to_pixels(images))
    if dd.ddit is None:
        with torch.no_grad():
            decoded = data.to_images(dd.vae(pixels.to(dd.device), torch.zeros(()))[0])  # of the mean, without noise
        cells = [cell for pair in zip(images, decoded) for cell in zip(pair, ("image", "reconstruction"))]
    else:
        prompts = [source.caption(i, rng) or "" for i in ids[:8]]
        drawn = sample.text_to_image(dd, prompts, generator=generator)
        questions = [(source.question(i, rng) or ("what is this?",))[0] for i in ids[-8:]]
        captions = sample.caption(dd, pixels, generator=generator)
        answers = sample.answer(dd, pixels, questions, generator=generator)
        texts = [*map("drawn: {}".format, prompts), *map("read: {}\n{}\n> {}".format, captions, questions, answers)]
        cells = [*zip([*data.to_images(drawn), *images], texts)]
    if path:
        sample.sheet(path, cells)


def show_batch(dd, batch, path):
    """A sheet of what a stage learns from: images through the VAE, texts as cut; [what may be masked]."""
    images, say = batch.images if batch.text_images is None else batch.text_images, dd.tokenizer.decode
    if images.ndim == 5:  # stored moments
        images = dd.decode_image(dd.vae.normalize(images[:16, 0].to(dd.device).float()))
    sample.sheet(path, [(image, f"{say(ids[~free])} [{say(ids[free])}]".strip()) for image, ids, free in zip(
        data.to_images(images[:16]), batch.tokens, batch.maskable)])


# ---------------------------------------------------------------- a stage from end to end, and its settings

def prepare(args, recipe, folder):
    """What a stage begins with -> dd, its modules that learn, Subsets (to learn from; held out), the run's settings."""
    args.start = starting_file(args)
    if args.stage not in ("0", "1"):
        start = find_parts(args.start, args.t5, args.vae, args.spiece)[0].settings
        lengths = {recipe.length for recipe in RECIPES[args.preset].values()}
        if args.length is None and start.length not in lengths:
            warn(f"{args.start} was trained at --length {start.length}; this stage takes {recipe.length}")
        if args.size is None and start.size > recipe.size:
            warn(f"{args.start} was trained at --size {start.size}; this stage takes {recipe.size}")
    images, unseen_images = subsets(args.image_data or args.data, args, recipe)
    texts, unseen = images, unseen_images
    if args.image_data or args.text_data:
        texts, unseen = subsets(args.text_data or args.data, args, recipe)
    os.makedirs(folder, exist_ok=True)
    args.lock = data.claim(os.path.join(args.out, ".lock")) if dist.get_rank() == 0 else None  # until the end
    settings = check_settings(folder, args, recipe, images, texts)
    if dist.get_rank() == 0 and (args.data or args.text_data):
        with data.replacing(os.path.join(folder, "held-out.txt")) as beside, open(beside, "w") as f:
            f.writelines(dict.fromkeys(f"{unseen.source.record(i).image}\n" for i in unseen.ids))
    if args.data and args.start == SHIPPED and not args.init:
        warn("the shipped tokenizer and VAE are taken, which know only coloured shapes; for your own, first run "
             f"python train.py --stage 0 --data {' '.join(args.data)} --out {args.out}")
    dd, modules = starting_point(args, recipe, texts, args.device, DTYPES[settings["dtype"]])
    if dd.ddit:
        sample.latent_size(dd, recipe.size, recipe.size)  # refuses now what is too large
        limit = args.latents if args.data or args.image_data else recipe.pool
        encode = partial(data.with_latents, vae=dd.vae, folder=args.out, limit=limit)
        images, texts = (encode(images),) * 2 if texts is images else (encode(images), encode(texts))
    return dd, modules, (images, texts), (unseen_images, unseen), settings


def run_stage(args, recipe):
    """One stage, from its start or its newest checkpoint to the file that it leaves."""
    rank, share, device = dist.get_rank(), recipe.batch // dist.get_world_size(), args.device
    folder, rows = os.path.join(args.out, f"stage{args.stage}"), slice(rank * share, (rank + 1) * share)
    if rank > 0:
        barrier()  # what rank 0 prepares, the others find
    dd, modules, (images, texts), held_out, settings = prepare(args, recipe, folder)
    if rank == 0:
        barrier()
    learner = Learner(dd, modules, recipe, args, DTYPES[settings["dtype"]], folder)
    start, path = learner.load(), os.path.join(folder, "model.safetensors")
    if start > recipe.steps:
        fail(f"{folder} is already at step {start}, beyond --steps {recipe.steps}")
    newest = os.path.getmtime(checkpoints(learner.folder)[-1]) if start == recipe.steps else float("inf")
    if os.path.exists(path) and os.path.getmtime(path) >= newest:  # leave it, for a later stage may have begun with it
        return print(f"finished: {path}") if rank == 0 else None
    if rank == 0:
        print(f"{sum(p.numel() for p in learner.parameters):,} parameters learn from {len(texts.ids):,} records, in "
              f"{settings['dtype']}, on {dist.get_world_size()} x {device.type}"
              + f"; going on from step {start}" * (start > 0), file=sys.stderr)

    log = Log(folder, ("image_loss", "text_loss") if dd.ddit else ("reconstruction", "kl"), start, recipe.steps)
    batches = data.Batches(images, texts, dd.tokenizer, recipe, args.seed, rows, args.accumulate)
    quick = images.latents or isinstance(images.source, data.World)  # but a GPU must not wait for one core
    workers = 0 if device.type == "cpu" and quick else min(4, os.cpu_count() or 1)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, recipe.steps), pin_memory=device.type == "cuda",
                        num_workers=workers if args.workers is None else args.workers,
                        worker_init_fn=own_session)
    if rank == 0:
        with torch.no_grad():
            show_batch(dd, batches[0][0], f"{folder}/data.png")
    unseen_batches = data.Batches(*held_out, dd.tokenizer, recipe, UNSEEN, rows, args.accumulate)

    def validate():
        """Both losses on images that are held out, with the same noise and masks every time and in every run."""
        steps = -(-min(256, len(held_out[1].ids)) // recipe.batch)
        with torch.no_grad():
            parts = [torch.stack(learner.forward(batch)[1:]) for k in range(steps) for batch in unseen_batches[k]]
        return mean_over_processes(torch.stack(parts).mean(0))

    with noted_signals() as signals:
        train(learner, loader, log, signals, validate,
              lambda done: show(dd, held_out[1], rank == 0 and f"{folder}/samples-{done:06d}.png"), args, recipe)
    weights = learner.weights()
    show(dd, held_out[1], rank == 0 and f"{folder}/samples.png")
    if rank == 0:
        write_model(args, recipe, weights, texts, path)
        print(f"wrote {path}")


def write_model(args, recipe, weights, texts, path):
    """The file for sample.py: what was trained, and the frozen parts anew from the starting file; all in float16."""
    dd, modules = starting_point(args, recipe, texts, torch.device("cpu"), None)
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    if isinstance(modules.get("t5"), MaskRow):
        dd.t5.shared.weight.data[dd.tokenizer.mask_id] = modules["t5"].row.detach()
    if args.stage == "0":  # bring latents to mean 0 and deviation 1, which the transformer expects
        pixels = torch.stack([texts.record(k)[1] for k in range(min(512, len(texts.ids)))])
        with torch.no_grad():
            z = torch.cat([dd.vae.encode(pixels[part])[0] for part in data.slices(len(pixels), *pixels.shape[2:])])
        dd.config.vae.shift, dd.config.vae.scale = z.mean().item(), 1 / z.std().item()
    dd.save(path, dtype=torch.float16)


def check_settings(folder, args, recipe, images, texts):
    """-> the settings, which run.json keeps. A folder holds one run: another would overwrite what it has left, and is
    refused. But a run at a constant rate may be made longer, and files and data may be moved."""
    cpu = getattr(torch.cpu, "get_capabilities", dict)()  # bf16, where it is fast; stage 0's narrow layers never gain
    fast = args.device.type == "cuda" or args.device.type == "cpu" and args.stage != "0" and (
        cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    settings = {name: vars(args)[name] for name in ("preset", "text_encoder", "seed")} | asdict(recipe) | {
        "data": [hashlib.sha256(source.fingerprint.encode()).hexdigest()[:12] for source, *_ in (images, texts)],
        "files": [f"{os.path.basename(file)}, {os.stat(file).st_size} bytes, {time.ctime(os.stat(file).st_mtime)}"
                  for path in (args.start, args.t5, args.vae, args.spiece) if path for file in data.files_of(path)],
        "dtype": args.dtype or ("bf16" if fast else "fp32")}
    if os.path.exists(path := os.path.join(folder, "run.json")) and checkpoints(f"{folder}/checkpoints"):
        with open(path) as f:
            before = json.load(f)
        may_change = {"steps"} if recipe.schedule == "constant" else set()
        changed = [f"{name} {before.get(name)} is now {settings[name]}" for name in settings.keys() - may_change
                   if before.get(name) != settings[name]]
        if changed:
            fail(f"{folder} holds a run with other settings ({', '.join(changed)}); give its own, or another --out")
    if dist.get_rank() == 0:
        with data.replacing(path) as beside, open(beside, "w") as f:
            json.dump(settings, f, indent=1)
    return settings


def add_arguments(parser, recipe):
    add, paths = parser.add_argument, "Images and texts: .json, .jsonl, .tar or folders"
    add("--data", nargs="+", metavar="PATH", help=f"{paths} [the built-in world].")
    add("--image-data", nargs="+", metavar="PATH", help=f"{paths}, for the image loss alone [--data].")
    add("--text-data", nargs="+", metavar="PATH", help=f"{paths}, for the text loss alone [--data].")
    add("--init", metavar="FILE", help="The checkpoint to start from [what the stage before left].")
    sample.add_parts(parser)
    add("--text-encoder", choices=["t5", "none"], default="t5", help="none: embeddings that learn, as in Table 9 [t5].")
    add("--out", default="runs", metavar="DIR", help="Where stageN/ folders are made [runs].")
    add("--seed", type=int, default=0, help="Seeds all random numbers [0].")
    add = parser.add_argument_group("how it runs; what is learned is the same, up to rounding").add_argument
    add("--device", type=sample.existing_device, default=sample.default_device(), help="Where [the GPU, if any].")
    add("--dtype", choices=list(DTYPES), help="What to compute in [bf16 where the hardware has it].")
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help="fsdp: split gradients and optimizer state [ddp].")
    add("--accumulate", type=int, default=1, help="Passes per step; more take less memory, but more time [1].")
    add("--checkpointing", action="store_true", help="Compute activations twice: less memory, slower.")
    add("--compile", action="store_true", help="Compile every block with torch.compile.")
    add("--workers", type=int, help="Processes that make batches [4; on a CPU with stored latents 0].")
    add("--latents", type=int, default=25_000, metavar="N", help="Store latents of --data, if there are at most N "
        "records [25000].")
    add("--save-minutes", type=float, default=10, metavar="N", help="Save every N minutes, and at the end [10].")
    add("--show-every", type=int, default=500, help="Draw samples and validate every N steps [500].")
    add("--keep", type=int, default=3, help="How many checkpoints to keep [3].")
    add = parser.add_argument_group("numbers of a stage", "In brackets what this stage and preset have.").add_argument
    choices = {"schedule": ["constant", "linear"], "learn_t5": ["no", "mask", "all"]}
    for f in fields(Recipe):
        add("--" + f.name.replace("_", "-"), type=f.type, choices=choices.get(f.name),
            metavar=None if f.name in choices else "N", help=f"{f.metadata['help']} [{getattr(recipe, f.name)}]")


def parse_args():
    parser = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--stage", choices=["0", "1", "2", "2hr", "3"], help="Which stage to train; needed.")
    parser.add_argument("--preset", choices=list(PRESETS), default="tiny", help="Model and training numbers [tiny].")
    first, _ = parser.parse_known_args()  # --help shows the numbers of this stage
    parser.add_argument("-h", "--help", action="help")
    add_arguments(parser, RECIPES[first.preset].get(first.stage) or RECIPES[first.preset]["1"])
    args = parser.parse_args()
    if bool(args.image_data) != bool(args.text_data) and not args.data:
        fail("give --image-data and --text-data, or one of them and --data")
    if args.stage not in RECIPES[args.preset]:
        fail(f"give --stage, one of {', '.join(RECIPES[args.preset])}")
    numbers = {f.name: vars(args)[f.name] for f in fields(Recipe) if vars(args)[f.name] is not None}
    recipe = replace(RECIPES[args.preset][args.stage], **numbers)
    if not (args.data or args.image_data) and recipe.size != data.SIDE:
        fail(f"the built-in world has {data.SIDE} pixels a side, not {recipe.size}: bring --data")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if min(recipe.batch, args.accumulate) < 1 or recipe.batch % (processes * args.accumulate):
        fail(f"--batch {recipe.batch} cannot be shared equally by {processes} processes x {args.accumulate} passes")
    if args.parallel == "fsdp" and recipe.muon:
        fail("--parallel fsdp cuts up the matrices that Muon needs whole: give --muon 0, or --parallel ddp")
    return args, recipe


def main():
    args, recipe = parse_args()
    if sys.platform == "win32":
        fail("training wants Linux or macOS; on Windows use WSL")
    if args.device.type == "mps":
        warn("FSDP2 does not run on a Mac's GPU: training on the CPU")
        args.device = torch.device("cpu")
    device = args.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:" \
        + dist.get_default_backend_for_device(device.type)
    dist.init_process_group(backend, timeout=timedelta(hours=3), **alone)
    # On the CPU the backward pass of bf16 flash attention is slow: fall back on plain matrix products there.
    torch.backends.cuda.enable_flash_sdp(device.type == "cuda")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    run_stage(args, recipe)
    dist.destroy_process_group()


if __name__ == "__main__":
    sample.run_program(main, "stopped; the same command goes on from the last checkpoint",
                       "--batch, or give --accumulate")
