"""Tests a model, where test_*.py test the code. What is measured, and by whose definition, each benchmark below says.

    python tests/evaluate.py world                                    the shipped model, on the built-in world
    python tests/evaluate.py data --ckpt FILE --data TEST.jsonl       a model of your own, on images of your own

A benchmark is one function: it takes the model and the arguments, and gives {name: scores}, the scores from 0 (wrong)
to 1 (right), one per answer, caption or drawing. All of them share what else there is: arguments, progress bars, the
95% interval of a mean. So to add one is to write that function and to list it in BENCHMARKS.
"""
import argparse
import colorsys
import itertools
import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch comes; sample.py says why

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data
from model import DTYPES, DualDiffusion, missing_parts
from sample import (
    SHIPPED,
    Parser,
    add_parts,
    answer,
    caption,
    default_device,
    existing_device,
    fail,
    number,
    run_program,
    seed,
    text_to_image,
)

UNSEEN = 1_000_000  # added to the seed for scenes that training never draws, as train.py does


# ---------------------------------------------------------------- the benchmarks


def world(dd, args):
    """The built-in world, on scenes that training never draws.

    Answers: of every kind one question per scene, where the scene allows it; they must equal the only right answer.
    Held-out pairs: one question per scene with a colour and a shape that training never shows together. Captions: any
    true one is right. Drawings: of one caption per scene, and what they show is found by `read_scene`, which is first
    tried on true images. The definitions are ours. A model of stage 0 is judged by its reconstructions."""
    source = data.World(UNSEEN + args.seed, kinds=args.kinds)
    held_out = data.World(source.seed, "held", source.kinds)
    ids, kinds = range(args.num), dict.fromkeys(source.kinds)
    rng, generator = np.random.default_rng([args.seed, 2]), torch.Generator().manual_seed(args.seed)

    scores = {"reader, true scenes": judge_scenes(source, ids, map(source.image, ids))}
    if dd.ddit is None:
        return scores | {"scenes read back": judge_scenes(source, ids, reconstruct(dd, source, ids))}

    questions = [(kind, i, *pair) for i in ids for kind in kinds if (pair := source.question(i, rng, kind))]
    right = judge_answers(dd, source, [question for _, *question in questions], generator)
    scores["answers"] = right
    for kind in kinds:
        scores[f"  {kind}"] = [score for score, question in zip(right, questions) if question[0] == kind]
    questions = [(i, *held_out.question(i, rng)) for i in ids]
    scores["answers, held-out pairs"] = judge_answers(dd, held_out, questions, generator)
    captions = write_captions(dd, source, ids, generator)
    scores["captions"] = [caption_holds(text, source.scene(i)[0]) for i, text in zip(ids, captions)]
    scores["objects drawn"], scores["scenes drawn"] = judge_drawings(dd, source, ids, rng, generator)
    return scores


def own_data(dd, args):
    """Images of your own (--data): one answer and one caption for each, which must equal the one in the data.

    Capitals and blanks at the ends do not count. Where a record has several captions or questions, one is drawn. With
    --unseen only those images that train.py kept apart. A model of stage 0 is judged by its reconstructions."""
    source = data.Records(args.data, dd.config.settings.size)
    rng, generator = np.random.default_rng([args.seed, 2]), torch.Generator().manual_seed(args.seed)
    ids = source.split(250)[0] if args.unseen else np.arange(len(source))
    chosen = np.random.default_rng(args.seed).permutation(ids)[:args.num]
    bad = []
    ids = [int(i) for i in chosen if data.readable(source, int(i), bad) is not None]
    if bad:
        data.warn(f"{len(bad)} images cannot be read and are left out, the first: {bad[0]}")
    if not ids:
        fail(f"{' '.join(args.data)}: no image can be read")
    if dd.ddit is None:
        reconstruct(dd, source, ids)
        return {}

    questions = [(i, *pair) for i in ids if (pair := source.question(i, rng))]
    captioned = [i for i in ids if source.caption(i, np.random.default_rng(0)) is not None]
    scores = {"answers": judge_answers(dd, source, questions, generator)}
    captions = write_captions(dd, source, captioned, generator)
    scores["captions"] = [same_text(text, source.caption(i, rng)) for i, text in zip(captioned, captions)]
    return {name: values for name, values in scores.items() if values}


BENCHMARKS = {"world": world, "data": own_data}


# ---------------------------------------------------------------- one judge per thing judged


def image_batches(source, ids, desc):
    """The images of `ids`, as many at once as go through the networks -> pairs of (slice of ids, pixels (B,3,H,W))."""
    for part in data.slices(len(ids), source.size, source.size, desc):
        yield part, torch.from_numpy(data.to_pixels([source.image(i) for i in ids[part]]))


def same_text(text, truth):
    return text.strip().lower() == truth.strip().lower()


def write_answers(dd, source, ids, questions, generator):
    """One question about each image -> list of str, the model's answers."""
    return [text for part, pixels in image_batches(source, ids, "answering")
            for text in answer(dd, pixels, questions[part], generator=generator)]


def judge_answers(dd, source, questions, generator):
    """questions: [(i, question, its right answer)] about images i of the source -> list of bool."""
    ids, texts, truths = zip(*questions) if questions else ((), (), ())
    return list(map(same_text, write_answers(dd, source, ids, texts, generator), truths))


def write_captions(dd, source, ids, generator):
    """-> list of str, the model's caption of each image."""
    return [text for _, pixels in image_batches(source, ids, "captioning")
            for text in caption(dd, pixels, generator=generator)]


def judge_drawings(dd, source, ids, rng, generator):
    """Draw one caption of each scene of the world -> two lists of bool: for every object, whether the image shows it;
    for every scene, whether its caption is true of the image."""
    captions, objects, scenes = [source.caption(i, rng) for i in ids], [], []
    settings = dd.config.settings
    for part in data.slices(len(ids), source.size, source.size, "drawing"):
        pixels = text_to_image(dd, captions[part], cfg=settings.cfg, shift=settings.shift, generator=generator)
        for i, text, image in zip(ids[part], captions[part], data.to_images(pixels)):
            things = read_scene(image)
            objects += [str(thing) in map(str, things) for thing in source.scene(i)[0]]
            scenes.append(caption_holds(text, things))
    return objects, scenes


def judge_scenes(source, ids, images):
    """Does each image show its scene of the world? -> list of bool."""
    return [sorted(read_scene(image)) == sorted(source.scene(i)[0]) for i, image in zip(ids, images)]


def reconstruct(dd, source, ids):
    """The images after the autoencoder's round trip (N,H,W,3) uint8. Prints how near they are (PSNR)."""
    with torch.no_grad():
        decoded = [data.to_images(dd.decode_image(dd.encode_image(pixels)))
                   for _, pixels in image_batches(source, ids, "reconstructing")]
    decoded = np.concatenate(decoded)
    error = np.mean([np.square(source.image(i) / 255.0 - image / 255.0).mean() for i, image in zip(ids, decoded)])
    print(f"reconstruction of {len(ids)} images: {-10 * np.log10(error):.1f} dB")
    return decoded


# ---------------------------------------------------------------- truth in the built-in world, without any network


def caption_holds(text, things):
    """Is a caption wholly true of a scene (a list of Thing)? It is if it is one of those that the world itself could
    give: of these things, in some order, with some relation that is true of the first two. A full stop at the end,
    capitals and double spaces do not count."""
    text = " ".join(text.lower().strip().rstrip(".").split()).removeprefix("there is ")
    if not 1 <= len(things) <= 3:  # a drawing may show more than any scene has
        return False
    for order in itertools.permutations(things):
        first, second = order[0], order[:2][-1]  # of one thing no relation is true
        relations = [relation for relation in data.RELATIONS if data.related(first.quarter, relation, second.quarter)]
        if any(text in data.phrasings(order, relation) for relation in relations or [None]):
            return True
    return False



Y, X = np.mgrid[0:data.SIDE, 0:data.SIDE] + 0.5  # the centres of the pixels


def read_scene(image):
    """What an image of the world shows, (64,64,3) uint8 -> list of Thing. One whose outline is no shape of the world
    has the shape "unknown".

    What differs from the border's colour by more than 80 (half of the faintest object's contrast) is foreground. Each
    connected patch of it is one thing: its hue gives the colour, the best-fitting outline the shape and the size, its
    middle the quarter."""
    image = image.astype(float)
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    things = []
    for patch in patches(abs(image - np.median(border, axis=0)).max(axis=2) > 80):
        y, x = Y[patch].mean(), X[patch].mean()
        shape, radius = fit_outline(patch, y, x)
        hue = 360 * colorsys.rgb_to_hsv(*np.median(image[patch], axis=0) / 255)[0]
        color = min(data.COLORS, key=lambda name: abs((hue - data.COLORS[name] + 180) % 360 - 180))
        size = "small" if radius < (data.SIZES["small"][1] + data.SIZES["large"][0]) / 2 else "large"
        things.append(data.Thing(size, color, shape, int(y > 32) * 2 + int(x > 32)))
    return things


def patches(foreground):
    """(H,W) bool -> its connected patches, each (H,W) bool. Specks of less than 16 pixels do not count; the smallest
    object has 60."""
    label = np.where(foreground, np.arange(1, foreground.size + 1).reshape(foreground.shape), 0)
    while True:  # every pixel takes the largest label among itself and its neighbours, until nothing changes
        pad = np.pad(label, 1)
        spread = np.maximum.reduce([label, pad[2:, 1:-1], pad[:-2, 1:-1], pad[1:-1, 2:], pad[1:-1, :-2]]) * foreground
        if (spread == label).all():
            break
        label = spread
    candidates = (label == number for number in np.unique(label[foreground]))
    return [patch for patch in candidates if patch.sum() >= 16]


def fit_outline(patch, y, x):
    """The shape whose outline of equal area, about the patch's middle, covers it best -> its name, its radius."""
    def covers(shape, y, x, radius):
        return data.distance(shape, X - x, Y - y, radius) < 0

    area = patch.sum()
    best, shape, radius = 0.7, "unknown", (area / 3.0) ** 0.5
    for candidate in data.SHAPES:
        r = 16.0 * (area / covers(candidate, 32, 32, 16.0).sum()) ** 0.5  # the radius that gives this area
        outline = covers(candidate, y, x, r)
        overlap = (outline & patch).sum() / (outline | patch).sum()
        if overlap > best:
            best, shape, radius = overlap, candidate, r
    return shape, radius


# ---------------------------------------------------------------- figures, arguments


def interval(scores):
    """Wilson's 95% interval of a share, from its scores, in per cent. Of scores between 0 and 1 it is a safe one: none
    vary more, with the same mean, than those that are all 0 or 1."""
    z, n = 1.96, max(len(scores), 1)
    p = sum(scores) / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return tuple(100 * min(max((middle + sign * half) / (1 + z * z / n), 0), 1) for sign in (-1, 1))


def report(scores):
    """{name: scores} -> one line per name: the mean in per cent, its interval, the sum of how many."""
    return "\n".join("{:26s}{:6.1f}%  [{:.1f}, {:.1f}]  {:.10g}/{}".format(
        name, 100 * sum(values) / max(len(values), 1), *interval(values), sum(values), len(values))
        for name, values in scores.items())


def parse_args():
    first_lines = (f"  {name:6s} {benchmark.__doc__.splitlines()[0]}" for name, benchmark in BENCHMARKS.items())
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="benchmarks:\n" + "\n".join(first_lines))
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--ckpt", default=SHIPPED, metavar="FILE",
                        help="the model's file; default: the small model that ships")
    add_parts(parser)
    parser.add_argument("--data", nargs="+", help="images and texts, as train.py takes them: .json, .jsonl, .tar or "
                        "folders")
    parser.add_argument("--unseen", action="store_true", help="of --data only the images that train.py keeps apart and "
                        "never learns from: one in twenty, at most 250")
    parser.add_argument("--num", type=number(int, 1, 10 ** 6), default=1000,
                        help="images to judge on, at most; default: 1000")
    parser.add_argument("--kinds", nargs="+", choices=[*data.KINDS, "same"], default=list(data.KINDS), metavar="KIND",
                        help="of questions in the built-in world, as train.py's; default: all but same")
    parser.add_argument("--seed", type=seed, default=0, help="of scenes, of what is drawn from --data, and of sampling")
    parser.add_argument("--device", type=existing_device, default=default_device())
    parser.add_argument("--dtype", choices=list(DTYPES), help="to compute in; default: bf16 on a GPU, fp32 on a CPU")
    args = parser.parse_args()
    if args.benchmark == "world" and args.data:
        fail("world draws its own images: leave out --data, or take the benchmark data")
    if args.benchmark != "world" and not args.data:
        fail(f"{args.benchmark} wants --data: the images and texts to judge on")
    return args


def main():
    args = parse_args()
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]  # as sample.py
    dd = DualDiffusion.load(args.ckpt, args.t5, args.vae, args.spiece, args.device, dtype)
    autoencoder_alone = dd.vae and not dd.ddit and not dd.t5  # what stage 0 leaves
    if (missing := missing_parts(dd)) and not autoencoder_alone:
        fail(f"{args.ckpt}: holds no {' and no '.join(missing)}; `python sample.py --ckpt {args.ckpt} --describe` "
             f"tells what it holds")
    if scores := BENCHMARKS[args.benchmark](dd, args):
        print(report(scores))


if __name__ == "__main__":
    run_program(main, lower="--num")
