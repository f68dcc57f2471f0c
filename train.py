"""Training: the stages of the paper, one after another, in one loop.

    python train.py --stage 0      the tokenizer and the VAE; only where no pretrained parts exist
    python train.py --stage 1      dual diffusion on captions
    python train.py --stage 2      the same on longer captions, if there are; of T5 only the mask's embedding is trained
    python train.py --stage 2hr    between 2 and 3, optional: higher resolution
    python train.py --stage 3      question answering, mixed with captions; the image loss stays

With no other argument this is the `tiny` preset on the built-in world. A stage writes into OUT/stageN/, and the same
command goes on from there. `torchrun --nproc_per_node N train.py ...` takes the same steps; N has to divide the batch.
References: Li et al., D-DiT, arXiv 2501.00289, section 4; Jordan et al., Muon, 2024; Zhao et al., FSDP, 2304.11277
"""
import argparse
import copy
import inspect
import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
import timeit
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from glob import escape, glob

import sample  # isort: skip  (It comes before torch, for which it sets GOMP_SPINCOUNT.)

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_convert
from tqdm import tqdm

import data
import losses
import t5
import vae
from data import one_line, warn
from model import DTYPES, PRESETS, DualDiffusion, JointBlock, check_complete, find_parts
from sample import SHIPPED, at_least, fail


@dataclass
class Recipe:
    """The numbers of one stage. For each there is a flag of the same name. The defaults are the paper's, of stage 1:
    steps, batch, rate, warmup, weight_decay, size, length and text_weight from Table 6; clip, ema, min_time and drop
    from the authors' code. muon and schedule are ours."""
    steps: int = 60_000         # Optimizer steps
    batch: int = 512            # Rows per step, over all processes
    rate: float = 5e-5          # AdamW's learning rate after the warm-up
    muon: float = 0.0           # Learning rate of Muon, for matrices inside the blocks; 0: AdamW takes all
    warmup: int = 5000          # Steps in which the rates rise from 0
    schedule: str = "constant"  # Schedule of the learning rates; linear falls to nearly 0
    beta2: float = 0.999        # AdamW's decay of the squared gradients, per step
    weight_decay: float = 1e-2  # Weight decay of matrices
    clip: float = 2.0           # Norm to which larger gradients are clipped; 0: none are
    ema: float = 0.9995         # Decay per step of the weights' running average, which is saved; 0: none
    size: int = 256             # Pixels of an image's side
    length: int = 64            # Tokens of a text
    text_weight: float = 0.2    # Weight of the text loss in Eq. 9
    image_weight: float = 1.0   # Weight of the image loss; 0: the text loss alone, as in Table 10
    time_mean: float = 0.0      # Mean of the image times' logit; above 0: more noise
    time_std: float = 1.0       # Standard deviation of the image times' logit
    min_time: float = losses.MIN_TIME  # Least time of a text; near 0 few have a mask, and these weigh much
    drop: float = 0.1           # Share of captions left empty in the image half, for guidance
    questions: float = 0.0      # Share of the text half that is questions with answers, not captions
    learn_t5: str = "no"        # What is trained in T5; mask: the mask token's embedding alone
    pool: int = 25_000          # Images of the built-in world to learn from
    vocab: int = 412            # Pieces, at most, of the tokenizer that stage 0 makes


# Plain shapes show through much noise: their layout is settled at t > 0.9, which mean 0 rarely draws.
_tiny = Recipe(steps=600, batch=64, rate=2e-3, muon=0.02, warmup=50, beta2=0.98, ema=0.0, size=64, length=24,
               text_weight=1.0, time_mean=1.5, time_std=1.2, learn_t5="all")
_late = Recipe(rate=3e-5, warmup=1000, length=256)
RECIPES = {
    "tiny": {"0": replace(_tiny, steps=2000, batch=16, schedule="linear"),
             "1": _tiny,
             "2": replace(_tiny, steps=40, learn_t5="mask"),
             "2hr": replace(_tiny, steps=300),
             "3": replace(_tiny, steps=2800, questions=0.65, schedule="linear", min_time=0.15)},
    "sd3-medium": {"1": Recipe(),
                   "2": replace(_late, steps=200_000, learn_t5="mask"),
                   "2hr": replace(_late, steps=80_000, batch=768, size=512),
                   "3": replace(_late, steps=50_000, length=128, text_weight=1.0, questions=0.5)},
}


def training_losses(learner, batch):
    """The losses of one pass, for a data.Batch -> total, image loss, text loss. Random numbers are drawn for the whole
    batch, from the step's seed, and a process uses those of its rows: any number of processes takes the same step."""
    dd = learner.dd
    recipe = learner.recipe
    if dd.ddit is None:
        return autoencoder_losses(learner, batch)  # stage 0
    rows = batch.rows
    generator = torch.Generator().manual_seed(batch.seed)
    moments = learner.moments(batch.images)  # means and log-variances of the latents
    image_t = losses.logit_normal_times(recipe.batch, recipe.time_mean, recipe.time_std, generator)[rows]
    text_t = losses.stratified_times(recipe.batch, recipe.min_time, generator)[rows]
    both = batch_noise((2, recipe.batch, *moments.shape[2:]), generator, dd.device)
    vae_noise, noise = both[:, rows]
    u = torch.rand(recipe.batch, recipe.length, generator=generator)[rows]
    noisy_tokens, masked = losses.mask_tokens(batch.tokens, text_t, batch.maskable, dd.tokenizer.mask_id, u=u)

    latents = sample_latents(dd.vae, moments, vae_noise)
    text_latents = latents
    if batch.text_images is not None:  # the text half is about other images (--text-data)
        text_latents = sample_latents(dd.vae, learner.moments(batch.text_images), vae_noise)
    image_t = image_t.to(dd.device, non_blocking=True)
    captions = batch.captions.to(dd.device, non_blocking=True)
    noisy_tokens = noisy_tokens.to(dd.device, non_blocking=True)
    noisy_latents = losses.noise_latents(latents, noise, image_t)
    images = losses.ImageHalf(latents, noise, noisy_latents, image_t, captions)
    if recipe.image_weight == 0:  # Table 10: no image half
        images = losses.ImageHalf._make(x[:0] for x in images)  # no rows
    texts = losses.TextHalf(text_latents, batch.tokens, noisy_tokens, masked, text_t)
    return losses.joint_loss(dd.ddit, dd.t5, images, texts, recipe.text_weight, recipe.image_weight)


def sample_latents(vae, moments, noise):
    """Draws latents from the VAE's Gaussians: moments (B,2,C,h,w) -> latents (B,C,h,w)."""
    mean, logvar = moments.unbind(1)
    return vae.normalize(vae.sample(mean, logvar, noise))


def rate_factor(recipe, step):
    """Returns the factor of all learning rates at a step (0-based). It rises to 1 in the warm-up."""
    factor = min(1.0, (step + 1) / max(recipe.warmup, 1))
    if recipe.schedule == "linear":
        factor *= 1 - step / recipe.steps
    return factor


def train(learner, loader, log, signals):
    """The loop, to the last step. loader: a list of data.Batch for each step; signals: those that have come."""
    recipe = learner.recipe
    for step, batches in zip(log.bar, loader):  # the progress bar counts the steps
        for k, batch in enumerate(batches, 1):  # several, if one does not fit in memory
            sync_gradients(learner, last=k == len(batches))
            loss, *parts = training_losses(learner, batch)
            (loss / len(batches)).backward()
            log.recent.append(torch.stack(parts).detach())

        norm = nn.utils.clip_grad_norm_(learner.parameters, recipe.clip or float("inf"))
        for optimizer in learner.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_factor(recipe, step)
            optimizer.step()
            optimizer.zero_grad()
        update_averages(learner)

        done = step + 1
        finished = done == recipe.steps
        stop, save_now = any_process(bool(signals), learner.save_is_due())
        save_now = save_now or stop or finished
        show_now = not finished and learner.args.show_every > 0 and done % learner.args.show_every == 0
        if done % 20 == 0 or save_now or show_now:  # only here does the loop wait for the device
            log.write(done, norm.full_tensor(), learner, validates=show_now or finished)
            if save_now:
                learner.save(done)
            if show_now:
                show_samples(learner, f"samples-{done:06d}")
            log.since = time.perf_counter()  # to save and to draw was no training
        if stop:
            number = signals[0] if signals else signal.SIGTERM
            fail(f"stopped after step {done}; the same command goes on from there", 128 + number)


# ------------------------------------------------- the chapter ends here; what follows makes it practical

BLOCKS = JointBlock, t5.Block, vae.Level, vae.ResnetBlock, vae.AttnBlock
UNSEEN = 1_000_000  # added to the seed for scenes that training never draws


def batch_noise(shape, generator, device):
    """Draws standard normal noise on the device that needs it: at full size 50 million numbers."""
    seed = int(torch.randint(2 ** 62, (), generator=generator))
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)


def autoencoder_losses(learner, batch):
    """The losses of a pass of stage 0 -> total, reconstruction, KL."""
    dd = learner.dd
    pixels = batch.images.to(dd.device, non_blocking=True)
    side = pixels.shape[2] // dd.config.vae.factor
    shape = learner.recipe.batch, dd.config.vae.latent_channels, side, side
    generator = torch.Generator().manual_seed(batch.seed)
    noise = batch_noise(shape, generator, dd.device)[batch.rows]
    return losses.autoencoding_loss(dd.vae, pixels, noise)


# ---------------------------------------------------------------- where a stage starts

def find_data(paths, args, recipe):
    """Finds the user's records, or makes the built-in world -> data.Subsets: to learn from, and held out."""
    if not paths:
        learn = data.Subset(data.World(args.seed), np.arange(recipe.pool))
        count = min(250, recipe.pool // 20 + 1)
        return learn, data.Subset(data.World(UNSEEN + args.seed), np.arange(count))
    part = slice(dist.get_rank(), None, dist.get_world_size())  # every so many sources, each process its own
    source = data.Records(paths, recipe.size, args.out, args.held_out, part, exchange)
    names = " ".join(paths)
    unseen, ids = source.split()
    some_can_be_read = any(data.readable(source, i) is not None for i in unseen)
    if not some_can_be_read or not len(ids):
        fail(f"{names}: holds too few images that can be read: one in twenty, at least one, is held out")
    if args.stage in ("1", "2", "2hr") and not source.captioned:
        fail(f"{names}: no image has a caption, which stage {args.stage} learns from")
    if recipe.questions and not source.questioned:
        warn(f"{names}: no image has a question; stage {args.stage} will learn captions alone")
    return data.Subset(source, ids), data.Subset(source, unseen)


BEFORE = {"0": [], "1": ["0"], "2": ["1"], "2hr": ["2"], "3": ["2hr", "2"]}


def starting_file(args):
    """Returns the checkpoint that a stage begins with. Stage 1 may begin with a file of VAE and tokenizer alone,
    stage 0 begins with none: ""."""
    for stage in BEFORE[args.stage]:
        before = f"{args.out}/stage{stage}/model.safetensors"
        if os.path.exists(before):
            for other in (args.init, args.t5, args.vae, args.spiece):
                if other and not os.path.samefile(before, other):
                    warn(f"{other} is taken, not what {before} holds")
            return args.init or before
    if args.init or args.stage == "0":
        return args.init or ""
    if args.stage != "1":
        fail(f"{before}: no such checkpoint; run the stage before it with the same --out, or give --init")
    if args.preset != "tiny" and not (args.text_encoder == "none" and args.vae):
        fail(f"--preset {args.preset} needs pretrained parts: give --init (or --vae, with --text-encoder none)")
    return args.vae or SHIPPED


def held_out_share(args, recipe):
    """Returns the share of images that is held out. An image that one stage holds out no other may learn, so it is the
    share of the files that the stage begins with, if these have learned from a user's images. Warns of larger images
    there."""
    shares = {args.held_out}
    for file in filter(None, args.files[:3]):
        settings = find_parts(file)[0].settings
        shares.add(settings.held_out)
        if settings.size > recipe.size:
            warn(f"{file} was trained at --size {settings.size}; this stage takes {recipe.size}")
    shares = set(filter(None, shares)) or {data.HELD_OUT}
    if len(shares) > 1:
        fail(f"--held-out has to be the same in all stages, not {' and '.join(map(str, sorted(shares)))}")
    return shares.pop()


def starting_point(args, recipe, texts, device, dtype):
    """Makes the system, and {name: module} of what learns in this stage. What learns is in float32, the rest in
    `dtype`; with None, as stored."""
    torch.manual_seed(args.seed)
    preset = copy.deepcopy(PRESETS[args.preset])
    if args.stage == "0":
        tokenizer = t5.train_tokenizer(tokenizer_texts(texts, args.seed), recipe.vocab)
        dd = DualDiffusion.build(preset, tokenizer, ["vae"]).to(device)
        return dd, {"vae": dd.vae}
    found = find_parts(*args.files)[0]
    no_t5_wanted = args.stage == "1" and args.text_encoder == "none"
    has_no_t5 = no_t5_wanted or isinstance(found.t5, t5.EmbeddingsConfig)
    learns_all = recipe.learn_t5 == "all" or has_no_t5
    dtypes = {"ddit": torch.float32, "t5": torch.float32 if learns_all else dtype, "vae": dtype}
    if dtype is not None:
        dtypes["vae"] = torch.float32  # it is small, and its rounding would stay in stored latents
    dd = DualDiffusion.load(*args.files, device, dtypes)
    has_no_network = dd.ddit is None and dd.t5 is None
    starts_anew = has_no_network or (args.stage == "1" and not args.init)
    if no_t5_wanted and not starts_anew:
        fail("--text-encoder none starts from nothing: give --vae and --spiece, but no --init")
    if starts_anew and dd.tokenizer:
        dd = fresh_networks(dd, preset, recipe, args.text_encoder).to(device)
    check_complete(dd, args.start)
    settings = dd.config.settings  # the file is to be used as it was trained
    settings.size = recipe.size
    settings.length = recipe.length
    for name in ("caption_prompt", "answer_suffix"):
        if getattr(args, name) is not None:
            setattr(settings, name, getattr(args, name))
    dd.requires_grad_(False)
    modules = {"ddit": dd.ddit.requires_grad_()}
    if learns_all:
        modules["t5"] = dd.t5.requires_grad_()
    elif recipe.learn_t5 == "mask":
        modules["t5"] = MaskRow(dd.t5, dd.tokenizer.mask_id)
    return dd, modules


def fresh_networks(dd, preset, recipe, text_encoder):
    preset.vae = dd.config.vae
    if text_encoder == "none":
        positions = max(recipe.length, preset.settings.length)  # for the longest texts of any stage
        preset.t5 = t5.EmbeddingsConfig(preset.ddit.width, positions)
        preset.ddit.text_dim = preset.ddit.width
    fresh = DualDiffusion.build(preset, dd.tokenizer, ["ddit", "t5"])
    fresh.vae = dd.vae
    return fresh


def tokenizer_texts(subset, seed, count=5000):
    for k in range(count):
        rng = np.random.default_rng([seed, 4, k])
        i = int(data.pick(rng, subset.ids))
        question, answer = subset.source.question(i, rng) or ("", "")
        yield subset.source.caption(i, rng) or ""
        yield f"Q: {question} A: {answer}"


class MaskRow(nn.Module):
    """The one embedding of a frozen T5 that learns in stage 2, the mask token's."""
    def __init__(self, encoder, mask_id):
        super().__init__()
        self.mask_id = mask_id
        self.row = nn.Parameter(encoder.shared.weight[mask_id].detach().float().clone())
        encoder.shared.register_forward_hook(lambda table, inputs, embedded: self(inputs[0], embedded))

    def forward(self, tokens, embedded):
        is_mask = (tokens == self.mask_id)[..., None]
        return torch.where(is_mask, self.row.to(embedded), embedded)


# ---------------------------------------------------------------- processes, optimizers, checkpoints

def make_mesh(device, parallel):
    """Says how processes hold the weights. ddp: each holds everything. fsdp: the processes of a node share out
    gradients and optimizer state, and gather weights for a step (ZeRO-2); every node holds all of it."""
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if parallel == "fsdp" else 1
    shape = dist.get_world_size() // sharing, sharing
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelize(module, mesh, dtype):
    """Shares a module out among the processes of a mesh, in place, by FSDP2. Its parameters become DTensors:
    `p.to_local()` is what this process holds, in ddp all of it. The network computes in `dtype`. Weights, gradients
    and optimizer stay in float32: a bf16 weight could not take a step smaller than 1/256 of itself."""
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # we change no view in place
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    parts = [part for part in module.modules() if isinstance(part, JointBlock)]
    for part in parts + [module]:
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def predict_as_array(ddit, args, kwargs):
    """Makes `predict` a NumPy array. FSDP would move a tensor to the GPU, where `nonzero` waits."""
    if "predict" in kwargs:
        kwargs["predict"] = kwargs["predict"].numpy()
    return args, kwargs


def sync_gradients(learner, last):
    """Lets only the last pass of a step sum gradients over the replicas and free gathered weights."""
    for module in learner.modules.values():
        module.set_requires_all_reduce(last)
        module.set_reshard_after_backward(last)


def update_averages(learner):
    """Moves the running average of every weight, if there is one, a little towards the weight."""
    for average, p in zip(learner.averages, learner.parameters):
        average.to_local().lerp_(p.detach().to_local(), 1 - learner.recipe.ema)


def make_optimizers(modules, recipe):
    """Makes optimizers for {name: module}. Muon, if the recipe has it, learns the matrices inside the blocks, AdamW the
    rest."""
    decayed, plain, muon_groups = [], [], []
    for name, module in modules.items():
        layers = [part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv2d)]
        matrices = {layer.weight for layer in layers}
        in_blocks = {p for part in module.modules() if isinstance(part, BLOCKS) for p in part.parameters()}
        inside = []
        for p in module.parameters():
            if p not in matrices:
                plain.append(p)
            elif recipe.muon and p in in_blocks:
                inside.append(p)
            else:
                decayed.append(p)
        # T5's attention does not scale its scores, and Muon's steps are as large for small weights as for large ones.
        # At the full rate these scores explode.
        peak = 0.2 * recipe.muon if name == "t5" else recipe.muon
        muon_groups.append({"params": inside, "weight_decay": recipe.weight_decay, "peak": peak})
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay, "peak": recipe.rate},
              {"params": plain, "weight_decay": 0.0, "peak": recipe.rate}]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, recipe.beta2), fused=True)]
    if recipe.muon:
        optimizers.append(Muon(muon_groups, {}))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Jordan et al.: a weight, taken as a matrix (out, all else), moves by the running mean of its gradients, whose
    singular values are first brought to about 1. So no direction is learned much faster than another. `train` sets the
    rate."""
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                weight = p.to_local().view(len(p), -1)  # to change it changes the parameter
                gradient = p.grad.to_local().flatten(1)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(gradient))
                momentum.lerp_(gradient, 0.05)
                update = orthogonalize(gradient.lerp(momentum, 0.95))  # Nesterov: the gradient counts once more
                rows, columns = weight.shape
                scale = max(1, rows / columns) ** 0.5  # else each output of a tall matrix would change less
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(group["lr"] * scale * update)


def orthogonalize(matrix):
    """Brings the singular values of a matrix, all but the tiniest, into 0.7 to 1.2, by five steps of Newton-Schulz:
    each multiplies x by a factor a I + b x x^T + c (x x^T)^2. The five factors are multiplied together first: they are
    smaller than x. All is in float32, for bf16 is slow on most CPUs."""
    rows, columns = matrix.shape
    if rows > columns:
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)  # no singular value is above 1
    gram = x @ x.T
    identity = torch.eye(len(x), device=x.device)
    product = identity
    for _ in range(5):
        factor = 3.4445 * identity - 4.775 * gram + 2.0315 * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor  # that of factor @ x; factor is symmetric
    return product @ x


def make_state(optimizers):
    """Makes the optimizers' state, which a checkpoint is read into, by a step with gradients and rates of 0."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()


class Learner:
    """All that a run consists of: the system, the modules of it that learn, shared out among the processes, their
    parameters, optimizers and running averages; the recipe, the arguments; the images that are held out."""
    def __init__(self, dd, modules, recipe, args, dtype, folder, held_out=None):
        self.dd = dd
        self.modules = modules
        self.recipe = recipe
        self.args = args
        self.folder = folder
        self.held_out = held_out  # two Subsets, for the two losses
        self.checkpoints = f"{folder}/checkpoints"
        self.saved = time.monotonic()
        self.autocast = dd.device.type == "cuda" and dtype == torch.bfloat16
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a lone process saves without it
        for block in [part for part in dd.modules() if isinstance(part, JointBlock | t5.Block)]:
            if args.compile:  # not block.compile(): around FSDP's hooks it compiles nothing
                block.forward = torch.compile(block.forward)
            if args.checkpointing:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        mesh = make_mesh(dd.device, args.parallel)
        for module in modules.values():
            parallelize(module, mesh, dtype)
        if dd.ddit:
            dd.ddit.register_forward_pre_hook(predict_as_array, prepend=True, with_kwargs=True)
        self.optimizers = make_optimizers(modules, recipe)
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.averages = [p.detach().clone() for p in self.parameters] if recipe.ema else []

    def moments(self, images):
        """Returns the moments (B,2,C,h,w) of a batch's images on the device: as stored, or encoded now, in bf16 if that
        is fast."""
        device = self.dd.device
        images = images.to(device, non_blocking=True)
        if images.ndim == 5:  # stored
            return images.float()
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, self.autocast):
            return torch.stack(self.dd.vae.encode(images), 1).float()

    def final_weights(self):
        """Moves the running averages into the modules -> {name of a module: its whole state, on the CPU}."""
        for average, p in zip(self.averages, self.parameters):
            p.data.copy_(average)
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {name: get_model_state_dict(module, options=whole) for name, module in self.modules.items()}

    def state(self, step):
        """Returns all that a run must remember; loading writes into these tensors, from files of any number of
        processes."""
        return {"step": torch.tensor(step),
                "files": torch.tensor(dist.get_world_size()),  # each process writes one
                "modules": {name: module.state_dict() for name, module in self.modules.items()},
                "optimizers": {str(k): o.state_dict()["state"] for k, o in enumerate(self.optimizers)},
                "averages": dict(enumerate(self.averages))}

    def save(self, step):
        """Writes a checkpoint atomically: every process writes its part beside, then rank 0 renames the folder."""
        path = f"{self.checkpoints}/step-{step:08d}"
        beside = f"{path}.partial"
        problem = ""
        logging.disable(logging.WARNING)  # torch would print tracebacks of what one line says
        try:
            # A lone process saves without collectives: gloo's threads would start OpenMP teams, more threads than
            # cores, and training took 1.6 times as long.
            writer = HuggingFaceStorageWriter(beside, save_distributed=True)
            dcp.save(self.state(step), storage_writer=writer, no_dist=dist.get_world_size() == 1)
        except (Exception, CheckpointException) as error:
            problem = one_line(error)
        logging.disable(logging.NOTSET)
        problem = max(exchange(problem))
        if problem:
            shutil.rmtree(beside, ignore_errors=True)
            fail(f"{path}: could not be written ({problem}); the checkpoints before it stand")
        if is_first():
            os.replace(beside, path)
            aside = glob(f"{escape(self.checkpoints)}/*.unreadable")
            for old in checkpoints(self.checkpoints)[:-self.args.keep] + aside:
                shutil.rmtree(old)
        self.saved = time.monotonic()

    def save_is_due(self):
        return time.monotonic() - self.saved >= 60 * self.args.save_minutes

    def load(self):
        """Loads the newest checkpoint that is whole -> its step; 0 if there is none."""
        path = ""
        if is_first():
            path = newest_checkpoint(self.checkpoints)
        path = exchange(path)[0]  # the first process chooses
        if not path:
            return 0
        make_state(self.optimizers)
        state = self.state(0)
        reader = HuggingFaceStorageReader(path)
        dcp.load(state, storage_reader=reader, no_dist=dist.get_world_size() == 1)
        return int(state["step"])


def checkpoints(folder):
    """Lists the checkpoints that a run has left, oldest first. What a killed process was writing ends in .partial."""
    return sorted(glob(f"{escape(folder)}/step-" + "[0-9]" * 8))


def newest_checkpoint(folder):
    """Returns the newest checkpoint that is whole, "" if there are none. Damaged ones after it are moved aside."""
    for leftover in glob(f"{escape(folder)}/*.partial"):  # of a kill
        shutil.rmtree(leftover)
    paths = checkpoints(folder)
    newest = max(filter(is_whole, paths), default="")
    if paths and not newest:
        fail(f"{folder}: none of its checkpoints can be read; to begin anew, move it away")
    for path in paths:
        if path > newest:
            warn(f"{path}: cannot be read; an older one is taken")
            shutil.rmtree(f"{path}.unreadable", ignore_errors=True)
            os.replace(path, f"{path}.unreadable")
    return newest


def is_whole(path):
    """Is each process's file there, and not cut off?"""
    found = 0
    wanted = -1
    for file in glob(f"{escape(path)}/*"):
        with suppress(SafetensorError, OSError), safe_open(file, "pt") as f:
            found += 1
            if "files" in f.keys():
                wanted = f.get_tensor("files")
    return found == wanted


class Log:
    """The progress bar, and metrics.jsonl. A run that goes on from step `start` drops the lines that came after it."""
    def __init__(self, learner, start):
        steps = learner.recipe.steps
        self.names = ("image_loss", "text_loss") if learner.dd.ddit else ("reconstruction", "kl")
        self.recent = []  # the losses of each pass since the last line
        self.step = start
        self.since = time.perf_counter()
        self.metrics = f"{learner.folder}/metrics.jsonl"
        if is_first() and os.path.exists(self.metrics):
            with open(self.metrics) as f:  # the last line may have been cut off
                kept = [line for line in f if line.endswith("}\n") and json.loads(line)["step"] <= start]
            data.write_text(self.metrics, "".join(kept))
        self.bar = tqdm(range(start, steps), os.path.basename(learner.folder), initial=start, total=steps,
                        mininterval=1, disable=not is_first())

    def write(self, done, norm, learner, validates):
        """Writes a line of metrics, means over the steps since the last. Raises ValueError if a loss is not finite."""
        seconds = time.perf_counter() - self.since
        validation = validate(learner) if validates else ()
        means = torch.stack(self.recent).mean(0)
        *parts, norm = mean_over_processes(list(means) + [norm])
        if not np.isfinite(parts + [norm]).all():
            raise ValueError(f"the loss or its gradient is not a number at step {done}, so nothing of it was saved. "
                             "Lower --rate or --muon")
        line = dict(zip(self.names, parts))
        line["grad_norm"] = norm
        line["rate"] = learner.optimizers[0].param_groups[0]["lr"]
        line["images_per_s"] = (done - self.step) * learner.recipe.batch / seconds
        line |= {f"val_{name}": loss for name, loss in zip(self.names, validation)}
        self.bar.set_postfix(line)
        if is_first():
            with open(self.metrics, "a") as f:
                f.write(json.dumps({"step": done} | line) + "\n")
        self.recent = []
        self.step = done


def mean_over_processes(numbers):
    x = torch.stack(list(numbers)).cpu()
    dist.all_reduce(x)
    return (x / dist.get_world_size()).tolist()


def exchange(value):
    """Returns the values of all processes, the first one's first."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def any_process(*flags):  # for each flag: is it set in any of them?
    return [share > 0 for share in mean_over_processes(torch.tensor(flags).float())]


def is_first():
    return dist.get_rank() == 0  # the process that writes and speaks


def barrier():
    dist.all_reduce(torch.zeros(1))  # on the CPU, all processes wait for each other


SIGNALS = signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", 0)  # Windows lacks one


class Watch(threading.Thread):
    """Notes signals, and ends the process: at once before the loop, in it when a SIGINT or SIGTERM comes three seconds
    or more after the first signal. It does so even while the main thread waits, when no handler of Python's runs."""
    def __init__(self):
        super().__init__(daemon=True)
        self.seen = []
        self.in_loop = False
        self.pipe, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores one
                signal.signal(number, note)
        self.start()

    def run(self):
        while True:
            number = os.read(self.pipe, 1)[0]
            if number not in SIGNALS:  # a worker has ended, say
                continue
            if self.in_loop and not self.seen:
                first = time.monotonic()
                warn("saving after this step; again ends at once, without saving")
            elif not self.in_loop or (number != signal.SIGHUP and time.monotonic() - first >= 3):
                warn("ended; the same command goes on from the last checkpoint")
                for worker in torch.multiprocessing.active_children():
                    worker.kill()
                os._exit(128 + number)
            self.seen.append(number)


def note(number, frame):
    """Handles a signal. It does nothing: the thread has noted it."""


def own_session(worker):
    os.setsid()  # Ctrl-C does not reach a process that makes batches: the step under way still needs it
    signal.set_wakeup_fd(-1)  # its signals are not the first process's


def batches_of(loader, pinned):
    """Gives what a loader gives, with tensors. Says so if it takes more than a minute."""
    batches = iter(loader)
    while True:
        slow = threading.Timer(60, warn, ["no batch for a minute: the disk that images are on may be slow, or gone"])
        slow.daemon = True
        slow.start()
        step = next(batches, None)
        slow.cancel()
        if step is None:
            return
        step = default_convert(step)
        if pinned:
            step = [batch._replace(images=batch.images.pin_memory()) for batch in step]
        yield step


@torch.no_grad()
def validate(learner):
    """Computes both losses on images that are held out, with the same noise and masks every time."""
    steps = -(-min(256, len(learner.held_out[1].ids)) // learner.recipe.batch)
    batches = make_batches(learner, learner.held_out, UNSEEN)
    batches = [batch for step in range(steps) for batch in default_convert(batches[step])]
    parts = [torch.stack(training_losses(learner, batch)) for batch in batches]
    return mean_over_processes(torch.stack(parts).mean(0))[1:]


def make_batches(learner, subsets, seed):
    share = learner.recipe.batch // dist.get_world_size()
    first = share * dist.get_rank()
    rows = slice(first, first + share)
    return data.Batches(*subsets, learner.dd.tokenizer, learner.dd.config.settings, learner.recipe, seed, rows,
                        learner.args.accumulate)


def show_samples(learner, name):
    cells = sample_cells(learner.dd, learner.held_out[1])
    if is_first():
        sample.sheet(f"{learner.folder}/{name}.png", cells)


@torch.no_grad()
def sample_cells(dd, subset):
    """Draws from captions, and reads the images of these captions; stage 0 reconstructs -> [(image, text)]."""
    source = subset.source
    rng = np.random.default_rng([0, 3])
    generator = torch.Generator().manual_seed(0)
    chosen = rng.permutation(len(subset.ids))[:8]  # or sorted data would show one class alone
    ids, pixels = zip(*[subset.record(k) for k in chosen])
    pixels = torch.from_numpy(np.array(pixels))
    images = list(data.to_images(pixels))
    if dd.ddit is None:
        decoded, _, _ = dd.vae(pixels.to(dd.device), torch.zeros(()))  # of the mean, without noise
        images += list(data.to_images(decoded))
        return list(zip(images, ["image"] * len(ids) + ["reconstruction"] * len(ids)))
    prompts = [source.caption(i, rng) or "" for i in ids]
    drawn = data.to_images(sample.text_to_image(dd, prompts, generator=generator))
    questions = [source.question(i, rng) or ("what is this?", "") for i in ids]
    questions = [question for question, _ in questions]
    captions = sample.caption(dd, pixels, generator=generator)
    answers = sample.answer(dd, pixels, questions, generator=generator)
    texts = [f"drawn: {prompt}" for prompt in prompts]
    texts += [f"read: {text}\n{question}\n> {answer}" for text, question, answer in zip(captions, questions, answers)]
    return list(zip(list(drawn) + images, texts))


@torch.no_grad()
def show_batch(dd, batch, path):
    """Writes a sheet of what a stage learns from: images through the VAE, texts as cut; [what may be masked]."""
    images = batch.images if batch.text_images is None else batch.text_images
    pixels = images[:16]
    if images.ndim == 5:  # their moments
        pixels = dd.decode_image(dd.vae.normalize(pixels[:, 0].to(dd.device).float()))
    decode = dd.tokenizer.decode
    texts = [f"{decode(ids[~may])} [{decode(ids[may])}]" for ids, may in zip(batch.tokens, batch.maskable)]
    sample.sheet(path, list(zip(data.to_images(pixels), texts)))


# ---------------------------------------------------------------- a stage from end to end, and its settings

def prepare(args, recipe, folder):
    """Finds what a stage begins with -> dd, {name: module}, Subsets to learn from, held-out Subsets, settings."""
    args.start = starting_file(args)
    args.files = args.start, args.t5, args.vae, args.spiece
    args.held_out = held_out_share(args, recipe)
    images = find_data(args.image_data or args.data, args, recipe)
    texts = images
    if args.image_data or args.text_data:
        texts = find_data(args.text_data or args.data, args, recipe)
    (images, texts), held_out = zip(images, texts)
    if not is_first():
        barrier()  # what the first process prepares, the others find
    settings = check_settings(folder, args, recipe, images, texts)
    own_data = args.data or args.text_data
    if is_first() and own_data:
        names = [f"{texts.source.record(i).image}\n" for i in held_out[1].ids]
        data.write_text(f"{folder}/held-out.txt", "".join(dict.fromkeys(names)))
    if own_data and args.start == SHIPPED and not args.init:
        warn("the shipped tokenizer and VAE are taken, which know only coloured shapes; for your own, first run "
             f"python train.py --stage 0 --data {' '.join(own_data)} --out {args.out}")
    dd, modules = starting_point(args, recipe, texts, args.device, DTYPES[settings["dtype"]])
    sample.latent_size(dd, recipe.size, recipe.size)  # refuses now what does not fit
    if dd.ddit:
        same = texts is images
        images = data.with_latents(images, dd.vae, args.out, args.latents)
        texts = images if same else data.with_latents(texts, dd.vae, args.out, args.latents)
    if is_first():
        barrier()
    return dd, modules, (images, texts), held_out, settings


def run_stage(args, recipe):
    """Runs one stage, from its start or its newest checkpoint to the file that it leaves."""
    folder = f"{args.out}/stage{args.stage}"
    path = f"{folder}/model.safetensors"
    if is_first():
        os.makedirs(folder, exist_ok=True)
        args.lock = data.claim(f"{args.out}/.lock")  # until the end
    barrier()
    dd, modules, subsets, held_out, settings = prepare(args, recipe, folder)
    learner = Learner(dd, modules, recipe, args, DTYPES[settings["dtype"]], folder, held_out)
    start = learner.load()
    if start > recipe.steps:
        fail(f"{folder} is already at step {start}, beyond --steps {recipe.steps}")
    images, texts = subsets
    batches = make_batches(learner, subsets, args.seed)
    if is_first():
        count = sum(p.numel() for p in learner.parameters)
        going_on = f"; going on from step {start}" if start else ""
        print(f"{count:,} parameters learn from {len(texts.ids):,} records ({len(held_out[1].ids):,} are held out), "
              f"in {settings['dtype']}, on {dist.get_world_size()} x {args.device.type}{going_on}", file=sys.stderr)
        show_batch(dd, default_convert(batches[0][0]), f"{folder}/data.png")
    loader = DataLoader(batches, batch_size=None, sampler=range(start, recipe.steps), num_workers=args.workers,
                        collate_fn=list, worker_init_fn=own_session)
    log = Log(learner, start)
    args.watch.in_loop = True
    train(learner, batches_of(loader, pinned=args.device.type == "cuda"), log, args.watch.seen)
    args.watch.in_loop = False
    weights = learner.final_weights()
    show_samples(learner, "samples")
    if is_first():
        write_model(args, recipe, weights, texts, path)
        print(f"wrote {path}")


@torch.no_grad()
def write_model(args, recipe, weights, texts, path):
    """Writes the file for sample.py: what was trained, and the frozen parts anew from the starting file; in float16."""
    dd, modules = starting_point(args, recipe, texts, torch.device("cpu"), None)
    for name, module in modules.items():
        module.load_state_dict(weights[name])
    if isinstance(modules.get("t5"), MaskRow):
        dd.t5.shared.weight.data[dd.tokenizer.mask_id] = modules["t5"].row.detach()
    if args.stage == "0":  # bring latents to mean 0 and standard deviation 1, which the transformer expects
        pixels = [texts.record(k)[1] for k in range(min(512, len(texts.ids)))]
        pixels = torch.from_numpy(np.array(pixels))
        parts = data.slices(len(pixels), recipe.size, recipe.size, dd.device)
        latents = torch.cat([dd.vae.encode(pixels[part])[0] for part in parts])  # the means
        dd.config.vae.shift_factor = latents.mean().item()
        dd.config.vae.scaling_factor = 1 / latents.std().item()
    if args.data or args.image_data:
        dd.config.settings.held_out = args.held_out
    dd.save(path, dtype=torch.float16)


def check_settings(folder, args, recipe, images, texts):
    """Returns the settings of a run, kept in run.json. A folder holds one run, which may be made longer or moved.
    The first process decides whether the run is the same; the others take its answer."""
    path = f"{folder}/run.json"
    before = {}
    if os.path.exists(path):
        with open(path) as f:
            before = json.load(f)
    if not is_first():
        return before
    settings = asdict(recipe)
    for name in ("preset", "text_encoder", "seed", "caption_prompt", "answer_suffix", "held_out"):
        settings[name] = getattr(args, name)
    settings["data"] = [data.fingerprint(subset.source) for subset in (images, texts)]
    settings["files"] = []
    for source in filter(None, args.files):
        for file in data.files_of(source):
            settings["files"].append(f"{os.path.basename(file)}, {data.content_hash(file, pieces=256)}")
    settings["dtype"] = args.dtype or before.get("dtype") or default_dtype(args)
    if before and checkpoints(f"{folder}/checkpoints"):
        for name, value in settings.items():
            old = before.get(name)
            may_change = name == "steps" and recipe.schedule == "constant"
            if value != old and not may_change:
                fail(f"{folder} holds a run with other settings ({name} {old} is now {value}); repeat its "
                     "command, or give another --out")
    data.write_text(path, json.dumps(settings, indent=1))
    return settings


def default_dtype(args):
    """Returns the faster dtype: bf16 on a GPU; on a CPU the one in which a product of matrices takes less time. (The
    narrow layers of stage 0 are never faster in bf16 there.)"""
    if args.device.type == "cuda":
        return "bf16"
    if args.stage == "0":
        return "fp32"
    seconds = dict.fromkeys(DTYPES, 1e9)
    for _ in range(100):  # in turn, as other programs may run
        for name, dtype in DTYPES.items():
            x = torch.ones(512, 512, dtype=dtype)
            seconds[name] = min(seconds[name], timeit.timeit(lambda: x @ x, number=1))
    return min(seconds, key=seconds.get)


# The least values of a recipe's numbers; of others it is 0.
LEAST = dict(steps=1, batch=1, size=1, length=6, pool=1, vocab=1, time_mean=-100, min_time=1e-6)


def add_arguments(parser, recipe):
    add = parser.add_argument
    paths = "Images and texts, in .json, .jsonl, .csv, .tar or folders"
    add("--data", nargs="+", help=f"{paths} (default: the built-in world).")
    add("--image-data", nargs="+", help=f"{paths}, for the image loss alone (default: --data).")
    add("--text-data", nargs="+", help=f"{paths}, for the text loss alone (default: --data).")
    add("--init", help="The checkpoint to start from (default: what the stage before left).")
    sample.add_parts(parser)
    add("--text-encoder", choices=["t5", "none"], default="t5", help="none: learned embeddings, Table 9 (default: t5).")
    add("--held-out", type=at_least(1e-6, float),
        help=f"Share of the images that no stage learns (default: the starting file's, or {data.HELD_OUT}).")
    text = sample.typed_text
    add("--caption-prompt", type=text, help="The question that asks for a caption (default: the starting file's).")
    add("--answer-suffix", type=text, help="Is added to every question (default: the starting file's).")
    add("--out", default="runs", help="Where stageN/ folders are made (default: runs).")
    add("--seed", type=sample.seed, default=0, help="Seeds all random numbers (default: 0).")
    add = parser.add_argument_group("how it runs; what is learned is the same, up to rounding").add_argument
    add("--device", type=sample.existing_device, default=sample.default_device(), help="Device (default: a GPU).")
    add("--dtype", choices=DTYPES, help="What to compute in (default: the faster one here).")
    add("--parallel", choices=["ddp", "fsdp"], default="ddp", help="fsdp: share out optimizer state (default: ddp).")
    add("--accumulate", type=at_least(1), default=1, help="Passes per step; more need less memory (default: 1).")
    add("--checkpointing", action="store_true", help="Compute activations twice: less memory, slower.")
    add("--compile", action="store_true", help="Compile every block with torch.compile.")
    workers = 0 if sample.default_device() == "cpu" else 4
    add("--workers", type=at_least(0), default=workers, help="Processes that make batches (default: 4, on a CPU 0).")
    add("--latents", type=at_least(0), default=25_000, help="Records up to which latents are stored (default: 25000).")
    add("--save-minutes", type=at_least(0, float), default=10, help="Minutes between checkpoints (default: 10).")
    add("--show-every", type=at_least(0), default=500, help="Steps between samples; 0: none (default: 500).")
    add("--keep", type=at_least(1), default=3, help="How many checkpoints to keep (default: 3).")
    group = parser.add_argument_group("numbers of a stage, with this stage's and preset's defaults")
    choices = {"schedule": ["constant", "linear"], "learn_t5": ["no", "mask", "all"]}
    meanings = dict(re.findall(r"(\w+): .*# (.*)", inspect.getsource(Recipe)))  # its comments
    for f in fields(Recipe):
        flag = "--" + f.name.replace("_", "-")
        kind = f.type
        if kind is not str:
            kind = at_least(LEAST.get(f.name, 0), kind)
        group.add_argument(flag, type=kind, choices=choices.get(f.name), default=getattr(recipe, f.name),
                           help=f"{meanings[f.name]} (default: %(default)s).")


def parse_args():
    parser = sample.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--stage", choices=BEFORE, help="Which stage to train; needed.")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="Which model (default: tiny).")
    first, _ = parser.parse_known_args()  # --help shows the numbers of this stage
    recipes = RECIPES[first.preset]
    parser.add_argument("-h", "--help", action="help")
    add_arguments(parser, recipes.get(first.stage, recipes["1"]))
    args = parser.parse_args()
    if args.stage not in recipes:
        fail(f"give --stage, one of {', '.join(recipes)}")
    if bool(args.image_data) != bool(args.text_data) and not args.data:
        fail("give --image-data and --text-data, or one of them and --data")
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    if not (args.data or args.image_data) and recipe.size != data.SIDE:
        fail(f"the built-in world has {data.SIDE} pixels a side, not {recipe.size}: bring --data")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if recipe.batch % (processes * args.accumulate):
        fail(f"--batch {recipe.batch} cannot be shared equally by {processes} processes x {args.accumulate} passes")
    for name, wanted in (("LOCAL_RANK", args.device.type != "cpu"), ("LOCAL_WORLD_SIZE", args.parallel == "fsdp")):
        if wanted and processes > 1 and name not in os.environ:
            fail(f"WORLD_SIZE is {processes}, but {name} is not set: start with torchrun, or set it")
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
    kind = args.device.type
    backend = "gloo" if kind == "cpu" else f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    if kind == "cuda":
        torch.cuda.set_device(args.device)
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    try:  # the others wait for rank 0, which may read and encode images for hours
        dist.init_process_group(backend, timeout=timedelta(hours=3), **alone)
    except (RuntimeError, ValueError) as error:
        fail(f"cannot join the other processes: {str(error).splitlines()[0]}")
    if args.compile:
        try:
            torch.compile(torch.neg)(torch.zeros(2, device=args.device))
        except Exception as error:  # of many kinds
            fail(f"--compile finds no compiler that works ({one_line(error)})")
    # On the CPU the backward pass of bf16 flash attention is slow: fall back on plain matrix products there.
    torch.backends.cuda.enable_flash_sdp(kind == "cuda")
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    args.watch = Watch()
    run_stage(args, recipe)
    dist.destroy_process_group()


if __name__ == "__main__":
    sample.run_program(main, "--batch, or give --accumulate")
