"""Using it: draw images from text (Euler steps with guidance), read images into text (unmasking), fill in blanks.

    python sample.py --vqa img.png "what color is the circle?"
    python sample.py --caption img.png
    python sample.py --t2i "a large green triangle left of a small red circle" --num 8 --out out.png
    python sample.py --infill img.png "a _ circle above a large _ square"

Answers, captions and the names of written files go to stdout, all else to stderr.

References:
  Ho & Salimans, Classifier-Free Guidance, arXiv 2207.12598; Esser et al., SD3, arXiv 2403.03206, section 5.3.2
  Zheng et al., Masked Diffusion Models are Secretly Time-Agnostic Masked Models, arXiv 2409.02908
  Chang et al., MaskGIT, arXiv 2202.04200: unmasking the most confident first
"""
import argparse
import math
import os
import signal
import sys
import time

# torch's OpenMP threads wait for work by spinning, without end where there are as many cores as threads. On a machine
# where something else runs that makes small tensors 10 to 70 times slower; a short spin costs nothing measurable.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from PIL import Image

from data import caption_ids, load_image, prompt_ids, question_ids, to_images, to_pixels
from model import DTYPES, DualDiffusion, add_parts

# ---------------------------------------------------------------- drawing


def time_grid(steps, shift):
    """(steps+1,) times from 1 (noise) down to 0 (image); shift > 1 spends more of the steps near the noise."""
    t = torch.linspace(1, 0, steps + 1)
    return shift * t / (1 + (shift - 1) * t)


@torch.no_grad()
def text_to_image(dd, prompts, negative="", height=None, width=None, length=None, steps=28, cfg=7.0, shift=3.0,
                  noise=None, generator=None):
    """Draw one image a prompt -> pixels (B,3,height,width) in [-1,1].

    negative: what guidance leads away from; length: tokens a prompt is padded to; height, width: pixels, multiples of
    16 (both default to the checkpoint's own); cfg 1 is no guidance; noise (B,C,H/8,W/8): what to start from."""
    settings, vae = dd.config.settings, dd.config.vae
    height, width, length = height or settings.size, width or settings.size, length or settings.length
    if noise is None:
        shape = (len(prompts), vae.latent_channels, height // vae.factor, width // vae.factor)
        noise = torch.randn(shape, generator=generator)
    x, guided = noise.to(dd.device), cfg != 1
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
            velocity = no + cfg * (yes - no)
        x = x + (t_next - t) * velocity  # Euler
    return dd.decode_image(x)


# ---------------------------------------------------------------- reading


@torch.no_grad()
def unmask(dd, latents, tokens, maskable, steps, order="random", temperature=1.0, generator=None):
    """Draw the maskable tokens given the image and the other tokens -> tokens (B,L), forward passes used.

    latents (B,C,H,W) as the transformer sees them; tokens (B,L) long; maskable (B,L) bool; steps: of the time grid.

    order "random" has exactly the distribution of ancestral sampling on that grid, at fewer passes: the network does
    not see the time, and a masked token is revealed at a step that is uniform and independent of all else. So those
    steps are drawn first, and the network runs only at steps where something is revealed, only for those rows.
    order "confidence" reveals the surest tokens first, as many a step as the grid calls for (not exact).
    temperature divides the logits; 0 takes the likeliest token."""
    tokens = torch.where(maskable, dd.tokenizer.mask_id, tokens)
    total = maskable.sum(1)
    due = torch.where(maskable, torch.randint(steps, tokens.shape, generator=generator), steps)
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
        drawn, sure = draw_tokens(logits.cpu(), temperature, generator)
        if order == "confidence":
            confidence = torch.full(look.shape, -1.0, dtype=torch.float64)
            confidence[look] = sure
            rank = confidence.argsort(1, descending=True).argsort(1)
            chosen = look & (rank < quota[:, None])
            drawn, look = drawn[chosen[look]], chosen
        tokens[look], due[look] = drawn, -1
    return tokens, passes


def draw_tokens(logits, temperature, generator):
    """logits (N,V) -> tokens (N,) and their probabilities. In float64: float32 noise would silently lower the
    temperature. The mask token, the last of the V, is never drawn."""
    logits = logits[:, :-1].double()
    probs = torch.softmax(logits / (temperature or 1.0), dim=1)
    drawn = torch.multinomial(probs, 1, generator=generator) if temperature else probs.argmax(1, keepdim=True)
    return drawn[:, 0], probs.gather(1, drawn)[:, 0]


@torch.no_grad()
def caption(dd, images, length=None, steps=None, order="random", temperature=0.0, generator=None):
    """Describe images (B,3,H,W) in [-1,1] -> list of str. length: tokens a text has; steps: passes at the most."""
    ids, maskable = caption_ids(dd.tokenizer, "", length or dd.config.settings.length)
    tokens, maskable = (torch.tensor([row] * len(images)) for row in (ids, maskable))
    steps = steps or dd.config.settings.caption_steps
    tokens, _ = unmask(dd, dd.encode_image(images), tokens, maskable, steps, order, temperature, generator)
    return [dd.tokenizer.decode(row) for row in tokens]


@torch.no_grad()
def answer(dd, images, questions, length=None, steps=None, order="random", temperature=0.0, generator=None):
    """Answer one question an image -> list of str. length: tokens that question and answer have together."""
    rows = [question_ids(dd.tokenizer, question, "", length or dd.config.settings.length) for question in questions]
    tokens, maskable = (torch.tensor(column) for column in zip(*rows))
    steps = steps or dd.config.settings.answer_steps
    tokens, _ = unmask(dd, dd.encode_image(images), tokens, maskable, steps, order, temperature, generator)
    return [dd.tokenizer.decode(row[m]) for row, m in zip(tokens, maskable)]


@torch.no_grad()
def infill(dd, images, texts, length=None, steps=None, order="random", temperature=0.0, generator=None):
    """Fill in the blanks of one text an image -> list of str. Every underscore stands for one token."""
    length = length or dd.config.settings.length
    tokens = torch.tensor([blank_ids(dd.tokenizer, text, length) for text in texts])
    maskable = tokens == dd.tokenizer.mask_id
    tokens, _ = unmask(dd, dd.encode_image(images), tokens, maskable, steps or length, order, temperature, generator)
    return [dd.tokenizer.decode(row) for row in tokens]


def blank_ids(tokenizer, text, length):
    """Text with underscores -> ids of that length, the mask token for each underscore."""
    parts = [tokenizer.encode(part)[:-1] for part in text.split("_")]
    ids = parts[0] + [i for part in parts[1:] for i in (tokenizer.mask_id, *part)]
    return ids[:length - 1] + [tokenizer.eos_id] * max(1, length - len(ids))


# ---------------------------------------------------------------- the command line

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "tiny.safetensors")


def fail(message):
    """A user's mistake: one line, exit status 2. Of several processes the first tells it: the others wait, and if it
    was the first's mistake too, torchrun ends them before they speak."""
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


def warn(message):
    print(f"warning: {message}", file=sys.stderr)


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


def seed(text):
    """An argparse type: what a random generator can be seeded with."""
    if not text.isdecimal() or int(text) >= 2 ** 40:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^40")
    return int(text)


def width_and_height(text):
    """An argparse type: "512" or "768x512"."""
    try:
        width, height = map(int, (text.split("x") * 2)[:2])
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not like 512 or 768x512") from None
    if min(width, height) < 16 or width % 16 or height % 16:
        raise argparse.ArgumentTypeError(f"{text}: sides are multiples of 16")
    return width, height


def parse_args():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_argument_group("what to do (each can be given several times; all of it runs as one batch)")
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
    parser.add_argument("--steps", type=int, help="of the sampling grid; default: 28 to draw, the checkpoint's to read")
    parser.add_argument("--order", choices=["random", "confidence"], default="random", help="of unmasking text")
    parser.add_argument("--temperature", type=float, default=0.0, help="of drawing tokens; 0 (default): the likeliest")
    parser.add_argument("--num", type=int, default=1, help="images a prompt")
    parser.add_argument("--cfg", type=float, help="guidance; 1 is none; default: the checkpoint's")
    parser.add_argument("--size", type=width_and_height, metavar="SIDE or WIDTHxHEIGHT",
                        help="of images, drawn or read, in pixels; default: the checkpoint's")
    parser.add_argument("--out", default="out.png", help="the drawn image, or the grid of all drawn images")
    args = parser.parse_args()
    for name, what in (("vqa", "a question"), ("infill", "a text with blanks")):
        if any(len(job) < 2 or not job[-1].strip() for job in getattr(args, name)):
            fail(f"--{name} wants an image and then {what}: --{name} img.png \"...\"")
    if not (args.vqa or args.caption or args.t2i or args.infill):
        fail("nothing to do: give --vqa, --caption, --t2i or --infill (--help shows how)")
    if args.num < 1 or args.steps is not None and args.steps < 1:
        fail("--num and --steps are at least 1")
    if args.temperature != 0 and not 0.01 <= args.temperature <= 100:
        fail("--temperature is 0 or from 0.01 to 100")
    if args.cfg is not None and not math.isfinite(args.cfg):
        fail("--cfg is a number")
    if args.t2i and not os.path.isdir(os.path.dirname(args.out) or "."):
        fail(f"--out {args.out}: no such folder")
    if args.t2i and Image.registered_extensions().get(os.path.splitext(args.out)[1].lower()) not in Image.SAVE:
        fail(f"--out {args.out}: give it the ending of a picture, .png for one")
    if any("_" not in text for *_, text in args.infill):
        fail("--infill's text has no blank: each underscore stands for one token to fill in")
    return args


def heard(dd, text, room):
    """A text as the model can take it in: in lower case, if that is all it knows. Warns of words that its tokenizer
    never saw, and of more tokens than there is room for; an underscore is one."""
    unseen, lower = dd.tokenizer.unseen_words(text), dd.tokenizer.unseen_words(text.lower())
    if len(lower) < len(unseen):
        text, unseen = text.lower(), lower
    if unseen:
        warn(f"never seen in training, so expect little: {', '.join(unseen)}")
    tokens = sum(len(dd.tokenizer.encode(part)) - 1 for part in text.split("_")) + text.count("_")
    if tokens > room:
        warn(f"{text[:40]!r}... has {tokens} tokens, the model takes {room}: its end is left out")
    return text


def main():
    args = parse_args()
    questions = [(image, text) for *images, text in args.vqa for image in images]
    blanks = [(image, text) for *images, text in args.infill for image in images]
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]
    dd = DualDiffusion.load(args.ckpt, args.t5, args.vae, args.spiece, args.device, dtype, args.offload)
    if dd.missing:
        fail(f"{args.ckpt}: holds no {' and no '.join(dd.missing)}; `python model.py {args.ckpt}` tells what it holds")
    if (questions or args.caption or blanks) and not dd.ddit.text_head.linear.weight.any():
        warn("this model's text head was never trained: it can draw, but what it reads means nothing")
    settings, generator = dd.config.settings, torch.Generator().manual_seed(args.seed)
    size = args.size or (settings.size, settings.size)
    reading = dict(steps=args.steps, order=args.order, temperature=args.temperature, generator=generator)

    def pixels(paths):
        return torch.from_numpy(to_pixels([load_image(path, *size) for path in paths]))

    if questions:
        longest, frame = "a " * settings.length, prompt_ids(dd.tokenizer, "", settings.length)
        room = len(prompt_ids(dd.tokenizer, longest, settings.length)) - len(frame)
        asked = [heard(dd, text, room) for _, text in questions]
        print(*answer(dd, pixels(image for image, _ in questions), asked, **reading), sep="\n")
    if args.caption:
        print(*caption(dd, pixels(args.caption), **reading), sep="\n")
    if blanks:
        texts = [heard(dd, text, settings.length - 1) for _, text in blanks]
        print(*infill(dd, pixels(image for image, _ in blanks), texts, **reading), sep="\n")
    if args.t2i:
        texts = [heard(dd, text, settings.length - 1) for text in args.t2i]
        prompts = [text for text in texts for _ in range(args.num)]
        drawn = text_to_image(dd, prompts, width=size[0], height=size[1], steps=args.steps or 28, shift=settings.shift,
                              cfg=settings.cfg if args.cfg is None else args.cfg, generator=generator)
        write_grid(args.out, to_images(drawn), columns=args.num if len(args.t2i) > 1 else round(args.num ** 0.5 + 0.4))
        print(args.out)


def write_grid(path, images, columns):
    """Images (B,H,W,3) uint8, row by row -> one picture, 2 white pixels between them."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * (width + 2) - 2, rows * (height + 2) - 2), "white")
    for k, image in enumerate(images):
        page.paste(Image.fromarray(image), (k % columns * (width + 2), k // columns * (height + 2)))
    page.save(path)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        fail(error)
