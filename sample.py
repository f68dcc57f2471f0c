"""Using it: draw images from text, read images into text, fill in the blanks of a text. Both diffusions run backwards:
an image begins as noise and follows the velocity; a text begins as masks, which the network replaces by tokens.

    python sample.py --vqa img.png "what color is the circle?"
    python sample.py --caption img.png
    python sample.py --t2i "a large green triangle left of a small red circle" --num 8 --out out.png
    python sample.py --infill img.png "a _ green _ above a small _ circle and a small green square"

References:
  Ho & Salimans, Classifier-Free Guidance, arXiv 2207.12598; Esser et al., SD3, arXiv 2403.03206, section 5.3.2
  Zheng et al., Masked Diffusion Models are Secretly Time-Agnostic Masked Models, arXiv 2409.02908
  Chang et al., MaskGIT, arXiv 2202.04200: unmasking the most confident first
  Ben-Hamu et al., Entropy-Bounded Unmasking, arXiv 2505.24857: as many at once as are nearly certain
"""
import argparse
import json
import os
import re
import signal
import sys
import textwrap
import time

# Idle OpenMP threads spin. Beside other busy programs, without this limit, small tensors are 10 to 70 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch.nn.functional import adaptive_max_pool2d
from tqdm import tqdm

import losses
import model
from data import EXTENSIONS, checksum, load_image, one_line, replacing, slices, to_images, to_pixels, warn
from model import DTYPES, DualDiffusion
from t5 import unseen_words


def time_grid(steps, shift):
    """(steps+1,) times from 1 (noise) down to 0 (image); shift > 1 spends more of the steps near the noise (SD3)."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def denoise(dd, x, prompts, negative, length, steps, cfg, shift, steer):
    """Noise (B,C,h,w) -> pixels (B,3,8h,8w), all prompts at once: Euler's steps along the ODE, from t = 1 to 0.

    Guidance predicts two velocities, one for the prompt and one for the negative text (most often empty), and takes
    negative + cfg * (prompt - negative). So cfg 1 means no guidance."""
    x, guided = x.to(dd.device), cfg != 1
    texts = [*prompts, *[negative] * len(prompts)] if guided else prompts
    states = dd.t5(torch.tensor([dd.tokenizer.encode(text, length) for text in texts], device=dd.device))
    grid = time_grid(steps, shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        latents = torch.cat([x, x]) if guided else x
        times = torch.full((len(latents),), t, device=dd.device)
        velocity = dd.ddit(latents, times, states, predict=torch.zeros(0).long())[0].float()  # no logits
        if guided:
            with_prompt, with_negative = velocity.chunk(2)
            velocity = with_negative + cfg * (with_prompt - with_negative)  # Eq. 10
        x = x + (t_next - t) * steer(x, t, velocity)  # Eq. 2
    return finite(dd.decode_image(x))


@torch.no_grad()
def text_to_image(dd, prompts, negative="", height=None, width=None, length=None, steps=28, cfg=None, shift=None,
                  noise=None, generator=None, steer=lambda x, t, velocity: velocity):
    """Draw one image per prompt -> pixels (B,3,height,width) in [-1,1].

    negative: the text that guidance leads away from; length: tokens that a prompt is padded to; height, width: pixels,
    multiples of 16; steps: of Euler, 28 is SD3's; cfg: guidance, 1 is none; shift: of the time grid; noise
    (B,C,H/8,W/8): what to start from; steer: sees each velocity and may change it. Sizes, length, cfg and shift are by
    default the checkpoint's. Raises ValueError for a size that the model cannot take."""
    settings, vae = dd.config.settings, dd.config.vae
    height, width, length = height or settings.size, width or settings.size, length or settings.length
    cfg, shift = settings.cfg if cfg is None else cfg, shift or settings.shift
    if noise is None:
        noise = torch.randn(len(prompts), vae.latent_channels, *latent_size(dd, height, width), generator=generator)
    parts = slices(len(prompts), noise.shape[2] * vae.factor, noise.shape[3] * vae.factor)
    return torch.cat([denoise(dd, noise[k], prompts[k], negative, length, steps, cfg, shift, steer) for k in parts])


def revealed_share(steps):
    """(steps+1,) float64, from 0 to 1: the share of the masked tokens that sampling has revealed, at each time of an
    even grid from t = 1 down to 0. It is alpha(t), scaled to begin at 0, as sampling begins fully masked. (By
    Eq. 5 a token stays masked through a step from t to s with chance (1 - alpha(s)) / (1 - alpha(t)); the product of
    these over all steps so far is 1 - this share.)"""
    readable = losses.alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    return (readable - readable[0]) / (readable[-1] - readable[0])  # Eq. 5


def text_logits(dd, latents, tokens, where):
    """One forward pass: latents (B,C,H,W), tokens (B,L) -> logits (N,V) at the N true positions of `where` (B,L)."""
    states, times = dd.t5(tokens.to(dd.device)), torch.zeros(len(tokens), device=dd.device)
    return finite(dd.ddit(latents, times, states, predict=where, image_rows=0)[1]).cpu()


# The orders of unmasking. Each yields, for every forward pass, where it reveals tokens, (B,L) bool, and which, (N,).
# `predict_tokens` is the forward pass, (B,L) bool -> tokens there, their probabilities, the entropies, each (N,). After
# each `yield`, `unmask` removes these tokens from `masked`.


def in_random_order(predict_tokens, masked, steps, generator):
    """Exact ancestral sampling on a grid of `steps` steps, but with fewer passes.

    Chance alone decides which masked tokens a step reveals, independently for each (Eq. 5). The network only decides
    what they are, and it does not see the time. So each token's step can be drawn first. The network then runs
    only at steps that reveal something, and only for rows in which they do: elsewhere its output would not be used."""
    u = torch.rand(masked.shape, dtype=torch.float64, generator=generator)
    step_of = torch.bucketize(u, revealed_share(steps)[1:-1], right=True)  # k, where share[k] <= u < share[k+1]
    for step in range(steps):
        reveal = masked & (step_of == step)
        if reveal.any():
            yield reveal, predict_tokens(reveal)[0]


def by_confidence(predict_tokens, masked, steps, generator):
    """As many tokens per step as ancestral sampling reveals on average, but the most probable first (MaskGIT)."""
    total = masked.sum(1)
    for share in revealed_share(steps)[1:]:
        count = (share * total - 1e-9).ceil() - total + masked.sum(1)  # per row; 1e-9: more than float64's rounding
        candidates = masked & (count > 0)[:, None]
        if candidates.any():
            ids, confidence, _ = predict_tokens(candidates)
            score = torch.full(masked.shape, -1.0, dtype=torch.float64).masked_scatter(candidates, confidence)
            rank = score.argsort(1, descending=True).argsort(1)  # 0 for the surest of a row
            reveal = candidates & (rank < count[:, None])
            yield reveal, ids[reveal[candidates]]


GAMMA = 0.1  # nats; README has a table of what larger and smaller ones give


def by_entropy(predict_tokens, masked, steps, generator):
    """The surest first, in each pass as many as are nearly independent; `steps` plays no part. What one pass reveals is
    drawn as if independent. The error, the divergence from the network's joint distribution, is the sum of the
    entropies minus the joint entropy, which is at least the largest single one. So a pass reveals the tokens of least
    entropy, as many as keep the sum minus the largest within GAMMA. (At temperature 0, the default, a rough rule.)"""
    while masked.any():
        ids, _, entropy = predict_tokens(masked)
        nats, order = torch.full(masked.shape, torch.inf, dtype=torch.float64).masked_scatter(masked, entropy).sort(1)
        within = nats.cumsum(1) - nats <= GAMMA  # for each, the sum over all surer ones
        reveal = masked & within.gather(1, order.argsort(1))
        yield reveal, ids[reveal[masked]]


ORDERS = {"random": in_random_order, "confidence": by_confidence, "entropy": by_entropy}


@torch.no_grad()
def unmask(dd, latents, tokens, maskable, steps, order="random", temperature=1.0, generator=None, watch=None):
    """Draw the maskable tokens given the image and the other tokens -> tokens (B,L), number of forward passes.

    latents (B,C,H,W) as the transformer sees them; tokens (B,L) long; maskable (B,L) bool; steps: of the time grid;
    order: one of ORDERS; "random", at temperature 1, is exact ancestral sampling of captions and answers. temperature
    divides the logits; 0 takes the likeliest (greedy). A text is read up to its first EOS: once that and all before it
    are revealed, the row's other masks become EOS without a forward pass."""
    mask_id, eos_id, passes = dd.tokenizer.mask_id, dd.tokenizer.eos_id, 0
    words_follow = (~maskable & (tokens != eos_id)).flip(1).cumsum(1).flip(1) > 0

    def predict_tokens(where):
        rows = where.any(1)
        logits = text_logits(dd, latents[rows], tokens[rows], where[rows])
        logits[words_follow[where], eos_id] = -torch.inf  # a text does not end before words that are given
        return draw_tokens(logits, temperature, generator)

    tokens, masked = torch.where(maskable, mask_id, tokens), maskable.clone()
    for passes, (reveal, ids) in enumerate(ORDERS[order](predict_tokens, masked, steps, generator), 1):
        tokens[reveal] = ids
        beginning = (masked & ~reveal).cumsum(1) == 0  # of each row all before its first mask
        masked &= ~reveal & ~(beginning & (tokens == eos_id)).any(1, keepdim=True)
        if watch:
            watch(tokens, reveal)
    return torch.where(tokens == mask_id, eos_id, tokens), passes


def caption(dd, images, length=None, steps=None, order=None, temperature=0.0, generator=None, watch=None):
    """Describe images (B,3,H,W) in [-1,1] -> list of str. length: tokens of a text; "auto": as many as it takes;
    steps: forward passes at most. order: default "entropy" (needs no steps); if steps are given "random", the paper's.
    A model that was tuned on answers alone is asked for a caption by a question, `caption_prompt`."""
    return unmask_texts(dd, images, [text_ids(dd, "", length)] * len(images), length, steps, order,
                        temperature, generator, watch, random_steps=dd.config.settings.caption_steps)


def answer(dd, images, questions, length=None, steps=None, order=None, temperature=0.0, generator=None, watch=None):
    """Answer one question per image -> list of str. length: tokens of question and answer; the rest as for caption."""
    return unmask_texts(dd, images, [text_ids(dd, (question, ""), length) for question in questions], length, steps,
                        order, temperature, generator, watch, random_steps=dd.config.settings.answer_steps)


def infill(dd, images, texts, length=None, steps=None, order=None, temperature=0.0, generator=None, watch=None):
    """Fill in the blanks of one text per image -> list of str. Every underscore stands for one token."""
    texts = [dd.tokenizer.blank_ids(text, length or dd.config.settings.length) for text in texts]
    return unmask_texts(dd, images, texts, length, steps, order, temperature, generator, watch, whole=True)


# ------------------------------------------------- the chapter ends here; what follows makes it practical


def draw_tokens(logits, temperature, generator):
    """logits (N,V) -> tokens (N,), their probabilities, the entropies (nats) of their distributions. In float64, for
    float32 noise would silently lower the temperature; and so 256 rows at a time. The mask token, the last of the V, is
    never drawn."""
    parts = []
    for part in logits.split(256):
        probs = torch.softmax(part[:, :-1].double() / (temperature or 1.0), dim=1)
        ids = torch.multinomial(probs, 1, generator=generator) if temperature else probs.argmax(1, keepdim=True)
        parts.append((ids[:, 0], probs.gather(1, ids)[:, 0], torch.special.entr(probs).sum(1)))
    return [torch.cat(column) for column in zip(*parts)]


def latent_size(dd, height, width):
    """Height and width of an image -> of its latents. Raises ValueError for one that the model cannot take."""
    factor, unit = dd.config.vae.factor, dd.config.vae.factor * dd.config.ddit.patch
    if height % unit or width % unit or min(height, width) < unit:
        raise ValueError(f"this model wants images with sides that are multiples of {unit}, not {width}x{height}")
    dd.ddit.positions(height // unit, width // unit)  # raises where it has fewer
    return height // factor, width // factor


def text_ids(dd, text, length=None):
    """A caption, or a pair (question, answer) -> ids, maskable, as this model was trained on them."""
    settings = dd.config.settings
    length = settings.length if length in (None, "auto") else length
    if isinstance(text, str):
        prompt = settings.caption_prompt
        return dd.tokenizer.question_ids(prompt, text, length) if prompt else dd.tokenizer.caption_ids(text, length)
    return dd.tokenizer.question_ids(f"{text[0]} {settings.answer_suffix}".rstrip(), text[1], length)


@torch.no_grad()
def unmask_texts(dd, images, texts, length, steps, order, temperature, generator, watch, random_steps=0, whole=False):
    """Unmask one text (ids, maskable) per image -> list of str: from the first mask on, or the whole texts. Without
    `steps`, random order takes `random_steps`, and the others a token per step. length "auto": in blocks, until EOS."""
    latent_size(dd, *images.shape[2:])  # raises before any work is done in vain
    tokens, maskable = (torch.tensor(column) for column in zip(*texts))
    order = order or ("random" if steps else "entropy")
    steps = steps or (order == "random" and random_steps) or tokens.shape[1]
    method, lines = unmask_in_blocks if length == "auto" else unmask, []
    for part in slices(len(images), *images.shape[2:]):
        latents = dd.encode_image(images[part])
        ids, _ = method(dd, latents, tokens[part], maskable[part], steps, order, temperature, generator, watch)
        starts = maskable[part].long().argmax(1)  # the first mask
        lines += [dd.tokenizer.decode(row if whole else row[start:]) for row, start in zip(ids, starts)]
    return lines


def unmask_in_blocks(dd, latents, tokens, maskable, *how, blocks=32):
    """`unmask` for texts of any length -> a list of ids per text, number of forward passes.

    A text that fills its whole length with words is not at its end. So a window moves over it, by a quarter of the
    length: the prompt and the latest words stay, new masks follow, and so on until EOS, or for `blocks` blocks. The
    network never sees more tokens than in training. But no training text began in the middle, and of longer ones it
    saw only the beginning: README says what comes of it."""
    ids, passes = unmask(dd, latents, tokens, maskable, *how)
    texts, prompts = ids[:, :-1].tolist(), (~maskable[:, :-1]).sum(1).tolist()  # tokens that are given
    room, eos_id = tokens.shape[1] - 1, dd.tokenizer.eos_id
    block = max(1, (room - max(prompts)) // 4)
    for _ in range(blocks):
        rows = [k for k, text in enumerate(texts) if eos_id not in text[prompts[k]:]]
        if not rows:
            break
        windows = [texts[k][:prompts[k]] + texts[k][len(texts[k]) - room + prompts[k] + block:] for k in rows]
        windows = torch.tensor([window + [eos_id] * (block + 1) for window in windows])
        fresh = torch.zeros_like(windows, dtype=torch.bool)
        fresh[:, -1 - block:-1] = True
        ids, more = unmask(dd, latents[rows], windows, fresh, *how)
        for k, words in zip(rows, ids[fresh].view(-1, block).tolist()):
            texts[k] += words
        passes += more
    return texts, passes


@torch.no_grad()
def score(dd, images, texts, length=None, draws=64, seed=0):
    """How unlikely is each text, given its image? -> (N,) nats, an estimate of Eq. 7, which bounds -log p(text|image).

    images (N,3,H,W) in [-1,1]; texts: N captions, or pairs (question, answer), of which only the answer counts. Each is
    masked `draws` times, at stratified times, with the same random numbers for all, so differences vary little."""
    nats = []
    for image, text in zip(images, texts):
        generator, latents = torch.Generator().manual_seed(seed), dd.encode_image(image[None])
        t = losses.stratified_times(draws, generator=generator)
        tokens, maskable = (torch.tensor(row).expand(draws, -1) for row in text_ids(dd, text, length))
        noisy, masked = losses.mask_tokens(tokens, t, maskable, dd.tokenizer.mask_id, generator)
        nats.append(0)
        for part in slices(draws, *images.shape[2:]):
            logits = text_logits(dd, latents.expand(len(t[part]), -1, -1, -1), noisy[part], masked[part])
            loss = losses.masked_diffusion_loss(logits, tokens[part], masked[part], t[part])  # per token
            nats[-1] += loss * tokens[part].numel() / draws
    return torch.stack(nats)


def rank(dd, images, questions, options, length=None):
    """One question per image -> list of str: the options, likeliest first, with their probabilities in per cent."""
    pairs = [(question, option) for question in questions for option in options]
    nats = score(dd, images.repeat_interleave(len(options), 0), pairs, length).view(-1, len(options))
    return [", ".join(f"{options[k]} ({100 * row[k]:.1f}%)" for k in row.argsort(descending=True))
            for row in torch.softmax(-nats, dim=1)]


def keep_likeliest(dd, pixels, prompts, count, length=None):
    """Images (N,3,H,W), `count` in a row for each prompt -> (N/count,3,H,W): per prompt the image from which the model
    itself most likely reads it."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    nats = score(dd, pixels, texts, length, draws=16).view(-1, count)
    return pixels.unflatten(0, nats.shape)[torch.arange(len(nats)), nats.argmin(1)]


@torch.no_grad()
def edit(dd, pixels, inside, prompts, steer, **how):
    """Draw a part of an image anew, once per prompt -> (B,3,H,W). pixels (1,3,H,W) in [-1,1]; inside (1,1,H,W) bool is
    the part. The rest becomes the autoencoder's reconstruction: its latents follow the line from the noise to their
    known end, so they are always as noisy as the others. The other arguments are text_to_image's."""
    latents = dd.encode_image(pixels)
    cells = adaptive_max_pool2d(inside.float(), latents.shape[2:]).bool().to(dd.device)
    drawn = text_to_image(dd, prompts, **how, steer=lambda x, t, velocity: steer(
        x, t, torch.where(cells, velocity, (x - latents) / t)))
    return torch.where(inside.to(drawn.device), drawn, dd.decode_image(latents))


def finite(tensor):
    """The tensor itself. Raises ValueError if it holds NaN or infinity."""
    if not tensor.isfinite().all():
        raise ValueError("the model computes NaN or infinity: its weights are damaged, or too large for --dtype")
    return tensor


# ---------------------------------------------------------------- what both programs share

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny.safetensors")
torch.backends.cudnn.allow_tf32 = False  # or fp32's convolutions would have 10 bits of precision on a GPU, not 23


def fail(message, status=2):
    """End the program after a user's mistake, with one line. If all processes of a run fail alike, the first prints it:
    the others wait for torchrun, which ends them when the first is gone."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if sys.stderr:
        tqdm.write(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)  # not into a bar
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    where = ""  # for messages: the PNG that the arguments are from

    def error(self, message):
        fail(f"{self.where}{message} (--help shows how)")

    def parse_args(self, args=None):
        args = super().parse_args(args)
        for name in ("ckpt", "init", "t5", "vae", "spiece", "out", "edit", "again", "preview"):
            if getattr(args, name, None) == "" != self.get_default(name):  # as from a shell's "$UNSET"
                fail(f"--{name} is empty: give a name, or leave it out")
        return args


def default_device():
    """The name of the accelerator that torch finds, or "cpu"."""
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return gpu.type if gpu else "cpu"


def existing_device(name):
    """An argparse type: a device that exists. A GPU gets the local rank of torchrun, else the index in `name`, or 0."""
    kind, _, index = name.partition(":")
    index, count = os.environ.get("LOCAL_RANK", index or "0"), torch.accelerator.device_count()
    if kind != "cpu" and not (kind == default_device() and index.isdecimal() and int(index) < count):
        raise argparse.ArgumentTypeError(f"there is no device {name} here")
    return torch.device(kind) if kind == "cpu" else torch.device(kind, int(index))


def number(kind, low, high):
    """An argparse type: an int or float (`kind`) in that range."""
    def number(text):  # argparse's messages show this name
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number


seed = number(int, 0, 2 ** 40)  # what random generators can be seeded with


def add_parts(parser):
    """The arguments that take parts of a model from other files."""
    parser.add_argument("--t5", metavar="FILE", help="a file or folder to take T5 from")
    parser.add_argument("--vae", metavar="FILE", help="a file or folder to take the VAE from")
    parser.add_argument("--spiece", metavar="FILE", help="T5's tokenizer, spiece.model")


def run_program(main, stopped="stopped", lower="--size, or give --offload"):
    """Run main(). A user's mistake gives one line and exit status 2; so does too little memory, and the line says what
    to lower. Ctrl-C prints `stopped` (130). If the reader of our output has left (| head), it ends in silence (141)."""
    if sys.stdout is None:
        fail("stdout is closed")
    sys.stdout.reconfigure(errors="replace")  # a narrow locale: a question mark, not a traceback
    try:
        try:
            main()
        finally:
            try:
                sys.stdout.flush()
            except OSError as error:  # Python will try once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise OSError(error.errno, error.strerror, "stdout") from None
    except BrokenPipeError:
        sys.exit(141)
    except KeyboardInterrupt:
        fail(stopped, 130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error):
            fail(f"a process that makes batches failed ({one_line(error)}); the same command goes on from "
                 "the last checkpoint")
        if isinstance(error, (ValueError, OSError)):
            fail(error)
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate|ALLOC_FAILED", str(error)):
            raise
        fail(f"out of memory: lower {lower}")


def describe(config, parts, tokenizer):
    """What `inspect` returns, in words: of each part its parameters, types, size, file and configuration."""
    lines = {title: "missing" for title in [*model.PART_NAMES.values(), "tokenizer"]}
    for part, tensors in parts.items():
        with torch.device("meta"):
            names = model.MODULES[part](getattr(config, part)).state_dict()
        stored = [info for name in names for info in tensors.pieces(name)]
        counts, types = [torch.Size(info.shape).numel() for info in stored], [info.dtype for info in stored]
        size = sum(n * model.TYPES.get(dtype, torch.int8).itemsize for n, dtype in zip(counts, types)) / 1e9
        lines[model.PART_NAMES[part]] = (f"{sum(counts):,} parameters, {', '.join(sorted(set(types)))}, {size:.3f} GB, "
                                   f"in {tensors.path}\n{'':12s} {getattr(config, part)}")
    if tokenizer:
        lines["tokenizer"] = f"{tokenizer.vocab_size} tokens, the mask token among them"
    able = "can draw and read" if model.HEAD in parts.get("ddit", ()) else (
        "can draw; to read, it must be trained first (no text head)")
    if "missing" in lines.values():
        able = "can do nothing yet: give what is missing (--t5, --vae, --spiece)"
    lines["settings"] = config.settings
    return "\n".join([*(f"{title:12s} {words}" for title, words in lines.items()), able])


def grid(images, columns, gap=2):
    """PIL images of one size, row by row -> one white page of them, `gap` pixels apart."""
    width, height, rows = images[0].width + gap, images[0].height + gap, -(-len(images) // columns)
    page = Image.new("RGB", (columns * width - gap, rows * height - gap), "white")
    for k, image in enumerate(images):
        page.paste(image, (k % columns * width, k // columns * height))
    return page


def sheet(path, cells, columns=4, width=192):
    """Write a PNG of images with their texts. cells: [(image (H,W,3) uint8, text)]; width: of one image, in pixels."""
    texts = ["\n".join(textwrap.fill(line, width // 7) for line in text[:400].split("\n")) for _, text in cells]
    size, tiles = (width + 8, width + 24 + 15 * max(text.count("\n") for text in texts)), []
    for (image, _), text in zip(cells, texts):
        tiles.append(Image.new("RGB", size, "white"))
        tiles[-1].paste(Image.fromarray(image).resize((width, width), Image.Resampling.NEAREST), (4, 4))
        ImageDraw.Draw(tiles[-1]).text((4, width + 6), text, "black", ImageFont.load_default(size=12), spacing=2)
    with replacing(path) as beside:
        grid(tiles, columns, gap=0).save(beside, format="PNG")


# ---------------------------------------------------------------- what a drawing tells of itself

RECORDED = "t2i edit mask ckpt t5 vae spiece dtype seed steps length num best_of cfg negative size".split()


def record(args, prompts, **settings):
    """-> text chunks for a PNG: "parameters" in the form in which viewers of such images read them, and "arguments",
    from which --again draws it again."""
    negative, chunks = [f"Negative prompt: {args.negative}"] * bool(args.negative), PngImagePlugin.PngInfo()
    lines = [*prompts, *negative, ", ".join(f"{name}: {value}" for name, value in settings.items())]
    chunks.add_text("parameters", "\n".join(lines))
    arguments = {name: value for name, value in vars(args).items() if name in RECORDED and value is not None}
    chunks.add_text("arguments", json.dumps(arguments | {"checksum": checksum(args.ckpt or SHIPPED)}))
    return chunks


def recorded_arguments(path):
    """A PNG with a record -> its arguments, as they could be typed, and its checkpoint's checksum or None. Raises
    ValueError, OSError with one line."""
    try:
        with Image.open(path) as image:
            values = json.loads(image.text["arguments"])
            return [f"--{name.replace('_', '-')}={value}" for name in RECORDED if name in values
                    for value in (values[name] if isinstance(values[name], list) else [values[name]])
                    ], values.get("checksum")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError):
        raise ValueError(f"{path}: holds no record of how it was drawn: only whole PNGs of this program do") from None


def watch_text(tokenizer, passes):
    """-> what `unmask` calls after every pass: it adds the first text to `passes`, as pairs of a word and whether it is
    new, and on a terminal shows how it fills in."""
    def watch(tokens, reveal):
        words = {tokenizer.mask_id: "", tokenizer.eos_id: "·"}
        words = [words[i] if i in words else tokenizer.pieces.id_to_piece(i) for i in tokens[0].tolist()]
        passes.append(list(zip(words, reveal[0].tolist())))
        if sys.stderr.isatty():
            line = "".join(f"\033[7m{word}\033[0m" if new else word or " _" for word, new in passes[-1])
            room = 2 + len(words) // 8  # lines: first of all, scroll so far
            start = "\n" * room + f"\033[{room}A\0337" if len(passes) == 1 else "\0338\033[J"
            print(f"{start}{len(passes):3d} {line.replace('▁', ' ')}", file=sys.stderr, flush=True)
            time.sleep(0.1)
    return watch


def text_page(passes):
    """-> PIL image, a row per pass: grey is masked, yellow is what this pass revealed, a dot is the end of the text."""
    font, left = ImageFont.load_default(size=13), [4.0]
    for word, _ in passes[-1]:
        left.append(left[-1] + font.getlength(word.strip("▁")) + 8)
    page = Image.new("RGB", (int(left[-1]) + 4, 22 * len(passes) + 4), "white")
    draw = ImageDraw.Draw(page)
    for k, words in enumerate(passes):
        for (word, new), x, end in zip(words, left, left[1:]):
            draw.rectangle((x, 22 * k + 4, end - 2, 22 * k + 22), "gold" if new else "white" if word else "lightgray")
            draw.text((x + 3, 22 * k + 4), word.strip("▁"), "black", font)
    return page


# ---------------------------------------------------------------- the program


def width_and_height(text):
    """An argparse type: "512" or "768x512"."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"{text} is not like 512 or 768x512")
    return int(sides[1]), int(sides[2] or sides[1])


def text_length(text):
    """An argparse type: a number of tokens, or "auto"."""
    if text != "auto" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor auto")
    return text if text == "auto" else number(int, 8, 4096)(text)


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to do (the first four can be given several times)").add_argument
    add("--vqa", nargs="+", action="append", metavar="IMAGE ... QUESTION", default=[])
    add("--caption", nargs="+", action="extend", metavar="IMAGE", default=[])
    add("--t2i", nargs="+", action="extend", metavar="TEXT", default=[])
    add("--infill", nargs="+", action="append", metavar="IMAGE ... TEXT", default=[], help="an underscore is one token")
    add("--edit", metavar="IMAGE", help="draw a part of it anew, as --t2i's text says")
    add("--mask", nargs="+", metavar="IMAGE TEXT", help="for --edit: an image, white in that part, and the text")
    add("--again", metavar="PNG", help="draw again what this PNG shows: it carries its prompts and settings; "
        "other flags count, too")
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--ckpt", metavar="FILE", help="a file of ours or of SD3, or a folder in diffusers layout; default: the small "
        "model that ships")
    add_parts(group)
    add("--describe", action="store_true", help="print what the checkpoint is; its weights are not read")
    add("--export", metavar="DIR", help="write the checkpoint in diffusers layout, as the authors' release has it")
    add("--device", type=existing_device, default=default_device(), help="default: the GPU, if there is one")
    add("--dtype", choices=list(DTYPES), help="to compute in; default: bf16 on a GPU, fp32 on a CPU")
    add("--offload", action="store_true", help="keep T5 on the CPU, if GPU memory is short")
    add = parser.add_argument_group("how to do it").add_argument
    add("--seed", type=seed, default=0, help="of the random numbers; default: 0")
    add("--steps", type=number(int, 1, 10_000), help="of sampling; default: 28 to draw; to read in random "
        "order the checkpoint's, for --infill one per token")
    add("--order", choices=list(ORDERS), help="of unmasking text; default: entropy, which chooses its own number of "
        "steps; with --steps: random, the paper's")
    add("--temperature", type=float, default=0.0, help="of drawing tokens: divides the logits; default: 0, always the "
        "likeliest; with 1 and random order, samples are exact")
    add("--length", type=text_length, help="of a text, in tokens; auto: captions and answers as long as they need; "
        "default: the checkpoint's")
    add("--options", nargs="+", default=[], metavar="ANSWER", help="rank these answers to --vqa by their probability")
    add("--suffix", metavar="TEXT", help="added to every question; default: the checkpoint's")
    add("--num", type=number(int, 1, 10 ** 6), default=1, help="images per prompt; default: 1")
    add("--best-of", type=number(int, 1, 1000), default=1, metavar="N", help="draw N images for each, and keep the one "
        "from which the model itself most likely reads the prompt; default: 1")
    add("--cfg", type=number(float, -1000, 1000), help="guidance, a factor; 1: none; default: the checkpoint's")
    add("--negative", default="", metavar="TEXT", help="what guidance leads away from; default: the empty text")
    add("--size", type=width_and_height, metavar="SIDES", help="pixels, 512 or 768x512; default: the checkpoint's")
    add("--trace", default="", metavar="FILE", help="an image of how it came about: of a text a row per pass, of a "
        "drawing an image per step (a .gif moves)")
    add("--out", default="out.png", help="the image, or the page of all images; default: out.png")
    args = parser.parse_args()
    if args.again is not None:
        args = with_record(parser, args)
    return checked(args, parser)


NEEDS = {**dict.fromkeys(("out", "num", "best_of", "cfg", "negative"), ["t2i"]),  # which flag is about which work
         **dict.fromkeys(("order", "temperature"), ["caption", "vqa", "infill"]), "options": ["vqa"], "suffix": ["vqa"]}


def with_record(parser, typed):
    """The arguments of --again: those that the PNG carries, and those that were typed, which count more."""
    if typed.t2i or typed.mask:
        fail(f"--again {typed.again}: the PNG has its own prompts; leave --t2i and --mask out")
    recorded, drawn_by = recorded_arguments(typed.again)
    parser.where = f"{typed.again}: "
    args = parser.parse_args([*recorded, *sys.argv[1:]])
    if not args.t2i:
        fail(f"{args.again}: does not show a drawing, which alone can be drawn again")
    if typed.ckpt is None and drawn_by not in (None, checksum(args.ckpt or SHIPPED)):
        warn(f"{args.ckpt or SHIPPED} is not the checkpoint that drew {args.again}")
    return args


def checked(args, parser):
    """The arguments themselves, if they make sense as a whole."""
    if args.mask:
        args.mask, args.t2i = args.mask[0], args.t2i + args.mask[1:]
    for name, needs in NEEDS.items():
        if getattr(args, name) != parser.get_default(name) and not any(getattr(args, need) for need in needs):
            fail(f"--{name.replace('_', '-')} has no part in this: it wants --{' or --'.join(needs)}")
    if bool(args.edit) != bool(args.mask) or args.edit and not args.t2i:
        fail("to edit, give an image, a mask and a text: --edit img.png --mask mask.png \"...\"")
    for name, what in (("vqa", "a question"), ("infill", "a text with blanks")):
        if any(len(job) < 2 or not job[-1].strip() for job in getattr(args, name)):
            fail(f"--{name} wants an image and then {what}: --{name} img.png \"...\"")
    drawn_on, again = [args.edit, args.mask] if args.edit else [], [args.again] if args.again else []
    outputs = ["out"] * bool(args.t2i) + ["trace"] * bool(args.trace)
    for paths in (args.caption, drawn_on, again, *(paths for *paths, _ in args.vqa + args.infill)):
        if missing := [path for path in paths if not os.path.exists(path)]:
            quotes = " (a question goes in quotes)" if len(paths) > 1 and paths is not drawn_on else ""
            fail(f"{missing[0]}: no such image{quotes}")
        for name in outputs:
            if any(os.path.realpath(path) == os.path.realpath(getattr(args, name)) for path in paths):
                fail(f"--{name} {getattr(args, name)}: is an image to be read; give another name")
    if any("_" not in text for *_, text in args.infill):
        fail("--infill's text has no blank: each underscore stands for one token to fill in")
    if not (args.vqa or args.caption or args.infill or args.t2i or args.describe or args.export is not None):
        fail("nothing to do: give --vqa, --caption, --t2i or --infill (--help shows how)")
    if args.steps and args.order == "entropy" and not args.t2i:
        fail("--steps has no part in --order entropy, which takes as many as a text needs")
    if args.length == "auto" and (args.infill or args.t2i or args.options):
        fail("--length auto is for texts that can go on: those of --caption and --vqa, without --options")
    if args.export is not None and args.ckpt is None:
        fail("--export wants --ckpt FILE: what to export")
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        fail("--temperature is 0 or from 0.01 to 100")
    texts = len(args.caption) + sum(len(job) - 1 for job in args.infill + (args.vqa if not args.options else []))
    same_file = args.t2i and os.path.realpath(args.trace) == os.path.realpath(args.out)
    if args.trace and (texts + bool(args.t2i) != 1 or same_file):
        fail("--trace FILE shows one text, or what --t2i draws, not several, and not in --out's file")
    for name in outputs:
        path = getattr(args, name)
        is_picture, folder = os.path.splitext(path)[1].lower() in EXTENSIONS, os.path.dirname(path) or "."
        if not is_picture or os.path.isdir(path) or not os.access(folder, os.W_OK):
            fail(f"--{name} {path}: give a picture's name, like out.png, in a folder that you can write to")
    return args


def prepare_text(dd, text, room):
    """A typed text as the model knows it: in lower case, if that takes fewer tokens of a vocabulary that has capitals
    only as single letters. Warns of words that the tokenizer never saw, and of more than `room` tokens."""
    text = os.fsencode(text).decode(errors="replace")  # as it was typed, whatever the locale takes that for
    pieces = dd.tokenizer.pieces
    if all(len(p.strip("▁")) == 1 for p in map(pieces.id_to_piece, range(len(pieces))) if p != p.lower()):
        text = min(text, text.lower(), key=lambda text: len(pieces.encode(text)))
    if unseen := unseen_words(dd.tokenizer, text):
        warn(f"never seen in training, so expect little: {', '.join(unseen)}")
    tokens = sum(len(dd.tokenizer.encode(part)) - 1 for part in text.split("_")) + text.count("_")
    if tokens > room:
        warn(f"{text[:40]!r}... has {tokens} tokens, the model takes {room}: its end is left out")
    return text


def save_image(path, frames, chunks):
    """Write an image; several as frames of a GIF."""
    with replacing(path) as beside:
        frames[0].save(beside, Image.registered_extensions()[os.path.splitext(path)[1].lower()], pnginfo=chunks,
                       save_all=len(frames) > 1, append_images=frames[1:], duration=150, loop=0)
    print(path)


def read_images(dd, args, width, height, length, generator):
    """--vqa, --caption, --infill: print what is read, a line per image; of a trace a row per pass."""
    settings, passes = dd.config.settings, []
    how = args.length or length, args.steps, args.order, args.temperature
    watch = watch_text(dd.tokenizer, passes) if args.trace else None

    def rows(jobs, room):
        return [(path, text) for *paths, text in jobs for text in [prepare_text(dd, text, room)] for path in paths]

    def choose(dd, images, questions, length, *how):
        return rank(dd, images, questions, [prepare_text(dd, text, length) for text in args.options], length)

    longest, suffix = (dd.tokenizer.prompt_ids(s, length) for s in ("a " * length, settings.answer_suffix))
    for reader, inputs in ((choose if args.options else answer, rows(args.vqa, room=len(longest) - len(suffix))),
                           (caption, [(path,) for path in args.caption]), (infill, rows(args.infill, room=length - 1))):
        for part in slices(len(inputs), height, width):
            paths, *texts = zip(*inputs[part])
            images = torch.from_numpy(to_pixels([load_image(path, width, height) for path in paths]))
            lines = reader(dd, images, *texts, *how, generator, watch)
            tqdm.write("\n".join(lines))
            sys.stdout.flush()
    if passes:
        save_image(args.trace, [text_page(passes)], record(args, lines, Seed=args.seed))


def draw_page(dd, args, width, height, length, generator):
    """--t2i, --edit: draw, keep the best, write the page of all images, and of a trace a page per step."""
    settings, trace = dd.config.settings, {}
    *texts, negative = (prepare_text(dd, text, length - 1) for text in [*args.t2i, args.negative])
    prompts = [text for text in texts for _ in range(args.num)]
    candidates = [text for text in prompts for _ in range(args.best_of)]
    steps, cfg = args.steps or 28, settings.cfg if args.cfg is None else args.cfg

    def steer(x, t, velocity):
        if args.trace:  # the image in which the line from here ends
            trace.setdefault(t, []).extend(map(Image.fromarray, to_images(dd.decode_image(x - t * velocity))))
        return velocity

    how = dict(negative=negative, height=height, width=width, length=length, steps=steps, cfg=cfg, shift=settings.shift,
               generator=generator, steer=steer)
    if args.edit:
        images = load_image(args.edit, width, height), load_image(args.mask, width, height, behind="black")
        image, mask = torch.from_numpy(to_pixels(images)).split(1)
        inside = mask.amax(1, keepdim=True) > 0
        if not inside.any():
            fail(f"--mask {args.mask}: is white nowhere, so there is nothing to draw")
        pixels = edit(dd, image, inside, candidates, **how)
    else:
        pixels = text_to_image(dd, candidates, **how)
    if args.best_of > 1:
        pixels = keep_likeliest(dd, pixels, prompts, args.best_of, length)
    name = os.path.splitext(os.path.basename((args.ckpt or SHIPPED).rstrip("/")))[0]
    args.size = f"{width}x{height}"  # as it is typed
    chunks = record(args, texts, **{"Steps": steps, "Sampler": "Euler", "CFG scale": cfg, "Seed": args.seed,
                                    "Size": args.size, "Model": name})
    columns = args.num if len(texts) > 1 else round(args.num ** 0.5 + 0.4)
    save_image(args.out, [grid([Image.fromarray(image) for image in to_images(pixels)], columns)], chunks)
    if args.trace.lower().endswith(".gif"):
        pages = [grid(images, columns * args.best_of) for images in trace.values()]
        save_image(args.trace, pages + pages[-1:] * 10, chunks)
    elif args.trace:  # a row per image, a column per step
        save_image(args.trace, [grid([image for row in zip(*trace.values()) for image in row], len(trace))], chunks)


def main():
    args = parse_args()
    files, reads = (args.ckpt or SHIPPED, args.t5, args.vae, args.spiece), args.vqa + args.caption + args.infill
    if args.export is not None:
        model.refuse_full(args.export)
    if args.describe or args.export is not None:
        checkpoint = model.inspect(*files)
        print(describe(*checkpoint))
        model.check_together(*checkpoint)
    if args.export is not None:
        DualDiffusion.load(*files, dtype=None).export(args.export)
        print(f"wrote {args.export}")
    if not (reads or args.t2i):
        return
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]
    dd = DualDiffusion.load(*files, args.device, dtype, args.offload)
    if missing := model.missing_parts(dd):
        fail(f"{files[0]}: holds no {' and no '.join(missing)}; `python sample.py --ckpt {files[0]} --describe` "
             "tells what it holds")
    if reads and not dd.ddit.text_head.linear.weight.any():
        warn("this model's text head was never trained: it can draw, but what it reads means nothing")
    settings, generator = dd.config.settings, torch.Generator().manual_seed(args.seed)
    if args.suffix is not None:
        settings.answer_suffix = args.suffix
    length = settings.length if args.length in (None, "auto") else args.length
    width, height = args.size or (settings.size, settings.size)
    latent_size(dd, height, width)  # raises before any work is done in vain
    if args.num * len(args.t2i) * height * width > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow would not open it again
        fail(f"{args.num * len(args.t2i)} images of {width}x{height} do not fit on a page: lower --num or --size")

    if reads:
        read_images(dd, args, width, height, length, generator)
    if args.t2i:
        draw_page(dd, args, width, height, length, generator)


if __name__ == "__main__":
    run_program(main)
