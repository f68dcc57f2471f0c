"""What judges a model: reading scenes, the truth of captions, intervals, each benchmark from the command line."""
import itertools
import json
import os
import re
import runpy
import sys
from types import SimpleNamespace

import evaluate
import numpy as np
import pytest
from PIL import Image

import data
import train
from data import Thing, World
from model import DualDiffusion
from sample import SHIPPED

N = 300


@pytest.mark.parametrize("pairs", ["train", "held"])
def test_the_reader_recovers_true_renders(pairs):
    world = World(11, pairs)
    assert sum(evaluate.judge_scenes(world, range(N), map(world.image, range(N)))) >= 0.99 * N


def test_the_reader_sees_what_is_wrong_in_a_drawing():
    world = World(5)
    i = next(i for i in range(100) if len(world.scene(i)[0]) == 1)
    image, things = world.image(i).copy(), world.scene(i)[0]
    empty = (things[0].quarter + 1) % 4
    y, x = empty // 2 * 32 + 8, empty % 2 * 32 + 8
    image[y:y + 12, x:x + 12] = (220, 40, 40)  # an extra object
    assert sorted(evaluate.read_scene(image)) == sorted([*things, Thing("small", "red", "square", empty)])
    image[y:y + 4, x:x + 30] = (220, 40, 40)  # of no known shape
    assert "unknown" in {t.shape for t in evaluate.read_scene(image)}
    assert evaluate.read_scene(np.full((64, 64, 3), 240, np.uint8)) == []


def test_captions_of_a_scene_hold_and_others_do_not():
    rng, world = np.random.default_rng(0), World(0)
    for i in range(N):
        things, text = world.scene(i)[0], world.caption(i, rng)
        assert evaluate.caption_holds(text, things), text
        assert evaluate.caption_holds(f"  {text.upper().replace(' ', '  ')}. ", things), text
        assert not evaluate.caption_holds(text, things[1:])
        assert not evaluate.caption_holds(text, [*things, things[0]])
        moved = [t._replace(quarter=3 - t.quarter) for t in things]  # every relation and place turns round
        claims = re.search(" in the |" + "|".join(data.RELATIONS), text)
        assert evaluate.caption_holds(text, moved) == (not claims)


@pytest.mark.parametrize("text, truth", {
    "a small red circle above a large blue square": True,
    "there is a small red circle and a large blue square": True,
    "a large blue square right of a small red circle": True,
    "A large blue square  in the bottom right and a small red circle in the top left.": True,
    "a small red circle below a large blue square": False, "a small red circle": False,
    "a large red circle above a large blue square": False, "a small red circle above": False,
    "a small red circle in the top right and a large blue square in the bottom right": False, "": False, "a dog": False,
    "a small red circle, a small red circle and a large blue square": False,
    "a small red circle in the top left and a large blue square": False}.items())  # the world never says it so
def test_the_truth_of_captions(text, truth):
    two = [Thing("small", "red", "circle", 0), Thing("large", "blue", "square", 3)]
    assert all(evaluate.caption_holds(text, list(order)) == truth for order in itertools.permutations(two))


def test_nothing_is_true_of_what_no_scene_is():
    four = [Thing("small", "red", shape, quarter) for quarter, shape in enumerate(data.SHAPES)]
    for text in ("", "a small red circle above a small red triangle", "a small red circle and a small red square"):
        assert not evaluate.caption_holds(text, []) and not evaluate.caption_holds(text, four)


def test_wilson_interval():
    low, high = evaluate.interval([1] * 95 + [0] * 5)
    assert (round(low, 2), round(high, 2)) == (88.82, 97.85)  # the published example values
    assert evaluate.interval([0.5] * 100) == evaluate.interval([True, False] * 50)
    assert evaluate.interval([]) == (0, pytest.approx(79.3, abs=0.1))


def test_scenes_are_those_that_training_never_draws():
    assert evaluate.UNSEEN == train.UNSEEN


def run(monkeypatch, capsys, *args, status=None):
    """tests/evaluate.py as if typed -> what it printed, its errors."""
    monkeypatch.setattr(sys, "argv", [evaluate.__file__, *map(str, args)])
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        ended = None
    except SystemExit as end:
        ended = end.code
    out, err = capsys.readouterr()
    assert ended == status, err
    return out, err


def figures(out):
    """The lines of a report -> {name: (sum of scores, how many)}."""
    lines = re.findall(r"^(.{26}) *[\d.]+%  \[[\d.]+, [\d.]+\]  ([\d.]+)/(\d+)$", out, re.MULTILINE)
    assert len(lines) == len(out.splitlines())
    return {name.strip(): (float(right), int(total)) for name, right, total in lines}


def test_the_shipped_model_in_the_world(monkeypatch, capsys):
    scores = figures(run(monkeypatch, capsys, "world", "--num", 12, "--kinds", "color", "where", "count")[0])
    assert list(scores) == ["reader, true scenes", "answers", "color", "where", "count", "answers, held-out pairs",
                            "captions", "objects drawn", "scenes drawn"]
    assert scores["where"][1] == scores["captions"][1] == scores["scenes drawn"][1] == 12
    assert scores["answers"] == tuple(map(sum, zip(*(scores[kind] for kind in ("color", "where", "count")))))
    assert all(right >= 0.75 * total for right, total in scores.values())


def test_orders_and_steps_of_reading(monkeypatch, capsys):
    """As the table has it: one step is one pass, more are at most as many, and entropy needs few for much."""
    out, _ = run(monkeypatch, capsys, "world", "--num", 24, "--kinds", "color", "--steps", 1, 4, "--order",
                 "random", "entropy")
    rows = [[cell.strip(" %") for cell in line.split("|")[1:-1]] for line in out.splitlines()[2:-2]]
    widest = re.search(r"^95% intervals: at most ([\d.]+) points to each side .* for answers$", out, re.MULTILINE)
    assert 15 < float(widest[1]) < 20  # of 24, the half of which are right, 18.6
    assert [row[:2] for row in rows] == [["random", "1"], ["random", "4"], ["entropy", ""]]
    right, passes = ([float(row[k]) for row in rows] for k in (2, 3))
    assert passes[0] == 1 and 3 < passes[1] < 4 and 5 < passes[2] < 10
    assert right[0] < 60 and right[2] > 95
    assert all(float(row[4]) > 95 and float(row[5]) <= float(row[3]) for row in rows)


def test_blanks_that_are_filled_by_the_model_and_by_nobody(monkeypatch):
    dd, args = DualDiffusion.load(SHIPPED), SimpleNamespace(seed=0, num=24)
    scores = evaluate.blanks(dd, args)
    assert list(scores) == ["1 in a row", "2 in a row", "3 in a row", "4 in a row"]
    assert all(sum(right) >= 0.75 * 24 for right in scores.values())
    monkeypatch.setattr(evaluate, "infill", lambda dd, pixels, texts, generator: texts)
    assert not any(map(any, evaluate.blanks(dd, args).values()))


def test_drawing_with_guidance_in_all_steps_and_in_some(monkeypatch, capsys):
    scores = figures(run(monkeypatch, capsys, "drawings", "--num", 8, "--steps", 8)[0])
    # t = 1, 0.955, 0.9, 0.83, 0.75, 0.64, 0.5, 0.3
    assert list(scores) == ["8 steps, all guided: 16", "8 steps, some guided: 13"]
    assert all(right >= 7 for right, _ in scores.values())


def test_the_best_of_four_is_the_one_that_the_model_keeps(monkeypatch):
    monkeypatch.setattr(evaluate, "keep_likeliest", lambda dd, pixels, prompts, count: pixels[::count])
    scores = evaluate.best_of(DualDiffusion.load(SHIPPED), SimpleNamespace(seed=0, num=2))
    assert scores["28 steps, cfg 1, best of 4"] == scores["28 steps, cfg 1, each"][::4]
    assert sum(scores["28 steps, cfg 3, each"]) >= 7


@pytest.fixture
def world_on_disk(tmp_path):
    """Thirty scenes as a user's files, every third with a caption alone, and one image that cannot be read."""
    rng, world, rows = np.random.default_rng(0), World(3), []
    for i in range(30):
        Image.fromarray(world.image(i)).save(tmp_path / f"{i}.png")
        question, answer = world.question(i, rng, "where") or ("", "")
        rows.append({"image": f"{i}.png", "caption": world.caption(i, rng)} |
                    ({"question": question, "answer": f"{answer.upper()} "} if i % 3 else {}))
    (tmp_path / "7.png").write_bytes(b"")
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "data.jsonl"


def test_images_of_the_user(world_on_disk, monkeypatch, capsys):
    out, err = run(monkeypatch, capsys, "data", "--data", world_on_disk)
    assert "7.png: cannot be read as an image" in err and err.count("\n") == 1
    scores = figures(out)
    assert scores["answers"] == (19, 19) and scores["captions"][1] == 29
    assert figures(run(monkeypatch, capsys, "data", "--data", world_on_disk, "--num", 5)[0])["captions"][1] in (4, 5)
    unseen = len(data.Records([str(world_on_disk)], 64).split(250)[0])
    assert figures(run(monkeypatch, capsys, "data", "--data", world_on_disk, "--unseen")[0])["captions"][1] == unseen


def test_no_image_at_all(world_on_disk, monkeypatch, capsys):
    for path in world_on_disk.parent.glob("*.png"):
        path.write_bytes(b"")
    err = run(monkeypatch, capsys, "data", "--data", world_on_disk, status=2)[1]
    assert err.splitlines()[-1].endswith("data.jsonl: no image can be read")


def test_a_model_of_stage_0_is_judged_by_its_reconstructions(world_on_disk, tmp_path, monkeypatch, capsys):
    dd, path = DualDiffusion.load(SHIPPED), tmp_path / "stage0.safetensors"
    DualDiffusion(dd.config, dd.tokenizer, vae=dd.vae).save(path)
    first, *rest = run(monkeypatch, capsys, "world", "--ckpt", path, "--num", 80)[0].splitlines()
    assert float(re.fullmatch(r"reconstruction of 80 images: ([\d.]+) dB", first)[1]) > 30
    assert figures("\n".join(rest)).keys() == {"reader, true scenes", "scenes read back"}
    out, _ = run(monkeypatch, capsys, "data", "--data", world_on_disk, "--ckpt", path)
    assert re.fullmatch(r"reconstruction of 29 images: [\d.]+ dB\n", out)


@pytest.mark.parametrize("args, message", [
    ([], "benchmark"), (["chess"], "invalid choice: 'chess'"), (["data"], "data wants --data"),
    (["world", "--data", "x.jsonl"], "leave out --data"),
    (["blanks", "--steps", "4"], "leave out --order and --steps"),
    (["drawings", "--temperature", "1"], "--temperature"),
    (["world", "--ckpt", "none.safetensors"], "none.safetensors"),
    (["world", "--ckpt", "half.safetensors"], "half.safetensors: holds no T5 (--t5)"),
    (["data", "--data", "none.jsonl"], "none.jsonl: No such file")])
def test_mistakes_give_one_line_and_status_2(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    if "half.safetensors" in args:
        dd = DualDiffusion.load(SHIPPED)
        DualDiffusion(dd.config, dd.tokenizer, dd.ddit, vae=dd.vae).save("half.safetensors")
    out, err = run(monkeypatch, capsys, *args, status=2)
    assert out == "" and len(err.strip().splitlines()) == 1 and message in err, err
    assert err.startswith(f"{os.path.basename(evaluate.__file__)}: ")
