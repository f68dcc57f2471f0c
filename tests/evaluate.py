"""Tests a model, where test_*.py test the code. What is measured, and by whose definition, each benchmark below says.

    python tests/evaluate.py world                                    the shipped model, on the built-in world
    python tests/evaluate.py world --order random entropy --steps 4 16        how many passes does reading take?
    python tests/evaluate.py blanks                                   blanks in texts, filled in
    python tests/evaluate.py drawings                                 how many steps does drawing take?
    python tests/evaluate.py best-of                                  drawings, of which the model chooses
    python tests/evaluate.py data --ckpt FILE --data TEST.jsonl       a model of your own, on images of your own
    python tests/evaluate.py vqa --ckpt FILE --annotations A.json --questions Q.json --images DIR --out R.json
    python tests/evaluate.py vqa --annotations A.json --results R.json        scores what is there, without a model

A benchmark is one function. Those in JUDGED take the model and the arguments, and give {name: scores}, the scores from
0 (wrong) to 1 (right), one per answer, caption or drawing. The others are in published.py: those in ASKED give what to
ask, and a function from the answers to the lines to print; those in DRAWN give what to draw. All else is shared:
arguments, progress bars, the 95% interval of a mean, and result files in the official format. The measures are in
metrics.py. So to add a benchmark is to write its function and to list it.
"""
import argparse
import colorsys
import itertools
import json
import os
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch comes; sample.py says why

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import published
from metrics import interval, vqa_score

import data
from model import DTYPES, DualDiffusion, check_complete
from sample import (
    ORDERS,
    SHIPPED,
    Parser,
    add_parts,
    answer,
    at_least,
    caption,
    default_device,
    existing_device,
    fail,
    infill,
    keep_likeliest,
    latent_size,
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
    tried on true images. The definitions are ours. A model of stage 0 is judged by its reconstructions. With --order or
    --steps instead the paper's Table 5 in miniature: what is right, and in how many passes."""
    if args.order or args.steps:
        return read_in_orders(dd, args)
    source = data.World(UNSEEN + args.seed, kinds=args.kinds)
    held_out = data.World(source.seed, "held", source.kinds)
    ids = range(args.num)
    rng, generator = np.random.default_rng([args.seed, 2]), torch.Generator().manual_seed(args.seed)

    scores = {"reader, true scenes": judge_scenes(source, ids, map(source.image, ids))}
    if dd.ddit is None:
        return scores | {"scenes read back": judge_scenes(source, ids, reconstruct(dd, source, ids))}

    kinds, questions = scene_questions(source, ids, rng)
    scores["answers"] = judge_answers(dd, source, questions, generator)
    for kind in dict.fromkeys(source.kinds):
        scores[f"  {kind}"] = [score for score, other in zip(scores["answers"], kinds) if other == kind]
    questions = [(i, *pair) for i in ids if (pair := held_out.question(i, rng))]
    scores["answers, held-out pairs"] = judge_answers(dd, held_out, questions, generator)
    scores["captions"] = judge_captions(dd, source, ids, generator)
    generator.manual_seed(args.seed)  # so that drawings do not depend on what was read before
    scores["objects drawn"], scores["scenes drawn"] = judge_drawings(dd, source, ids, rng, generator)
    return scores


def read_in_orders(dd, args):
    """Prints a line per order and number of steps: the captions and answers that are right, and the forward passes that
    a text takes. All share the scenes and questions of `world`."""
    source, ids = data.World(UNSEEN + args.seed, kinds=args.kinds), range(args.num)
    _, questions = scene_questions(source, ids, np.random.default_rng([args.seed, 2]))
    widest, rows = [0.0, 0.0], rows_of_passes(dd)  # widest: of the intervals, in points to one side
    print("| order | steps | captions | passes | answers | passes |\n|---|---|---|---|---|---|")
    for order in args.order or ["random"]:
        for steps in args.steps or [None]:
            cells = [order, str(steps or "") if order == "random" else ""]
            how = {"order": order, "steps": steps, "temperature": args.temperature}
            for k, (judge, inputs) in enumerate(((judge_captions, ids), (judge_answers, questions))):
                rows.clear()
                right = judge(dd, source, inputs, torch.Generator().manual_seed(args.seed), **how)
                count = max(1, len(right))
                cells += [f"{100 * sum(right) / count:.1f}%", f"{sum(rows) / count:.2f}"]
                low, high = interval(right)
                widest[k] = max(widest[k], (high - low) / 2)
            print(f"| {' | '.join(cells)} |", flush=True)
            if order != "random":  # it chooses the number of passes itself
                break
    print("\n95% intervals: at most {:.1f} points to each side for captions, {:.1f} for answers".format(*widest))
    return {}


def blanks(dd, args):
    """Filling blanks: one to four words in a row, left out of a caption of each scene, which must be true when filled.

    The definitions are ours."""
    source, rng = data.World(UNSEEN + args.seed), np.random.default_rng([args.seed, 3])
    generator, scores = torch.Generator().manual_seed(args.seed), {}
    captions = [source.caption(i, rng).split() for i in range(args.num)]
    for count in 1, 2, 3, 4:
        texts = []
        for words in captions:
            k = rng.integers(len(words) - count + 1)
            gap = ["_," if word.endswith(",") else "_" for word in words[k:k + count]]
            texts.append(" ".join([*words[:k], *gap, *words[k + count:]]))
        filled = []
        for part, pixels in image_batches(dd, source, range(args.num), "filling blanks"):
            filled += infill(dd, pixels, texts[part], generator=generator)
        scores[f"{count} in a row"] = [caption_holds(text, source.scene(i)[0]) for i, text in enumerate(filled)]
    return scores


def drawings(dd, args):
    """How many of Euler's steps (--steps) a drawing needs, with guidance at all times, and only at the model's own.

    What is drawn are captions with held-out pairs. A step takes two forward passes with guidance, else one: behind the
    colon is their sum."""
    source, ids, scores, rows = data.World(UNSEEN + args.seed, "held"), range(args.num), {}, rows_of_passes(dd)
    prompts = [source.caption(i, np.random.default_rng([args.seed, 2, i])) for i in ids]
    for guided, times in ("all", (0.0, 1.0)), ("some", dd.config.settings.cfg_times):
        dd.config.settings.cfg_times = times
        for steps in args.steps or (4, 5, 6, 8, 28):
            generator, right = torch.Generator().manual_seed(args.seed), []
            rows.clear()
            for part in data.slices(len(ids), source.size, source.size, dd.device, "drawing"):
                pixels = text_to_image(dd, prompts[part], steps=steps, generator=generator)
                right += judge_images(prompts[part], pixels)
            scores[f"{steps} steps, {guided} guided: {sum(rows) / len(ids):.0f}"] = right
    return scores


def best_of(dd, args):
    """The model as judge of its own drawings: of four per prompt it keeps the one from which it best reads the prompt.

    Prompts have held-out pairs of colour and shape; `read_scene` says what is right. The definition is ours."""
    source, ids = data.World(UNSEEN + args.seed, "held"), range(args.num)
    prompts, scores = [source.caption(i, np.random.default_rng([args.seed, 2, i])) for i in ids], {}
    for steps, cfg in (28, 1), (6, 3), (28, 3):
        generator, name = torch.Generator().manual_seed(args.seed), f"{steps} steps, cfg {cfg}"
        scores[f"{name}, each"], scores[f"{name}, best of 4"] = [], []
        for part in data.slices(len(ids), source.size, source.size, dd.device, "drawing"):
            four = [prompt for prompt in prompts[part] for _ in range(4)]
            pixels = text_to_image(dd, four, steps=steps, cfg=cfg, generator=generator)
            best = keep_likeliest(dd, pixels, prompts[part], 4)
            scores[f"{name}, each"] += judge_images(four, pixels)
            scores[f"{name}, best of 4"] += judge_images(prompts[part], best)
    return scores


def own_data(dd, args):
    """Images of your own (--data): one answer and one caption for each, which must equal the one in the data.

    Capitals and blanks at the ends do not count. Where a record has several captions or questions, one is drawn. Where
    it has the answers of four people or more, they count as in VQA; of two or three, each is right. With --unseen only
    those images that train.py kept apart. A model of stage 0 is judged by its reconstructions."""
    settings = dd.config.settings
    source = data.Records(args.data, settings.size, held_out=settings.held_out or data.HELD_OUT)
    rng, generator = np.random.default_rng([args.seed, 2]), torch.Generator().manual_seed(args.seed)
    ids = source.split()[0] if args.unseen else np.arange(len(source))
    chosen = np.random.default_rng(args.seed).permutation(ids)[:args.num]
    ids = [int(i) for i in chosen if data.readable(source, int(i)) is not None]
    if not ids:
        fail(f"{' '.join(args.data)}: no image can be read")
    if dd.ddit is None:
        reconstruct(dd, source, ids)
        return {}

    questions = [(i, *entry) for i in ids if (entry := data.pick(rng, source.record(i).questions or (None,)))]
    captioned = [i for i in ids if source.caption(i, np.random.default_rng(0)) is not None]
    scores = {"answers": judge_answers(dd, source, questions, generator)}
    captions = write_captions(dd, source, captioned, generator)
    scores["captions"] = [same_text(text, source.caption(i, rng)) for i, text in zip(captioned, captions)]
    return scores


JUDGED = {"world": world, "blanks": blanks, "drawings": drawings, "best-of": best_of,
          "data": own_data}
ASKED = {name: getattr(published, name) for name in ("vqa", "gqa", "pope", "mme", "coco")}
DRAWN = {name: getattr(published, name) for name in ("geneval", "pictures")}
BENCHMARKS = JUDGED | ASKED | DRAWN


# ---------------------------------------------------------------- asking and drawing, with result files


def begin(path, args, inputs):
    """-> what an interrupted command with the same model, seed, type and inputs has written into `path`; else None, and
    that file is begun. Another's is refused."""
    files = [file for part in (args.ckpt, args.t5, args.vae, args.spiece) if part for file in data.files_of(part)]
    made = {"model": [data.content_hash(file, pieces=256) for file in files], "seed": args.seed,
            "dtype": str(args.dtype), "inputs": data.short_hash(inputs)}
    if not os.path.exists(path):
        data.write_text(path, json.dumps({"made": made, "texts": []}))
    with open(path) as f:
        before = json.load(f)
    if before["made"] != made:
        fail(f"{path}: was begun with another model, seed, type or inputs; remove it, or give another --out")
    return before


def answers_of(dd, args, asked, paths):
    """-> list of str, what the model says about the images. Every batch has random numbers of its own. They are written
    after each batch, and an interrupted command goes on."""
    size = dd.config.settings.size
    kept = f"{asked.path}.begun"
    done = begin(kept, args, (asked, paths))
    texts = done["texts"]
    for part in data.slices(len(paths), size, size, dd.device, f"answering {os.path.basename(asked.path)}"):
        if part.start < len(texts):
            continue
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + part.start)
        pixels = torch.from_numpy(data.to_pixels([data.load_image(path, size) for path in paths[part]]))
        new = (answer(dd, pixels, asked.texts[part], generator=generator) if asked.texts else
               caption(dd, pixels, generator=generator))
        new = [" ".join(text.split()) for text in new]
        texts += [text.lower().rstrip(".") for text in new] if args.benchmark == "gqa" else new
        data.write_text(kept, json.dumps(done))
    return texts


def ask(args):
    """A benchmark of questions, scored from --results, or from those that the model is asked to write -> the lines to
    print."""
    sheets, score = read_published(ASKED, args)
    if not all(asked.keys for asked in sheets):
        fail(f"{args.annotations or args.questions}: no question has a truth")
    if not args.results:
        paths = [published.find_images(args.images, asked.images, os.path.splitext(os.path.basename(asked.path))[0])
                 for asked in sheets]
        dd = load_model(args)
        os.makedirs(args.out if args.benchmark == "mme" else os.path.dirname(args.out) or ".", exist_ok=True)
        for asked, images in zip(sheets, paths):
            published.write_results(asked, answers_of(dd, args, asked, images))
    return score(*map(published.read_results, sheets))


def draw(args):
    """A benchmark of drawings, into a new folder, or that of an interrupted command. Every image has random numbers of
    its own. -> the lines to print"""
    jobs, notes = read_published(DRAWN, args)
    begun = f"{args.out}/.begun"
    if os.path.exists(args.out) and os.listdir(args.out) and not os.path.exists(begun):
        fail(f"{args.out}: holds files; give an empty folder, or a new one")
    dd = load_model(args)
    os.makedirs(args.out, exist_ok=True)
    begin(begun, args, jobs)
    settings = dd.config.settings
    shape = (dd.config.vae.latent_channels, *latent_size(dd, settings.size, settings.size))
    for folder in {os.path.dirname(path) for _, path in jobs}:
        os.makedirs(folder, exist_ok=True)
    for path, text in notes.items():
        with open(path, "w") as f:
            f.write(text)
    missing = [k for k, (_, path) in enumerate(jobs) if not os.path.exists(path)]
    for part in data.slices(len(missing), settings.size, settings.size, dd.device, "drawing"):
        prompts, paths = zip(*[jobs[k] for k in missing[part]])
        seeds = [args.seed * 1_000_003 + k for k in missing[part]]
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
        for path, image in zip(paths, data.to_images(text_to_image(dd, prompts, noise=noise))):
            with data.replacing(path) as beside:
                Image.fromarray(image).save(beside, "PNG")
    return [f"{args.out}: {len(jobs)} images"]


def read_published(benchmarks, args):
    """What a benchmark makes of its published files. If they have another form, this ends the program."""
    try:
        return benchmarks[args.benchmark](args)
    except (LookupError, TypeError, AttributeError) as error:
        files = " and ".join(filter(None, (args.annotations, args.questions, args.prompts)))
        why = f"no {error}" if isinstance(error, KeyError) else data.one_line(error)
        fail(f"{files}: not in the form in which {args.benchmark} is published ({why})")


# ---------------------------------------------------------------- one judge per thing judged


def image_batches(dd, source, ids, desc):
    """The images of `ids`, as many at once as go through the networks -> pairs of (slice of ids, pixels (B,3,H,W))."""
    for part in data.slices(len(ids), source.size, source.size, dd.device, desc):
        yield part, torch.from_numpy(data.to_pixels([source.image(i) for i in ids[part]]))


def rows_of_passes(dd):
    """-> a list, to which every forward pass of the transformer will add its number of rows."""
    rows = []
    dd.ddit.register_forward_pre_hook(lambda ddit, inputs: rows.append(len(inputs[0])))
    return rows


def same_text(text, truth):
    return text.strip().lower() == truth.strip().lower()


def scene_questions(source, ids, rng):
    """Of every kind one question per scene, where the scene allows it -> kinds, questions (i, question, answer)."""
    questions = [(kind, (i, *pair)) for i in ids for kind in dict.fromkeys(source.kinds)
                 if (pair := source.question(i, rng, kind))]
    return [kind for kind, _ in questions], [question for _, question in questions]


def judge_answers(dd, source, questions, generator, **how):
    """questions: [(i, question, its right answer or those of several people)] about images i of the source -> list of
    scores, 0 to 1."""
    ids, texts, truths = zip(*((i, text, people) for i, text, *people in questions)) if questions else ((), (), ())
    answers = [text for part, pixels in image_batches(dd, source, ids, "answering")
               for text in answer(dd, pixels, texts[part], generator=generator, **how)]
    return [vqa_score(text, people) if len(people) > 3 else any(same_text(text, truth) for truth in people)
            for text, people in zip(answers, truths)]


def write_captions(dd, source, ids, generator, **how):
    """-> list of str, the model's caption of each image."""
    return [text for _, pixels in image_batches(dd, source, ids, "captioning")
            for text in caption(dd, pixels, generator=generator, **how)]


def judge_captions(dd, source, ids, generator, **how):
    """-> list of bool: is the model's caption of each scene of the world true?"""
    captions = write_captions(dd, source, ids, generator, **how)
    return [caption_holds(text, source.scene(i)[0]) for i, text in zip(ids, captions)]


def judge_images(captions, pixels):
    """-> list of bool: does each caption hold for the scene that its image shows?"""
    return [caption_holds(text, read_scene(image)) for text, image in zip(captions, data.to_images(pixels))]


def judge_drawings(dd, source, ids, rng, generator):
    """Draw one caption of each scene of the world -> two lists of bool: for every object, whether the image shows it;
    for every scene, whether its caption is true of the image."""
    captions, objects, scenes = [source.caption(i, rng) for i in ids], [], []
    for part in data.slices(len(ids), source.size, source.size, dd.device, "drawing"):
        pixels = text_to_image(dd, captions[part], generator=generator)
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
                   for _, pixels in image_batches(dd, source, ids, "reconstructing")]
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
        return data.SHAPES[shape](X - x, Y - y, radius) < 0

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


def report(scores):
    """{name: scores} -> one line per name that has any: the mean in per cent, its interval, the sum of how many."""
    return "\n".join("{:26s}{:6.1f}%  [{:.1f}, {:.1f}]  {:.10g}/{}".format(
        name, 100 * sum(values) / len(values), *interval(values), sum(values), len(values))
        for name, values in scores.items() if values)


NEEDS = {"world": "", "blanks": "", "drawings": "", "best-of": "", "data": "data",
         "vqa": "annotations images", "gqa": "questions images", "pope": "questions images", "mme": "questions images",
         "coco": "annotations images", "geneval": "prompts out", "pictures": "prompts out"}


def check_files(args):
    """Does the benchmark have the files that it needs, and no others?"""
    needs = NEEDS[args.benchmark].split()
    may = {*needs, *(["results"] if args.benchmark in ASKED and args.benchmark != "coco" else []),
           *(["out"] if args.benchmark in ASKED else []),
           *(["questions"] if args.benchmark == "vqa" else [])}
    if args.results:
        needs = [name for name in needs if name == "annotations" or name == "questions" and args.benchmark != "mme"]
    for name in ("data", "annotations", "questions", "images", "results", "prompts", "out"):
        if getattr(args, name) and name not in may:
            fail(f"{args.benchmark} has no use for it: leave out --{name}")
    for name in needs:
        if not getattr(args, name):
            fail(f"{args.benchmark} wants --{name} (--help shows how)")
    if args.benchmark != "world" and (args.order or args.steps and args.benchmark != "drawings"):
        fail(f"{args.benchmark} has no use for it: leave out --order and --steps")
    if args.temperature and not (args.order or args.benchmark == "world" and args.steps):
        fail("--temperature is for world, with --order or --steps")
    if args.results and args.num:
        fail("--results are scored whole: leave out --num")


def parse_args():
    first_lines = (f"  {name:8s} {benchmark.__doc__.splitlines()[0]}" for name, benchmark in BENCHMARKS.items())
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    epilog="benchmarks:\n" + "\n".join(first_lines))
    parser.add_argument("benchmark", choices=list(BENCHMARKS))
    parser.add_argument("--ckpt", default=SHIPPED, metavar="FILE",
                        help="the model's file; default: the small model that ships")
    add_parts(parser)
    parser.add_argument("--data", nargs="+", help="images and texts, as train.py takes them: .json, .jsonl, .tar or "
                        "folders")
    parser.add_argument("--unseen", action="store_true", help="of --data only the images that train.py keeps apart and "
                        "never learns from: one in twenty")
    parser.add_argument("--annotations", metavar="FILE", help="of vqa, coco: what people said, as published")
    parser.add_argument("--questions", metavar="FILE", help="of vqa, gqa, pope, and of mme a folder: as published")
    parser.add_argument("--images", metavar="DIR", help="the folder of their images")
    parser.add_argument("--prompts", metavar="FILE", help="of geneval, pictures: what to draw")
    parser.add_argument("--out", metavar="FILE", help="where to write the results, in the official format, or the "
                        "images (an empty folder); default of the results: vqa.json, gqa.json, pope.jsonl, mme, "
                        "coco.json")
    parser.add_argument("--results", metavar="FILE", help="score these results, without a model")
    parser.add_argument("--num", type=at_least(1), help="images to judge on, at most, or of the published "
                        "benchmarks how many of the first questions, images, prompts; default: 1000, or all")
    parser.add_argument("--kinds", nargs="+", choices=list(data.KINDS), default=list(data.KINDS), metavar="KIND",
                        help="of questions in the built-in world; default: all")
    parser.add_argument("--order", nargs="+", choices=list(ORDERS), help="of world: the orders of unmasking to compare")
    parser.add_argument("--steps", nargs="+", type=at_least(1), help="of drawings, and of world: the numbers of "
                        "steps to compare")
    parser.add_argument("--temperature", type=at_least(0, float), default=0.0,
                        help="of world, with --order or --steps; default: 0")
    parser.add_argument("--seed", type=seed, default=0, help="of scenes, of what is drawn from --data, and of sampling")
    parser.add_argument("--device", type=existing_device, default=default_device())
    parser.add_argument("--dtype", choices=list(DTYPES), help="to compute in; default: bf16 on a GPU, fp32 on a CPU")
    args = parser.parse_args()
    check_files(args)
    if args.benchmark in JUDGED:
        args.num = args.num or 1000
    endings = {"pope": ".jsonl", "mme": ""}
    args.out = (args.results or args.out or args.benchmark + endings.get(args.benchmark, ".json")).rstrip("/")
    if args.benchmark in ("vqa", "gqa", "coco") and not args.results and not args.out.endswith(".json"):
        fail(f"--out {args.out}: give a name that ends in .json")
    return args


def load_model(args):
    dtype = DTYPES[args.dtype or ("bf16" if args.device.type == "cuda" else "fp32")]  # as sample.py
    dd = DualDiffusion.load(args.ckpt, args.t5, args.vae, args.spiece, args.device, dtype)
    autoencoder_alone = args.benchmark in JUDGED and dd.vae and not dd.ddit and not dd.t5  # what stage 0 leaves
    if not autoencoder_alone:
        check_complete(dd, args.ckpt)
    return dd


def main():
    args = parse_args()
    if args.benchmark in JUDGED:
        if scores := JUDGED[args.benchmark](load_model(args), args):
            print(report(scores))
    else:
        print("\n".join((ask if args.benchmark in ASKED else draw)(args)))


if __name__ == "__main__":
    run_program(main, lower="--num")
