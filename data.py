"""What is learned from: the built-in world of coloured shapes, and the user's own images and texts.

A source of data has a `size`, the side of its images in pixels, a `fingerprint` that tells it from others, and records:

    image(i)            of record i, (size,size,3) uint8
    caption(i, rng)     one of its captions; None if it has none
    question(i, rng)    one of its questions, with the answer; None if it has none

`World` draws scenes without end, with nothing to download; `Records`, further below, reads the user's files.
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
import warnings
import zlib
from array import array
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from tqdm import tqdm

SIDE = 64  # pixels; four quarters of 32 x 32, at most one thing in each
SIZES = {"small": (6.0, 7.0), "large": (10.5, 11.8)}  # radius in pixels, from .. to
COLORS = {"red": 0, "yellow": 52, "green": 125, "cyan": 180, "blue": 222, "purple": 285}  # hue in degrees
# A shape is a function of x, y and its radius r. x (32,) and y (32,1) are pixels right of and below its centre. The
# result is about the distance to its outline, negative inside. No point may have |x| or |y| above 1.14 r.
SHAPES = {
    "circle": lambda x, y, r: np.hypot(x, y) - r,
    "square": lambda x, y, r: np.maximum(abs(x), abs(y)) - 0.88 * r,
    "triangle": lambda x, y, r: np.maximum(y, 0.866 * abs(x) - 0.5 * y) - 0.57 * r,  # equilateral, point up
    "cross": lambda x, y, r: np.maximum(np.maximum(abs(x), abs(y)) - r, np.minimum(abs(x), abs(y)) - 0.36 * r)}
QUARTERS = ("top left", "top right", "bottom left", "bottom right")  # row by row
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (1, -1), "right of": (1, 1)}  # axis (0 rows), direction
HELD = {("yellow", "triangle"), ("purple", "circle"), ("cyan", "square")}  # colour-shape pairs kept for testing


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
    """Scenes of one to three things, 64x64. Scene i is a function of (seed, pairs, i) alone. pairs: "train" never shows
    a HELD colour-shape pair, "held" at least one in every scene. kinds: of questions, some of KINDS, equally often."""
    def __init__(self, seed=0, pairs="train", kinds=None):
        self.seed, self.pairs, self.kinds, self.size = seed, pairs, list(kinds or KINDS), SIDE
        self.fingerprint = repr((seed, pairs, self.kinds, [zlib.crc32(self.image(i)) for i in range(20)]))

    @functools.lru_cache(maxsize=100_000)  # training comes back to the same scenes
    def scene(self, i):
        """-> things; how each of them looks, as (centre, radius, RGB); the background's RGB."""
        rng = np.random.default_rng([self.seed, self.pairs == "held", i])
        things, looks = [], []
        quarters = rng.permutation(4)
        for k in range(pick(rng, (1, 2, 3))):
            while True:
                color, shape = pick(rng, COLORS), pick(rng, SHAPES)
                held = (color, shape) in HELD
                allowed = not held if self.pairs == "train" else held or k > 0  # in "held" scenes the first has to be
                if allowed and all((color, shape) != (t.color, t.shape) for t in things):
                    break
            size, quarter = pick(rng, SIZES), int(quarters[k])
            r = rng.uniform(*SIZES[size])
            room = min(5.0, 15.5 - 1.14 * r)  # how far from its quarter's centre it may be, to stay inside
            center = tuple(n * 32 + 16 + rng.uniform(-room, room) for n in (quarter % 2, quarter // 2))
            hue, saturation, value = COLORS[color] + rng.uniform(-6, 6), rng.uniform(.75, .92), rng.uniform(.8, .95)
            things.append(Thing(size, color, shape, quarter))
            looks.append((center, r, colorsys.hsv_to_rgb(hue / 360 % 1, saturation, value)))
        return things, looks, rng.uniform(0.86, 0.97) + rng.uniform(-0.02, 0.02, 3)

    def image(self, i):
        """-> (64,64,3) uint8. Edges are smooth: a pixel that an outline crosses is part thing, part background."""
        things, looks, background = self.scene(i)
        canvas = np.broadcast_to(background, (SIDE, SIDE, 3)).copy()
        for thing, ((cx, cy), r, rgb) in zip(things, looks):
            top, left = thing.quarter // 2 * 32, thing.quarter % 2 * 32
            x, y = np.arange(left, left + 32) + 0.5 - cx, np.arange(top, top + 32)[:, None] + 0.5 - cy  # pixel centres
            inside = np.clip(0.5 - SHAPES[thing.shape](x, y, r), 0, 1)[..., None]
            quarter = canvas[top:top + 32, left:left + 32]
            quarter += inside * (np.array(rgb) - quarter)
        return (canvas * 255 + 0.5).astype(np.uint8)

    def caption(self, i, rng):
        """A true caption that names every thing once, in any order."""
        things = self.scene(i)[0]
        order, relation = [things[k] for k in rng.permutation(len(things))], None
        if len(order) > 1:
            relation = pick(rng, [r for r in RELATIONS if related(order[0].quarter, r, order[1].quarter)])
        return pick(rng, ["", "", "", "there is "]) + pick(rng, phrasings(order, relation))

    def question(self, i, rng, kind=None):
        """-> question, answer; with `kind`, of that kind. None where many tries find none that fits the scene."""
        things = self.scene(i)[0]
        for _ in range(1 if kind else 100):
            name = kind or pick(rng, self.kinds)
            for _ in range(10):
                thing = pick(rng, things)
                phrase = refer(thing, things, rng, hide=name)
                if phrase and (pair := KINDS[name](thing, phrase, things, rng)):
                    return pair


def related(a, relation, b):
    """Is quarter a in that relation to quarter b? Top left is above bottom right, and left of it, too."""
    axis, direction = RELATIONS[relation]
    return (divmod(a, 2)[axis] - divmod(b, 2)[axis]) * direction > 0


def phrasings(order, relation):
    """Every caption of these things in this order, with and without quarters and relations; one that is listed twice is
    picked twice as often. relation: of the first thing to the second; None if there is only one thing."""
    a = [f"a {thing}" for thing in order]
    at = [f"a {thing} in the {QUARTERS[thing.quarter]}" for thing in order]
    if len(order) == 1:
        return [a[0], at[0]]
    pair = f"{a[0]} {relation} {a[1]}"
    if len(order) == 2:
        return [pair, pair, f"{a[0]} and {a[1]}", f"{at[0]} and {at[1]}"]
    return [f"{pair} and {a[2]}", f"{pair} and {at[2]}", f"{at[0]}, {a[1]} and {a[2]}", f"{a[0]}, {a[1]} and {a[2]}"]


def refer(thing, things, rng, hide=None):
    """A phrase that fits this thing alone, naming some of its size, colour and shape ("red cross", "small shape"), or
    None after a few tries. hide: the feature that it must not give away."""
    for _ in range(6):
        fields = [f for f in ("size", "color", "shape") if f != hide and rng.random() < .55]
        if fields and sum(all(getattr(o, f) == getattr(thing, f) for f in fields) for o in things) == 1:
            return " ".join([getattr(thing, f) for f in fields] + ["shape"] * ("shape" not in fields))


def draw_texts(source, i, rng, recipe):
    """The texts of one row of a batch -> prompt, text to read. The prompt is a caption, left empty with probability
    `drop`, as guidance needs the velocity without a prompt, too (Eq. 10). The text to read is the same caption or, with
    probability `questions`, a pair (question, answer)."""
    caption = source.caption(i, rng)
    question = source.question(i, rng) if rng.random() < recipe.questions or caption is None else None
    prompt = "" if caption is None or rng.random() < recipe.drop else caption
    return prompt, question or caption


# ------------------------------------------------- the chapter ends here; what follows makes it practical

# ---------------------------------------------------------------- kinds of questions
# Each kind is a function of a thing, a phrase that fits it alone, all things of the scene and a random generator. It
# returns a question and its only right answer, or None if this try finds no question; then it is tried again, up to ten
# times. So where yes and no should be equally frequent, choose the answer first, then a question that has it. To add a
# kind, write such a function and list it in KINDS.

def ask_color(thing, phrase, things, rng):
    return pick(rng, [f"what color is the {phrase}?", f"what is the color of the {phrase}?"]), thing.color


def ask_shape(thing, phrase, things, rng):
    phrase = phrase.replace("shape", "thing")
    return pick(rng, [f"what shape is the {phrase}?", f"what is the {phrase}?"]), thing.shape


def ask_size(thing, phrase, things, rng):
    return pick(rng, [f"what size is the {phrase}?", f"how big is the {phrase}?"]), thing.size


def ask_where(thing, phrase, things, rng):
    return f"where is the {phrase}?", QUARTERS[thing.quarter]


def ask_count(thing, phrase, things, rng):
    color, shape = pick(rng, [thing.color, pick(rng, COLORS)]), pick(rng, [thing.shape, pick(rng, SHAPES)])
    colors, shapes = [o.color for o in things], [o.shape for o in things]
    counts = [("shape", len(things)), (f"{color} shape", colors.count(color)), (shape, shapes.count(shape))]
    name, count = pick(rng, counts)
    return f"how many {name}{'es' if name == 'cross' else 's'} are there?", str(count)


def ask_relation(thing, phrase, things, rng):
    relation = pick(rng, RELATIONS)
    others = [o for o in things if related(o.quarter, relation, thing.quarter)]
    if len(others) == 1 or not others and rng.random() >= .75:
        return f"what is {relation} the {phrase}?", str(others[0]) if others else "nothing"


def ask_exists(thing, phrase, things, rng):
    size, color, shape = ((thing.size, thing.color, thing.shape) if rng.random() < .5 else
                          (pick(rng, SIZES), pick(rng, COLORS), pick(rng, SHAPES)))
    if rng.random() < .5 and len(things) > 1:  # the tempting mistake: two things' features mixed
        color, shape = thing.color, pick(rng, things).shape
    size, color = pick(rng, [("", color), (size, color), (size, "")])
    exists = any(o.shape == shape and size in ("", o.size) and color in ("", o.color) for o in things)
    name = " ".join(word for word in (size, color, shape) if word)
    return pick(rng, [f"is there a {name}?", f"do you see a {name}?"]), "yes" if exists else "no"


def ask_compare(thing, phrase, things, rng):
    other = pick(rng, things)
    other_phrase = refer(other, things, rng)
    if other is thing or other_phrase is None:
        return None
    yes, relation, bigger = rng.random() < .5, pick(rng, RELATIONS), pick(rng, ["bigger", "smaller"])
    sizes = ("large", "small") if bigger == "bigger" else ("small", "large")
    claims = [(f"is the {phrase} {relation} the {other_phrase}?", related(thing.quarter, relation, other.quarter)),
              (f"is the {phrase} {bigger} than the {other_phrase}?", (thing.size, other.size) == sizes)]
    question, truth = pick(rng, [claim for claim in claims if claim[1] == yes] or claims)  # half of the answers are yes
    return question, "yes" if truth else "no"


KINDS = {"color": ask_color, "shape": ask_shape, "size": ask_size, "count": ask_count, "exists": ask_exists,
         "where": ask_where, "relation": ask_relation, "compare": ask_compare}


# ---------------------------------------------------------------- the user's images and texts

Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
                if name in Image.OPEN)  # what Pillow decodes by itself
EXTENSIONS = tuple(end for end, name in Image.registered_extensions().items() if name in FORMATS)
LISTS = re.compile(r"(caption|label|annotation)[^/]*\.(txt|json)$|\.(jsonl|csv|tsv|parquet|arrow|zip)$")  # of some kind
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2 ** 28  # some tools write megabytes into PNGs


def load_image(path, width, height=None, span=("", 0, -1)):
    """An image file of one of FORMATS -> RGB image of width x height (height: width): turned upright by its EXIF tag,
    pasted on white, resized (bicubic) to cover, centre cropped. span: see `Record`. Raises ValueError if it is none."""
    shard, start, count = span
    try:
        with open(shard or path, "rb") as f:
            f.seek(start)
            content = io.BytesIO(f.read(count))
        with warnings.catch_warnings(action="ignore"), Image.open(content, formats=FORMATS) as image:
            image.draft(None, (2 * max(width, height or width),) * 2)  # a large JPEG is decoded at a fraction
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # grey in 16 bits, or in fractions of 1
                grey = np.asarray(image).astype(float) * (255 if image.mode == "F" else 1 / 257)
                image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return ImageOps.fit(image.convert("RGB"), (width, height or width), Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow's many decoders raise whatever they like
        why = f"none of {', '.join(FORMATS)}" if isinstance(error, UnidentifiedImageError) else one_line(error)
        raise ValueError(f"{path}: cannot be read as an image ({why})") from None


def to_pixels(images):
    """Images, (H,W,3) uint8 arrays or PIL's -> float32 array (B,3,H,W) in [-1,1]."""
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def to_images(pixels):
    """(B,3,H,W) tensor in [-1,1] -> (B,H,W,3) uint8 array."""
    pixels = np.asarray(pixels.float().cpu()).clip(-1, 1).transpose(0, 2, 3, 1)
    return ((pixels + 1) * 127.5 + 0.5).astype(np.uint8)


class Record(NamedTuple):
    """One image and its texts."""
    image: str                  # a path; in a .tar, the shard's path and the member's name
    captions: tuple             # of str; may be empty where there are questions
    questions: tuple            # of (question, answer, ...): all answers given, the most frequent first
    span: tuple = ("", 0, -1)   # where its bytes are: shard ("": a file of its own), the first, how many (-1: all)

    @classmethod
    def read(cls, row, base, *span):
        """A JSON object in one of the usual forms -> Record. base: where paths start. Raises ValueError for one that
        cannot be used. A "re_caption" counts alone, and so does each question of a conversation."""
        def texts(key):  # a list of them, or one; numbers are texts, too
            found = row.get(key) if isinstance(row.get(key), list) else [row.get(key)]
            found = [x.get("answer") if isinstance(x, dict) else x for x in found]
            return [str(x).strip() for x in found if isinstance(x, str | int | float) and str(x).strip()]

        try:
            images = texts("image") or texts("image_path") or texts("file_name")
            captions = texts("re_caption") or texts("caption") + texts("text")
            answers = texts("answers") or texts("answer")
            questions = [(question, *sorted(answers, key=answers.count, reverse=True))
                         for question in texts("question") if answers]
            turns = row.get("conversations") or []  # LLaVA: a human and the model in turn
            questions += [(a["value"].replace("<image>", "").strip(), b["value"].strip())
                          for a, b in zip(turns, turns[1:]) if (a["from"], b["from"]) == ("human", "gpt")]
        except (KeyError, TypeError, AttributeError):
            raise ValueError("not in a form that this program knows") from None
        if len(images) != 1 or not captions + questions:
            raise ValueError('holds not one "image" with a "caption", or with "question" and "answer"')
        return cls(os.path.join(base, images[0]), tuple(captions), tuple(questions), *span)


# Each of these readers yields (where it stands, a row for `Record.read` or the ValueError in its place, base, span).


def read_list(path):
    """A .csv with a header; else one JSON list, or an object per line, whatever the file's name says."""
    base = os.path.dirname(path)
    with open(path, "rb") as f:
        beginning = f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
        f.seek(0)
        if path.lower().endswith(".csv"):
            rows = csv.DictReader(io.TextIOWrapper(f, "utf-8-sig", errors="replace", newline=""))
            yield from ((f"{path}, row {k}", row, base) for k, row in enumerate(rows, 1))
        elif beginning.startswith(b"["):
            yield from ((f"{path}, item {k}", row, base) for k, row in enumerate(parse(f.read(), path, list), 1))
        else:
            yield from ((f"{path}, line {k}", parsed(line), base) for k, line in enumerate(f, 1) if line.strip())


def read_folder(path):
    """Images: as every metadata.jsonl and metadata.csv says; or each with a .txt, .caption or .json of its name beside
    it; or, if there is no text at all, with the name of its folder, and a warning."""
    files = files_of(path)
    if lists := [file for file in files if os.path.basename(file).lower() in ("metadata.jsonl", "metadata.csv")]:
        yield from itertools.chain.from_iterable(map(read_list, lists))
        return
    stems = {os.path.splitext(file)[0]: file for file in files if file.lower().endswith((".txt", ".caption", ".json"))}
    images = [file for file in files if file.lower().endswith(EXTENSIONS)]
    texts = {image: stems.get(image) or stems.get(os.path.splitext(image)[0]) for image in images}  # 1.png.txt or 1.txt
    if no_texts := images and not any(texts.values()):
        if other := [file for file in files if LISTS.search(file.lower())]:
            raise ValueError(f"{other[0]}: not read. The texts of a folder are a .txt, .caption or .json beside each "
                             "image, or metadata.jsonl or metadata.csv with file_name and text")
        warn(f"{path}: {len(images)} images without texts, so the names of their folders are taken: "
             f"{folder_name(images[0])!r} for {images[0]}")
    for image, file in texts.items():
        row = {"caption": folder_name(image) if no_texts else None}
        if file:
            with open(file, "rb") as f:
                text = f.read()
            row = parsed(text) if file.lower().endswith(".json") else {"caption": text.decode("utf-8-sig", "replace")}
        yield image, row if isinstance(row, ValueError) else row | {"image": image}, ""


def folder_name(file):
    return os.path.basename(os.path.dirname(os.path.abspath(file))).replace("_", " ")


def read_shard(path):
    """A WebDataset shard, a .tar of images, each with its .txt or .json, in one pass over the headers. Members of one
    sample stand side by side and share their name up to the first dot (a leading dot does not count)."""
    stems = set()
    try:
        with open(path, "rb") as f:
            tar = tarfile.open(path, "r:", f)
            stem = re.compile(r"(.*/)?\.*[^.]*")
            members = (member for member in tar if not any(map(hidden, os.path.normpath(member.name).split("/"))))
            for name, sample in itertools.groupby(members, lambda member: stem.match(os.path.normpath(member.name))[0]):
                row, image, span, again = {}, None, (), name in stems
                stems.add(name)
                for member in sample:
                    name = member.name.lower()
                    if name.endswith(".txt"):
                        new = {"caption": tar.extractfile(member).read().decode("utf-8-sig", "replace").strip()}
                    elif name.endswith(".json"):
                        new = parsed(tar.extractfile(member).read())
                    elif name.endswith(EXTENSIONS) and member.isfile():
                        if image:
                            raise ValueError(f"{member.name}: a second image, in the sample of {image}")
                        image, span, new = member.name, (path, member.offset_data, member.size), {}
                    else:
                        continue
                    row |= {k: v for k, v in new.items() if v not in (None, "", [])} if isinstance(new, dict) else {}
                if again:
                    raise ValueError(f"the files of {member.name} are not side by side: sort them (tar --sort=name)")
                if row or image:
                    yield image or path, row | {"image": image}, path, span
            f.seek(tar.offset)  # tarfile takes a damaged header for the end; but after the end there are only zeros
            rest = f.read(2 ** 20)
            if len(rest) < tarfile.BLOCKSIZE or rest.strip(b"\0"):
                raise tarfile.ReadError(f"cut off or damaged at byte {tar.offset}")
    except Exception as error:  # of damaged headers tarfile raises whatever it likes
        raise ValueError(f"{path}: not a readable .tar shard ({error})") from None


def hidden(name):
    """What systems leave behind (._1.jpg, .ipynb_checkpoints, __MACOSX) is no data."""
    return name.startswith(".") and name not in (".", "..") or name == "__MACOSX"


def files_of(path):
    """All files in a folder and below, in order, or the one that `path` is. Linked folders count, once."""
    found, seen = [] if os.path.isdir(path) else [path], set()
    for folder, folders, names in os.walk(path, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not hidden(name)]
        found += [os.path.join(folder, name) for name in names if not hidden(name)]
    return sorted(found)


@functools.cache
def mapped(path):
    """A .npy's array, or another file's bytes, mapped once per process. (Plain arrays are faster than memmaps.)"""
    return np.asarray(np.load(path, mmap_mode="r") if path.endswith(".npy") else np.memmap(path, mode="r"))


class Records:
    """The user's data, from one or several of: a .json list or .jsonl of objects, a folder of images, WebDataset shards
    (.tar). All is read once into an index on disk, which `folder` keeps for the next time. So each record is one seek
    away, and none lies in memory. captioned, questioned, incomplete: how many have a caption, have a question, were
    left out; fingerprint: of names and texts, wherever they lie. Raises ValueError or OSError, naming line or file."""
    def __init__(self, paths, size, folder=None):
        self.size, paths = size, [paths] if isinstance(paths, str) else paths
        stamp = [(file, os.stat(file).st_mtime_ns) for path in paths for file in files_of(path)]
        self.temporary = None if folder else tempfile.TemporaryDirectory()
        folder = folder or self.temporary.name
        self.lines = os.path.join(folder, f"records-{hashlib.sha256(repr(stamp).encode()).hexdigest()[:12]}.jsonl")
        if not os.path.exists(self.lines):
            os.makedirs(folder, exist_ok=True)
            write_index(self.lines, paths)
        totals = json.loads(mapped(self.lines)[self.index[-1, 0]:].tobytes())
        self.fingerprint, self.captioned, self.questioned, self.incomplete, self.first_incomplete = totals

    @property
    def index(self):
        """Where each line starts, and the hash of its image's name."""
        return mapped(f"{self.lines}.npy")

    def __len__(self):
        return len(self.index) - 1

    def record(self, i):
        start, end = self.index[i:i + 2, 0]
        image, captions, questions, span = json.loads(mapped(self.lines)[start:end].tobytes())
        return Record(image, tuple(captions), tuple(map(tuple, questions)), tuple(span))

    def count_images(self):
        return len(np.unique(self.index[:-1, 1]))  # several records may be about one image

    def changed(self, i):
        """When the file that holds image i was changed last, in ns; 0 if it is gone."""
        record = self.record(i)
        file = record.span[0] or record.image
        return os.stat(file).st_mtime_ns if os.path.exists(file) else 0

    def split(self, count):
        """Hold out some images, at most `count` and at most one in twenty, but at least one, chosen by the hash of
        their names, so that all records of an image stay together -> ids held out, ids of the others."""
        hashes = self.index[:-1, 1]
        images = np.unique(hashes)
        last = images[max(1, min(count, len(images) // 20)) - 1]
        return np.flatnonzero(hashes <= last), np.flatnonzero(hashes > last)

    def image(self, i):
        """-> (size,size,3) uint8. Raises ValueError, naming the image, if it cannot be read."""
        record = self.record(i)
        return np.asarray(load_image(record.image, self.size, span=record.span))

    def caption(self, i, rng):
        return pick(rng, self.record(i).captions or (None,))

    def question(self, i, rng):
        question = pick(rng, self.record(i).questions or (None,))
        return question and question[:2]


def write_index(path, sources):
    """Read the user's files, and write a record per line, totals in the last; in a .npy beside, where each starts, and
    a hash of its image: its true path, seen from the folder that holds all sources, and in a shard the member."""
    index, digest, captioned, questioned, incomplete = array("q"), hashlib.sha256(), 0, 0, []
    base = os.path.commonpath([os.path.realpath(s if os.path.isdir(s) else os.path.dirname(s) or ".") for s in sources])
    with replacing(path) as beside, open(beside, "wb") as f:
        for source in tqdm(sources, desc="reading", unit="file", disable=len(sources) == 1):
            folder, good, bad = os.path.isdir(source), 0, []
            read = read_folder if folder else read_shard if source.endswith(".tar") else read_list
            for where, row, start, *span in read(source):
                try:
                    if isinstance(row, ValueError):
                        raise row
                    record = Record.read(row, start, *span)
                    if not span and not os.path.isfile(record.image):
                        raise ValueError(f"no such image: {record.image}")
                except ValueError as error:
                    bad.append(f"{where}: {error}")
                    continue
                file = os.path.relpath(os.path.realpath(source if span else record.image), base)
                identity = hashlib.sha256(repr((file, bool(span) and row["image"])).encode())
                digest.update(identity.digest() + repr((record[1:3], record.span[1:])).encode())
                index.extend((f.tell(), int.from_bytes(identity.digest()[:7])))
                f.write(json.dumps(record, ensure_ascii=False).encode(errors="replace") + b"\n")
                captioned, questioned = captioned + bool(record.captions), questioned + bool(record.questions)
                good += 1
            if not good and not bad:
                raise ValueError(f"{source}: holds no images with texts")
            if not good or len(bad) > good and not folder:
                raise ValueError(f"{source}: {len(bad)} records cannot be used, {good} can; {' '.join(bad[:1])}")
            incomplete += bad
        index.extend((f.tell(), 0))
        f.write(json.dumps([digest.hexdigest()[:12], captioned, questioned, len(incomplete), incomplete[:1]]).encode())
        np.save(f"{path}.npy", np.reshape(index, (-1, 2)))


# ---------------------------------------------------------------- what training takes: images or latents, in batches

def readable(source, i):
    """Image i (H,W,3); None, and a warning, if it cannot be read."""
    try:
        return source.image(i)
    except (ValueError, OSError) as error:
        warn_once(f"{error}; left out")


class Subset(NamedTuple):
    """Some records of a source."""
    source: object                 # World or Records
    ids: np.ndarray                # which records
    latents: str = ""              # a .npy; its [i]: moments of image i

    def record(self, k):
        """-> which record the k-th is, and its image: moments (2,C,h,w), or pixels (3,H,W) in [-1,1]. An image that
        cannot be read is replaced by the next."""
        for i in (int(self.ids[n % len(self.ids)]) for n in range(k, k + 100)):
            if self.latents:
                return i, torch.tensor(mapped(self.latents)[i])
            if (image := readable(self.source, i)) is not None:
                return i, torch.from_numpy(to_pixels([image])[0])
        raise ValueError("a hundred images in a row cannot be read: mend the data")


def with_latents(subset, vae, folder, limit):
    """The subset with its images encoded, if they are at most `limit`. Done once: the moments are in a file whose name
    is a hash of all that they depend on. Images that cannot be read are left out of the subset, NaN in the file."""
    source, ids, _ = subset
    if len(ids) > limit:
        return subset
    side = source.size // vae.config.factor
    shape = (vae.config.latent_channels, side, side)
    times = [source.changed(i) for i in ids.tolist()] if isinstance(source, Records) else []
    key = hashlib.sha256(repr((source.fingerprint, source.size, len(ids), shape, times)).encode())
    for tensor in vae.state_dict().values():
        key.update(tensor.float().cpu().numpy().tobytes())
    path = os.path.join(folder, f"latents-{key.hexdigest()[:12]}.npy")
    if not os.path.exists(path):
        encode_images(source, ids, vae, (int(max(ids)) + 1, 2, *shape), path)
    ids = ids[~np.isnan(mapped(path)[ids, 0, 0, 0, 0])]
    if not len(ids):
        raise ValueError("none of the images can be read")
    return Subset(source, ids, path)


@torch.no_grad()
def encode_images(source, ids, vae, shape, path):
    device = next(vae.parameters()).device
    tqdm.write(f"encoding the images of {len(ids):,} records once, into {path}", file=sys.stderr)
    if (total := 2 * np.prod(shape)) > shutil.disk_usage(os.path.dirname(path) or ".").free:
        raise OSError(f"{path} would take {total / 1e9:.1f} GB, and the disk has less: free some, or give a smaller "
                      "--latents")
    with replacing(path) as beside:
        latents = np.lib.format.open_memmap(beside, "w+", np.float16, shape)
        for part in slices(len(ids), source.size, source.size, "encoding"):
            images = {i: image for i in ids[part].tolist() if (image := readable(source, i)) is not None}
            latents[ids[part]] = np.nan
            if images:
                moments = vae.encode(torch.from_numpy(to_pixels(images.values())).to(device))
                latents[list(images)] = torch.stack(moments, 1).float().cpu().numpy()
        latents.flush()


class Batch(NamedTuple):
    """What one process computes in one pass of a step."""
    images: torch.Tensor              # (B,2,C,h,w) moments or (B,3,H,W) pixels, for the image loss
    text_images: torch.Tensor | None  # the same for the text loss, where that is about other images (--text-data)
    captions: torch.Tensor            # (B,L) tokens for the image loss
    tokens: torch.Tensor              # (B,L) for the text loss
    maskable: torch.Tensor            # (B,L) bool, which of them may be masked
    rows: slice                       # which rows of the step's whole batch these are
    seed: int                         # of the step


def learning_ids(tokenizer, text, length, rng):
    """A caption, or a pair (question, answer), to learn from -> ids, maskable. Of a text that is too long, one of the
    windows in which it would be written, drawn at random; the first is written whole."""
    *question, text = [text] if isinstance(text, str) else text
    prompt, words = tokenizer.prompt_ids(*question, length) if question else [], tokenizer.encode(text)[:-1]
    room = length - 1 - len(prompt)
    if 0 < room <= len(words):  # no place for its EOS
        start = pick(rng, [0, *range(room, len(words) + 1, block_size(room))])
        if start:
            return window_ids(tokenizer, prompt, words, start, length)
    return tokenizer.question_ids(*question, text, length) if question else tokenizer.caption_ids(text, length)


def block_size(room):
    """Of all the tokens of a window but prompt and last EOS, how many are new."""
    return max(1, room // 4)


def window_ids(tokenizer, prompt, words, start, length):
    """A window into a long text -> ids, maskable: the prompt, the words before `start`, as many as fit, and a block to
    be written. The block holds the words from `start` on, then EOS."""
    room = length - 1 - len(prompt)
    block = block_size(room)
    fresh = (words[start:] + [tokenizer.eos_id] * block)[:block]
    return ([*prompt, *words[start - (room - block):start], *fresh, tokenizer.eos_id],
            [False] * (len(prompt) + room - block) + [True] * block + [False])


class Batches(torch.utils.data.Dataset):
    """batches[step] -> what one process computes at a step: a list of `accumulate` Batch, together the `rows` (a slice)
    of the whole batch. Rows are an endless stream, in which each epoch has every record once. A row is a function of
    the seed and its number. So a step is the same on any number of processes, and after any interruption. images,
    texts: Subsets for the two losses, or twice the same. recipe: a train.Recipe."""
    def __init__(self, images, texts, tokenizer, recipe, seed, rows, accumulate=1):
        self.images, self.texts, self.tokenizer = images, texts, tokenizer
        self.recipe, self.seed, self.rows, self.accumulate = recipe, seed, rows, accumulate

    def __getitem__(self, step):
        batches, first = [], step * self.recipe.batch
        size = (self.rows.stop - self.rows.start) // self.accumulate
        for start in range(self.rows.start, self.rows.stop, size):
            rows = slice(start, start + size)
            images, text_images, *texts = zip(*(self.row(first + k) for k in range(start, start + size)))
            text_images = None if self.texts is self.images else torch.stack(text_images)
            batches.append(Batch(torch.stack(images), text_images, *map(torch.tensor, texts), rows,
                                 self.seed * 1_000_003 + step))
        return batches

    def row(self, n):
        """Row n of the stream -> image, image of the text loss, caption's ids, text's ids, and which are maskable."""
        recipe, tokenizer, rng = self.recipe, self.tokenizer, np.random.default_rng([self.seed, 1, n])
        i, image = self.record(self.images, n)
        caption, text = draw_texts(self.images.source, i, rng, recipe)
        text_image = image
        if self.texts is not self.images:  # --text-data
            j, text_image = self.record(self.texts, n)
            text = draw_texts(self.texts.source, j, rng, recipe)[1]
        return image, text_image, tokenizer.encode(caption, recipe.length), *learning_ids(
            tokenizer, text, recipe.length, rng)

    def record(self, subset, n):
        epoch, k = divmod(n, len(subset.ids))
        return subset.record(self.order(len(subset.ids), epoch)[k])

    @functools.lru_cache(maxsize=4)  # the last two epochs of two subsets, 8 bytes per record
    def order(self, total, epoch):
        return np.random.default_rng((self.seed, epoch)).permutation(total)


# ---------------------------------------------------------------- what all files share

PIXELS = 2 ** 18  # of all images that go through the networks at once: 64 of 64x64, one of 512x512; more gains nothing


def slices(count, height, width, desc=None):
    """Slices of `count` images of that size, each slice of at most PIXELS. Several show a bar on a terminal."""
    size = max(1, PIXELS // (height * width))
    parts = [slice(at, min(at + size, count)) for at in range(0, count, size)]
    return tqdm(parts, desc, leave=False, disable=count <= size or None)


def warn(message):
    tqdm.write(f"warning: {message}", file=sys.stderr)  # tqdm's, or it would run into a bar


warn_once = functools.cache(warn)


def one_line(error):
    """An error's message as one short line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:120]


def parse(raw, where, kind):
    """JSON, bytes -> what they hold, a list or dict (`kind`). Raises ValueError with one line, which begins `where`."""
    try:
        value = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({one_line(error)})") from None
    if not isinstance(value, kind):
        raise ValueError(f'{where}: want {{"image": path, "caption": text}}{", in a list" * (kind is list)}')
    return value


def parsed(raw):
    """A JSON object, bytes -> dict, or the ValueError."""
    try:
        return parse(raw, "a record", dict)
    except ValueError as error:
        return error


@contextmanager
def replacing(path):
    """-> where to write a file: beside `path`, which it replaces once it is whole. So a full disk or a Ctrl-C leaves
    what was there. Raises OSError with one line; a mistake in what is to be written (ValueError) passes as it is."""
    try:
        yield f"{path}.partial"
        with suppress(OSError):  # of a file system without rights
            os.umask(umask := os.umask(0))  # it can only be read by setting it
            os.chmod(f"{path}.partial", 0o666 & ~umask)  # safetensors gives files narrower rights than files have here
        os.replace(f"{path}.partial", path)
    except Exception as error:
        if os.path.isfile(f"{path}.partial"):
            os.remove(f"{path}.partial")
        if isinstance(error, ValueError):
            raise
        raise OSError(f"{path}: could not be written ({one_line(error)})") from None


def claim(path):
    """-> a lock, held until closed. Raises OSError where another run has it. (kill -9 of torchrun leaves workers.)"""
    lock = open(path, "a")
    try:
        import fcntl  # Windows has none
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(f"{os.path.dirname(path)}: another run is at work here; let it end, or stop its processes")
    except (ImportError, OSError) as error:
        warn(f"{path}: no locks here ({one_line(error)}), so see to it that no other run writes into this folder")
    return lock
