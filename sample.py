"""Using it: draw images from text (Euler steps with guidance), read images into text (unmasking), fill in blanks.

    python sample.py --vqa img.png "what color is the circle?"
    python sample.py --caption img.png
    python sample.py --t2i "a large green triangle left of a small red circle" --num 8 --out out.png
    python sample.py --infill img.png "a _ green _ above a small _ circle and a small green square"

Answers, captions and the names of written files go to stdout, all else to stderr.

References:
  Ho & Salimans, Classifier-Free Guidance, arXiv 2207.12598; Esser et al., SD3, arXiv 2403.03206, section 5.3.2
  Zheng et al., Masked Diffusion Models are Secretly Time-Agnostic Masked Models, arXiv 2409.02908
  Chang et al., MaskGIT, arXiv 2202.04200: unmasking the most confident first
"""
import argparse
import os
import re
import signal
import sys
import time

# torch's OpenMP threads wait for work by spinning, without end where there are as many cores as threads. On a machine
# where something else runs that makes small tensors 10 to 70 times slower; a short spin costs nothing measurable.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from PIL import Image
from tqdm import tqdm

from data import load_image, replacing, to_images, to_pixels
from model import DTYPES, DualDiffusion, add_parts
from t5 import unseen_words

PIXELS = 2 ** 18  # of all images that go through the networks at once: 64 of 64x64, one of 512x512; more gains nothing


def batches(count, height, width):
    """Slices of `count` images of that size, each of PIXELS at most. Several show a bar on a terminal."""
    size = max(1, PIXELS // (height * width))
    return tqdm([slice(at, at + size) for at in range(0, count, size)], leave=False, disable=count <= size or None)


def latent_size(dd, height, width):
    """Height and width of an image -> of its latents. Raises ValueError for one that the model cannot take."""
    factor, unit = dd.config.vae.factor, dd.config.vae.factor * dd.config.ddit.patch
    if height % unit or width % unit or min(height, width) < unit:
        raise ValueError(f"this model wants images with sides that are multiples of {unit}, not {width}x{height}")
    dd.ddit.positions(height // unit, width // unit)  # raises where it has fewer
    return height // factor, width // factor


def finite(tensor):
    """The tensor, if all of it is numbers."""
    if not tensor.isfinite().all():
        raise ValueError("the model computes what is not finite: its weights are damaged, or too large for --dtype")
    return tensor


# ---------------------------------------------------------------- drawing


def time_grid(steps, shift):
    """(steps+1,) times from 1 (noise) down to 0 (image); shift > 1 spends more of the steps near the noise (SD3)."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def text_to_image(dd, prompts, negative="", height=None, width=None, length=None, steps=28, cfg=7.0, shift=3.0,
                  noise=None, generator=None):
    """Draw one image a prompt -> pixels (B,3,height,width) in [-1,1].

    negative: what guidance leads away from; length: tokens a prompt is padded to; height, width: pixels, multiples of
    16 (all default to the checkpoint's own); cfg 1 is no guidance; noise (B,C,H/8,W/8): what to start from. 28 steps
    and a shift of 3 are SD3's. Raises ValueError for a size that the model cannot take."""
    settings, vae = dd.config.settings, dd.config.vae
    height, width, length = height or settings.size, width or settings.size, length or settings.length
    if noise is None:
        shape = (len(prompts), vae.latent_channels, *latent_size(dd, height, width))
        noise = torch.randn(shape, generator=generator)
    parts = batches(len(prompts), noise.shape[2] * vae.factor, noise.shape[3] * vae.factor)
    return torch.cat([denoise(dd, noise[part], prompts[part], negative, length, steps, cfg, shift) for part in parts])


def denoise(dd, x, prompts, negative, length, steps, cfg, shift):
    """Noise (B,C,h,w) -> pixels (B,3,8h,8w): Euler's steps along the ODE, all prompts at once."""
    x, guided = x.to(dd.device), cfg != 1
    ids = [dd.tokenizer.encode(text, length) for text in [*prompts, *[negative] * len(prompts) * guided]]
    text = dd.t5(torch.tensor(ids, device=dd.device))
    nowhere = torch.zeros(text.shape[:2], dtype=torch.bool)  # no logits wanted
    grid = time_grid(steps, shift).tolist()
    for t, t_next in zip(grid, grid[1:]):
        both = torch.cat([x, x]) if guided else x
        velocity, _ = dd.ddit(both, torch.full((len(both),), t, device=dd.device), text, predict=nowhere)
        velocity = velocity.float()
        if guided:
            yes, no = velocity.chunk(2)
            velocity = no + cfg * (yes - no)  # Eq. 10
        x = x + (t_next - t) * velocity  # Eq. 2
    return finite(dd.decode_image(x))


# ---------------------------------------------------------------- reading


@torch.no_grad()
def unmask(dd, latents, tokens, maskable, steps, order="random", temperature=1.0, generator=None):
    """Draw the maskable tokens given the image and the other tokens -> tokens (B,L), forward passes used.

    latents (B,C,H,W) as the transformer sees them; tokens (B,L) long; maskable (B,L) bool; steps: of the time grid.

    order "random", at temperature 1, has exactly the distribution of ancestral sampling on that grid, at fewer passes:
    the network does not see the time, and a masked token is revealed at a step that is uniform and independent of all
    else. So those steps are drawn first, and the network runs only at steps where something is revealed, only for those
    rows. order "confidence" reveals the surest tokens first, as many a step as the grid calls for (not exact).
    temperature divides the logits; 0 takes the likeliest token: no sampling, but a greedy reading in that order."""
    tokens = torch.where(maskable, dd.tokenizer.mask_id, tokens)
    total = maskable.sum(1)
    due = torch.where(maskable, torch.randint(steps, tokens.shape, generator=generator), steps)  # Eq. 5
    passes = 0
    for step in range(steps):
        if order == "random":
            look = due == step
        else:
            quota = -(-total * (step + 1) // steps) - (maskable & (due < 0)).sum(1)  # rounded up, less those done
            look = maskable & (due >= 0) & (quota > 0)[:, None]
        rows = look.any(1)
        if not rows.any():
            continue
        passes += 1
        states = dd.t5(tokens[rows].to(dd.device))
        time = torch.zeros(len(states), device=dd.device)
        _, logits = dd.ddit(latents[rows], time, states, predict=look[rows], draw=0)
        drawn, sure = draw_tokens(logits, temperature, generator)
        if order == "confidence":
            confidence = torch.full(look.shape, -1.0, dtype=torch.float64)
            confidence[look] = sure
            rank = confidence.argsort(1, descending=True).argsort(1)
            chosen = look & (rank < quota[:, None])
            drawn, look = drawn[chosen[look]], chosen
        tokens[look], due[look] = drawn, -1
    return tokens, passes


def draw_tokens(logits, temperature, generator):
    """logits (N,V) -> tokens (N,) and their probabilities, on the CPU. In float64, for float32 noise would silently
    lower the temperature; and so 256 rows at a time. The mask token, the last of the V, is never drawn."""
    drawn, sure = [], []
    for part in logits.split(256):
        probs = torch.softmax(finite(part[:, :-1]).cpu().double() / (temperature or 1.0), dim=1)
        drawn.append(torch.multinomial(probs, 1, generator=generator) if temperature else probs.argmax(1, keepdim=True))
        sure.append(probs.gather(1, drawn[-1]))
    return torch.cat(drawn)[:, 0], torch.cat(sure)[:, 0]


def read(dd, images, rows, full, *how):
    """Unmask a text, (ids, maskable), for each image -> list of str: full texts, or only what was unmasked."""
    latent_size(dd, *images.shape[2:])
    tokens, maskable = (torch.tensor(column) for column in zip(*rows))
    for part in batches(len(images), *images.shape[2:]):
        tokens[part], _ = unmask(dd, dd.encode_image(images[part]), tokens[part], maskable[part], *how)
    return [dd.tokenizer.decode(row if full else row[m]) for row, m in zip(tokens, maskable)]


@torch.no_grad()
def caption(dd, images, length=None, steps=None, order="random", temperature=0.0, generator=None):
    """Describe images (B,3,H,W) in [-1,1] -> list of str. length: tokens a text has; steps: passes at the most. A model
    that saw captions only as answers is asked for them."""
    settings = dd.config.settings
    length, steps, asks = length or settings.length, steps or settings.caption_steps, settings.caption_prompt
    row = dd.tokenizer.question_ids(asks, "", length) if asks else dd.tokenizer.caption_ids("", length)
    return read(dd, images, [row] * len(images), False, steps, order, temperature, generator)


@torch.no_grad()
def answer(dd, images, questions, length=None, steps=None, order="random", temperature=0.0, generator=None):
    """Answer one question an image -> list of str. length: tokens that question and answer have together. The model's
    own suffix, if it has one, follows the question."""
    settings = dd.config.settings
    length, steps, suffix = length or settings.length, steps or settings.answer_steps, settings.answer_suffix
    rows = [dd.tokenizer.question_ids(f"{question} {suffix}".rstrip(), "", length) for question in questions]
    return read(dd, images, rows, False, steps, order, temperature, generator)


@torch.no_grad()
def infill(dd, images, texts, length=None, steps=None, order="random", temperature=0.0, generator=None):
    """Fill in the blanks of one text an image -> list of str. Every underscore stands for one token."""
    length = length or dd.config.settings.length
    rows = [dd.tokenizer.blank_ids(text, length) for text in texts]
    return read(dd, images, rows, True, steps or length, order, temperature, generator)


# ---------------------------------------------------------------- the command line

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny.safetensors")
torch.backends.cudnn.allow_tf32 = False  # or fp32's convolutions would have 10 bits of precision on a GPU, not 23


def fail(message, status=2):
    """A user's mistake: one line, exit status 2. Of several processes the first tells it: the others wait, and if it
    was the first's mistake too, torchrun ends them before they speak."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    if sys.stderr:
        tqdm.write(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)  # not into a bar that is showing
    sys.exit(status)


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help shows how)")


def existing_device(name):
    """An argparse type: a device that exists. An accelerator carries its number, this process's own: the local rank
    under torchrun, else 0 unless `name` says another. Nothing is allocated on it, so none is touched in vain."""
    try:
        device, here = torch.device(name), torch.accelerator.current_accelerator(check_available=True)
        index = int(os.environ.get("LOCAL_RANK", device.index or 0))
        if device.type == "cpu":
            return torch.device("cpu")
        if here is not None and device.type == here.type and index < torch.accelerator.device_count():
            return torch.device(device.type, index)
    except RuntimeError:
        pass
    raise argparse.ArgumentTypeError(f"there is no device {name} here")


def default_device():
    """What torch.accelerator finds, by name; else the CPU."""
    here = torch.accelerator.current_accelerator(check_available=True)
    return here.type if here else "cpu"


def number(kind, low, high):
    """An argparse type: a number of that kind (int or float) in that range."""
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    return number


seed = number(int, 0, 2 ** 40)  # what random generators can be seeded with


def width_and_height(text):
    """An argparse type: "512" or "768x512"."""
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not sides:
        raise argparse.ArgumentTypeError(f"{text} is not like 512 or 768x512")
    return int(sides[1]), int(sides[2] or sides[1])


def run_program(main, stopped="stopped", lower="--size, or give --offload"):
    """Run main(). What a user can mend is one line and exit status 2; `lower` says what to lower where memory ends;
    Ctrl-C says `stopped` (130); a reader of our output who has left (| head) ends us in silence (141)."""
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
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        fail(stopped, 130)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("out of memory|allocate|ALLOC_FAILED", str(error)):
            raise
        fail(f"out of memory: lower {lower}")


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_argument_group("what to do (each can be given several times)")
    jobs.add_argument("--vqa", nargs="+", action="append", metavar="IMAGE ... QUESTION", default=[])
    jobs.add_argument("--caption", nargs="+", action="extend", metavar="IMAGE", default=[])
    jobs.add_argument("--t2i", nargs="+", action="extend", metavar="TEXT", default=[])
    jobs.add_argument("--infill", nargs="+", action="append", metavar="IMAGE ... TEXT", default=[],
                      help="each underscore stands for one token")
    files = parser.add_argument_group("the model (`python model.py FILE` tells what a file is)")
    files.add_argument("--ckpt", default=SHIPPED, help="a file of ours, an SD3 single file, or a folder in diffusers "
                       "layout; default: the small model that ships")
    add_parts(files)
    files.add_argument("--device", type=existing_device, default=default_device())
    files.add_argument("--dtype", choices=list(DTYPES), help="to compute in; default: bf16 on a GPU, fp32 on a CPU")
    files.add_argument("--offload", action="store_true", help="keep T5 on the CPU, where GPU memory is short")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--steps", type=number(int, 1, 10_000),
                        help="of the sampling grid; default: 28 to draw (SD3's), the checkpoint's to read")
    parser.add_argument("--order", choices=["random", "confidence"], default="random", help="of unmasking text")
    parser.add_argument("--temperature", type=float, default=0.0,
                        help="of drawing tokens; 0 (default): the likeliest; 1, in random order: exact samples")
    parser.add_argument("--length", type=number(int, 8, 4096), help="of a text, in tokens; default: the checkpoint's")
    parser.add_argument("--suffix", metavar="TEXT", help="added to every question; default: the checkpoint's")
    parser.add_argument("--num", type=number(int, 1, 10 ** 6), default=1, help="images a prompt")
    parser.add_argument("--cfg", type=number(float, -1000, 1000), help="guidance; 1 is none; default: the checkpoint's")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--size", type=width_and_height, metavar="SIDE or WIDTHxHEIGHT",
                        help="of images, drawn or read, in pixels; default: the checkpoint's")
    parser.add_argument("--out", default="out.png", help="the drawn image, or the grid of all drawn images")
    args = parser.parse_args()
    for name, what in (("vqa", "a question"), ("infill", "a text with blanks")):
        if any(len(job) < 2 or not job[-1].strip() for job in getattr(args, name)):
            fail(f"--{name} wants an image and then {what}: --{name} img.png \"...\"")
    for images in (args.caption, *(images for *images, _ in args.vqa + args.infill)):
        for path in images:
            if not os.path.exists(path):  # before hours of work on others
                fail(f"{path}: no such image" + (" (a question goes in quotes)" if len(images) > 1 else ""))
    if not (args.vqa or args.caption or args.t2i or args.infill):
        fail("nothing to do: give --vqa, --caption, --t2i or --infill (--help shows how)")
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        fail("--temperature is 0 or from 0.01 to 100")
    folder, ending = os.path.dirname(args.out), os.path.splitext(args.out)[1]
    args.format = Image.registered_extensions().get(ending.lower())
    if args.t2i and (args.format not in Image.SAVE or os.path.isdir(args.out) or not os.access(folder or ".", os.W_OK)):
        fail(f"--out {args.out}: give a picture's name, like out.png, in a folder that you can write to")
    if any("_" not in text for *_, text in args.infill):
        fail("--infill's text has no blank: each underscore stands for one token to fill in")
    return args


def heard(dd, text, room):
    """A text as the model can take it in: in lower case, if that takes fewer tokens of a vocabulary that has capitals
    only as single letters. Warns of words that its tokenizer never saw, and of more tokens than there is room for; an
    underscore is one."""
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


def main():
    args = parse_args()
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]
    dd = DualDiffusion.load(args.ckpt, args.t5, args.vae, args.spiece, args.device, dtype, args.offload)
    if dd.missing:
        fail(f"{args.ckpt}: holds no {' and no '.join(dd.missing)}; `python model.py {args.ckpt}` tells what it holds")
    if (args.vqa or args.caption or args.infill) and not dd.ddit.text_head.linear.weight.any():
        warn("this model's text head was never trained: it can draw, but what it reads means nothing")
    settings, generator = dd.config.settings, torch.Generator().manual_seed(args.seed)
    if args.suffix is not None:
        settings.answer_suffix = args.suffix
    length, (width, height) = args.length or settings.length, args.size or (settings.size, settings.size)
    latent_size(dd, height, width)  # raises before any work is done in vain
    if args.num * len(args.t2i) * height * width > 2 * Image.MAX_IMAGE_PIXELS:  # Pillow would not open it again
        fail(f"{args.num * len(args.t2i)} images of {width}x{height} do not fit on a page: lower --num or --size")

    def tell(reader, paths, *texts):
        for part in batches(len(paths), height, width):
            images = torch.from_numpy(to_pixels([load_image(path, width, height) for path in paths[part]]))
            tqdm.write("\n".join(reader(dd, images, *(column[part] for column in texts), length, args.steps, args.order,
                                        args.temperature, generator)))
            sys.stdout.flush()

    def pairs(jobs, room):
        return zip(*((image, text) for *images, typed in jobs for text in [heard(dd, typed, room)] for image in images))

    if args.vqa:
        longest, suffix = (dd.tokenizer.prompt_ids(s, length) for s in ("a " * length, settings.answer_suffix))
        tell(answer, *pairs(args.vqa, len(longest) - len(suffix)))
    if args.caption:
        tell(caption, args.caption)
    if args.infill:
        tell(infill, *pairs(args.infill, length - 1))
    if args.t2i:
        *texts, negative = (heard(dd, text, length - 1) for text in [*args.t2i, args.negative])
        prompts = [text for text in texts for _ in range(args.num)]
        drawn = text_to_image(dd, prompts, negative, height, width, length, args.steps or 28,
                              settings.cfg if args.cfg is None else args.cfg, settings.shift, generator=generator)
        page = grid(to_images(drawn), columns=args.num if len(args.t2i) > 1 else round(args.num ** 0.5 + 0.4))
        with replacing(args.out) as beside:
            page.save(beside, args.format)
        print(args.out)


def grid(images, columns):
    """Images (B,H,W,3) uint8, row by row -> one picture, 2 white pixels between them."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for k, image in enumerate(images):
        page.paste(Image.fromarray(image), (k % columns * (width + 2), k // columns * (height + 2)))
    return page


if __name__ == "__main__":
    run_program(main)
