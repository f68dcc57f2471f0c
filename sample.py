"""Using it: draw images from text, read images into text, fill in the blanks of a text. Both diffusions run backwards:
an image begins as noise and follows the velocity; a text begins as masks, which the network replaces by tokens.

    python sample.py --vqa img.png "what color is the circle?"
    python sample.py --caption img.png
    python sample.py --t2i "a large green triangle left of a small red circle" --num 8 --out out.png
    python sample.py --infill img.png "a _ green _ above a small _ circle and a small green square"
References: Esser et al., SD3, arXiv 2403.03206, section 5.3.2; Ho & Salimans, Classifier-Free Guidance, 2207.12598;
  Kynkäänniemi et al., Limited-Interval Guidance, 2404.07724; Zheng et al., Time-Agnostic Masked Models, 2409.02908;
  Chang et al., MaskGIT, 2202.04200; Ben-Hamu et al., Entropy-Bounded Unmasking, 2505.24857
"""
import argparse
import os
import re
import sys
import textwrap

# Idle OpenMP threads spin. Beside other busy programs, without this limit, small tensors are 10 to 70 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import losses
from data import EXTENSIONS, load_image, replacing, slices, to_images, to_pixels, warn, window_ids
from model import DTYPES, DualDiffusion, missing_parts
from t5 import unseen_words


def time_grid(steps, shift):
    """(steps+1,) times from 1 (noise) down to 0 (image); shift > 1 spends more of the steps near the noise (SD3)."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def denoise(dd, x, prompts, negative, length, steps, cfg, shift, watch=None):
    """Noise (B,C,h,w) -> pixels (B,3,8h,8w), all prompts at once: Euler's steps along the ODE, from t = 1 to 0.

    Guidance predicts two velocities, one for the prompt and one for the negative text, most often empty, and takes
    negative + cfg * (prompt - negative). With cfg 1 that is the prompt's own; with more it goes beyond."""
    x, (low, high) = x.to(dd.device), dd.config.settings.cfg_times
    texts = [*prompts, *[negative] * len(prompts) * (cfg != 1)]
    states = dd.t5(torch.tensor([dd.tokenizer.encode(text, length) for text in texts], device=dd.device))

    def velocity_at(x, t):
        guided = cfg != 1 and low <= t <= high  # at other times it costs a pass and helps little
        latents = torch.cat([x, x]) if guided else x
        times = torch.full((len(latents),), t, device=dd.device)
        velocity = dd.ddit(latents, times, states[:len(latents)], predict=slice(0))[0].float()  # no logits
        if guided:
            with_prompt, with_negative = velocity.chunk(2)
            velocity = with_negative + cfg * (with_prompt - with_negative)  # Eq. 10
        return velocity

    grid = time_grid(steps, shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        velocity = velocity_at(x, t)
        if watch:
            watch(x, t, velocity)
        x = x + (t_next - t) * velocity  # Eq. 2
    return finite(dd.decode_image(x))


@torch.no_grad()
def text_to_image(dd, prompts, negative="", height=None, width=None, length=None, steps=28, cfg=None, shift=None,
                  noise=None, generator=None, watch=None):
    """Draw one image per prompt, of a list -> pixels (B,3,height,width) in [-1,1].

    height, width: pixels, multiples of 16; length: tokens that a prompt is padded to; steps: of Euler, 28 is SD3's;
    cfg: guidance, 1 is none; noise (B,C,H/8,W/8): what to start from; watch(x, t, velocity) is called at every step.
    What is None is the checkpoint's own. Raises ValueError for a size that the model cannot take."""
    settings, vae, prompts = dd.config.settings, dd.config.vae, [prompts] if isinstance(prompts, str) else prompts
    height, width, length = height or settings.size, width or settings.size, length or settings.length
    cfg, shift = settings.cfg if cfg is None else cfg, shift or settings.shift
    if noise is None:
        noise = torch.randn(len(prompts), vae.latent_channels, *latent_size(dd, height, width), generator=generator)
    parts = slices(len(prompts), noise.shape[2] * vae.factor, noise.shape[3] * vae.factor)
    return torch.cat([denoise(dd, noise[k], prompts[k], negative, length, steps, cfg, shift, watch) for k in parts])


def revealed_share(steps):
    """(steps+1,) float64: the share of tokens that are revealed at each time of an even grid from t = 1 down to 0:
    alpha(t), scaled to run from 0 to 1. (By Eq. 5 a token stays masked through a step from t to s with chance
    (1 - alpha(s)) / (1 - alpha(t)). The product of these chances over the steps so far is 1 minus this share.)"""
    readable = losses.alpha(torch.linspace(1, 0, steps + 1, dtype=torch.float64))
    return (readable - readable[0]) / (readable[-1] - readable[0])  # Eq. 5


def text_logits(dd, latents, tokens, predict):
    """One forward pass: latents (B,C,H,W), tokens (B,L) -> logits (N,V) at the N true positions of `predict` (B,L)."""
    states, times = dd.t5(tokens.to(dd.device)), torch.zeros(len(tokens), device=dd.device)
    return finite(dd.ddit(latents, times, states, predict=predict, image_rows=0)[1])


# The orders of unmasking. An order runs the network by `predict_tokens(positions)`, (B,L) bool, which returns a token,
# its probability and the entropy for each true position. After every pass the order yields `reveal`, (B,L) bool, with a
# token for each true one. `unmask` writes these into the text and clears their places in `masked`, this very tensor.


def in_random_order(predict_tokens, masked, steps, generator):
    """Exact ancestral sampling on a grid of `steps` steps, but with fewer passes. Chance alone decides at which step a
    token is revealed, independently for each (Eq. 5). The network only decides what it is, and does not see the time.
    So all steps can be drawn first, and the network runs only at those, and for those rows, that reveal something."""
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
        remaining = (total * (1 - share) + 1e-9).floor()  # masks that each row keeps; 1e-9 against rounding
        count = masked.sum(1) - remaining                 # tokens that each row reveals now
        candidates = masked & (count > 0)[:, None]
        if candidates.any():
            ids, confidence, _ = predict_tokens(candidates)
            sure = torch.full(masked.shape, -1.0, dtype=confidence.dtype).masked_scatter(candidates, confidence)
            rank = sure.argsort(1, descending=True).argsort(1)  # 0 for the surest of a row
            reveal = candidates & (rank < count[:, None])
            yield reveal, ids[reveal[candidates]]


GAMMA = 0.1  # nats; larger: fewer passes and more errors (tests/README.md has a table)


def by_entropy(predict_tokens, masked, steps, generator):
    """The surest first, and in each pass as many as are nearly independent; `steps` plays no part. A pass draws its
    tokens independently. This errs by at most the sum of their entropies without the largest (a KL divergence). So a
    pass takes the tokens of least entropy, as many as keep this sum within GAMMA."""
    while masked.any():
        ids, _, entropy = predict_tokens(masked)
        nats, order = torch.full(masked.shape, torch.inf, dtype=entropy.dtype).masked_scatter(masked, entropy).sort(1)
        within = nats.cumsum(1) - nats <= GAMMA  # for each, the sum of all surer ones
        reveal = masked & within.gather(1, order.argsort(1))
        yield reveal, ids[reveal[masked]]


ORDERS = {"random": in_random_order, "confidence": by_confidence, "entropy": by_entropy}


@torch.no_grad()
def unmask(dd, latents, tokens, maskable, steps, order="random", temperature=1.0, generator=None, watch=None):
    """Draw the maskable tokens given the image and the other tokens -> tokens (B,L), number of forward passes.

    latents (B,C,H,W) as the transformer sees them; tokens (B,L) long; maskable (B,L) bool; order: one of ORDERS, on a
    grid of `steps` times; temperature divides the logits, 0 takes the likeliest. "random" at temperature 1 is exact
    ancestral sampling. A text is read up to its first EOS: once that and all before it are revealed, the row's other
    masks become EOS without a forward pass."""
    mask_id, eos_id, passes = dd.tokenizer.mask_id, dd.tokenizer.eos_id, 0
    given = ~maskable & (tokens != eos_id)
    before_given = given.flip(1).cumsum(1).flip(1) > 0  # up to the last given word

    def predict_tokens(positions):
        rows = positions.any(1)
        logits = text_logits(dd, latents[rows], tokens[rows], positions[rows])
        logits[before_given[positions], eos_id] = -torch.inf  # a text does not end before words that are given
        return draw_tokens(logits, temperature, generator)

    tokens, masked = torch.where(maskable, mask_id, tokens), maskable.clone()
    for passes, (reveal, ids) in enumerate(ORDERS[order](predict_tokens, masked, steps, generator), 1):
        tokens[reveal] = ids
        beginning = (masked & ~reveal).cumsum(1) == 0  # of each row, all before its first mask
        masked &= ~reveal & ~(beginning & (tokens == eos_id)).any(1, keepdim=True)  # a text with its EOS is done
        if watch:
            watch(tokens, reveal)
    return torch.where(tokens == mask_id, eos_id, tokens), passes


def draw_tokens(logits, temperature, generator):
    """logits (N,V) -> tokens (N,), their probabilities, the entropies (nats) of their distributions; on the CPU, but
    computed where the logits are, 256 rows at a time to save memory. The mask token, the last of V, is never drawn."""
    parts = []
    for part in logits[:, :-1].split(256):
        probs = torch.softmax(in_float64(part) / temperature if temperature else part, dim=1)  # float32 loses rare ones
        ids = draw(probs, generator) if temperature else probs.argmax(1, keepdim=True)
        parts.append((ids[:, 0], probs.gather(1, ids)[:, 0], torch.special.entr(probs).sum(1)))
    return [torch.cat(column).cpu() for column in zip(*parts)]


def text_ids(dd, text, length=None):
    """A caption, or a pair (question, answer) -> ids, maskable, as this model was trained on them."""
    settings = dd.config.settings
    length = settings.length if length in (None, "auto") else length
    if isinstance(text, str):
        prompt = settings.caption_prompt
        return dd.tokenizer.question_ids(prompt, text, length) if prompt else dd.tokenizer.caption_ids(text, length)
    return dd.tokenizer.question_ids(f"{text[0]} {settings.answer_suffix}".rstrip(), text[1], length)


def caption(dd, images, length=None, steps=None, **how):
    """Describe images (B,3,H,W) in [-1,1] -> list of str. length: tokens of a text; steps, how: see `unmask_texts`."""
    texts = [text_ids(dd, "", length)] * len(images)
    return unmask_texts(dd, images, texts, length, steps, dd.config.settings.caption_steps, **how)


def answer(dd, images, questions, length=None, steps=None, **how):
    """Answer one question per image -> list of str. length: tokens of question and answer; the rest as for caption."""
    texts = [text_ids(dd, (question, ""), length) for question in questions]  # no answer: EOS in all its places
    return unmask_texts(dd, images, texts, length, steps, dd.config.settings.answer_steps, **how)


def infill(dd, images, texts, length=None, steps=None, **how):
    """Fill in the blanks of one text per image -> list of str. Every underscore stands for one token."""
    length = dd.config.settings.length if length in (None, "auto") else length
    texts = [dd.tokenizer.blank_ids(text, length) for text in texts]
    return unmask_texts(dd, images, texts, length, steps, length, whole=True, **how)


@torch.no_grad()
def unmask_texts(dd, images, texts, length, steps, default_steps, order=None, temperature=0.0, generator=None,
                 watch=None, whole=False):
    """Unmask one text (ids, maskable) per image -> list of str: from the first mask on, or the whole texts. order: by
    default "random", the paper's, if `steps` are given, else "entropy". length "auto": in blocks, until EOS."""
    latent_size(dd, *images.shape[2:])  # raises before any work is done in vain
    order, steps = order or ("random" if steps else "entropy"), steps or default_steps
    tokens, maskable = (torch.tensor(column) for column in zip(*texts))
    if len(tokens) != len(images):
        raise ValueError(f"{len(images)} images want as many texts, not {len(tokens)}")
    method, lines = unmask_in_blocks if length == "auto" else unmask, []
    for part in slices(len(images), *images.shape[2:]):
        latents = dd.encode_image(images[part])
        ids, _ = method(dd, latents, tokens[part], maskable[part], steps, order, temperature, generator, watch)
        starts = maskable[part].long().argmax(1)  # the first mask
        lines += [dd.tokenizer.decode(row if whole else row[start:]) for row, start in zip(ids, starts)]
    return lines


# ------------------------------------------------- the chapter ends here; what follows makes it practical


def in_float64(x):
    return (x.cpu() if x.device.type == "mps" else x).double()  # Apple's GPUs have none


def draw(probs, generator):
    """torch.multinomial on any device, with one generator, on the CPU: probs (N,V) float64 -> ids (N,1). A number u
    falls between two values of the cumulative distribution, whose last may miss 1 by rounding."""
    ends, u = probs.cumsum(1), torch.rand(len(probs), 1, dtype=torch.float64, generator=generator)
    return (ends < u.to(ends.device) * ends[:, -1:]).sum(1, keepdim=True)


def latent_size(dd, height, width):
    """Height and width of an image -> of its latents. Raises ValueError for one that the model cannot take."""
    factor, unit = dd.config.vae.factor, dd.config.vae.factor * dd.config.ddit.patch
    if height % unit or width % unit or min(height, width) < unit:
        raise ValueError(f"this model wants images with sides that are multiples of {unit}, not {width}x{height}")
    dd.ddit.positions(height // unit, width // unit)  # raises where it has fewer
    return height // factor, width // factor


def unmask_in_blocks(dd, latents, tokens, maskable, *how, blocks=32):
    """`unmask` for texts of any length -> a list of ids per text, number of forward passes.

    A text that fills its whole length with words is not at its end. So a window moves over it: the prompt and the
    latest words stay, a block of new masks follows, and so on until EOS, or for `blocks` blocks. The network never sees
    more tokens than in training, where it saw such windows (`learning_ids`)."""
    ids, passes = unmask(dd, latents, tokens, maskable, *how)
    prompts = [row[~free].tolist()[:-1] for row, free in zip(tokens, maskable)]  # without the last EOS
    texts = [row[free].tolist() for row, free in zip(ids, maskable)]
    for _ in range(blocks):
        rows = [k for k, text in enumerate(texts) if dd.tokenizer.eos_id not in text]
        if not rows:
            break
        windows = [window_ids(dd.tokenizer, prompts[k], texts[k], len(texts[k]), tokens.shape[1]) for k in rows]
        ids, fresh = (torch.tensor(column) for column in zip(*windows))
        ids, more = unmask(dd, latents[rows], ids, fresh, *how)
        for k, row, new in zip(rows, ids, fresh):
            texts[k] += row[new].tolist()
        passes += more
    return [prompt + text for prompt, text in zip(prompts, texts)], passes


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
            logits = text_logits(dd, latents.expand(len(t[part]), -1, -1, -1), noisy[part], masked[part]).cpu()
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
    """Images (N,3,H,W), `count` per prompt -> (N/count,3,H,W): the one from which the model most likely reads it."""
    texts = [prompt for prompt in prompts for _ in range(count)]
    nats = score(dd, pixels, texts, length, draws=16).view(-1, count)
    return pixels.unflatten(0, nats.shape)[torch.arange(len(nats)), nats.argmin(1)]


def finite(tensor):
    """The tensor itself. Raises ValueError if it holds NaN or infinity."""
    if not tensor.isfinite().all():
        raise ValueError("the model computes NaN or infinity: its weights are damaged, or too large for --dtype")
    return tensor


# ---------------------------------------------------------------- what both programs share

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny.safetensors")
torch.backends.cudnn.allow_tf32 = False  # or fp32's convolutions would have 10 bits of precision on a GPU, not 23


def fail(message, status=2):
    """End the program after a user's mistake, with one line."""
    tqdm.write(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)  # not into a bar
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help shows how)")


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


def token_count(text):
    """An argparse type: a number, or auto."""
    return text if text == "auto" else int(text)


def add_parts(parser):
    """The arguments that take parts of a model from other files."""
    parser.add_argument("--t5", metavar="FILE", help="A file or folder to take T5 from.")
    parser.add_argument("--vae", metavar="FILE", help="A file or folder to take the VAE from.")
    parser.add_argument("--spiece", metavar="FILE", help="T5's tokenizer, spiece.model.")


def run_program(main, stopped="stopped", lower="--size, or give --offload"):
    """Run main(). A user's mistake, or too little memory, gives one line and status 2; Ctrl-C `stopped` and 130."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left (| head)
        os._exit(141)
    except KeyboardInterrupt:
        fail(stopped, 130)
    except (ValueError, OSError) as error:
        fail(f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate|ALLOC_FAILED", str(error)):
            raise
        fail(f"out of memory: lower {lower}")


def tile(images, columns, gap=2):
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
        tile(tiles, columns, gap=0).save(beside, format="PNG")


def words_of(tokenizer, ids):
    """-> a word per token: nothing for a mask, a dot for the end of the text."""
    special = {tokenizer.mask_id: "", tokenizer.eos_id: "·"}
    return [special[i] if i in special else tokenizer.pieces.id_to_piece(i).strip("▁") for i in ids.tolist()]


def text_page(trace):
    """An image of how a text was unmasked, a row per pass. trace: for each its words, and which of them are new. Grey
    is masked, yellow is new."""
    font, left = ImageFont.load_default(size=13), [4.0]
    for word in trace[-1][0]:
        left.append(left[-1] + font.getlength(word) + 8)
    page = Image.new("RGB", (int(left[-1]) + 4, 22 * len(trace) + 4), "white")
    draw = ImageDraw.Draw(page)
    for k, (words, reveal) in enumerate(trace):
        for word, new, x, end in zip(words, reveal, left, left[1:]):
            draw.rectangle((x, 22 * k + 4, end - 2, 22 * k + 22), "gold" if new else "white" if word else "lightgray")
            draw.text((x + 3, 22 * k + 4), word, "black", font)
    return page


# ---------------------------------------------------------------- the program

def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to do").add_argument
    more = {"nargs": "+", "default": []}
    add("--vqa", **more, action="append", metavar="IMAGE ... QUESTION", help="Answer a question about each image.")
    add("--caption", **more, action="extend", metavar="IMAGE", help="Describe each image.")
    add("--t2i", **more, action="extend", metavar="TEXT", help="Draw each text.")
    add("--infill", **more, action="append", metavar="IMAGE ... TEXT", help="Fill in: one token per underscore.")
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add("--ckpt", metavar="FILE", default=SHIPPED, help="Ours, SD3's, or a diffusers folder [the shipped model].")
    add_parts(group)
    add("--device", type=existing_device, default=default_device(), help="Where to run [the GPU, if there is one].")
    add("--dtype", choices=list(DTYPES), help="What to compute in [bf16 on a CUDA GPU, else fp32].")
    add("--offload", action="store_true", help="Keep T5 on the CPU, if GPU memory is short.")
    add = parser.add_argument_group("how to do it", "In brackets what is taken without the flag.").add_argument
    add("--seed", type=int, default=0, help="Seeds all random numbers [0].")
    add("--steps", type=int, help="Steps of drawing [28], or of reading (see --order).")
    add("--order", choices=list(ORDERS), help="How a text is unmasked [random if --steps is given, else entropy].")
    add("--temperature", type=float, default=0.0, help="Divides the logits of tokens; 0 takes the likeliest [0].")
    add("--length", type=token_count, metavar="TOKENS", help="Of a text; auto: as many as it needs [the checkpoint's].")
    add("--options", **more, metavar="ANSWER", help="Rank these answers to --vqa by their probability.")
    add("--suffix", metavar="TEXT", help="Is added to every question [the checkpoint's].")
    add("--num", type=int, default=1, help="Images per prompt [1].")
    add("--best-of", type=int, default=1, metavar="N", help="Draw N, keep the one that best reads as the prompt [1].")
    add("--cfg", type=float, help="Guidance, a factor; 1 is none [the checkpoint's].")
    add("--negative", default="", metavar="TEXT", help="What guidance leads away from [the empty text].")
    add("--size", metavar="SIDES", help="In pixels: 512, or WIDTHxHEIGHT [the checkpoint's].")
    add("--trace", default="", metavar="FILE", help="Write the steps as a picture, too; a .gif moves.")
    add("--out", default="out.png", help="Where to write the image, or the page of all images [out.png].")
    args = parser.parse_args()
    for name, least in ("steps", 1), ("num", 1), ("best_of", 1), ("length", 2), ("temperature", 0):
        if (value := getattr(args, name)) not in (None, "auto") and not value >= least:
            fail(f"--{name.replace('_', '-')} {value} is too small: give at least {least}")
    for name, what in (("vqa", "a question"), ("infill", "a text with blanks")):
        if any(len(job) < 2 for job in getattr(args, name)):
            fail(f"--{name} wants an image and then {what}: --{name} img.png \"...\"")
    for paths in (args.caption, *(paths for *paths, _ in args.vqa + args.infill)):
        if missing := [path for path in paths if not os.path.exists(path)]:
            fail(f"{missing[0]}: no such image{' (one question per --vqa, in quotes)' * (len(paths) > 1)}")
    if any("_" not in text for *_, text in args.infill):
        fail("--infill's text has no blank: each underscore stands for one token to fill in")
    texts = len(args.caption) + sum(len(job) - 1 for job in args.infill + ([] if args.options else args.vqa))
    if args.trace and texts + bool(args.t2i) != 1:
        fail("--trace FILE shows one text, or what --t2i draws, not several")
    for path in [args.out] * bool(args.t2i) + [args.trace] * bool(args.trace):
        if not path.lower().endswith(EXTENSIONS) or not os.path.isdir(os.path.dirname(path) or "."):
            fail(f"{path}: give a picture's name, like out.png, in a folder that is there")
    if not (args.vqa or args.caption or args.infill or args.t2i):
        fail("nothing to do: give --vqa, --caption, --t2i or --infill (--help shows how)")
    return args


def prepare_text(dd, text, room):
    """A typed text as the model knows it: in lower case, if that takes fewer tokens of a vocabulary that has capitals
    only as single letters. Warns of unknown words, and of more than `room` tokens."""
    pieces = dd.tokenizer.pieces
    if all(len(p.strip("▁")) == 1 for p in map(pieces.id_to_piece, range(len(pieces))) if p != p.lower()):
        text = min(text, text.lower(), key=lambda text: len(pieces.encode(text)))
    if unseen := unseen_words(dd.tokenizer, text):
        warn(f"never seen in training, so expect little: {', '.join(unseen)}")
    tokens = sum(len(dd.tokenizer.encode(part)) - 1 for part in text.split("_")) + text.count("_")
    if tokens > room:
        warn(f"{text[:40]!r}... has {tokens} tokens, the model takes {room}: its end is left out")
    return text


def save_image(path, frames, chunks=None):
    """Write an image; several as frames of a GIF."""
    with replacing(path) as beside:
        frames[0].save(beside, Image.registered_extensions()[os.path.splitext(path)[1].lower()], pnginfo=chunks,
                       save_all=len(frames) > 1, append_images=frames[1:], duration=150, loop=0)
    print(path)


def read_images(dd, args, generator):
    """--vqa, --caption, --infill: print what is read, a line per image and text; of a trace a row per pass."""
    (width, height), length, trace = args.size, dd.config.settings.length, []
    frame = dd.tokenizer.prompt_ids(dd.config.settings.answer_suffix, 10 * length)  # "Q:", the suffix, "A:"
    question_room = length - min(8, length // 3) - len(frame)

    def watch(tokens, reveal):
        trace.append((words_of(dd.tokenizer, tokens[0]), reveal[0]))

    def read(reader, jobs, **how):
        for part in slices(len(jobs), height, width):
            paths, *texts = zip(*jobs[part])
            images = torch.from_numpy(to_pixels([load_image(path, width, height) for path in paths]))
            tqdm.write("\n".join(reader(dd, images, *texts, **how)))
            sys.stdout.flush()

    def with_text(jobs, room):  # one job per image
        return [(path, prepare_text(dd, text, room)) for *paths, text in jobs for path in paths]

    how = {"length": args.length, "steps": args.steps, "order": args.order, "temperature": args.temperature,
           "generator": generator, "watch": watch if args.trace else None}
    if args.options:
        options = [prepare_text(dd, text, length) for text in args.options]
        read(rank, with_text(args.vqa, question_room), options=options)
    else:
        read(answer, with_text(args.vqa, question_room), **how)
    read(caption, [(path,) for path in args.caption], **how)
    read(infill, with_text(args.infill, length - 1), **how)
    if trace:
        save_image(args.trace, [text_page(trace)])


def draw_page(dd, args, generator):
    """--t2i: draw, keep the best, write the page of all images, and of a trace a page per step. The PNG's text chunk
    "parameters" says how it was drawn, in the form in which viewers of such images read it."""
    settings, trace, (width, height) = dd.config.settings, {}, args.size
    *texts, negative = (prepare_text(dd, text, settings.length - 1) for text in [*args.t2i, args.negative])
    prompts = [text for text in texts for _ in range(args.num)]
    candidates = [text for text in prompts for _ in range(args.best_of)]
    steps, cfg = args.steps or 28, settings.cfg if args.cfg is None else args.cfg

    def watch(x, t, velocity):  # the image in which the line from here ends
        trace.setdefault(t, []).extend(map(Image.fromarray, to_images(dd.decode_image(x - t * velocity))))

    pixels = text_to_image(dd, candidates, negative, height, width, steps=steps, cfg=cfg, generator=generator,
                           watch=watch if args.trace else None)
    if args.best_of > 1:
        pixels = keep_likeliest(dd, pixels, prompts, args.best_of)
    chunks, name = PngImagePlugin.PngInfo(), os.path.splitext(os.path.basename(args.ckpt.rstrip("/")))[0]
    chunks.add_text("parameters", "\n".join([
        *texts, *[f"Negative prompt: {args.negative}"] * bool(args.negative), f"Steps: {steps}, "
        f"CFG scale: {cfg}, Seed: {args.seed}, Size: {width}x{height}, Model: {name}"]))
    columns = args.num if len(texts) > 1 else round(args.num ** 0.5 + 0.4)
    save_image(args.out, [tile([Image.fromarray(image) for image in to_images(pixels)], columns)], chunks)
    if args.trace.lower().endswith(".gif"):
        pages = [tile(images, columns * args.best_of) for images in trace.values()]
        save_image(args.trace, pages + pages[-1:] * 10)
    elif args.trace:  # a row per image, a column per step
        save_image(args.trace, [tile([image for row in zip(*trace.values()) for image in row], len(trace))])


def main():
    args = parse_args()
    reads, dtype = args.vqa + args.caption + args.infill, "bf16" if args.device.type == "cuda" else "fp32"
    dd = DualDiffusion.load(args.ckpt, args.t5, args.vae, args.spiece, args.device, DTYPES[args.dtype or dtype],
                            args.offload)
    if missing := missing_parts(dd):
        fail(f"{args.ckpt}: holds no {' and no '.join(missing)}")
    if reads and not dd.ddit.text_head.linear.weight.any():
        warn("this model's text head was never trained: it can draw, but what it reads means nothing")
    settings, generator = dd.config.settings, torch.Generator().manual_seed(args.seed)
    if args.length not in (None, "auto"):
        settings.length = args.length
    settings.answer_suffix = settings.answer_suffix if args.suffix is None else args.suffix
    args.size = [int(side) for side in (args.size or str(settings.size)).split("x") * 2][:2]
    latent_size(dd, *args.size[::-1])  # raises before any work is done in vain
    if reads:
        read_images(dd, args, generator)
    if args.t2i:
        draw_page(dd, args, generator)


if __name__ == "__main__":
    run_program(main)
