"""Using it: draw images from text, read images into text, fill in the blanks of a text. Both diffusions run
backwards: an image begins as noise and follows the velocity; a text begins as masks, which become tokens.

    python sample.py --vqa img.png "what color is the circle?"
    python sample.py --caption img.png
    python sample.py --t2i "a large green triangle left of a small red circle" --num 8 --out out.png
    python sample.py --infill img.png "a _ green _ above a small _ circle and a small green square"
References: Esser et al., SD3, arXiv 2403.03206, section 5.3.2; Ho & Salimans, Classifier-Free Guidance, 2207.12598
  Kynkäänniemi et al., Limited-Interval Guidance, 2404.07724; Zheng et al., Time-Agnostic Masked Models, 2409.02908
  Ben-Hamu et al., Entropy-Bounded Unmasking, 2505.24857
"""
import argparse
import os
import re
import sys
import textwrap

# Waiting threads of OpenMP spin, which slows everything beside other programs. (Set before torch is imported.)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import losses
from data import ENDINGS, EXTENSIONS, at_once, load_image, one_line, replacing, slices, to_images, to_pixels, warn
from model import DTYPES, DualDiffusion, check_complete, finite
from t5 import unseen_words


def time_grid(steps, shift):
    """Returns (steps+1,) times from 1 (noise) to 0 (image); shift > 1 puts more steps near the noise (SD3)."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def denoise(dd, x, prompts, negative, length, steps, cfg, shift, watch=None):
    """Noise (B,C,h,w) -> pixels (B,3,8h,8w), all prompts at once: Euler's steps along the ODE, from t = 1 to 0.
    Guidance predicts two velocities, one for the prompt and one for the negative text, which is usually empty,
    and takes negative + cfg * (prompt - negative)."""
    low, high = dd.config.settings.cfg_times
    x = x.to(dd.device)
    texts = list(prompts)
    if cfg != 1:
        texts += [negative] * len(prompts)
    tokens = [dd.tokenizer.encode(text, length) for text in texts]
    all_states = dd.t5(torch.tensor(tokens, device=dd.device))
    prompt_states = all_states[:len(prompts)]

    def predict_velocity(x, t, states):
        times = torch.full((len(x),), t, device=dd.device)
        velocity, _ = dd.ddit(x, times, states, image_rows=len(x))
        return velocity.float()

    def velocity_at(x, t):
        if cfg == 1 or not low <= t <= high:  # elsewhere guidance costs a pass and helps little
            return predict_velocity(x, t, prompt_states)
        with_prompt, with_negative = predict_velocity(torch.cat([x, x]), t, all_states).chunk(2)
        return with_negative + cfg * (with_prompt - with_negative)  # Eq. 10

    grid = time_grid(steps, shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        velocity = velocity_at(x, t)
        if watch:
            watch(x, t, velocity)
        x = x + (t_next - t) * velocity  # Eq. 2
    return dd.decode_image(x)


@torch.no_grad()
def text_to_image(dd, prompts, negative="", height=None, width=None, length=None, steps=28, cfg=None, shift=None,
                  noise=None, generator=None, watch=None):
    """Draws one image for each prompt of a list -> pixels (B,3,height,width) in [-1,1].
    height, width: pixels, multiples of 16; length: tokens to which a prompt is padded; steps: of Euler's method,
    in SD3 28; cfg: guidance, 1 is none; shift: of the time grid; noise (B,C,H/8,W/8): what to start from;
    watch(x, t, velocity) is called at every step. Where an argument is None, the checkpoint's own is taken.
    Raises ValueError for a size that the model cannot take."""
    settings = dd.config.settings
    length = length or settings.length
    shift = shift or settings.shift
    if cfg is None:
        cfg = settings.cfg
    if noise is None:
        h, w = latent_size(dd, height or settings.size, width or settings.size)
        noise = torch.randn(len(prompts), dd.config.vae.latent_channels, h, w, generator=generator)
    factor = dd.config.vae.factor
    drawn = []
    for part in slices(len(prompts), noise.shape[2] * factor, noise.shape[3] * factor, dd.device):
        drawn.append(denoise(dd, noise[part], prompts[part], negative, length, steps, cfg, shift, watch))
    return torch.cat(drawn)


def revealed_share(steps):
    """Returns (steps+1,) float64: the share of tokens that are revealed by each time s of an even grid from t = 1 to 0.
    By Eq. 5 a step from t to s leaves a token masked with probability (1 - alpha(s)) / (1 - alpha(t)); all steps to s,
    with the product, (1 - alpha(s)) / (1 - alpha(1)). The share is 1 minus this. (1 is alpha(0), readable[-1].)"""
    readable = losses.alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    return (readable - readable[0]) / (readable[-1] - readable[0])  # Eq. 5


def text_logits(dd, latents, tokens, places):
    """One forward pass: latents (B,C,H,W), tokens (B,L), places (B,L) bool on the CPU -> logits (N,V) at N places."""
    states = dd.t5(tokens.to(dd.device))
    times = torch.zeros(len(tokens), device=dd.device)
    _, logits = dd.ddit(latents, times, states, predict=places, image_rows=0)
    return finite(logits)


def draw_steps(u, steps):
    """Draws the step, 0 to steps-1, at which each token is revealed, by u (B,L), uniform in [0,1). Ancestral sampling
    goes from t = 1 to 0 in steps, and at each step reveals each mask with some probability (Eq. 5). The network does
    not change this probability; it only says which token appears. So the steps of all tokens can be drawn
    beforehand."""
    # k where share[k] <= u < share[k+1]
    return torch.bucketize(u.contiguous(), revealed_share(steps)[1:-1], right=True)


# An order of unmasking is a function of three things: masked (B,L) bool says which places are still masked; predict
# runs the network for some of them (see `predict_tokens`); step_of (B,L) are the steps of `draw_steps`. The function
# returns (B,L) bool, which masks to reveal now, and the tokens (B,L).

def in_random_order(masked, predict, step_of):
    """Reveals in each row the masks whose step is next: ancestral sampling, without the passes that reveal nothing."""
    next_step = step_of.masked_fill(~masked, 10 ** 9).amin(1, keepdim=True)  # of the masked places
    reveal = masked & (step_of == next_step)
    tokens, _ = predict(reveal)
    return reveal, tokens


GAMMA = 0.1  # nats; more makes fewer passes and more errors (tests/README.md has a table)


def by_entropy(masked, predict, step_of):
    """Reveals the surest masks of each row, those of least entropy. One pass predicts each token without knowing the
    other masks, so tokens that are revealed together may not fit together. The sum of their entropies, without the
    largest, bounds this error. So a mask is revealed if the entropies of all surer masks add up to at most GAMMA. With
    entropies 0.02, 0.05, 0.4 and 0.9 nats, the first three are revealed."""
    tokens, nats = predict(masked)
    nats = nats.masked_fill(~masked, 10 ** 9)
    surest_first = nats.argsort(1)
    sorted_nats = nats.gather(1, surest_first)
    nats_of_surer = sorted_nats.cumsum(1) - sorted_nats  # for each token the sum of all surer ones
    within = torch.zeros_like(masked).scatter(1, surest_first, nats_of_surer <= GAMMA)  # back in the text's order
    return masked & within, tokens


ORDERS = {"random": in_random_order, "entropy": by_entropy}


@torch.no_grad()
def unmask(dd, latents, tokens, maskable, steps, order="random", temperature=1.0, generator=None, watch=None):
    """Draws the maskable tokens, given the image and the other tokens -> tokens (B,L), number of forward passes.

    latents (B,C,H,W) as the transformer sees them; tokens (B,L) long; maskable (B,L) bool; steps: of ancestral
    sampling, for order "random"; order: one of ORDERS; temperature divides the logits, 0 takes the likeliest token;
    watch(tokens, reveal) is called after every pass. Order "random" at temperature 1 is exact ancestral sampling.
    A text is read up to its first EOS. When this EOS and all before it are revealed, the row needs no more passes."""
    mask_id = dd.tokenizer.mask_id
    eos_id = dd.tokenizer.eos_id
    count = 2 if temperature else 1  # uniform numbers per place: one draws its step, the other its token
    u = torch.rand(len(tokens), count, tokens.shape[1], dtype=torch.float64, generator=generator)
    step_of = draw_steps(u[:, 0], steps)
    may_end = ends_allowed(tokens, maskable, eos_id)  # no EOS is drawn before a given word (in-filling)
    tokens = torch.where(maskable, mask_id, tokens)
    masked = maskable
    passes = 0

    def predict(places):
        return predict_tokens(dd, latents, tokens, places, may_end, temperature, u[:, -1])

    while masked.any():
        reveal, predicted = ORDERS[order](masked, predict, step_of)
        tokens = torch.where(reveal, predicted, tokens)
        masked = masked & ~reveal
        is_eos = maskable & (tokens == eos_id)
        before_first_mask = masked.cumsum(1) == 0
        has_ended = (before_first_mask & is_eos).any(1)
        masked = masked & ~has_ended[:, None]
        passes += 1
        if watch:
            watch(tokens, reveal)
    return torch.where(tokens == mask_id, eos_id, tokens), passes


def predict_tokens(dd, latents, tokens, places, may_end, temperature, u):
    """One forward pass, which predicts the tokens of some masked places (B,L) bool -> tokens (B,L), the entropies (B,L)
    of their distributions in nats; elsewhere both are meaningless. may_end (B,L) bool: may EOS stand here? u (B,L):
    uniform in [0,1), draws the tokens. A token counts only when it is revealed, and its number has no part in when
    that is, so one number serves all passes."""
    rows = places.any(1)
    logits = text_logits(dd, latents[rows], tokens[rows], places[rows])
    logits[~may_end[places], dd.tokenizer.eos_id] = -torch.inf
    ids, entropies = draw_tokens(logits, temperature, u[places])
    predicted = tokens.clone()
    predicted[places] = ids
    nats = torch.zeros(places.shape, dtype=entropies.dtype)
    nats[places] = entropies
    return predicted, nats


def draw_tokens(logits, temperature, u):
    """Draws a token from each row of logits (N,V), by u (N,), uniform in [0,1) -> tokens (N,), the entropies (N,) of
    their distributions in nats; both on the CPU. They are computed where the logits are, 256 rows at a time to save
    memory. The mask token, the last of V, is never drawn."""
    if logits.device.type == "mps":
        logits = logits.cpu()  # Apple's GPUs have no float64
    tokens, entropies = [], []
    for part, u_part in zip(logits[:, :-1].split(256), u.split(256)):
        if temperature:
            probs = torch.softmax(part.double() / temperature, dim=1)  # float32 loses rare tokens
            ids = draw(probs, u_part)
        else:
            probs = torch.softmax(part, dim=1)
            ids = probs.argmax(1)
        tokens.append(ids)
        entropies.append(torch.special.entr(probs).sum(1))
    return torch.cat(tokens).cpu(), torch.cat(entropies).cpu()


def caption(dd, images, length=None, steps=None, **how):
    """Describes images (B,3,H,W) in [-1,1] -> list of str. length: tokens of a text; steps, how: see `unmask_texts`."""
    texts = [text_ids(dd, "", length)] * len(images)
    return unmask_texts(dd, images, texts, steps, dd.config.settings.caption_steps, **how)


def answer(dd, images, questions, length=None, steps=None, **how):
    """Answers one question per image -> list of str. length: tokens of question and answer."""
    texts = [text_ids(dd, (question, ""), length) for question in questions]
    return unmask_texts(dd, images, texts, steps, dd.config.settings.answer_steps, **how)


def infill(dd, images, texts, length=None, steps=None, **how):
    """Fills in the blanks of one text per image -> list of str. Every underscore stands for one token."""
    length = length or dd.config.settings.length
    texts = [dd.tokenizer.blank_ids(text, length) for text in texts]
    return unmask_texts(dd, images, texts, steps, default_steps=length, whole=True, **how)


def text_ids(dd, text, length=None):
    """Makes ids and maskable of a caption, or of a pair (question, answer), as this model was trained on them. An
    empty caption or answer has EOS in all its places, to be masked."""
    settings = dd.config.settings
    return dd.tokenizer.text_ids(text, length or settings.length, settings.caption_prompt, settings.answer_suffix)


@torch.no_grad()
def unmask_texts(dd, images, texts, steps, default_steps, order=None, temperature=0.0, whole=False, **how):
    """Unmasks one text (ids, maskable) for each image -> list of str: the texts from their first mask on, or the whole
    texts. order: by default "random", the paper's, if `steps` are given, else "entropy". how: generator and watch, see
    `unmask`."""
    height, width = images.shape[2:]
    latent_size(dd, height, width)  # raises before any work is done in vain
    if len(texts) != len(images):
        raise ValueError(f"{len(images)} images want as many texts, not {len(texts)}")
    if order is None:
        order = "random" if steps else "entropy"
    steps = steps or default_steps
    tokens = torch.tensor([ids for ids, _ in texts])
    maskable = torch.tensor([may for _, may in texts])
    lines = []
    for part in slices(len(images), height, width, dd.device):
        latents = dd.encode_image(images[part])
        rows, _ = unmask(dd, latents, tokens[part], maskable[part], steps, order, temperature, **how)
        first_masks = maskable[part].long().argmax(1)
        for row, first in zip(rows, first_masks):
            lines.append(dd.tokenizer.decode(row if whole else row[first:]))
    return lines


# ------------------------------------------------- the chapter ends here; what follows makes it practical

def ends_allowed(tokens, maskable, eos_id):
    """Where may a text end, (B,L) bool? In-filling must not end it before a word that is given."""
    is_given = ~maskable & (tokens != eos_id)
    place = torch.arange(tokens.shape[1])
    last_given = torch.where(is_given, place, -1).amax(1, keepdim=True)
    return place > last_given


def draw(probs, u):
    """Draws like torch.multinomial, but by numbers from the CPU: probs (N,V) float64, u (N,) in [0,1) -> ids (N,)."""
    ends = probs.cumsum(1)
    return (ends < u[:, None].to(ends.device) * ends[:, -1:]).sum(1)


def latent_size(dd, height, width):
    """Returns height and width of an image's latents. Raises ValueError for an image that the model cannot take."""
    factor = dd.config.vae.factor
    unit = factor * dd.config.ddit.patch
    if height % unit or width % unit or min(height, width) < unit:
        raise ValueError(f"this model wants images with sides that are multiples of {unit}, not {width}x{height}")
    if dd.ddit:
        dd.ddit.positions(height // unit, width // unit)  # raises where there are fewer
    return height // factor, width // factor


@torch.no_grad()
def score(dd, images, texts, draws=64):
    """Estimates how unlikely each text is, given its image -> (N,) nats: Eq. 7, an upper bound on -log p(text|image).
    images: N of (3,H,W); texts: N captions, or pairs (question, answer), whose answer counts. Each is masked `draws`
    times."""
    nats = []
    for image, text in zip(images, texts):
        generator = torch.Generator().manual_seed(0)
        t = losses.stratified_times(draws, generator=generator)
        ids, may = text_ids(dd, text)
        tokens = torch.tensor(ids).expand(draws, -1)
        maskable = torch.tensor(may).expand(draws, -1)
        noisy, masked = losses.mask_tokens(tokens, t, maskable, dd.tokenizer.mask_id, generator)
        latents = dd.encode_image(image[None]).expand(draws, -1, -1, -1)
        logits = text_logits(dd, latents, noisy, masked).cpu()
        loss = losses.masked_diffusion_loss(logits, tokens, masked, t)
        nats.append(loss * len(ids))  # the loss is per token
    return torch.stack(nats)


def keep_likeliest(dd, pixels, prompts, count):
    """Keeps the one of `count` drawings for each prompt that best reads as it: (N,3,H,W) -> (N/count,3,H,W)."""
    best = []
    for images, prompt in zip(pixels.split(count), prompts):
        nats = score(dd, images, [prompt] * count, draws=16)
        best.append(images[nats.argmin()])
    return torch.stack(best)


# ---------------------------------------------------------------- what both programs share

SHIPPED = os.path.join(os.path.dirname(os.path.realpath(__file__)), "assets", "tiny.safetensors")
# With TF32, convolutions in fp32 would have 10 bits of precision on a GPU, not 23.
torch.backends.cudnn.allow_tf32 = False


def fail(message, status=2):
    """Ends the program after a user's mistake, with one line."""
    program = os.path.basename(sys.argv[0])
    if os.environ.get("DDIT_TRACEBACK"):
        raise RuntimeError(message)
    tqdm.write(f"{program}: {message}", file=sys.stderr)  # tqdm's, or it would run into a bar
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help shows how)")


def default_device():
    gpu = torch.accelerator.current_accelerator(check_available=True)
    return gpu.type if gpu else "cpu"


def existing_device(name):
    """An argparse type: a device that exists. A GPU gets torchrun's local rank, else the index in `name`, or 0."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", index or "0"))
    if kind != default_device() or index >= torch.accelerator.device_count():
        raise argparse.ArgumentTypeError(f"there is no device {name} here")
    return torch.device(kind, index)


def at_least(least, kind=int):
    def number(text):
        value = kind(text)
        if not value >= least:  # also for nan
            raise argparse.ArgumentTypeError(f"{text} is too small: give at least {least}")
        return value
    return number


def seed(text):
    """An argparse type: any integer, modulo 2**32. Other programs give larger ones, and negative ones."""
    return int(text) % 2 ** 32


def typed_text(text):
    """Returns a text from the command line, whatever the locale. Raises ValueError if it is not UTF-8."""
    try:
        return os.fsencode(text).decode()
    except UnicodeDecodeError:
        raise ValueError(f"{text!r} is not UTF-8") from None


def image_size(text):
    """An argparse type: "512", or "WIDTHxHEIGHT" -> height, width."""
    width, _, height = text.partition("x")
    return int(height or width), int(width)


def picture_name(endings):
    """Makes an argparse type: where a picture can be written."""
    def name(path):
        folder_exists = os.path.isdir(os.path.dirname(path) or ".")
        if not path.lower().endswith(endings) or not folder_exists:
            raise argparse.ArgumentTypeError(f"{path}: give a name like out.png or out.gif, in a folder that is there")
        return path
    return name


def add_parts(parser):
    parser.add_argument("--t5", help="Take T5 from this file or folder.")
    parser.add_argument("--vae", help="Take the VAE from this file or folder.")
    parser.add_argument("--spiece", help="Take T5's tokenizer, a spiece.model.")
    parser.add_argument("--at-once", type=at_once, help="Images of 512x512 that go through the networks at once, more "
                        "if they are smaller (default: 1 on a CPU, 16 on a CUDA GPU).")


def run_program(main, lower="--size, or give --offload"):
    """Runs main(). A mistake of the user or too little memory gives one line and status 2, Ctrl-C one and 130."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # it was closed
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # in an ASCII locale, too
        setattr(sys, name, stream)
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left (| head)
        os._exit(141)
    except KeyboardInterrupt:
        fail("stopped", 130)
    except (ValueError, OSError) as error:
        file = getattr(error, "filename", None)
        fail(f"{file}: {error.strerror}" if file else str(error).rpartition("\n")[2])  # a worker's has more lines
    except (MemoryError, RuntimeError) as error:
        if "DataLoader worker" in str(error):  # it was killed
            fail(one_line(error))
        no_memory = re.search("out of memory|allocate|ALLOC_FAILED", str(error))
        if isinstance(error, RuntimeError) and not no_memory:
            raise
        fail(f"out of memory: lower {lower}")


def page(images, columns, texts=(), gap=2):
    """Puts images (H,W,3) uint8 of one size on a white page of PIL, row by row, each above its lines of text, [str]."""
    height, width, _ = images[0].shape
    across = width + gap
    texts = texts or [[]] * len(images)
    down = height + gap + 15 * max(map(len, texts))
    rows = -(-len(images) // columns)
    result = Image.new("RGB", (columns * across - gap, rows * down - gap), "white")
    pen = ImageDraw.Draw(result)
    font = ImageFont.load_default(size=12)
    for k, (image, lines) in enumerate(zip(images, texts)):
        x = k % columns * across
        y = k // columns * down
        result.paste(Image.fromarray(image), (x, y))
        pen.text((x, y + height), "\n".join(lines), "black", font, spacing=2)
    return result


def sheet(path, cells):
    """Writes a page of images with their texts, four in a row. cells: [(image (H,W,3) uint8, text)]."""
    images, texts = [], []
    for image, text in cells:
        image = Image.fromarray(image).resize((192, 192), Image.Resampling.NEAREST)
        images.append(np.asarray(image))
        texts.append([row for line in text[:400].split("\n") for row in textwrap.wrap(line, 27)])
    save_image(path, [page(images, 4, texts, gap=8)])


def save_image(path, frames):
    """Writes an image; several become the frames of a GIF."""
    kind = ENDINGS[os.path.splitext(path)[1].lower()]
    with replacing(path) as beside:
        frames[0].save(beside, kind, save_all=len(frames) > 1, append_images=frames[1:], duration=150, loop=0)


# ---------------------------------------------------------------- the program

def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to do").add_argument
    add("--vqa", nargs=2, action="append", default=[], metavar=("IMAGE", "QUESTION"),
        help="Answer a question about an image (may be repeated).")
    add("--caption", nargs="+", action="extend", default=[], metavar="IMAGE", help="Describe each image.")
    add("--t2i", nargs="+", action="extend", default=[], metavar="TEXT", help="Draw each text.")
    add("--infill", nargs=2, action="append", default=[], metavar=("IMAGE", "TEXT"),
        help="Fill in a text about an image, one token per underscore (may be repeated).")
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--ckpt", default=SHIPPED,
        help="A file of ours or SD3's, or a folder in diffusers layout (default: the shipped model).")
    add_parts(group)
    add("--device", type=existing_device, default=default_device(),
        help="Where to run (default: the GPU, if there is one).")
    add("--dtype", choices=DTYPES, help="What to compute in (default: bf16 on a CUDA GPU, else fp32).")
    add("--offload", action="store_true", help="Keep T5 on the CPU, if GPU memory is short.")
    add = parser.add_argument_group("how to do it").add_argument
    add("--seed", type=seed, default=0, help="Seeds all random numbers (default: 0).")
    add("--steps", type=at_least(1), help="Steps of drawing (default: 28), or of reading (default: see --order).")
    add("--order", choices=ORDERS,
        help="In which order tokens are unmasked (default: entropy; with --steps, random).")
    add("--temperature", type=at_least(0, float), default=0.0,
        help="Divides the logits of tokens; 0 takes the likeliest token (default: 0).")
    add("--length", type=at_least(6), help="Tokens of a text (default: the checkpoint's).")
    add("--show-passes", action="store_true", help="Print a text after every forward pass, too; _ is a mask.")
    add("--num", type=at_least(1), default=1, help="Images per prompt (default: 1).")
    add("--best-of", type=at_least(1), default=1,
        help="Draw N images for each and keep the one that best reads as the prompt (default: 1).")
    add("--cfg", type=float, help="Guidance; 1 is none (default: the checkpoint's).")
    add("--negative", default="", help="The text that guidance leads away from (default: the empty text).")
    add("--size", type=image_size, help="Pixels: 512, or WIDTHxHEIGHT (default: the checkpoint's).")
    add("--trace", type=picture_name((".gif", ".png", ".webp")),
        help="Write the steps of drawing, too, as a moving .gif, .png or .webp.")
    add("--out", type=picture_name(EXTENSIONS), default="out.png",
        help="Where to write the drawing, or the page of all drawings (default: out.png).")
    args = parser.parse_args()
    args.reads = args.vqa or args.caption or args.infill
    if not (args.reads or args.t2i):
        fail("nothing to do: give --vqa, --caption, --t2i or --infill (--help shows how)")
    for path in args.caption + [path for path, _ in args.vqa + args.infill]:
        if not os.path.exists(path):
            fail(f"{path}: no such image")
    for _, text in args.infill:
        if "_" not in text:
            fail("--infill's text has no blank: each underscore stands for one token to fill in")
    return args


def prepare_text(dd, text, room):
    """Puts a word in lower case if a small vocabulary then needs fewer tokens for it. Warns of unknown words, and of
    a text that is too long."""
    def count(text):
        return len(dd.tokenizer.pieces.encode(text))

    text = typed_text(text)
    if len(dd.tokenizer.pieces) < 10_000:
        text = " ".join(min(word, word.lower(), key=count) for word in text.split(" "))
    unseen = unseen_words(dd.tokenizer, text)
    if unseen:
        warn(f"never seen in training, so expect little: {', '.join(unseen)}")
    parts = text.split("_")
    tokens = len(parts) - 1 + sum(map(count, parts))  # a blank is one token
    if tokens > room:
        warn(f"{text[:40]!r}... has {tokens} tokens, the model takes {room}: its end is left out")
    return text


def read_images(dd, args, generator):
    """Does --vqa, --caption and --infill: prints what is read, a line per image."""
    settings = dd.config.settings
    pieces = dd.tokenizer.pieces
    length = settings.length
    suffix = dd.tokenizer.prompt_ids("", 10 * length, settings.answer_suffix)  # with "Q:" and "A:"
    question_room = length - dd.tokenizer.answer_room(length) - len(suffix)

    def print_pass(tokens, reveal):
        ids = tokens[0].tolist()
        words = ["_" if i >= len(pieces) else pieces.id_to_piece(i).strip("▁") for i in ids]
        tqdm.write(" ".join(words))

    def read(reader, paths, *texts, **how):
        parts = slices(len(paths), args.height, args.width, args.device)
        if args.show_passes:
            parts = [slice(k, k + 1) for k in range(len(paths))]
        for part in parts:
            images = [load_image(path, args.height, args.width) for path in paths[part]]
            pixels = torch.from_numpy(to_pixels(images))
            lines = reader(dd, pixels, *[column[part] for column in texts], **how)
            tqdm.write("\n".join(lines))
            sys.stdout.flush()

    how = {"steps": args.steps, "order": args.order, "temperature": args.temperature, "generator": generator}
    if args.show_passes:
        how["watch"] = print_pass
    paths = [path for path, _ in args.vqa]
    questions = [prepare_text(dd, question, question_room) for _, question in args.vqa]
    read(answer, paths, questions, **how)
    read(caption, args.caption, **how)
    paths = [path for path, _ in args.infill]
    texts = [prepare_text(dd, text, length - 1) for _, text in args.infill]
    read(infill, paths, texts, **how)


def draw_page(dd, args, generator):
    """Does --t2i: draws, keeps the best, and writes the page of all images; as a trace a page for each step."""
    room = dd.config.settings.length - 1
    negative = prepare_text(dd, args.negative, room)
    texts = [prepare_text(dd, text, room) for text in args.t2i]
    prompts = [text for text in texts for _ in range(args.num)]
    candidates = [prompt for prompt in prompts for _ in range(args.best_of)]
    trace = {}  # time: images

    def watch(x, t, velocity):
        heading_for = dd.decode_image(x - t * velocity)  # where a straight line from here ends
        trace.setdefault(t, []).extend(to_images(heading_for))

    pixels = text_to_image(dd, candidates, negative, args.height, args.width, steps=args.steps or 28,
                           cfg=args.cfg, generator=generator, watch=watch if args.trace else None)
    if args.best_of > 1:
        pixels = keep_likeliest(dd, pixels, prompts, args.best_of)
    columns = min(args.num, 4)
    save_image(args.out, [page(to_images(pixels), columns)])
    print(args.out)
    if args.trace:
        frames = [page(images, columns * args.best_of) for images in trace.values()]
        save_image(args.trace, frames + frames[-1:] * 10)
        print(args.trace)


def main():
    args = parse_args()
    if args.trace and not args.t2i:
        fail("--trace shows what --t2i draws; for a text give --show-passes")
    dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")
    dd = DualDiffusion.load(args.ckpt, args.t5, args.vae, args.spiece, args.device, DTYPES[dtype],
                            args.offload)
    check_complete(dd, args.ckpt)
    if (args.reads or args.best_of > 1) and not dd.ddit.text_head.linear.weight.any():
        warn("this model's text head was never trained: it can draw, but what it reads means nothing")
    settings = dd.config.settings
    if args.length:
        settings.length = args.length
    args.height, args.width = args.size or (settings.size, settings.size)
    latent_size(dd, args.height, args.width)  # raises before any work is done in vain
    if args.reads:
        read_images(dd, args, torch.Generator().manual_seed(args.seed))
    if args.t2i:
        draw_page(dd, args, torch.Generator().manual_seed(args.seed))


if __name__ == "__main__":
    run_program(main)
