"""What it learns from: the built-in world of coloured shapes, and the user's own images and texts.

A source of data, whichever it is, is indexed: `image(i)` is a picture, `caption(i, rng)` one of its captions,
`question(i, rng)` one of its questions with the answer, `fingerprint` what tells it from other sources. `World` draws
scenes, endless and free; `Records` reads the user's files. The world also judges: `read_scene` recovers the objects of
a drawn image without any network, and `telling_holds` says whether a sentence is true of a scene.
"""
import argparse
import colorsys
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import tarfile
import tempfile
import warnings
import zlib
from array import array
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# ---------------------------------------------------------------- the world

SIDE = 64  # pixels; four cells of 32 x 32, at most one object in each
SIZES = {"small": (6.0, 7.0), "large": (10.5, 11.8)}  # radius in pixels, from .. to
COLORS = {"red": 0, "yellow": 52, "green": 125, "cyan": 180, "blue": 222, "purple": 285}  # hue in degrees
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # the cells, row by row
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (1, -1), "right of": (1, 1)}  # axis (0 rows), direction
HELD = {("yellow", "triangle"), ("purple", "circle"), ("cyan", "square")}  # colour-shape pairs kept for testing
KINDS = ("color", "shape", "size", "count", "exists", "where", "relation", "compare")  # "same": some of "compare"


def pick(rng, options):
    return options[rng.integers(len(options))]


class Thing(NamedTuple):
    size: str
    color: str
    shape: str
    cell: int  # 0..3, index into PLACES

    def __str__(self):
        return f"{self.size} {self.color} {self.shape}"


def related(a, relation, b):
    """Is cell a in that relation to cell b? By rows and columns: top left is above bottom right, and left of it."""
    axis, direction = RELATIONS[relation]
    a, b = divmod(a, 2)[axis], divmod(b, 2)[axis]
    return (a - b) * direction > 0


def distance(shape, x, y, r):
    """Signed distance in pixels, negative inside, of points (x right, y down) to a shape of radius r at the origin."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.88 * r
    if shape == "triangle":  # equilateral, point up, about its centroid
        return np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.57 * r
    x, y = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))  # cross: two bars, folded into one
    return np.maximum(x - r, y - 0.36 * r)


GRID_Y, GRID_X = np.mgrid[0:SIDE, 0:SIDE] + 0.5


class World:
    """Scenes of one to three objects, 64x64. Scene i is a function of (seed, i) alone.

    pairs: "train" never shows a HELD colour-shape pair, "held" shows at least one in every scene. kinds: of questions
    that are asked, equally often; one that is listed twice, twice as often."""
    def __init__(self, seed=0, pairs="train", kinds=KINDS):
        self.seed, self.pairs, self.kinds = seed, pairs, kinds
        self.fingerprint = f"{zlib.crc32(repr((seed, pairs, *kinds)).encode()):08x}"

    def __len__(self):
        return 2 ** 62

    def version(self, ids):
        return self.seed, self.pairs, len(ids)

    @functools.lru_cache(maxsize=100_000)  # a training pool is asked for again and again
    def scene(self, i):
        """-> the objects, a list of Thing, and how they look: centre, radius, RGB of each, and of the background."""
        rng = np.random.default_rng([self.seed, self.pairs == "held", i])
        things, looks = [], []
        cells = rng.permutation(4)
        for k in range(pick(rng, (1, 2, 3))):
            while True:
                color, shape = pick(rng, list(COLORS)), pick(rng, SHAPES)
                held = (color, shape) in HELD
                if held != (self.pairs == "held") and (held or k == 0):
                    continue
                if all((color, shape) != (t.color, t.shape) for t in things):
                    break
            size, cell = pick(rng, list(SIZES)), int(cells[k])
            r = rng.uniform(*SIZES[size])
            room = min(5.0, 15.5 - 1.14 * r)
            center = (cell % 2 * 32 + 16 + rng.uniform(-room, room), cell // 2 * 32 + 16 + rng.uniform(-room, room))
            hue, saturation, value = COLORS[color] + rng.uniform(-6, 6), rng.uniform(.75, .92), rng.uniform(.8, .95)
            rgb = colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)
            things.append(Thing(size, color, shape, cell))
            looks.append((center, r, rgb))
        background = rng.uniform(0.86, 0.97) + rng.uniform(-0.02, 0.02, 3)
        return things, looks, background

    def image(self, i):
        """-> (64,64,3) uint8."""
        things, looks, background = self.scene(i)
        canvas = np.broadcast_to(background, (SIDE, SIDE, 3)).copy()
        for thing, ((cx, cy), r, rgb) in zip(things, looks):
            part = np.s_[thing.cell // 2 * 32:thing.cell // 2 * 32 + 32, thing.cell % 2 * 32:thing.cell % 2 * 32 + 32]
            inside = np.clip(0.5 - distance(thing.shape, GRID_X[part] - cx, GRID_Y[part] - cy, r), 0, 1)[..., None]
            canvas[part] += inside * (np.array(rgb) - canvas[part])
        return (canvas * 255 + 0.5).astype(np.uint8)

    def caption(self, i, rng):
        return tell(self.scene(i)[0], rng)

    def question(self, i, rng, kind=None):
        """-> question, answer; with `kind`, of that kind, or None where the scene allows none."""
        things = self.scene(i)[0]
        while True:
            wanted = kind or pick(rng, self.kinds)
            if wanted == "compare" and rng.random() < 1 / 3:
                wanted = "same"
            asked = next(filter(None, (ask(things, wanted, rng) for _ in range(10))), None)
            if asked or kind:
                return asked


def tell(things, rng):
    """One true caption that names every object once: in any order, with or without places and relations."""
    order = [things[k] for k in rng.permutation(len(things))]
    a = [f"a {thing}" for thing in order]
    at = [f"{noun} in the {PLACES[thing.cell]}" for noun, thing in zip(a, order)]
    if len(order) == 1:
        said = [a[0], at[0]]
    else:
        pair = f"{a[0]} {pick(rng, [r for r in RELATIONS if related(order[0].cell, r, order[1].cell)])} {a[1]}"
        said = [pair, pair, f"{a[0]} and {a[1]}", f"{at[0]} and {at[1]}"]
    if len(order) == 3:
        rest = f"{a[1]} and {a[2]}"
        said = [f"{pair} and {a[2]}", f"{pair} and {at[2]}", f"{at[0]}, {rest}", f"{a[0]}, {rest}"]
    return pick(rng, ["", "", "", "there is "]) + pick(rng, said)


def understand(text):
    """A caption -> the objects it names, as "size color shape" strings, and what it claims of them, as (k, place) and
    (k, relation, k+1). None if it is not a sentence of this world."""
    noun = rf"(?:a|one) ((?:{'|'.join(SIZES)}) (?:{'|'.join(COLORS)}) (?:{'|'.join(SHAPES)}))"
    text = re.sub(r"\s+", " ", text.lower().strip().rstrip("."))
    parts = re.split(noun, re.sub("^there (is|are) ", "", text))
    between, nouns, claims = parts[0::2], parts[1::2], []
    if not nouns or between[0]:
        return None
    for k, words in enumerate(between[1:]):
        words = words.strip()
        place = re.match(rf"(?:in|at) the ({'|'.join(PLACES)})\b ?", words)
        if place:
            claims.append((k, place[1]))
            words = words[place.end():]
        last = k == len(nouns) - 1
        if words in RELATIONS and not place and not last:
            claims.append((k, words, k + 1))
        elif words not in ({""} if last else {"and", ",", ", and"}):
            return None
    return nouns, claims


def telling_holds(text, things):
    """Is the caption wholly true: every object named once, none that is not there, every place and relation right?"""
    understood = understand(text)
    if understood is None:
        return False
    nouns, claims = understood
    cell = {str(thing): thing.cell for thing in things}
    if sorted(nouns) != sorted(map(str, things)) or len(cell) != len(things):
        return False
    return all(PLACES[cell[nouns[c[0]]]] == c[1] if len(c) == 2 else related(cell[nouns[c[0]]], c[1], cell[nouns[c[2]]])
               for c in claims)


def plural(shape):
    return shape + ("es" if shape.endswith("s") else "s")


def refer(thing, things, rng, hide=()):
    """A phrase that fits this object alone, naming some of its size, colour and shape ("the red shape", "the small
    one" is "the small shape"), or None after a few tries. `hide`: what it must not give away."""
    for _ in range(6):
        fields = [f for f in ("size", "color", "shape") if f not in hide and rng.random() < .55]
        if fields and sum(all(getattr(o, f) == getattr(thing, f) for f in fields) for o in things) == 1:
            words = [getattr(thing, f) for f in fields]
            return " ".join(words if "shape" in fields else [*words, "shape"])


def ask(things, kind, rng):
    """One question of that kind with its only right answer, or None where this scene (or this try) allows none."""
    thing = pick(rng, things)
    the = refer(thing, things, rng, hide=(kind,))
    if the is None:
        return None
    if kind == "color":
        return pick(rng, [f"what color is the {the}?", f"what is the color of the {the}?"]), thing.color
    if kind == "shape":
        return pick(rng, [f"what shape is the {the.replace('shape', 'thing')}?",
                     f"what is the {the.replace('shape', 'thing')}?"]), thing.shape
    if kind == "size":
        return pick(rng, [f"what size is the {the}?", f"how big is the {the}?"]), thing.size
    if kind == "where":
        return f"where is the {the}?", PLACES[thing.cell]
    if kind == "count":
        color, shape = pick(rng, [thing.color, pick(rng, list(COLORS))]), pick(rng, [thing.shape, pick(rng, SHAPES)])
        return pick(rng, [("how many shapes are there?", str(len(things))),
                     (f"how many {color} shapes are there?", str(sum(o.color == color for o in things))),
                     (f"how many {plural(shape)} are there?", str(sum(o.shape == shape for o in things)))])
    if kind == "exists":
        size, color, shape = ((thing.size, thing.color, thing.shape) if rng.random() < .5 else
                              (pick(rng, list(SIZES)), pick(rng, list(COLORS)), pick(rng, SHAPES)))
        if rng.random() < .5 and len(things) > 1:  # the tempting mistake: two objects' features mixed
            color, shape = thing.color, pick(rng, things).shape
        size, color = pick(rng, [("", color), (size, color), (size, "")])
        there = any(o.shape == shape and size in ("", o.size) and color in ("", o.color) for o in things)
        wanted = " ".join(word for word in (size, color, shape) if word)
        return pick(rng, [f"is there a {wanted}?", f"do you see a {wanted}?"]), "yes" if there else "no"
    if kind == "relation":
        relation = pick(rng, list(RELATIONS))
        found = [o for o in things if related(o.cell, relation, thing.cell)]
        if len(found) > 1 or not found and rng.random() < .75:
            return None
        return f"what is {relation} the {the}?", str(found[0]) if found else "nothing"
    other = pick(rng, things)  # what remains is of two objects, and answered by yes or no
    that = refer(other, things, rng)
    if other is thing or that is None:
        return None
    if kind == "same":
        feature = pick(rng, ["color", "shape", "size"])
        truth = getattr(thing, feature) == getattr(other, feature)
        often = {"color": (.15, 1), "shape": (.25, 1), "size": (.45, .45)}[feature][truth]
        if rng.random() > often:  # two of a color are rare: without this, "no" would nearly always be right
            return None
        return f"are the {the} and the {that} the same {feature}?", "yes" if truth else "no"
    if kind == "compare":
        want, relation, bigger = rng.random() < .5, pick(rng, list(RELATIONS)), pick(rng, ["bigger", "smaller"])
        claims = [(f"is the {the} {relation} the {that}?", related(thing.cell, relation, other.cell)),
                  (f"is the {the} {bigger} than the {that}?",
                   (thing.size, other.size) == (("large", "small") if bigger == "bigger" else ("small", "large")))]
        question, truth = pick(rng, [claim for claim in claims if claim[1] == want] or claims)  # half of them yes
        return question, "yes" if truth else "no"


def read_scene(image):
    """Recover the objects of a picture of the world, without any network. (64,64,3) uint8 -> list of Thing; one whose
    outline is no shape of the world has shape "unknown".

    What differs from the border's colour by more than 80 (half of the faintest object's contrast) is foreground; each
    connected patch of it is one object: its hue gives the colour, the best-fitting outline of equal area gives shape
    and radius, its centre gives the cell."""
    image = image.astype(float)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    foreground = abs(image - np.median(border, axis=0)).max(axis=2) > 80
    label = np.where(foreground, np.arange(1, SIDE * SIDE + 1).reshape(SIDE, SIDE), 0)
    while True:  # every pixel takes the largest label among itself and its neighbours, until nothing changes
        pad = np.pad(label, 1)
        spread = np.maximum.reduce([label, pad[2:, 1:-1], pad[:-2, 1:-1], pad[1:-1, 2:], pad[1:-1, :-2]])
        spread = np.where(foreground, spread, 0)
        if (spread == label).all():
            break
        label = spread
    things = []
    for one in np.unique(label[label > 0]):
        mask = label == one
        area = mask.sum()
        if area < 16:  # specks; the smallest object has 60 pixels
            continue
        ys, xs = np.nonzero(mask)
        cy, cx = ys.mean() + 0.5, xs.mean() + 0.5
        best, shape, r = 0.0, "unknown", (area / 3.0) ** 0.5
        for candidate in SHAPES:
            unit = (distance(candidate, GRID_X - 32, GRID_Y - 32, 16.0) < 0).sum() / 256
            radius = (area / unit) ** 0.5
            outline = distance(candidate, GRID_X - cx, GRID_Y - cy, radius) < 0
            overlap = (outline & mask).sum() / (outline | mask).sum()
            if overlap > max(best, 0.7):
                best, shape, r = overlap, candidate, radius
        red, green, blue = np.median(image[mask], axis=0) / 255
        hue = colorsys.rgb_to_hsv(red, green, blue)[0] * 360
        color = min(COLORS, key=lambda name: abs((hue - COLORS[name] + 180) % 360 - 180))
        size = "small" if r < (SIZES["small"][1] + SIZES["large"][0]) / 2 else "large"
        things.append(Thing(size, color, shape, int(cy > 32) * 2 + int(cx > 32)))
    return things

# ---------------------------------------------------------------- the user's images and texts

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")  # what Pillow decodes by itself
EXTENSIONS = tuple(end for end, name in Image.registered_extensions().items() if name in FORMATS)
FORM = '{"image": path, "caption": text}'


def load_image(path, width, height=None, inside=("", 0, -1)):
    """An image file of one of FORMATS -> RGB image of width x height (square if only one is given): turned upright by
    its EXIF note, transparency on white, resized (bicubic) to cover, centre cropped. `inside`: see `Record`. Raises
    ValueError if it is no image, or one of more than 179 million pixels."""
    shard, start, count = inside
    raw = None
    try:
        with open(regular_file(shard or path), "rb") as f:
            f.seek(start)
            raw = f.read(count)
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # grey in 16 bits, or in fractions of 1
                grey = np.asarray(image).astype(float) * (255 if image.mode == "F" else 1 / 257)
                image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return ImageOps.fit(image.convert("RGB"), (width, height or width), Image.Resampling.BICUBIC)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image") from None
    except Exception as error:  # Pillow's many decoders raise whatever they like
        unknown = isinstance(error, UnidentifiedImageError) and f"none of {', '.join(FORMATS)}"
        why = "the file is empty" if raw == b"" else unknown or one_line(error)
        raise ValueError(f"{path}: cannot be read as an image ({why})") from None


def to_pixels(images):
    """A list of (H,W,3) uint8 arrays or PIL images -> float32 array (B,3,H,W) in [-1,1]."""
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def to_images(pixels):
    """(B,3,H,W) tensor in [-1,1] -> (B,H,W,3) uint8 array."""
    pixels = np.asarray(pixels.float().cpu()).clip(-1, 1).transpose(0, 2, 3, 1)
    return ((pixels + 1) * 127.5 + 0.5).astype(np.uint8)


class Record(NamedTuple):
    """One image and what is said of it."""
    image: str                # a path; in a .tar, the shard's path and the member's name
    captions: tuple           # of str; may be empty where there are questions
    asked: tuple              # of (question, answer)
    inside: tuple = ("", 0, -1)  # where its bytes are: shard ("": a file of its own), the first, how many (-1: all)

    @classmethod
    def read(cls, row, base, where, *inside):
        """A JSON object in one of the forms that people have -> Record, or None if the image or all text is missing. A
        "re_caption" counts alone; of many people's answers the most frequent; of a conversation every question, each
        alone, with the answer after it. `base`: the folder that paths start from; `where`: for messages. Raises
        ValueError with one line."""
        try:
            image = row.get("image") or row.get("image_path") or row.get("file_name") or ""
            captions = [row[key] for key in ("re_caption", "caption", "text") if row.get(key)]
            answers = row.get("answers", row.get("answer"))
            answers = answers if isinstance(answers, list) else [answers]
            answers = [a.get("answer") if isinstance(a, dict) else a for a in answers]
            answer = max(filter(None, answers), key=answers.count, default=None)
            asked = [(row["question"], answer)] if row.get("question") and answer else []
            turns = row.get("conversations") or []  # LLaVA: a human and the model in turn
            asked += [(a["value"].replace("<image>", "").strip(), b["value"].strip()) for a, b in zip(turns, turns[1:])
                      if (a["from"], b["from"]) == ("human", "gpt")]
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{where}: not in a form that this program knows") from None
        if not all(isinstance(text, str) for text in (image, *captions, *itertools.chain(*asked))):
            raise ValueError(f"{where}: images, captions, questions and answers are strings")
        if image and captions + asked:
            captions = captions[:1] if row.get("re_caption") else captions
            return cls(os.path.join(base, image), tuple(captions), tuple(asked), *inside)


def expand(pattern):
    """"d/{000..002}.tar" -> ["d/000.tar", "d/001.tar", "d/002.tar"], as a shell would."""
    texts = re.split(r"\{(\d+)\.\.(\d+)\}", pattern)  # text, first, last, text, ...
    spans = [range(int(first), int(last) + 1) for first, last in zip(texts[1::3], texts[2::3])]
    if not 1 <= math.prod(map(len, spans)) <= 1_000_000:
        raise ValueError(f"{pattern}: stands for no file, or for more than a million")
    numbers = ([f"{n:0{len(first)}d}" for n in span] for first, span in zip(texts[1::3], spans))
    return ["".join(map("".join, zip(texts[::3], (*some, "")))) for some in itertools.product(*numbers)]


def read_json(path):
    """The records of a .json list, or of a .jsonl of one object a line. At most one image in ten may be missing."""
    number, missing, unit = 0, [], "item" if path.endswith(".json") else "line"
    with open(regular_file(path), "rb") as f:
        for number, row in enumerate(parse(f.read(), path, list, f"a list of {FORM}") if unit == "item" else f, 1):
            where = f"{path}, {unit} {number}"
            if unit == "line" and not (row := row.strip()):
                continue
            record = Record.read(parse(row, where, dict, FORM) if unit == "line" else row, os.path.dirname(path), where)
            if record and not os.path.isfile(record.image):
                missing.append(f"{where}: no such image: {record.image}")
            else:
                yield record
    if len(missing) * 10 > number:
        raise ValueError(f"{missing[0]} ({len(missing)} of {number} are missing)")
    if missing:
        warn(f"left out {len(missing)} of {number}: {'; '.join(missing[:3])}")


def files_of(path):
    """All files in a folder, in order, or the one that `path` is. A folder in it that cannot be opened is an error."""
    def stop(error):
        raise error

    found = os.walk(path, onerror=stop) if os.path.isdir(path) else [("", [], [path])]
    return [os.path.join(at, name) for at, _, names in sorted(found) for name in sorted(names)]


def read_folder(path):
    """The records of a folder of images: as its metadata.jsonl says, or each captioned by the .txt of the same name, or
    else by the name of the folder it lies in."""
    if os.path.exists(listed := os.path.join(path, "metadata.jsonl")):
        yield from read_json(listed)
        return
    for image in (file for file in files_of(path) if file.lower().endswith(EXTENSIONS)):
        text = os.path.basename(os.path.dirname(os.path.abspath(image))).replace("_", " ")
        if os.path.exists(told := os.path.splitext(image)[0] + ".txt"):
            with open(regular_file(told), "rb") as f:
                text = parse(f.read(), told, str).strip()
        yield Record.read({"image": image, "caption": text}, "", image)


def read_shard(path):
    """The records of a WebDataset shard, a .tar of images, each with its .txt or .json, in one pass over the headers.
    Members of one sample share their name up to the first dot (a dot that it begins with does not count)."""
    def stem(member):
        if member.size < 0:  # would be read over and over
            raise tarfile.ReadError(f"{member.name} has a negative size")
        return re.match(r"(.*/)?\.*[^.]*", os.path.normpath(member.name))[0]

    try:
        with open(regular_file(path), "rb") as f:
            if f.peek(2)[:2] == b"\x1f\x8b":
                raise tarfile.ReadError("compressed; gunzip it first")
            tar = tarfile.open(path, "r:", f)
            for _, sample in itertools.groupby(tar, stem):
                told, image, inside = {}, None, ()
                for member in sample:
                    name = member.name.lower()
                    if name.endswith(".txt"):
                        told["caption"] = parse(tar.extractfile(member).read(), member.name, str).strip()
                    elif name.endswith(".json"):
                        told |= parse(tar.extractfile(member).read(), member.name, dict, FORM)
                    elif name.endswith(EXTENSIONS) and member.isfile():
                        if image:
                            raise ValueError(f"{member.name}: a second image, in the sample of {image}")
                        image, inside = member.name, (path, member.offset_data, member.size)
                if told or image:
                    yield Record.read(told | {"image": image}, path, image, inside)
            f.seek(tar.offset)  # tarfile takes a damaged header for the end; but after the end there are only zeros
            rest = f.read(2 ** 20)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")
    except Exception as error:  # of damaged headers tarfile raises whatever it likes
        raise ValueError(f"{path}: not a readable .tar shard ({error})") from None


class Mapped:
    """A .npy's array, or any other file's bytes, memory-mapped on first use. What is pickled is the path."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Mapped, (self.path,)

    @functools.cached_property
    def array(self):
        array = np.load(self.path, mmap_mode="r") if self.path.endswith(".npy") else np.memmap(self.path, mode="r")
        return np.asarray(array)  # of which a row is found sooner


class Records:
    """The user's data, from one or several of: a .json list or .jsonl of objects (`Record.read` knows the forms), a
    folder of images, WebDataset shards ({000..999} for many). Whatever the form, it is read through once, and every
    record noted in an index on disk, so that afterwards any of them is one seek away and none lies in memory.

    size: side of the images, pixels; folder: where to keep the index for the next time. A bad line ends the reading
    and is named; an image is first opened when it is asked for. captioned, questioned: how many have a caption, a
    question; fingerprint: of all names and texts, wherever the data lie."""
    def __init__(self, paths, size, folder=None):
        self.size, stamp = size, []
        paths = [path for given in ([paths] if isinstance(paths, str) else paths) for path in expand(given)]
        for path in paths:
            if not os.path.exists(path):
                raise FileNotFoundError(f"{path}: no such file or folder to train on")
            stamp += [(file, os.path.exists(file) and os.stat(file).st_mtime_ns) for file in files_of(path)]
        key = hashlib.sha256(repr(stamp).encode()).hexdigest()[:12]
        if folder is None:
            self.temporary = tempfile.TemporaryDirectory()
            folder = self.temporary.name
        lines = os.path.join(folder, f"records-{key}.jsonl")
        try:
            self.open(lines)
        except Exception:  # not there yet, or left short by a power cut
            os.makedirs(folder, exist_ok=True)
            write_index(lines, paths)
            self.open(lines)

    def open(self, lines):
        """The index: a record a line, and at last what they are together; where each line starts; hashes of images."""
        self.lines, self.index = Mapped(lines), Mapped(f"{lines}.npy")
        end = self.lines.array[self.index.array[-1, 0]:].tobytes()
        self.fingerprint, self.captioned, self.questioned = json.loads(end)

    def __len__(self):
        return len(self.index.array) - 1

    def row(self, i):
        start, end = self.index.array[i:i + 2, 0]
        image, captions, asked, inside = json.loads(self.lines.array[start:end].tobytes())
        return Record(image, tuple(captions), tuple(map(tuple, asked)), tuple(inside))

    def version(self, ids):
        """What those images depend on: their names, when they were last changed, and the size they are brought to."""
        rows = [(row.image, row.inside[0] or row.image) for row in map(self.row, ids)]
        return self.size, [(image, os.path.exists(file) and os.stat(file).st_mtime_ns) for image, file in rows]

    def split(self, count):
        """Keep some pictures apart, at most `count` and at most one in twenty, but one at least, chosen by the hash of
        their names, so that all records of a picture go one way -> indices kept apart, indices of the others."""
        hashes = self.index.array[:-1, 1]
        pictures = np.unique(hashes)
        last = pictures[max(1, min(count, len(pictures) // 20)) - 1]
        return np.flatnonzero(hashes <= last), np.flatnonzero(hashes > last)

    def image(self, i):
        """-> (size,size,3) uint8. Raises ValueError naming the image if it cannot be read."""
        row = self.row(i)
        return np.asarray(load_image(row.image, self.size, inside=row.inside))

    def readable(self, i):
        try:
            self.image(i)
        except (ValueError, OSError):
            return False
        return True

    def caption(self, i, rng):
        """One of its captions; None if it has none."""
        return pick(rng, self.row(i).captions or (None,))

    def question(self, i, rng):
        """-> question, answer; None if it has none."""
        return pick(rng, self.row(i).asked or (None,))


def write_index(lines, paths):
    """Read the data, and write what `Records.open` opens."""
    index, digest, left_out, captioned, questioned = array("q"), hashlib.sha256(), 0, 0, 0
    with replacing(lines) as beside, open(beside, "wb") as f:
        for path in tqdm(paths, desc="reading", unit="file", disable=len(paths) == 1):
            read = read_folder if os.path.isdir(path) else read_shard if path.endswith((".tar", ".gz")) else read_json
            before, base = f.tell(), path if os.path.isdir(path) else os.path.dirname(path)
            for record in read(path):
                if record is None:
                    left_out += 1
                    continue
                name = os.path.relpath(record.image, base)
                digest.update(repr((name, record[1:3], record.inside[1:])).encode())
                captioned, questioned = captioned + bool(record.captions), questioned + bool(record.asked)
                index.extend((f.tell(), zlib.crc32(name.encode(errors="replace"))))
                line = json.dumps(record, ensure_ascii=False)  # half a character ("\ud800") becomes "?"
                f.write(line.encode(errors="replace") + b"\n")
            if f.tell() == before:
                raise ValueError(f'{path}: holds no images with "caption", or "question" and "answer"')
        index.extend((f.tell(), 0))
        f.write(json.dumps([digest.hexdigest()[:12], captioned, questioned]).encode())
    with replacing(f"{lines}.npy") as beside, open(beside, "wb") as f:
        np.save(f, np.reshape(index, (-1, 2)))
    if left_out:
        warn(f"records without an image or a text, left out: {left_out}")


def draw_rows(seed, first, count, total, block=10_000):
    """Which records rows first .. first+count of the endless stream are. Every epoch shows each record once: blocks of
    neighbours in random order, and random order inside a block. So no epoch's order is ever held in memory, and of many
    shards only a few are being read at a time."""
    rows = []
    for at in range(first, first + count):
        epoch, place = divmod(at, total)
        blocks = shuffled(-(-total // block), seed, epoch)
        lacking = len(blocks) * block - total  # in the data's last block: places after it move up
        if place >= (blocks.argmax() + 1) * block - lacking:
            place += lacking
        start = int(blocks[place // block]) * block
        rows.append(start + int(shuffled(min(block, total - start), seed, epoch, 1 + start)[place % block]))
    return rows


@functools.lru_cache(maxsize=16)
def shuffled(count, *seed):
    return np.random.default_rng(seed).permutation(count)


# ---------------------------------------------------------------- what all files share

PIXELS = 2 ** 18  # of all images that go through the networks at once: 64 of 64x64, one of 512x512; more gains nothing


def batches(count, height, width, desc=None):
    """Slices of `count` images of that size, each slice of at most PIXELS. Several show a bar on a terminal."""
    size = max(1, PIXELS // (height * width))
    slices = [slice(at, min(at + size, count)) for at in range(0, count, size)]
    return tqdm(slices, desc, leave=False, disable=count <= size or None)


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)  # not into a bar


def one_line(error):
    """An error's message as one short line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:120]


def parse(raw, where, kind, form=None):
    """Bytes or str -> the JSON (`kind` list or dict) that they are, or of bytes the text (`kind` str). `where` is for
    messages, and so is `form`, what a value of that kind looks like here. Raises ValueError with one line."""
    try:
        value = str(raw, "utf-8-sig") if kind is str else json.loads(raw)
    except (ValueError, RecursionError) as error:
        why = one_line(error).replace("line 1 ", "")  # of a .jsonl, `where` has the line
        raise ValueError(f"{where}: not valid {'UTF-8' if kind is str else 'JSON'} ({why})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: want {form or {list: 'a list', dict: 'an object'}[kind]}")
    return value


def regular_file(path):
    """The path of a user's file, to be opened: not of a pipe, which might wait for ever, nor of a device, which may
    never end. Raises FileNotFoundError, or ValueError for what is no regular file."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise ValueError(f"{path}: not a regular file")
    return path


@contextmanager
def replacing(path):
    """-> where to write a file: beside `path`, which it replaces once it is whole and on the disk. So nobody ever meets
    half a file, and a full disk or a Ctrl-C leaves what was there. Raises OSError with one line; a mistake in what is
    to be written (ValueError) or in another file passes as it is."""
    beside = f"{path}.partial"
    try:
        if os.path.lexists(beside):  # left by a kill; or a link, through which nothing must be written
            os.remove(beside)
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)  # some libraries give files narrower rights than files have here
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    except BaseException as error:
        if os.path.isfile(beside):
            os.remove(beside)
        other = getattr(error, "filename", None) not in (None, beside)
        if other or isinstance(error, ValueError) or not isinstance(error, Exception):
            raise
        raise OSError(f"{path}: could not be written ({one_line(error)})") from None


# ---------------------------------------------------------------- pictures for people


def sheet(path, cells, columns=4, width=192):
    """A PNG of pictures with their texts. cells: [(image (H,W,3) uint8, text)]; width: of one, in pixels."""
    font = ImageFont.load_default(size=12)
    rows = []
    for at in range(0, len(cells), columns):
        texts = [wrap(text[:400], font, width) for _, text in cells[at:at + columns]]
        row = Image.new("RGB", (columns * (width + 8), width + 24 + 15 * max(t.count("\n") for t in texts)), "white")
        for k, ((image, _), text) in enumerate(zip(cells[at:at + columns], texts)):
            row.paste(Image.fromarray(image).resize((width, width), Image.Resampling.NEAREST), (k * (width + 8) + 4, 4))
            ImageDraw.Draw(row).text((k * (width + 8) + 4, width + 6), text, fill="black", font=font, spacing=2)
        rows.append(np.asarray(row))
    with replacing(path) as beside:
        Image.fromarray(np.concatenate(rows)).save(beside, format="PNG")


def wrap(text, font, width):
    lines = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in paragraph.split():
            if font.getlength(f"{lines[-1]} {word}") > width:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description="Draw samples of a data set as the model will see them.")
    parser.add_argument("data", nargs="*", help="what train.py's --data takes; default: the built-in world")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (256 or 512 at full size)")
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="data.png")
    args = parser.parse_args()
    if args.num < 1 or args.size < 16 or args.size % 16:
        raise ValueError("--num wants 1 or more, --size a multiple of 16")
    source, rng = Records(args.data, args.size) if args.data else World(args.seed), np.random.default_rng(args.seed)
    cells, bad = [], []
    for i in rng.permutation(min(len(source), 10_000)):
        try:
            image = source.image(int(i))
        except (ValueError, OSError) as error:
            bad.append(str(error))
            continue
        told, asked = source.caption(int(i), rng), source.question(int(i), rng)
        cells.append((image, f"[{told or ''}]" + (f"\nQ: {asked[0]} A: [{asked[1]}]" if asked else "")))
        if len(cells) == args.num:
            break
    for line in bad:
        print(line, file=sys.stderr)
    if not cells:
        raise ValueError(f"{' '.join(args.data)}: no image can be read")
    sheet(args.out, cells)
    print(f"{args.out}: {len(cells)} of {len(source) if args.data else 'endless'} samples; "
          f"what is in [brackets] may be masked")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("stopped")
