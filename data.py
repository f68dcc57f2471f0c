"""What is learned from: the built-in world of coloured shapes, and the user's own images and texts.

A source of data has a `size`, the side of its images in pixels, and numbered records:

    image(i)            of record i, (size,size,3) uint8
    caption(i, rng)     one of its captions; None if it has none
    question(i, rng)    one of its questions, with the answer; None if it has none

`World` draws scenes without end, with nothing to download. `Records`, further below, reads the user's files.
"""
import colorsys
import csv
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import unicodedata
import warnings
from array import array
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from safetensors import SafetensorError
from tqdm import tqdm

SIDE = 64  # pixels; an image has four quarters of 32 x 32, with at most one thing in each
SIZES = {"small": (6.0, 7.0), "large": (10.5, 11.8)}  # least and largest radius in pixels
COLORS = {"red": 0, "yellow": 52, "green": 125, "cyan": 180, "blue": 222, "purple": 285}  # hue, degrees
# A shape is a function of x, y and its radius r, in pixels: x to the right, y downwards from the shape's centre. Its
# value is roughly the distance to the outline, negative inside. No point inside may have |x| or |y| above 1.14 r.
SHAPES = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.88 * r,
    "triangle": lambda x, y, r: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.57 * r,  # equilateral, point up
    "cross": lambda x, y, r: np.maximum(np.maximum(abs(x), abs(y)) - r, np.minimum(abs(x), abs(y)) - 0.36 * r)}
QUARTERS = ("top left", "top right", "bottom left", "bottom right")  # row by row
# Each relation compares rows (0) or columns (1), and asks for a smaller (-1) or a larger (1) one.
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (1, -1), "right of": (1, 1)}
HELD = {("yellow", "triangle"), ("purple", "circle"), ("cyan", "square")}  # kept for testing


class Thing(NamedTuple):
    size: str
    color: str
    shape: str
    quarter: int  # index into QUARTERS

    def __str__(self):
        return f"{self.size} {self.color} {self.shape}"


def pick(rng, options):
    return list(options)[rng.integers(len(options))]


class World:
    """Scenes of one to three things, 64x64. Scene i depends on (seed, pairs, i) alone. pairs: "train" never shows
    a HELD pair of colour and shape, "held" shows at least one in every scene. kinds: the KINDS of questions."""
    size = SIDE

    def __init__(self, seed=0, pairs="train", kinds=None):
        self.seed = seed
        self.pairs = pairs
        self.kinds = list(kinds or KINDS)

    @functools.lru_cache(maxsize=100_000)  # training comes back to the same scenes
    def scene(self, i):
        """Returns the things of scene i; how each looks, as (x, y, radius, RGB); the background's RGB."""
        rng = np.random.default_rng([self.seed, self.pairs == "held", i])
        things, looks = [], []
        quarters = rng.permutation(4).tolist()
        count = pick(rng, (1, 2, 3))
        for quarter in quarters[:count]:
            color, shape = self.new_pair(things, rng)
            size = pick(rng, SIZES)
            radius = rng.uniform(*SIZES[size])
            room = min(5.0, 15.5 - 1.14 * radius)  # how far off its quarter's centre it may be
            x = quarter % 2 * 32 + 16 + rng.uniform(-room, room)
            y = quarter // 2 * 32 + 16 + rng.uniform(-room, room)
            hue = (COLORS[color] + rng.uniform(-6, 6)) / 360 % 1
            rgb = colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 0.92), rng.uniform(0.8, 0.95))
            things.append(Thing(size, color, shape, quarter))
            looks.append((x, y, radius, rgb))
        background = rng.uniform(0.86, 0.97) + rng.uniform(-0.02, 0.02, 3)
        return things, looks, background

    def new_pair(self, things, rng):
        """Draws a colour and a shape that `pairs` allows and that no thing of the scene has."""
        taken = [(thing.color, thing.shape) for thing in things]
        while True:
            pair = pick(rng, COLORS), pick(rng, SHAPES)
            if self.pairs == "train":
                allowed = pair not in HELD
            else:
                allowed = pair in HELD or len(things) > 0  # the first thing has to be a held one
            if allowed and pair not in taken:
                return pair

    def image(self, i):
        """Draws scene i -> (64,64,3) uint8. A pixel that an outline crosses is part thing, part background."""
        things, looks, background = self.scene(i)
        canvas = np.tile(background, (SIDE, SIDE, 1))
        for thing, (center_x, center_y, radius, rgb) in zip(things, looks):
            top = thing.quarter // 2 * 32
            left = thing.quarter % 2 * 32
            quarter = canvas[top:top + 32, left:left + 32]
            x = np.arange(left, left + 32) + 0.5 - center_x  # of the pixels' centres
            y = np.arange(top, top + 32)[:, None] + 0.5 - center_y
            inside = np.clip(0.5 - SHAPES[thing.shape](x, y, radius), 0, 1)
            quarter += inside[..., None] * (rgb - quarter)
        return (canvas * 255 + 0.5).astype(np.uint8)

    def caption(self, i, rng):
        """Draws a true caption that names every thing once, in any order."""
        things, _, _ = self.scene(i)
        order = [things[k] for k in rng.permutation(len(things))]
        relation = None
        if len(order) > 1:
            relation = pick(rng, [name for name in RELATIONS if related(order[0].quarter, name, order[1].quarter)])
        return pick(rng, ["", "", "", "there is "]) + pick(rng, phrasings(order, relation))

    def question(self, i, rng, kind=None):
        """Draws a question, with its answer, of any kind or of the given one; None if many tries find none."""
        things, _, _ = self.scene(i)
        for _ in range(1 if kind else 100):
            name = kind or pick(rng, self.kinds)
            for _ in range(10):
                thing = pick(rng, things)
                phrase = refer(thing, things, rng, hide=name)
                if phrase:
                    pair = KINDS[name](thing, phrase, things, rng)
                    if pair:
                        return pair


def related(a, relation, b):
    """Is quarter a in that relation to quarter b? (Top left, for example, is above bottom right.)"""
    axis, direction = RELATIONS[relation]
    distance = divmod(a, 2)[axis] - divmod(b, 2)[axis]  # divmod gives (row, column)
    return distance * direction > 0


def phrasings(order, relation):
    """Lists the captions of things in this order. relation: of the first to the second; None if there is but one."""
    a = [f"a {thing}" for thing in order]
    at = [f"a {thing} in the {QUARTERS[thing.quarter]}" for thing in order]
    if len(order) == 1:
        return [a[0], at[0]]
    pair = f"{a[0]} {relation} {a[1]}"
    if len(order) == 2:
        return [pair, pair, f"{a[0]} and {a[1]}", f"{at[0]} and {at[1]}"]  # twice: twice as often
    return [f"{pair} and {a[2]}", f"{pair} and {at[2]}",
            f"{at[0]}, {a[1]} and {a[2]}", f"{a[0]}, {a[1]} and {a[2]}"]


def refer(thing, things, rng, hide=None):
    """Draws a phrase, like "small shape", that fits this thing alone and does not name its feature `hide`; or None."""
    for _ in range(6):
        features = [f for f in ("size", "color", "shape") if f != hide and rng.random() < 0.55]
        words = [getattr(thing, feature) for feature in features]
        fitting = [o for o in things if words == [getattr(o, feature) for feature in features]]
        if features and len(fitting) == 1:
            if "shape" not in features:
                words.append("shape")
            return " ".join(words)


def ask_color(thing, phrase, things, rng):
    """Asks for the colour of a thing, which `phrase` describes -> question, answer. This is one of eight kinds."""
    return pick(rng, [f"what color is the {phrase}?", f"what is the color of the {phrase}?"]), thing.color


def draw_texts(source, i, rng, recipe):
    """Draws the two texts of one row of a batch -> prompt, text to read. The prompt, for the image loss, is a
    caption; with probability `recipe.drop` it is empty, as guidance needs the velocity without a prompt, too.
    The text to read is the same caption; with probability `recipe.questions` it is a pair (question, answer)."""
    caption = text = source.caption(i, rng)
    if rng.random() < recipe.questions or caption is None:
        text = source.question(i, rng) or caption
    if caption is None or rng.random() < recipe.drop:
        return "", text
    return caption, text


# ------------------------------------------------- the chapter ends here; what follows makes it practical

# A kind of question is a function of a thing, a phrase that fits it alone, all things and a generator. It returns a
# question and its only right answer, or None: then up to ten are tried. Where yes and no should come equally often,
# choose the answer first.

def ask_shape(thing, phrase, things, rng):
    phrase = phrase.replace("shape", "thing")
    return pick(rng, [f"what shape is the {phrase}?", f"what is the {phrase}?"]), thing.shape


def ask_size(thing, phrase, things, rng):
    return pick(rng, [f"what size is the {phrase}?", f"how big is the {phrase}?"]), thing.size


def ask_where(thing, phrase, things, rng):
    return f"where is the {phrase}?", QUARTERS[thing.quarter]


def ask_count(thing, phrase, things, rng):
    color = pick(rng, [thing.color, pick(rng, COLORS)])
    shape = pick(rng, [thing.shape, pick(rng, SHAPES)])
    of_color = [other.color for other in things].count(color)
    of_shape = [other.shape for other in things].count(shape)
    name, count = pick(rng, [("shape", len(things)), (f"{color} shape", of_color), (shape, of_shape)])
    ending = "es" if name == "cross" else "s"
    return f"how many {name}{ending} are there?", str(count)


def ask_relation(thing, phrase, things, rng):
    relation = pick(rng, RELATIONS)
    others = [other for other in things if related(other.quarter, relation, thing.quarter)]
    question = f"what is {relation} the {phrase}?"
    if len(others) == 1:
        return question, str(others[0])
    if not others and rng.random() >= 0.75:
        return question, "nothing"


def ask_exists(thing, phrase, things, rng):
    size, color, shape, _ = thing
    if rng.random() >= 0.5:
        size, color, shape = [pick(rng, options) for options in (SIZES, COLORS, SHAPES)]
    if rng.random() < 0.5 and len(things) > 1:  # the tempting mistake: two things' features mixed
        color = thing.color
        shape = pick(rng, things).shape
    size, color = pick(rng, [("", color), (size, color), (size, "")])
    fits = [o for o in things if o.shape == shape and size in ("", o.size) and color in ("", o.color)]
    name = " ".join(f"{size} {color} {shape}".split())
    question = pick(rng, [f"is there a {name}?", f"do you see a {name}?"])
    return question, "yes" if fits else "no"


def ask_compare(thing, phrase, things, rng):
    other = pick(rng, things)
    other_phrase = refer(other, things, rng)
    if other is thing or other_phrase is None:
        return None
    wanted = rng.random() < 0.5  # half of the answers are yes
    relation = pick(rng, RELATIONS)
    bigger, size = pick(rng, [("bigger", "large"), ("smaller", "small")])
    claims = [(f"is the {phrase} {relation} the {other_phrase}?", related(thing.quarter, relation, other.quarter)),
              (f"is the {phrase} {bigger} than the {other_phrase}?", thing.size == size != other.size)]
    fitting = [claim for claim in claims if claim[1] == wanted]
    question, truth = pick(rng, fitting or claims)
    return question, "yes" if truth else "no"


KINDS = {"color": ask_color, "shape": ask_shape, "size": ask_size, "count": ask_count,
         "exists": ask_exists, "where": ask_where, "relation": ask_relation, "compare": ask_compare}


ENDINGS = Image.registered_extensions()  # {".jpg": "JPEG", ...}; fills Image.OPEN, too
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
                if name in Image.OPEN)  # some need a library
EXTENSIONS = tuple(ending for ending in ENDINGS if ENDINGS[ending] in FORMATS)
TEXTS = [".txt", ".caption", ".json"]
LISTS = ".jsonl .csv .tsv .parquet .arrow .zip .tar .gz".split()
NOT_READ = ".heic .heif .avif .jp2 .jxl .svg .psd .tga .ico .eps .dng .raw .cr2 .cr3 .nef .arw .raf .orf .rw2".split()
PICTURES = list(EXTENSIONS) + NOT_READ
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28  # some PNGs have megabytes of text
WHOLE_FILE = ("", 0, -1)


def read_bytes(path, span):
    shard, start, count = span
    with open(shard or path, "rb") as f:
        f.seek(start)
        return f.read(count)


def load_image(path, height, width=None, span=WHOLE_FILE):
    """Reads an image of one of FORMATS -> RGB image of PIL, height x width pixels: upright by its EXIF tag, on white,
    resized to cover, cropped in the centre. span: see `Record`. Raises OSError for no file, ValueError for no image."""
    width = width or height
    content = io.BytesIO(read_bytes(path, span))
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(content, formats=FORMATS) as image:
            twice = 2 * max(width, height)
            image.draft(None, (twice, twice))  # a large JPEG is decoded at a fraction of its size
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # grey in 16 bits, or in fractions of 1
                scale = 255 if image.mode == "F" else 1 / 257
                grey = (np.asarray(image) * scale).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(grey)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
    except UnidentifiedImageError:
        why = f"none of {', '.join(FORMATS)}; convert it"
    except Exception as error:  # Pillow's many decoders raise whatever they like
        why = one_line(error)
    raise ValueError(f"{path}: cannot be read as an image ({why})")


def to_pixels(images):
    """Images, (H,W,3) uint8 arrays or PIL's -> float32 array (B,3,H,W) in [-1,1]."""
    return np.stack(list(images)).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def to_images(pixels):
    """(B,3,H,W) tensor in [-1,1] -> (B,H,W,3) uint8 array."""
    pixels = np.asarray(pixels.float().cpu()).clip(-1, 1).transpose(0, 2, 3, 1)
    return ((pixels + 1) * 127.5 + 0.5).astype(np.uint8)


# ---------------------------------------------------------------- the user's files
class Row(NamedTuple):
    """What a reader of files finds about one image."""
    where: str         # for messages
    fields: dict = {}  # a JSON object or its text, or a row of a .csv
    base: str = ""     # where its paths start
    image: str = ""    # the image, where it is not among the fields
    span: tuple = WHOLE_FILE
    files: list = []   # more texts, (name, bytes): a JSON object in a .json, a caption in others
    problem: str = ""  # why it is left out, if it is


class Record(NamedTuple):
    """One image and its texts."""
    image: str        # a path; in a .tar, the shard's path and the member's name
    captions: tuple   # of str; may be empty where there are questions
    questions: tuple  # of (question, answer, ...): all answers given, the most frequent first
    span: tuple       # where the bytes are: shard ("": the image's own file), first, count


def read_record(row, looked_at):
    """Makes a Record of a Row in one of the usual forms. A caption in a .txt replaces those in a .json, and there a
    "re_caption" replaces others. looked_at: gets the file of its image. Raises ValueError for what cannot be used."""
    if row.problem:
        raise ValueError(row.problem)
    try:
        fields = row.fields
        if isinstance(fields, str):
            fields = parse(fields, "a record", dict)
        captions = []
        for name, content in row.files:
            text = content.decode(encoding_of(content), "surrogateescape").strip()
            if ending_of(name) == ".json":
                fields = fields | parse(text, "a record", dict)
            elif text:
                captions.append(text)
        texts = functools.partial(texts_of, fields)
        images = [row.image] if row.image else texts("image") or texts("image_path") or texts("file_name")
        image = find_image(row, images)
        looked_at.append(row.span[0] or image)
        captions = captions or texts("re_caption") or texts("caption") + texts("text")
        asked = texts("question")
        answers = texts("answers") or texts("answer")
        questions = list(zip(asked, answers))
        if len(asked) == 1 and answers:  # all are its
            questions = [(asked[0], *sorted(answers, key=answers.count, reverse=True))]
        elif len(asked) != len(answers):
            raise ValueError(f"has {len(asked)} questions and {len(answers)} answers")
        turns = fields.get("conversations") or []  # LLaVA's, in which a human and the model take turns
        for turn, reply in zip(turns, turns[1:]):
            if (turn["from"], reply["from"]) == ("human", "gpt"):
                question = turn["value"].replace("<image>", "").strip()
                questions.append((question, reply["value"].strip()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not in a form that this program knows") from None
    if None in fields:
        raise ValueError("has too many cells: put texts in quotes")
    if not captions + questions:
        if row.files:
            raise ValueError(f"has a text that holds nothing: {row.files[0][0]}")
        raise ValueError("has no caption, and no question with an answer")
    if NOT_UNICODE.search("".join(itertools.chain(captions, *questions))):
        raise ValueError("its text is neither UTF-8, nor UTF-16 with a byte order mark")
    return Record(image, tuple(captions), tuple(questions), row.span)


def find_image(row, images):
    """Returns the path of a Row's image. Raises ValueError if there is not one, of a kind that can be read."""
    if len(images) != 1:
        raise ValueError('has not one "image"')
    kind = ending_of(images[0])
    if kind in NOT_READ and kind not in EXTENSIONS:  # Pillow may have a library for some
        raise ValueError(f"{kind} is not read: convert such pictures to .jpg or .png")
    # A Mac writes an accent as a code point of its own (NFD), a list may not (NFC).
    names = images + [unicodedata.normalize(form, images[0]) for form in ("NFC", "NFD")]
    paths = [os.path.join(row.base, name) for name in names]
    return next(filter(os.path.exists, paths), paths[0])


def ending_of(path):
    return os.path.splitext(path)[1].lower()


def encoding_of(content):
    return "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"  # by its byte order mark


# Bytes that are not UTF-8 are decoded to surrogates, from which a path is encoded again to the same bytes. In a text
# there must be none, and no zero, which shows UTF-16 without a byte order mark.
NOT_UNICODE = re.compile(r"[\0\ud800-\udfff]")


def texts_of(fields, key):
    """Lists the texts that stand under a key: one, or a list of them; numbers are texts, too."""
    values = fields.get(key)
    if not isinstance(values, list):
        values = [values]
    texts = []
    for value in values:
        if isinstance(value, dict):  # as in VQA
            value = value.get("answer")
        if isinstance(value, str | int | float):
            texts.append(str(value).strip())
    return list(filter(None, texts))


csv.field_size_limit(2 ** 31 - 1)  # a caption may be long


def read_list(path):
    """Reads a .csv with a header, one JSON list, or an object per line -> Rows."""
    k = 0
    with open(path, "rb") as f:
        text = io.TextIOWrapper(f, encoding_of(f.peek()), errors="surrogateescape", newline="")
        try:
            items = text
            word = "line"
            beginning = text.read(4096).lstrip()
            text.seek(0)
            if ending_of(path) == ".csv":
                items = csv.DictReader(text, strict=True, skipinitialspace=True)
                k = 1  # the header
            elif beginning.startswith("["):
                items = parse(text.read(), path, list)
                word = "item"
            for k, item in enumerate(items, 1):
                k = getattr(items, "line_num", k)  # of a .csv
                if not isinstance(item, str) or item.strip():  # no empty line
                    yield Row(f"{path}, {word} {k}", item, os.path.dirname(path))
        except (csv.Error, UnicodeError) as error:
            raise ValueError(f"{path}, line {k + 1}: {error} (put texts in quotes, double a quote in them)") from None


NO_TEXT = "has no text: a .txt, .caption or .json of its name, or a line of metadata.jsonl or metadata.csv"


def read_folder(path, files, looked_at):
    """Reads the files of a folder -> Rows. The texts of an image are in a metadata.jsonl or metadata.csv, or beside it,
    in a .txt, .caption or .json of its name; or, if there is no text at all, folders' names are taken, with a warning.
    looked_at: the images of all Rows so far."""
    lists = [file for file in files if os.path.basename(file).lower() in ("metadata.jsonl", "metadata.csv")]
    for file in lists:
        yield from read_list(file)
    named = set(map(os.path.normpath, lists + looked_at))
    entries = {}
    for file in files:
        if not os.path.exists(file):
            yield Row(file, problem="a link to nothing")
        elif ending_of(file) in PICTURES + TEXTS + LISTS and os.path.normpath(file) not in named:
            entries[file] = WHOLE_FILE
    has_texts = lists or any(ending_of(file) not in PICTURES for file in entries)
    if has_texts:
        yield from join_samples(entries, lambda path: os.path.splitext(path)[0])
    elif entries:
        warn(f"{path}: {len(entries)} images without texts, so the names of their folders are their captions")
        for image in entries:
            folder = os.path.basename(os.path.dirname(os.path.abspath(image)))
            yield Row(image, {"caption": folder.replace("_", " ")}, image=image)


def join_samples(entries, name_of):
    """Joins each image with the texts of its name -> Rows. entries: {path: span}."""
    def key(path):
        return unicodedata.normalize("NFC", name_of(path))  # see read_record
    texts = {}
    used = set()
    for path in entries:
        if ending_of(path) not in PICTURES:
            texts.setdefault(path if ending_of(path) in LISTS else key(path), []).append(path)
    for image, span in entries.items():
        if ending_of(image) in PICTURES:
            name = unicodedata.normalize("NFC", image)
            beside = texts.get(name, []) + texts.get(key(image), [])  # of 1.png.txt, of 1.txt
            used.update(beside)
            contents = [(path, read_bytes(path, entries[path])) for path in beside]
            yield Row(image, {}, "", image, span, contents, "" if beside else NO_TEXT)
    for paths in texts.values():
        for path in paths:
            if path not in used:
                yield Row(path, problem="belongs to no image")


def read_shard(path):
    """Reads a WebDataset shard, in one pass over the headers of a .tar -> Rows. An image and its .txt or .json form
    a sample: they share their name up to the first dot (a leading dot does not count)."""
    def name_of(path):
        return re.match(r"(.*/)?\.*[^.]*", os.path.normpath(path))[0]
    entries, samples = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or HIDDEN.search(member.name) or ending_of(member.name) not in PICTURES + TEXTS:
                    continue
                name = f"{path}/{member.name}"
                entries[name] = path, member.offset_data, member.size
                if ending_of(name) in PICTURES:
                    other = samples.setdefault(name_of(name), name)
                    if other != name:
                        raise ValueError(f"{name}: a second image, in the sample of {other}")
            tar.fileobj.seek(tar.offset)  # a damaged header looks like the end, but after the end are only zeros
            rest = tar.fileobj.read(2 ** 20)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise ValueError(f"cut off or damaged at byte {tar.offset}")
    except Exception as error:  # of damaged headers tarfile raises whatever it likes
        raise ValueError(f"{path}: not a readable .tar shard ({error})") from None
    yield from join_samples(entries, name_of)


# What systems leave behind (._1.jpg, .ipynb_checkpoints, __MACOSX) is no data. ("." and ".." are parts of paths.)
HIDDEN = re.compile(r"(^|/)(\.(?!\.?(/|$))|__MACOSX(/|$)|(?i:readme|license)\.txt$)")


def files_of(path):
    """Lists all files in a folder and below, in order, or the one that `path` is. Linked folders count, once; what
    train.py has written there does not. Raises OSError for a folder that cannot be opened."""
    if not os.path.isdir(path):
        return [path]
    found, seen = [], set()
    for folder, folders, names in os.walk(path, onerror=raise_error, followlinks=True):
        real = os.path.realpath(folder)
        holds_stages = folder != path and any(map(is_stage, [f"{folder}/{name}" for name in folders]))
        if real in seen or holds_stages or is_stage(folder):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = itertools.filterfalse(HIDDEN.search, folders)
        found += [f"{folder}/{name}" for name in itertools.filterfalse(HIDDEN.search, names)]
    return sorted(found)


def is_stage(folder):
    return os.path.basename(folder).startswith("stage") and os.path.exists(f"{folder}/run.json")


def raise_error(error):
    raise error


def content_hash(path, span=WHOLE_FILE, pieces=2):
    """Hashes the size and the bytes of a file, or of a part of a shard -> a number below HASHES. Where there are more
    than 1 MB only some pieces of 4 KB are read: the first, the last, and others between."""
    shard, start, count = span
    if count < 0:
        count = os.path.getsize(path)
    spans = [span]
    if count > 2 ** 20:
        step = (count - 4096) // (pieces - 1)
        spans = [(shard, start + k * step, 4096) for k in range(pieces)]
    digest = hashlib.sha256(str(count).encode())
    for span in spans:
        digest.update(read_bytes(path, span))
    return int.from_bytes(digest.digest()[:7])


def stamp_of(files):
    """Hashes what the system says of files. While it is the same, so is what they hold: no program can set back the
    time of the last change of an inode (ctime)."""
    digest = hashlib.sha256()
    for file in files:
        with suppress(OSError):  # it is gone
            stat = os.stat(file)
            seen = file, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns
            digest.update(repr(seen).encode())
    return digest.hexdigest()[:12]


@functools.cache
def mapped(path, stamp=""):
    """Maps a .npy's array, or another file's bytes, once per process. (Plain arrays are faster than memmaps.)"""
    if path.endswith(".npy"):
        return np.asarray(np.load(path, mmap_mode="r"))
    return np.asarray(np.memmap(path, mode="r"))


HELD_OUT = 0.05  # share of images
HASHES = 2 ** 56


class Records:
    """The user's data, from a .json list, a .jsonl or .csv, a folder of images, a WebDataset shard (.tar), or
    several. Each is read once into an index on disk, which `folder` keeps; none lies in memory. captioned and
    questioned count records with captions and with questions, incomplete those left out; hash: of images and texts;
    stamp: of the files' times. Of several processes each reads its own part of the sources, a slice of them, and
    `exchange` gives the values of all."""
    def __init__(self, paths, size, folder=None, held_out=HELD_OUT, part=slice(None), exchange=lambda value: [value]):
        self.size = size
        self.held_out = held_out
        if isinstance(paths, str):
            paths = [paths]
        self.temporary = tempfile.TemporaryDirectory()
        folder = f"{folder or self.temporary.name}/.index"
        os.makedirs(folder, exist_ok=True)
        self.parts = [f"{folder}/{short_hash(path)}.jsonl" for path in paths]
        sources = dict(zip(self.parts, paths))
        with tqdm(desc="reading", unit=" records", leave=False, delay=1, disable=bool(part.start) or None) as bar:
            found = {index: read_source(sources[index], index, bar) for index in list(sources)[part]}
        for others in exchange(found):
            found |= others
        totals = [found[part] for part in self.parts]
        for name in ("captioned", "questioned", "incomplete"):
            setattr(self, name, sum(part[name] for part in totals))
        self.starts = np.cumsum([0] + [part["records"] for part in totals])
        self.hash = short_hash([part["hash"] for part in totals])
        self.stamp = short_hash([part["stamp"] for part in totals])
        if self.incomplete:
            problems = [f"{count} like {first}" for part in totals for count, first in part["problems"].values()]
            warn(f"{self.incomplete} records cannot be used, {len(self)} can:\n  " + "\n  ".join(problems[:5]))

    def __len__(self):
        return int(self.starts[-1])

    def index(self, part):
        return mapped(f"{part}.npy", self.stamp)  # where each line starts, and the hash of its image

    def hashes(self):
        return np.concatenate([self.index(part)[:-1, 1] for part in self.parts])

    def record(self, i):
        k = np.searchsorted(self.starts, i, "right") - 1
        part = self.parts[k]
        i -= self.starts[k]
        start, end = self.index(part)[i:i + 2, 0]
        image, captions, questions, span = json.loads(mapped(part, self.stamp)[start:end].tobytes())
        return Record(image, tuple(captions), tuple(map(tuple, questions)), tuple(span))

    def count_images(self):
        return len(np.unique(self.hashes()))  # several records may be about one

    def split(self, *_):
        """Holds out the images whose hash falls into a share of all hashes -> their ids, the others' ids. So an image
        is held out or not whatever else the data hold, and under any name. (Arguments do nothing.)"""
        hashes = self.hashes()
        limit = int(self.held_out * HASHES)
        if hashes.min() >= limit:
            limit = hashes.min() + 1
            warn(f"no image falls into the {self.held_out:.1%} that are held out: one is taken, but not in other data")
        return np.flatnonzero(hashes < limit), np.flatnonzero(hashes >= limit)

    def image(self, i):
        record = self.record(i)
        return np.asarray(load_image(record.image, self.size, span=record.span))

    def caption(self, i, rng):
        return pick(rng, self.record(i).captions or [None])

    def question(self, i, rng):
        question = pick(rng, self.record(i).questions or [None])
        return question and question[:2]


def read_source(source, path, bar):
    """Reads a source into an index, unless all its files are as they were then -> its totals. The index has a line per
    record, and one with the totals. Beside it a .npy says where each line starts, and holds the hash of its image."""
    os.stat(source)  # raises, if there is nothing
    files = files_of(source)
    stamp = stamp_of(files)
    if os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                pass
            totals, named = json.loads(line)  # the last
        if totals["stamp"] == [stamp, stamp_of(named)]:
            return totals
    totals = {"captioned": 0, "questioned": 0, "incomplete": 0, "problems": {}}
    index = array("q")
    digest = hashlib.sha256()
    looked_at = []
    with replacing(path) as beside, open(beside, "wb") as f:
        for row in rows_of(source, files, looked_at):
            try:
                record = read_record(row, looked_at)
                file = record.span[0] or record.image
                if not os.path.isfile(file):
                    raise ValueError(f"no such image: {file}")
                image_hash = content_hash(file, record.span)
            except ValueError as error:
                totals["incomplete"] += 1
                kind = str(error).partition(":")[0]
                count, first = totals["problems"].get(kind, (0, f"{row.where}: {error}"))
                totals["problems"][kind] = count + 1, first
                continue
            digest.update(repr((image_hash, record.captions, record.questions)).encode())
            index.extend((f.tell(), image_hash))
            f.write(f"{json.dumps(record)}\n".encode())
            totals["captioned"] += bool(record.captions)
            totals["questioned"] += bool(record.questions)
            bar.update()
        totals["records"] = len(index) // 2
        if not index:
            problems = [first for _, first in totals["problems"].values()]
            raise ValueError(f"{source}: holds no image with a text that can be used. {'; '.join(problems[:3])}")
        index.extend((f.tell(), 0))
        named = sorted(set(looked_at) - set(files))  # images elsewhere, which a list names
        totals["hash"] = digest.hexdigest()
        totals["stamp"] = [stamp, stamp_of(named)]
        f.write(json.dumps([totals, named]).encode())
        np.save(f"{path}.npy", np.reshape(index, (-1, 2)))
    return totals


def rows_of(source, files, looked_at):
    """Reads a source -> Rows. Raises ValueError for a kind of file that is none."""
    if os.path.isdir(source):
        return read_folder(source, files, looked_at)
    if ending_of(source) == ".tar":
        return read_shard(source)
    if ending_of(source) in (".json", ".jsonl", ".csv"):
        return read_list(source)
    raise ValueError(f"{source}: give a folder, a list (.jsonl, .json or .csv), or a .tar that is not compressed")


def readable(source, i):
    """Returns image i (H,W,3); None, and a warning, if it cannot be read."""
    try:
        return source.image(i)
    except (ValueError, OSError) as error:
        warn_once(f"{error}; left out")


class Subset(NamedTuple):
    """Some records of a source, and the file of their images' latents, if there is one."""
    source: object     # World or Records
    ids: np.ndarray    # which records
    latents: str = ""  # a .npy whose [i] are the moments of image i

    def record(self, k):
        """Returns the number of the k-th record, or of the next that can be read, and its
        image: moments (2,C,h,w) if there are latents, else pixels (3,H,W) in [-1,1]."""
        for n in range(k, k + 100):
            i = int(self.ids[n % len(self.ids)])
            if self.latents:
                return i, mapped(self.latents)[i]
            image = readable(self.source, i)
            if image is not None:
                return i, to_pixels([image])[0]
        raise ValueError("a hundred images in a row cannot be read: mend the data")


def fingerprint(source):
    """Tells a source from all others, by what it holds: a World by some images, Records by images and texts."""
    if isinstance(source, Records):
        return source.hash
    images = [hashlib.sha256(source.image(i)).hexdigest() for i in range(20)]
    return short_hash((source.seed, source.pairs, source.kinds, images))


def with_latents(subset, vae, folder, limit):
    """Returns the subset with its images encoded, if they are at most `limit`; done once, into a file."""
    source, ids, _ = subset
    if len(ids) > limit:
        return subset
    side = source.size // vae.config.factor
    shape = vae.config.latent_channels, side, side
    identity = source.stamp if isinstance(source, Records) else fingerprint(source)
    weights = hashlib.sha256()
    for tensor in vae.state_dict().values():
        weights.update(tensor.float().cpu().numpy().tobytes())
    key = short_hash((identity, source.size, len(ids), shape, weights.hexdigest()))
    path = f"{folder}/latents-{key}.npy"
    if not os.path.exists(path):
        encode_images(source, ids, vae, (int(max(ids)) + 1, 2, *shape), path)
    ids = ids[~np.isnan(mapped(path)[ids, 0, 0, 0, 0])]
    if not len(ids):
        raise ValueError("none of the images can be read")
    return Subset(source, ids, path)


@torch.no_grad()
def encode_images(source, ids, vae, shape, path):
    """Writes the moments of the images `ids` into a .npy; NaN for those that cannot be read."""
    device = next(vae.parameters()).device
    tqdm.write(f"encoding the images of {len(ids):,} records once, into {path}", file=sys.stderr)
    gigabytes = 2e-9 * np.prod(shape)
    if gigabytes > 1e-9 * shutil.disk_usage(os.path.dirname(path)).free:
        raise OSError(f"{path} would take {gigabytes:.1f} GB, and the disk has less: free some, or lower --latents")
    with replacing(path) as beside:
        latents = np.lib.format.open_memmap(beside, "w+", np.float16, shape)
        for part in slices(len(ids), source.size, source.size, device, "encoding"):
            latents[ids[part]] = np.nan
            images = {}
            for i in ids[part].tolist():
                image = readable(source, i)
                if image is not None:
                    images[i] = image
            if images:
                pixels = torch.from_numpy(to_pixels(images.values())).to(device)
                moments = torch.stack(vae.encode(pixels), 1)
                latents[list(images)] = moments.float().cpu().numpy()
        latents.flush()


class Batch(NamedTuple):
    """What one process computes in one pass of a step. Images are pixels (B,3,H,W) in [-1,1]; or, if their latents are
    stored, moments (B,2,C,h,w): mean and log-variance. Arrays become tensors in the process that trains: a worker would
    hand over tensors in /dev/shm, of which a container has little, but arrays through a pipe."""
    images: np.ndarray       # for the image loss
    text_images: np.ndarray  # for the text loss; None: the same
    captions: np.ndarray     # (B,L) tokens, for the image loss
    tokens: np.ndarray       # (B,L), for the text loss
    maskable: np.ndarray     # (B,L) bool, which of them may be masked
    rows: slice              # which rows of the step's whole batch these are
    seed: int                # of the step


@dataclass(eq=False)
class Batches(torch.utils.data.Dataset):
    """batches[step] is what one process computes at a step: a list of `accumulate` Batch. A row depends on the seed
    and its number alone, so a step is the same on any number of processes, and after any interruption."""
    images: Subset
    texts: Subset        # for the text loss; the same object, except with --text-data
    tokenizer: object    # a t5.Tokenizer
    settings: object     # a model.Settings
    recipe: object       # a train.Recipe
    seed: int
    rows: slice          # of the whole batch, for this process
    accumulate: int = 1  # passes per step

    def __getitem__(self, step):
        rows = self.rows
        size = (rows.stop - rows.start) // self.accumulate
        starts = range(rows.start, rows.stop, size)
        return [self.batch(step, slice(start, start + size)) for start in starts]

    def batch(self, step, rows):
        first = step * self.recipe.batch
        images, text_images, *texts = zip(*[self.row(first + k) for k in range(rows.start, rows.stop)])
        images = np.array(images)  # in C order, which np.stack would not give
        text_images = None if self.texts is self.images else np.array(text_images)
        return Batch(images, text_images, *map(np.array, texts), rows, self.seed * 1_000_003 + step)

    def row(self, n):
        """Makes row n of the stream -> image, image of the text loss, caption's ids, text's ids, which are maskable."""
        settings = self.settings
        rng = np.random.default_rng([self.seed, 1, n])
        image, (caption, text) = self.draw(self.images, n, rng)
        text_image = image
        if self.texts is not self.images:  # --text-data
            text_image, (_, text) = self.draw(self.texts, n, rng)
        caption = self.tokenizer.encode(caption, settings.length)
        ids, may = self.tokenizer.text_ids(text, settings.length, settings.caption_prompt, settings.answer_suffix)
        question_fills_room = sum(may) < self.tokenizer.answer_room(settings.length)
        if ids[-2] != self.tokenizer.eos_id or question_fills_room:
            warn_once(f"some texts fill --length {settings.length} or are cut: raise it, or their ends are not learned")
        return image, text_image, caption, ids, may

    def draw(self, subset, n, rng):
        epoch, k = divmod(n, len(subset.ids))
        i, image = subset.record(self.order(len(subset.ids), epoch)[k])
        return image, draw_texts(subset.source, i, rng, self.recipe)

    @functools.lru_cache(maxsize=4)  # the last two epochs of two subsets, 8 bytes per record
    def order(self, total, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(total)


# ---------------------------------------------------------------- what all files share
# Pixels of all images that go through the networks at once, by kind of device. (On CUDA 16 images of 512 x 512 take at
# most 5.4 GB; tests/fake_gpu.py counts them.)
PIXELS = {"cpu": 2 ** 18, "mps": 2 ** 18, "cuda": 2 ** 22}


def at_once(text):
    """An argparse type that sets how many images of 512x512 go through the networks at once, at least one."""
    PIXELS.update(dict.fromkeys(PIXELS, int(text) * 2 ** 18))


def slices(count, height, width, device, desc=None):
    """Cuts `count` images of that size into slices of at most PIXELS. Several slices show a bar on a terminal."""
    size = max(1, PIXELS.get(device.type, 2 ** 18) // (height * width))
    parts = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return tqdm(parts, desc, leave=False, disable=count <= size or None)


def warn_here(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)  # tqdm's, or it would run into a bar


def warn(message):
    if os.environ.get("RANK", "0") == "0":  # of all the processes of torchrun, one speaks
        warn_here(message)


warn_once = functools.cache(warn_here)


def short_hash(values):
    return hashlib.sha256(repr(values).encode()).hexdigest()[:12]


def one_line(error):
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:120]


def parse(raw, where, kind):
    """Reads JSON -> a list or dict (`kind`). Raises ValueError with one line, which begins with `where`."""
    try:
        value = json.loads(raw, parse_constant=lambda name: None)  # NaN is no text
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, kind):
        raise ValueError(f'{where}: want {{"image": path, "caption": text}}, or a list of such')
    return value


@contextmanager
def replacing(path):
    """Gives a path beside `path` to write to, and moves that file to `path` once it is whole: a full disk
    or a Ctrl-C leaves what was there. Raises OSError with one line if it cannot be written; other errors pass."""
    beside = f"{path}.partial"
    try:
        yield beside
        with suppress(OSError):  # of a file system without rights
            umask = os.umask(0)  # it can only be read by setting it
            os.umask(umask)
            os.chmod(beside, 0o666 & ~umask)  # safetensors gives narrower rights
        os.replace(beside, path)
    except Exception as error:
        if os.path.isfile(beside):
            os.remove(beside)
        about_another = getattr(error, "filename", None) not in (None, beside, path)
        if about_another or not isinstance(error, OSError | SafetensorError):
            raise
        raise OSError(f"{path}: could not be written ({one_line(error)})") from error


def write_text(path, text):
    with replacing(path) as beside, open(beside, "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write(text)


def claim(path):
    """Locks a folder by a file in it -> the lock, held until it is closed. Raises OSError where another run has it."""
    import fcntl  # Windows has none
    lock = open(path, "a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{os.path.dirname(path)}: another run is at work here; let it end, or stop its processes")
    except OSError as error:
        warn(f"{path}: no locks here ({one_line(error)}), so see to it that no other run writes into this folder")
    return lock
