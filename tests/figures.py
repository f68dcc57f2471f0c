"""The READMEs' pictures of results: `python tests/figures.py` writes all into assets/, `python tests/figures.py both`
one of them. Plots are SVG, pictures with pixels PNG. `curves` needs the logs of a training (--runs), `orders` a table
in a README; without them they are left out. The diagrams (batch.svg, block.svg, velocity.svg) are drawn by this program
at commit 76c244a.

Blue is what belongs to images, orange to text, grey what is noisy or masked, purple what is learned. All but `both` is
laid out on a card 800 wide, on which no letter is smaller than 25: a phone shows it at half that size."""
import argparse
import html
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
from model import DualDiffusion
from train import UNSEEN

WORLD = World(UNSEEN)  # scenes that the shipped model never saw
ASSETS = os.path.dirname(sample.SHIPPED)
READMES = [path for path in (os.path.join(ASSETS, "..", name) for name in ("README.md", "tests/README.md"))
           if os.path.exists(path)]
WIDTH, SMALL, LARGE = 800, 25, 31
SANS, MONO = "Helvetica,Arial,DejaVu Sans,sans-serif", "Menlo,Consolas,DejaVu Sans Mono,monospace"
DARK = {"image": "#2166ac", "text": "#b35806", "noise": "#565b63", "learn": "#6a3d9a", "ink": "#2a2d34"}
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

    def line(self, points, kind="ink", width=3, opacity=1):
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.lines.append(f'<polyline points="{path}" fill="none" stroke="{DARK[kind]}" stroke-width="{width}" '
                          f'stroke-opacity="{opacity}" stroke-linejoin="round"/>')

    def dot(self, x, y, kind, radius=7):
        self.lines.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius}" fill="{DARK[kind]}"/>')

    def save(self, name, height):
        card = f'<rect x="2" y="2" width="{WIDTH - 4}" height="{height - 4}" rx="28" fill="{CARD}" stroke="{EDGE}" ' \
               'stroke-width="2"/>'
        lines = "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
                           f'height="{height}">', card, *self.lines, "</svg>\n"])
        with open(os.path.join(ASSETS, name), "w") as f:
            f.write(lines)


@torch.no_grad()
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


FIGURES = {f.__name__: f for f in (both, samples, curves, orders)}


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
