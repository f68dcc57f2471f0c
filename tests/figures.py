"""The pictures of the READMEs, drawn from the code and the shipped model: `python tests/figures.py` writes all into
assets/, `python tests/figures.py batch` one of them. Diagrams and plots are SVG, pictures with pixels PNG. `curves`
needs the logs of a training (--runs), `orders` a table in a README; without them they are left out.

Blue is what belongs to images, orange to text, grey what is noisy or masked, purple what is learned. All but `both` is
laid out on a card 800 wide, on which no letter is smaller than 25: a phone shows it at half that size."""
import argparse
import base64
import html
import io
import json
import math
import os
import re
import sys
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import sample
from data import World, to_images, to_pixels
from losses import noise_latents
from model import DualDiffusion
from train import UNSEEN

WORLD = World(UNSEEN)  # scenes that the shipped model never saw
ASSETS = os.path.dirname(sample.SHIPPED)
READMES = [path for path in (os.path.join(ASSETS, "..", name) for name in ("README.md", "tests/README.md"))
           if os.path.exists(path)]
WIDTH, SMALL, LARGE = 800, 25, 31
SANS, MONO = "Helvetica,Arial,DejaVu Sans,sans-serif", "Menlo,Consolas,DejaVu Sans Mono,monospace"
DARK = {"image": "#2166ac", "text": "#b35806", "noise": "#565b63", "learn": "#6a3d9a", "ink": "#2a2d34"}
LIGHT = {"image": "#deebf7", "text": "#fdebd3", "noise": "#dcdee2", "learn": "#ebe1f5", "ink": "#ffffff"}
CARD, EDGE = "#fcfbf8", "#e4e1da"
# Of what has no card: these suit a white page and a black one.
GREY, TOKEN = "#7d8590", {"text": "#fde3bf", "learn": "#c9b3e6", "noise": "#7d859050"}


class Drawing:
    """An SVG file, line by line."""
    def __init__(self, title, name):
        self.lines = []
        self.text(WIDTH / 2, 58, title, size=LARGE, bold=True)
        self.text(WIDTH / 2, 98, name, "noise")

    def text(self, x, y, words, kind="ink", anchor="middle", size=SMALL, bold=False):
        """Words on the line y; a name from the code, marked by a backtick before it, in a typewriter's letters."""
        font, weight = MONO if words[0] == "`" else SANS, "bold" if bold else "normal"
        self.lines.append(f'<text x="{x:g}" y="{y:g}" font-family="{font}" font-size="{size}" font-weight="{weight}" '
                          f'fill="{DARK[kind]}" text-anchor="{anchor}">{html.escape(words.lstrip("`"))}</text>')

    def box(self, x, y, w, h, kind, *lines, radius=12, outline=2, fill=None):
        self.lines.append(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" '
                          f'fill="{fill or LIGHT[kind]}" stroke="{DARK[kind]}" stroke-width="{outline}"/>')
        for k, words in enumerate(lines):
            self.text(x + w / 2, y + h / 2 + 9 + 34 * (k - (len(lines) - 1) / 2), words, kind)

    def line(self, points, kind="ink", width=3, opacity=1):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.lines.append(f'<polyline points="{path}" fill="none" stroke="{DARK[kind]}" stroke-width="{width}" '
                          f'stroke-opacity="{opacity}" stroke-linejoin="round"/>')

    def area(self, points, kind):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.lines.append(f'<polygon points="{path}" fill="{DARK[kind]}" fill-opacity="0.35"/>')

    def arrow(self, *points, kind="ink"):
        """A line through the points, with a head at the last."""
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        u, v = (x - x0) / length, (y - y0) / length  # its direction
        self.line([*points[:-1], (x - 10 * u, y - 10 * v)], kind)
        head = " ".join(f"{a:g},{b:g}" for a, b in ((x, y), (x - 16 * u - 8 * v, y - 16 * v + 8 * u),
                                                    (x - 16 * u + 8 * v, y - 16 * v - 8 * u)))
        self.lines.append(f'<polygon points="{head}" fill="{DARK[kind]}"/>')

    def picture(self, x, y, side, image):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        data = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
        self.lines.append(f'<image x="{x:g}" y="{y:g}" width="{side}" height="{side}" href="{data}"/>')
        self.lines.append(f'<rect x="{x:g}" y="{y:g}" width="{side}" height="{side}" fill="none" stroke="{EDGE}"/>')

    def dot(self, x, y, kind, radius=7):
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius}" fill="{DARK[kind]}"/>')

    def tokens(self, x, y, words, room):
        """A text as boxes, one per token, from x on and at most `room` wide; "mask" is grey."""
        at = x
        for word in words.split():
            width = 30 if word == "·" else 18 + 14 * len(word)
            if at + width > x + room:
                at, y = x, y + 52
            kind, fill = ("noise", None) if word == "mask" else ("text", "white")
            self.box(at, y, width, 42, kind, word, radius=8, outline=1, fill=fill)
            at += width + 7

    def save(self, name, height):
        card = f'<rect x="2" y="2" width="{WIDTH - 4}" height="{height - 4}" rx="28" fill="{CARD}" stroke="{EDGE}" ' \
               'stroke-width="2"/>'
        lines = "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                           f'height="{height}">', card, *self.lines, "</svg>\n"])
        with open(os.path.join(ASSETS, name), "w") as f:
            f.write(lines)


@torch.no_grad()
def noisy(dd, image, t):
    """What noise leaves of an image: its latents at time t, decoded."""
    latents = dd.encode_image(torch.from_numpy(to_pixels([image])))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    return to_images(dd.decode_image(noise_latents(latents, noise, torch.tensor([t]))))[0]


# ---------------------------------------------------------------- diagrams


def batch(dd, args):
    """One training step, losses.joint_loss: two halves of a batch, one forward pass, two losses."""
    d = Drawing("One training step", "joint_loss: two halves, stacked along the batch")
    pictures = [noisy(dd, WORLD.image(11), 0.8), noisy(dd, WORLD.image(30), 0.5), WORLD.image(26), WORLD.image(33)]
    texts = ["a large blue triangle left of a small yellow cross · ·", "· " * 12,
             "a mask blue mask below a mask mask cross · mask ·", "Q: what color is the cross? A: mask mask · mask ·"]
    d.box(12, 110, 776, 642, "noise", outline=2, radius=26, fill="none")
    halves = (("image", "ImageHalf: noisy latents, clean caption"), ("text", "TextHalf: clean latents, masked text"))
    for k, (kind, words) in enumerate(halves):
        d.box(24, 122 + 318 * k, 752, 304, kind, outline=0, radius=18)
        d.text(44, 160 + 318 * k, words, kind, "start", bold=True)
    for k, (picture, t, text) in enumerate(zip(pictures, ("t=0.8", "t=0.5", "t=0", "t=0"), texts)):
        y = 178 + 120 * (k % 2) + 318 * (k // 2)
        d.picture(44, y, 104, picture)
        d.text(191, y + 61, t, "noise" if k < 2 else "ink")
        d.tokens(236, y + 5, text, 536)
    d.text(236, 384, "one caption in ten is empty", "text", "start")
    d.text(764, 384, "· end of text", "text", "end")

    d.arrow((96, 752), (96, 906), kind="image")
    d.text(110, 800, "latents", "image", "start")
    d.arrow((215, 752), (215, 906), kind="noise")
    d.text(229, 800, "times", "noise", "start")
    d.arrow((560, 752), (560, 782), kind="text")
    d.box(400, 784, 320, 54, "text", "`t5")
    d.arrow((560, 838), (560, 906), kind="text")
    d.text(544, 880, "one vector per token", "text", "end")
    d.box(24, 908, 752, 84, "learn", "`ddit", "one forward pass for all rows")
    for x, kind, part, head, output, *loss in (
            (24, "image", "only the image half", "`final_layer", "velocity",
             "`flow_matching_loss", "target: noise − latents", "Eq. 3"),
            (410, "text", "only the masked tokens", "`text_head", "logits",
             "`masked_diffusion_loss", "target: the true tokens", "Eq. 7")):
        d.arrow((x + 40, 992), (x + 40, 1048), kind=kind)
        d.text(x + 60, 1029, part, kind, "start")
        d.box(x, 1050, 366, 54, kind, head)
        d.arrow((x + 40, 1104), (x + 40, 1160), kind=kind)
        d.text(x + 60, 1141, output, kind, "start")
        d.box(x, 1162, 366, 120, "learn", *loss)
        d.arrow((x + 183, 1282), (x + 183, 1326), kind="learn")
    d.box(24, 1328, 752, 84, "learn", "`image_loss + text_weight · text_loss", "Eq. 9")
    d.save("batch.svg", 1440)


def block(dd, args):
    """One model.JointBlock: two streams with weights of their own, which meet in the attention."""
    d = Drawing("One block: two streams, one attention", "JointBlock; SD3-medium has 24 of them")
    d.box(240, 124, 320, 54, "noise", "vec, from the time t", radius=27)
    for x, side, kind, stream in ((50, -1, "image", "`x"), (430, 1, "text", "`text")):
        mid, edge = x + 160, x + 160 + side * 178
        d.arrow((400, 178), (400, 202), (mid, 202), (mid, 224), kind="noise")
        d.box(x, 226, 320, 54, kind, "`adaLN_modulation")
        d.arrow((mid, 280), (mid, 312), kind="noise")
        d.box(x, 314, 320, 84, "noise", "shift, scale, gate,", "two of each", outline=0)
        d.text(mid, 458, f"{kind} tokens", kind, bold=True)
        d.text(mid, 492, stream, kind)
        for y, words, color in (
                (524, "`norm1", kind), (602, "modulate: shift, scale", "noise"), (680, "`attn.qkv", kind),
                (886, "`attn.proj", kind), (964, "× gate_attn", "noise"),
                (1116, "`norm2", kind), (1194, "modulate: shift, scale", "noise"), (1272, "`mlp", kind),
                (1350, "× gate_mlp", "noise")):
            d.box(x, y, 320, 52, color, words)
        for y in (576, 654, 732, 860, 938, 1016, 1090, 1168, 1246, 1324, 1402, 1476):
            d.arrow((mid, y), (mid, y + 26), kind=kind)
        for start, end in ((508, 1066), (1098, 1452)):  # around the branch
            d.arrow((mid, start), (edge, start), (edge, end), (mid + side * 24, end), kind=kind)
            d.box(mid - 24, end - 24, 48, 48, kind, "+", radius=24)
        d.arrow((mid, 502), (mid, 524), kind=kind)
    d.box(50, 760, 700, 100, "ink", "`scaled_dot_product_attention", "every token sees all, image and text")
    d.text(400, 1534, "to the next block", "noise")
    d.save("block.svg", 1566)


# ---------------------------------------------------------------- plots


def curves(dd, args):
    """The losses of the three default stages."""
    stages = []
    for stage in (1, 2, 3):
        path = os.path.join(args.runs, f"stage{stage}", "metrics.jsonl")
        if not os.path.exists(path):
            return print(f"curves: left out, no {path} (train the default stages, or give --runs)")
        with open(path) as f:
            stages.append([json.loads(line) for line in f])
    d = Drawing("Training, the three default stages", "against steps; lines: training; dots: unseen images")
    for top, kind in ((170, "image"), (640, "text")):
        values = [row[f"{kind}_loss"] for rows in stages for row in rows]
        low, high, height = math.log(min(values) * 0.8), math.log(max(values) * 1.1), 320
        d.text(90, top - 16, f"{kind} loss", kind, "start", bold=True)
        for tick in (tick for tick in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if low < math.log(tick) < high):
            y = top + height * (high - math.log(tick)) / (high - low)
            d.line([(90, y), (690, y)], "noise", 1, 0.4)
            d.text(80, y + 9, f"{tick:g}", "noise", "end")
        for k, (rows, left, width, every) in enumerate(zip(stages, (90, 300, 370), (190, 50, 320), (200, 40, 1000))):
            def place(row, name):
                return (left + width * row["step"] / rows[-1]["step"],
                        top + height * (high - math.log(row[name])) / (high - low))

            d.line([place(row, f"{kind}_loss") for row in rows], kind, 3, 0.45)
            d.line([(left, top + height), (left + width, top + height)])
            dots = [place(row, f"val_{kind}_loss") for row in rows if f"val_{kind}_loss" in row]
            for x, y in dots:
                d.dot(x, y, kind)
            for step in range(every, rows[-1]["step"] + 1, every):
                x = left + width * step / rows[-1]["step"]
                d.line([(x, top + height), (x, top + height + 8)])
                d.text(x, top + height + 34, f"{step:,}", "noise")
            d.text(left + width / 2, top + height + 66, f"stage {k + 1}" if width > 99 else str(k + 1))
        x, y = dots[-1]
        d.text(x + 14, y + 9, f"{rows[-1][f'val_{kind}_loss']:.3f}", kind, "start", bold=True)
    d.save("curves.svg", 1060)


def readmes():
    """The text of both READMEs."""
    return "\n".join(open(path).read() for path in READMES)


TABLE = re.compile(r"\| order \| steps \| captions \| passes \| answers \| passes \|\n\|[-|: ]+\n((?:\|.*\n)+)")


def orders(dd, args):
    """The paper's Table 5 in miniature: what is right after how many passes, from the table in a README."""
    table = TABLE.search(readmes())
    if not table:
        return print("orders: left out, no README has a table of them")
    rows = [[cell.strip(" *`%") for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    d = Drawing("Orders of unmasking", "how many texts are right")
    names = {"random": "noise", "entropy": "learn"}

    def place(top, passes, share):
        return 110 + 620 * math.log2(float(passes)) / 5, top + 300 * (1 - float(share) / 100)

    for top, words, column in ((176, "captions", 2), (616, "answers", 4)):
        d.text(110, top - 24, words, "ink", "start", bold=True)
        for tick in (0, 50, 100):
            d.line([place(top, 1, tick), place(top, 32, tick)], "noise", 1, 0.4)
            d.text(96, place(top, 1, tick)[1] + 9, f"{tick}%", "noise", "end")
        for passes in (1, 2, 4, 8, 16, 32):
            d.text(place(top, passes, 0)[0], top + 340, str(passes), "noise")
        for name, kind in names.items():
            line = sorted(place(top, row[column + 1], row[column]) for row in rows if row[0] == name)
            d.line(line, kind)
            for x, y in line:
                d.dot(x, y, kind, 7 if len(line) > 1 else 13)
    d.text(420, 992, "forward passes per text", "noise")
    for x, (name, kind) in zip((260, 450), names.items()):
        d.dot(x, 1037, kind, 10)
        d.text(x + 20, 1046, name, kind, "start", bold=True)
    d.save("orders.svg", 1080)


# ---------------------------------------------------------------- why a mean velocity draws

CENTRES, SPREAD = np.array([-2.0, 2.0]), 0.25  # images of one number: two clusters, equally frequent


def mean_velocity(x, t):
    """The mean of noise - image over all lines that pass through x (N,) at time t -> (N,), in closed form.

    Of the lines that end in one cluster, the points at time t are normal, and so are image and noise for a given x."""
    offset = x[:, None] - (1 - t) * CENTRES
    variance = ((1 - t) * SPREAD) ** 2 + t ** 2
    share = np.exp(-offset ** 2 / (2 * variance))  # of the lines through x, those that end in each cluster
    share /= share.sum(1, keepdims=True)
    mean = (t - (1 - t) * SPREAD ** 2) / variance * offset - CENTRES
    return (share * mean).sum(1)


def follow(x, steps=1000):
    """Noise (N,), at t = 1, follows the mean velocity to t = 0 -> its places on the way (steps+1,N), from t = 1 on."""
    places = [x]
    for k in range(steps):
        t = 1 - k / steps
        x = x - mean_velocity(x, t) / steps
        places.append(x)
    return np.array(places)


def random_lines(count, rng):
    """Images and noise in random pairs -> two arrays (N,); each pair is a straight line from t = 0 to t = 1."""
    images = rng.choice(CENTRES, count) + SPREAD * rng.standard_normal(count)
    return images, rng.standard_normal(count)


def positions(times, rng, count=10_000):
    """Where as many lines and as many paths are at these times -> a list of (on lines (N,), on paths (N,))."""
    images, noise = random_lines(count, rng)
    paths = follow(rng.standard_normal(count))
    steps = len(paths) - 1
    return [((1 - t) * images + t * noise, paths[round((1 - t) * steps)]) for t in times]


def velocity(dd, args):
    """Lines from images to noise, and paths along their mean velocity. Both are spread alike at any time."""
    d = Drawing("Why a mean velocity draws", "images of one number, near −2 or 2")
    columns = {"image": 30, "learn": 460}  # the left edges, of lines and of paths
    width, top, height, reach = 310, 218, 400, 3.5
    rng = np.random.default_rng(0)

    def place(kind, x, t):
        return round(columns[kind] + width * (x + reach) / (2 * reach), 1), round(top + height * (1 - t), 1)

    def draw_line(image, noise, *style):
        d.line([place("image", image, 0), place("image", noise, 1)], *style)

    def draw_path(path, *style):
        steps = len(path) - 1
        d.line([place("learn", path[k], 1 - k / steps) for k in range(0, steps + 1, 20)], *style)

    def stairs(kind, positions, y):
        """The outline of a histogram that stands on y."""
        bins = np.linspace(-reach, reach, 36)
        density, _ = np.histogram(positions, bins, density=True)
        heights = np.pad(density.repeat(2), 1)
        return [(place(kind, x, 0)[0], round(y - 150 * h, 1)) for x, h in zip(bins.repeat(2), heights)]

    for kind, what, how in (("image", "Lines cross", "an image joined to noise"),
                            ("learn", "Paths do not", "along the mean velocity")):
        d.text(columns[kind] + width / 2, top - 54, what, kind, bold=True)
        d.text(columns[kind] + width / 2, top - 18, how, kind)
        d.box(columns[kind], top, width, height, "noise", radius=0, outline=1, fill="white")
    for image, noise in zip(*random_lines(40, rng)):
        draw_line(image, noise, "image", 2, 0.5)
    paths = follow(np.append(rng.standard_normal(40), 0.1))
    for path in paths.T:
        draw_path(path, "learn", 2, 0.5)
    t, x = 0.6, paths[400, -1]  # one place, where the last path is then, and lines that meet there
    images, noise = random_lines(10_000, rng)
    meet = abs((1 - t) * images + t * noise - x) < 0.001
    for image, noise in zip(images[meet], noise[meet]):
        draw_line(image, noise, "ink", 2.5, 0.8)
    draw_path(paths[:, -1], "ink", 4)
    for kind in columns:
        d.dot(*place(kind, x, t), "ink", 9)
    for y, words, kind in ((22, "t = 1", "ink"), (54, "noise", "noise"), (209, "t = ½", "ink"),
                           (height - 40, "images", "noise"), (height - 8, "t = 0", "ink")):
        d.text(400, top + y, words, kind)
    d.arrow((400, top + 74), (400, top + 170), kind="noise")
    d.arrow((400, top + 230), (400, top + 326), kind="noise")
    d.text(400, top + height + 42, "dark: lines that meet, and the path of their mean", "ink")

    y = top + height + 116
    d.text(400, y, "At each time both are spread alike", bold=True)
    d.text(400, y + 36, "10,000 lines; 10,000 paths, with the lines’ outline", "noise")
    for t, rise, (on_lines, on_paths) in zip(("1", "½", "0"), (145, 100, 152), positions((1, 0.5, 0), rng)):
        y += rise
        d.area(stairs("image", on_lines, y), "image")
        d.area(stairs("learn", on_paths, y), "learn")
        for kind in columns:
            d.line(stairs(kind, on_lines, y), "image", 2.5)
        d.text(400, y - 18, f"t = {t}")
    for kind in columns:
        for x, words in zip(CENTRES, ("−2", "2")):
            d.text(place(kind, x, 0)[0], y + 36, words, "noise")
    d.save("velocity.svg", y + 64)


# ---------------------------------------------------------------- pictures with pixels


class Page:
    """A PNG, at twice the resolution; on a card or on nothing."""
    def __init__(self, width, height, card):
        self.image = Image.new("RGBA", (2 * width, 2 * height))
        self.draw = ImageDraw.Draw(self.image)
        if card:
            self.draw.rounded_rectangle((3, 3, 2 * width - 4, 2 * height - 4), 56, CARD, EDGE, 4)

    def text(self, x, y, words, color, anchor="ls", size=SMALL, bold=False):
        font = ImageFont.load_default(2 * size)
        self.draw.text((2 * x, 2 * y), words, color, font, anchor, stroke_width=bold / 2, stroke_fill=color)

    def token(self, x, y, word, kind):
        """A word in a box, or a slim one for the end of a text -> where the next begins. It cannot be read in grey."""
        width, gap = (ImageFont.load_default(30).getlength(word) / 2 + 8, 3) if word else (3, 0)
        self.draw.rounded_rectangle((2 * x, 2 * y, 2 * (x + width) - 1, 2 * y + 43), 10 if word else 0, TOKEN[kind])
        if kind != "noise":
            self.text(x + width / 2, y + 16, word, DARK[kind], "ms", 15)
        return x + width + gap

    def picture(self, x, y, side, image):
        how = Image.Resampling.LANCZOS if 2 * side % len(image) else Image.Resampling.NEAREST  # sharp if whole
        image = Image.fromarray(image).resize((2 * side, 2 * side), how)
        self.image.paste(image, (2 * x, 2 * y))
        self.draw.rectangle((2 * x - 1, 2 * y - 1, 2 * (x + side), 2 * (y + side)), outline=EDGE, width=2)

    def save(self, name):
        self.image.save(os.path.join(ASSETS, name), optimize=True)


def words_of(tokenizer, ids):
    """The tokens of a text as words: a mask is empty, the end of the text a dot."""
    words = []
    for i in ids.tolist():
        word = tokenizer.pieces.id_to_piece(i).strip("▁") if i < len(tokenizer.pieces) else ""
        words.append("·" if i == tokenizer.eos_id else word)
    return words


def both(dd, args):
    """Both directions: a prompt is drawn, from noise, and the drawing is read, from masks, into other words."""
    page, prompt = Page(880, 190, card=False), "a small blue square right of a large yellow square"
    steps, passes, x = [], [], 0

    def watch(latents, t, velocity):  # what is there at t, and where the velocity leads
        steps.append((t, *to_images(dd.decode_image(torch.cat([latents, latents - t * velocity])))))

    def watch_text(tokens, reveal):
        passes.append((words_of(dd.tokenizer, tokens[0]), reveal[0]))

    drawn = to_images(sample.text_to_image(dd, [prompt], watch=watch, generator=torch.Generator().manual_seed(3)))
    sample.caption(dd, torch.from_numpy(to_pixels(drawn)), watch=watch_text)
    for word in prompt.split():
        x = page.token(x, 0, word, "text")
    for k, i in enumerate((0, 6, 13, 20)):
        t, latents, target = steps[i]
        page.picture(1 + 68 * k, 34, 60, latents)
        page.picture(1 + 68 * k, 102, 60, target)
        page.text(31 + 68 * k, 183, f"t={t:.2g}", GREY, "ms", 15)
    page.picture(273, 34, 128, drawn[0])
    page.text(337, 183, "t=0", GREY, "ms", 15)
    page.draw.line([(842, 182), (856, 196), (842, 210)], GREY, 5, "curve")  # on to reading
    last_words, _ = passes[-1]
    for k, (words, reveal) in enumerate(passes):
        x = 452
        for word, new, last in zip(words, reveal, last_words):  # what is masked behind the end needs no pass
            kind = "learn" if new else "text" if word or words is last_words else "noise"
            x = page.token(x, 24 * k, last.strip("·"), kind)
    page.save("both.png")


def samples(dd, args):
    """Six pictures drawn from sentences, and six scenes with the model's caption and answer."""
    rng, generator, world = np.random.default_rng([0, 3]), torch.Generator().manual_seed(0), World(UNSEEN + 1)
    ids = rng.permutation(250)  # as train.sample_cells chooses them, for the sheets of a run with seed 1
    prompts, ids = [world.caption(i, rng) for i in ids[:6]], ids[-6:]
    drawn = to_images(sample.text_to_image(dd, prompts, generator=generator))
    scenes, questions = [world.image(i) for i in ids], [world.question(i, rng)[0] for i in ids]
    pixels = torch.from_numpy(to_pixels(scenes))
    answers = sample.answer(dd, pixels, questions)
    cells = [*zip(drawn, [[(prompt, "text")] for prompt in prompts]),
             *zip(scenes, [[(caption, "text"), (question, "noise"), (words, "learn")] for caption, question, words in
                           zip(sample.caption(dd, pixels), questions, answers)])]
    lines = [[(line, kind) for words, kind in texts for line in textwrap.wrap(words, 19)] for _, texts in cells]
    heights = [max(132, 31 * len(two[0]), 31 * len(two[1])) + 24 for two in zip(lines[::2], lines[1::2])]
    page, y = Page(WIDTH, sum(heights) + 150, card=True), 74
    page.text(32, 58, "Drawn from sentences", DARK["ink"], bold=True)
    for k, ((image, _), texts) in enumerate(zip(cells, lines)):
        x = 32 + 376 * (k % 2)
        if k == 6:
            for at, words, kind in ((32, "Caption,", "text"), (140, "question,", "noise"), (262, "answer", "learn")):
                page.text(at, y - 16, words, DARK[kind], bold=True)
        page.picture(x, y, 128, image)
        for row, (line, kind) in enumerate(texts):
            page.text(x + 146, y + 22 + 31 * row, line, DARK[kind])
        y += heights[k // 2] * (k % 2) + 60 * (k == 5)
    page.save("samples.png")


FIGURES = {f.__name__: f for f in (both, samples, batch, block, velocity, curves, orders)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *FIGURES], metavar="NAME",
                        help=f"what to draw, of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="stage1/, stage2/ and stage3/ of a training")
    args = parser.parse_args()
    dd = DualDiffusion.load(sample.SHIPPED)
    for name in args.names or FIGURES:
        FIGURES[name](dd, args)


if __name__ == "__main__":
    main()
