"""The built-in world, its judge, and the user's files."""
import io
import json
import os
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
from data import Thing, World

N = 300


@pytest.mark.parametrize("pairs", ["train", "held"])
def test_scenes_are_seeded_and_respect_the_held_pairs(pairs):
    a, b, other = World(3, pairs), World(3, pairs), World(4, pairs)
    assert all((a.image(i) == b.image(i)).all() for i in range(5))
    assert any((a.image(i) != other.image(i)).any() for i in range(5))
    counts = Counter()
    for i in range(N):
        things = a.scene(i)[0]
        counts[len(things)] += 1
        held = [(t.color, t.shape) in data.HELD for t in things]
        assert any(held) if pairs == "held" else not any(held)
        assert len({t.cell for t in things}) == len(things) == len({(t.color, t.shape) for t in things})
    assert set(counts) == {1, 2, 3} and min(counts.values()) > N / 5


@pytest.mark.parametrize("pairs", ["train", "held"])
def test_the_reader_recovers_true_renders(pairs):
    world = World(11, pairs)
    right = sum(sorted(data.read_scene(world.image(i))) == sorted(world.scene(i)[0]) for i in range(N))
    assert right >= 0.99 * N


def test_the_reader_sees_what_is_wrong_in_a_drawing():
    world = World(5)
    i = next(i for i in range(100) if len(world.scene(i)[0]) == 1)
    image, things = world.image(i).copy(), world.scene(i)[0]
    free = (things[0].cell + 1) % 4
    y, x = free // 2 * 32 + 8, free % 2 * 32 + 8
    image[y:y + 12, x:x + 12] = (220, 40, 40)  # an extra object
    assert sorted(data.read_scene(image)) == sorted([*things, Thing("small", "red", "square", free)])
    image[y:y + 4, x:x + 30] = (220, 40, 40)  # of no known shape
    assert "unknown" in {t.shape for t in data.read_scene(image)}
    assert data.read_scene(np.full((64, 64, 3), 240, np.uint8)) == []


def test_captions_hold_and_fit_and_false_ones_do_not():
    rng, world = np.random.default_rng(0), World(0)
    said = set()
    for i in range(N):
        things, text = world.scene(i)[0], world.caption(i, rng)
        assert data.telling_holds(text, things), text
        assert Counter(data.understand(text)[0]) == Counter(map(str, things))
        assert not data.telling_holds(text, things[1:]) and not data.telling_holds(text, [*things, things[0]])
        moved = [t._replace(cell=3 - t.cell) for t in things]  # every relation and place turns round
        assert data.telling_holds(text, moved) == (not data.understand(text)[1])
        said.add(text.split("a ")[0])
    assert said == {"", "there is "}
    two = [Thing("small", "red", "circle", 0), Thing("large", "blue", "square", 3)]
    for text, truth in {
            "a small red circle above a large blue square": True,
            "a large blue square right of a small red circle": True,
            "a small red circle below a large blue square": False, "a small red circle": False,
            "a large red circle above a large blue square": False, "a small red circle above": False,
            "a small red circle in the top left and a large blue square": True, "": False, "a dog": False,
            "a small red circle in the top right and a large blue square": False,
            "a small red circle, a small red circle and a large blue square": False}.items():
        assert data.telling_holds(text, two) == truth, text


def check_by_hand(things, question, answer):
    """An answer from the scene by other means than the generator's, for the kinds where that is possible."""
    words = question.rstrip("?").split()

    def fits(ws):
        return [t for t in things if all(w in (t.size, t.color, t.shape, "shape", "thing") for w in ws)]

    if question.startswith("how many"):
        noun = [w for w in words[2:-2]]
        singular = {data.plural(s): s for s in data.SHAPES} | {"shapes": "shape"}
        assert answer == str(len(fits([singular.get(w, w) for w in noun])))
    elif question.startswith(("is there a", "do you see a")):
        assert answer == ("yes" if fits(words[words.index("a") + 1:]) else "no")
    elif question.startswith(("what color is", "what is the color")):
        (thing,) = fits(words[words.index("the", 4 if words[2] == "the" else 0) + 1:])
        assert answer == thing.color
    elif question.startswith("where"):
        (thing,) = fits(words[3:])
        assert answer == data.PLACES[thing.cell]
    else:
        return False
    return True


def test_questions_of_every_kind_have_their_right_answers():
    rng, world, seen = np.random.default_rng(0), World(0), {kind: Counter() for kind in data.KINDS}
    checked = 0
    for i in range(1500):
        for kind in data.KINDS:
            asked = world.question(i, rng, kind)
            if asked:
                seen[kind][asked[1]] += 1
                checked += check_by_hand(world.scene(i)[0], *asked)
    assert checked > 3000
    assert all(len(answers) >= 2 for answers in seen.values())
    for kind in ("exists", "compare"):
        assert set(seen[kind]) == {"yes", "no"} and min(seen[kind].values()) > 0.25 * seen[kind].total()


def save(path, mode, color, size=(40, 20), **options):
    Image.new(mode, size, color).save(path, **options)
    return path


def test_images_of_every_kind_are_read(tmp_path):
    grey = np.asarray(data.load_image(save(tmp_path / "l.png", "L", 100), 16))
    assert grey.shape == (16, 16, 3) and (grey == 100).all()
    deep = Image.fromarray(np.full((20, 20), 257 * 100, np.uint16))
    deep.save(tmp_path / "i16.png")
    assert (np.asarray(data.load_image(tmp_path / "i16.png", 16)) == 100).all()
    assert (np.asarray(data.load_image(save(tmp_path / "a.png", "RGBA", (9, 9, 9, 0)), 16)) == 255).all()
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "p.png")
    assert (np.asarray(data.load_image(tmp_path / "p.png", 16)) == (10, 200, 30)).all()
    assert data.load_image(save(tmp_path / "c.jpg", "CMYK", (0, 0, 0, 0)), 16).mode == "RGB"
    turned = Image.fromarray(np.repeat(np.uint8([[[255, 0, 0]], [[0, 0, 255]]]), 20, 0).repeat(40, 1))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "r.jpg", exif=exif, quality=95)
    upright = np.asarray(data.load_image(tmp_path / "r.jpg", 16))
    assert upright[0, 8, 2] > 200 > 60 > upright[0, 8, 0]


@pytest.mark.parametrize("content", [b"", b"no image at all", None])
def test_bad_images_are_named(tmp_path, content):
    path = tmp_path / "bad.png"
    if content is None:
        save(path, "RGB", "red", (300, 300))
        content = path.read_bytes()[:200]  # cut off
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bad.png.*cannot be read as an image"):
        data.load_image(path, 16)


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


RNG = np.random.default_rng(0)


def said(records):
    """All that a data set says: (the image's grey value, captions, questions with answers) of each record."""
    rows = map(records.row, range(len(records)))
    return [(int(records.image(i)[0, 0, 0]), row.captions, row.asked) for i, row in enumerate(rows)]


@pytest.fixture
def pictures(tmp_path):
    """0.png ... 5.png, of grey value 0, 10, ... 50."""
    for k in range(6):
        save(tmp_path / f"{k}.png", "L", 10 * k)
    return tmp_path


def test_a_folder(pictures):
    (pictures / "big_cats").mkdir()
    save(pictures / "big_cats" / "a.png", "L", 70)
    save(pictures / "big_cats" / "b.png", "L", 80)
    (pictures / "big_cats" / "b.txt").write_text("a lion\n")
    records = data.Records(str(pictures / "big_cats"), 16)
    assert said(records) == [(70, ("big cats",), ()), (80, ("a lion",), ())]
    assert records.question(0, RNG) is None and records.caption(1, RNG) == "a lion"
    write_jsonl(pictures / "metadata.jsonl", [{"file_name": "3.png", "text": "three"}])
    assert said(data.Records(str(pictures), 16)) == [(30, ("three",), ())]


ROWS = [({"image": "0.png", "caption": "zero"}, (0, ("zero",), ())),
        ({"image_path": "1.png", "caption": "one", "re_caption": "a one"}, (10, ("one", "a one"), ())),
        ({"image": "2.png", "question": "which?", "answers": "two"}, (20, (), (("which?", "two"),))),
        ({"image": "3.png", "question": "?", "answers": [{"answer": "b"}, {"answer": "a"}, {"answer": "a"}]},
         (30, (), (("?", "a"),))),
        ({"image": "4.png", "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "four"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]},
         (40, (), (("what is it?", "four"), ("sure?", "yes"))))]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_in_every_form(pictures, ending, capsys):
    rows, wanted = zip(*ROWS)
    rows += ({"conversations": ROWS[4][0]["conversations"]},)  # about no image: left out
    if ending == "jsonl":
        path = write_jsonl(pictures / "d.jsonl", [*rows, ""])
    else:
        path = str(pictures / "d.json")
        (pictures / "d.json").write_text(json.dumps(rows))
    records = data.Records(path, 16)
    assert said(records) == list(wanted) and "left out: 1" in capsys.readouterr().err
    assert records.question(4, RNG) in wanted[4][2] and records.caption(2, RNG) == "which? two"
    assert {records.caption(1, RNG) for _ in range(50)} == {"one", "a one"}
    assert len(data.Records([path, path], 16)) == 2 * len(wanted)


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_webdataset_shards(pictures):
    for shard in range(2):
        with tarfile.open(pictures / f"s-{shard:03d}.tar", "w") as tar:
            for k in range(2):
                n = 2 * shard + k
                if k == 0:
                    add(tar, f"d/{n}.txt", f"number {n}".encode())
                add(tar, f"d/{n}.png", (pictures / f"{n}.png").read_bytes())
                if k == 1:
                    told = {"caption": f"nr. {n}", "question": "n?", "answer": str(n)}
                    add(tar, f"d/{n}.json", json.dumps(told).encode())
            add(tar, "d/x.txt", b"no image")
            add(tar, "d/y.png", b"no text")
    assert said(data.Records(str(pictures / "s-{000..001}.tar"), 16)) == [
        (0, ("number 0",), ()), (10, ("nr. 1",), (("n?", "1"),)),
        (20, ("number 2",), ()), (30, ("nr. 3",), (("n?", "3"),))]
    (pictures / "s-002.tar").write_bytes((pictures / "s-001.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="s-002.tar: not a readable .tar shard"):
        data.Records(str(pictures / "s-002.tar"), 16)
    with pytest.raises(FileNotFoundError, match="s-003.tar"):
        data.Records(str(pictures / "s-{003..004}.tar"), 16)


def test_the_sheet(pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)
    (pictures / "bad.png").write_bytes(b"bad")
    write_jsonl(pictures / "d.jsonl", [*(row for row, _ in ROWS), {"image": "bad.png", "caption": "bad"}])
    monkeypatch.setattr(sys, "argv", ["data.py", "d.jsonl", "--size", "32"])
    data.main()
    out, err = capsys.readouterr()
    assert "data.png: 5 of 6 samples" in out and "bad.png: cannot be read" in err
    assert Image.open("data.png").size == (800, np.asarray(Image.open("data.png")).shape[0])


@pytest.mark.parametrize("line, message", [
    ('{"image": "x.png", "caption"', "line 2: not valid JSON"), ('{"caption": "no image"}', "line 2: names no image"),
    ("7", "line 2: want"), ('{"image": "none.png", "caption": "c"}', "line 2: no such image: .*none.png"),
    ('{"image": "x.png"}', "line 2: has neither"), ('{"image": "x.png", "caption": 7}', "line 2: captions, questions"),
    ('{"image": "x.png", "conversations": [{"from": "human"}, {"from": "gpt"}]}', "line 2: not in a form")])
def test_a_bad_line_is_named(tmp_path, line, message):
    save(tmp_path / "x.png", "RGB", "red")
    with pytest.raises((ValueError, OSError), match=message):
        data.Records(write_jsonl(tmp_path / "d.jsonl", [{"image": "x.png", "caption": "ok"}, line]), 16)


def test_rows_are_drawn_once_an_epoch_whatever_the_batch():
    for total, block in ((10, 100), (103, 10)):
        stream = data.draw_rows(0, 0, 3 * total, total, block)
        assert all(sorted(stream[k * total:(k + 1) * total]) == list(range(total)) for k in range(3))
        assert stream == data.draw_rows(0, 0, 7, total, block) + data.draw_rows(0, 7, 3 * total - 7, total, block)
        assert stream[:total] != stream[total:2 * total]
    assert len({row // 10 for row in stream[:10]}) <= 2  # of many shards, few are open at a time


def test_records_kept_apart_go_by_the_picture(tmp_path):
    for k in range(60):
        save(tmp_path / f"{k}.png", "L", k)
    rows = [{"image": f"{k}.png", "caption": f"{k}, {told}"} for told in ("once", "twice") for k in range(60)]
    records = data.Records(write_jsonl(tmp_path / "d.jsonl", rows), 16)
    apart, others = records.split(250)
    assert len(apart) == 2 * 3 and sorted([*apart, *others]) == list(range(120))  # one in twenty
    names = [{records.row(i).image for i in part} for part in (apart, others)]
    assert not names[0] & names[1]
    assert len(records.split(2)[0]) == 2 * 2


def test_the_index_is_kept_and_made_anew_when_the_data_change(tmp_path, monkeypatch):
    save(tmp_path / "x.png", "L", 7)
    path = write_jsonl(tmp_path / "d.jsonl", [{"image": "x.png", "caption": "one"}])
    assert data.Records(path, 16, tmp_path / "kept").row(0).captions == ("one",)
    read = []
    monkeypatch.setattr(data, "read_json", lambda path, read_json=data.read_json: read.append(path) or read_json(path))
    assert data.Records(path, 16, tmp_path / "kept").row(0).captions == ("one",) and not read
    write_jsonl(tmp_path / "d.jsonl", [{"image": "x.png", "caption": "two"}])
    os.utime(path, (1, 1))
    assert data.Records(path, 16, tmp_path / "kept").row(0).captions == ("two",) and read == [path]
