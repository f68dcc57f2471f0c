"""The paper's ablations in miniature: the tiny preset, the built-in world, a few minutes per run.

    python tests/ablations.py                 all runs of seeds 0, 1, 2 (some two hours), then the table
    python tests/ablations.py --seeds 0       one seed; several such programs may run beside each other

Every run is one call of train.py, and is printed, so it can be typed alone. What is finished is not done again, and an
interrupted run goes on. Table 9 asks whether pretrained parts help: here a model that first learned only to draw, then
both, against both from the start. Table 10 asks whether reading suffers if no images are learned any more in stage 3,
and whether drawing does. The third question is how much the text loss should weigh in Eq. 9.

Each run is judged on 250 scenes that training never draws: captions (any true one is right), scenes drawn (the caption
holds for the drawing), and in stage 3 one question of every kind. The table has the mean over the seeds and, in
brackets, every seed's own score: three seeds show what chance does better than an interval over scenes would.
"""
import argparse
import json
import os
import shlex
import subprocess
import sys

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch comes; sample.py says why

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import evaluate

import data
from model import DualDiffusion
from sample import Parser, run_program

TRAIN = os.path.join(os.path.dirname(data.__file__), "train.py")
# name: the run whose model it starts from, what it asks, train.py's arguments
RUNS = {
    "draw": (None, None, "--stage 1 --steps 400 --text-weight 0"),
    "draw, then both": ("draw", "Table 9", "--stage 1 --steps 400"),
    "both": (None, "Table 9", "--stage 1 --steps 400"),
    "both, twice as long": (None, "Table 9", "--stage 1 --steps 800"),
    "text weight 0.2": (None, "text loss", "--stage 1 --steps 400 --text-weight 0.2"),
    "text weight 5": (None, "text loss", "--stage 1 --steps 400 --text-weight 5"),
    "with image loss": ("both, twice as long", "Table 10", "--stage 3 --steps 800 --min-time 0.001"),
    "without": ("both, twice as long", "Table 10", "--stage 3 --steps 800 --min-time 0.001 --image-weight 0"),
}


def folder(out, name, seed):
    return os.path.join(out, f"{name.replace(' ', '-').replace(',', '')}-{seed}")


def model_file(out, name, seed):
    return os.path.join(folder(out, name, seed), f"stage{RUNS[name][2].split()[1]}", "model.safetensors")


def judge(path, seed, stage, num=250):
    """-> {name: score in per cent, or loss}"""
    dd = DualDiffusion.load(path)
    source, ids = data.World(evaluate.UNSEEN + seed), range(num)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    scores = {"captions": evaluate.judge_captions(dd, source, ids, generator)}
    generator.manual_seed(seed)  # so that drawings do not depend on what was read before
    scores["objects drawn"], scores["scenes drawn"] = evaluate.judge_drawings(dd, source, ids, rng, generator)
    if stage == "3":
        scores["answers"] = evaluate.judge_answers(dd, source, evaluate.scene_questions(source, ids, rng)[1], generator)
    with open(os.path.join(os.path.dirname(path), "metrics.jsonl")) as f:
        *_, last = map(json.loads, f)
    losses = {"image loss": last["val_image_loss"] or None, "text loss": last["val_text_loss"]}  # None: none is learned
    return {name: 100 * float(np.mean(values)) for name, values in scores.items()} | losses


def run(out, name, seed):
    """Train and judge, as far as this is not done yet -> scores."""
    start, _, arguments = RUNS[name]
    path, stage = model_file(out, name, seed), arguments.split()[1]
    scores = os.path.join(folder(out, name, seed), "scores.json")
    if not os.path.exists(scores):
        command = [*arguments.split(), "--seed", str(seed), "--pool", "10000", "--out", folder(out, name, seed)]
        command += ["--init", model_file(out, start, seed)] if start else []
        print("python train.py " + shlex.join(command), flush=True)
        subprocess.run([sys.executable, TRAIN, *command], check=True)
        text = json.dumps(judge(path, seed, stage))
        with data.replacing(scores) as beside, open(beside, "w") as f:
            f.write(text)
    with open(scores) as f:
        return json.load(f)


def table(results):
    """results: {run: list of scores, one per seed} -> Markdown."""
    names = "captions", "scenes drawn", "answers", "text loss", "image loss"
    lines = ["| | run | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for name, seeds in results.items():
        cells = []
        for column in names:
            values = [scores[column] for scores in seeds if scores.get(column) is not None]
            form = "{:.3f}" if "loss" in column else "{:.1f}"
            each = " ".join(map(form.format, values))
            cells.append(f"{form.format(np.mean(values))} ({each})" if values else "")
        lines.append(f"| {RUNS[name][1]} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", default="runs/ablations", metavar="DIR")
    args = parser.parse_args()
    results = {}
    for s in args.seeds:
        for name in RUNS:
            results.setdefault(name, []).append(run(args.out, name, s))
    del results["draw"]
    print(table(results))


if __name__ == "__main__":
    run_program(main)
