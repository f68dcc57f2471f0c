"""The built-in world, the user's files, and batches of both."""
import io
import json
import os
import pickle
import re
import resource
import shutil
import tarfile
import threading
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import SafetensorError
from torch.utils.data import default_convert

import data
from data import Thing, World
from model import Settings
from vae import VAE, VAEConfig

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
        assert len({t.quarter for t in things}) == len(things) == len({(t.color, t.shape) for t in things})
    assert set(counts) == {1, 2, 3} and min(counts.values()) > N / 5


def check_by_hand(things, question, answer):
    """An answer from the scene by other means than the generator's, for the kinds where that is possible."""
    words = question.rstrip("?").split()

    def fits(ws):
        return [t for t in things if all(w in (t.size, t.color, t.shape, "shape", "thing") for w in ws)]

    if question.startswith("how many"):
        noun = [w for w in words[2:-2]]
        singular = {"crosses": "cross"} | {f"{s}s": s for s in data.SHAPES} | {"shapes": "shape"}
        assert answer == str(len(fits([singular.get(w, w) for w in noun])))
    elif question.startswith(("is there a ", "do you see a ")):
        assert answer == ("yes" if fits(words[words.index("a") + 1:]) else "no")
    elif question.startswith(("what color is", "what is the color")):
        (thing,) = fits(words[words.index("the", 4 if words[2] == "the" else 0) + 1:])
        assert answer == thing.color
    elif question.startswith("where"):
        (thing,) = fits(words[3:])
        assert answer == data.QUARTERS[thing.quarter]
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


def test_a_new_shape_makes_another_world_and_an_unknown_one_is_not_drawn_as_another(monkeypatch):
    """The star is README's line."""
    before = data.fingerprint(World())
    line = re.search(r'`("star": lambda .*),`', open(os.path.join(os.path.dirname(__file__), "..", "README.md")).read())
    star = eval(f"{{{line[1]}}}", {"np": np})["star"]
    side = np.linspace(-1.5, 1.5, 301)
    y, x = np.nonzero(star(side, side[:, None], 1.0) < 0)
    assert abs(side[x]).max() <= 1.14 and abs(side[y]).max() <= 1.14 and len(x) > 3000
    monkeypatch.setattr(data, "SHAPES", data.SHAPES | {"star": star})
    assert data.fingerprint(World()) != before
    moon, look = Thing("small", "red", "moon", 0), (16, 16, 6, (1, 0, 0))
    monkeypatch.setattr(World, "scene", lambda self, i: ([moon], [look], np.ones(3)))
    with pytest.raises(KeyError, match="moon"):
        World().image(0)


def test_a_scene_in_which_nothing_can_be_asked_has_no_question():
    world, rng = data.World(0, kinds=["compare"]), np.random.default_rng(0)
    alone = [len(world.scene(i)[0]) == 1 for i in range(60)]
    assert any(alone) and [world.question(i, rng) is None for i in range(60)] == alone


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
    rows = map(records.record, range(len(records)))
    return [(int(records.image(i)[0, 0, 0]), row.captions, row.questions) for i, row in enumerate(rows)]


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
    assert said(records) == [(80, ("a lion",), ())] and records.incomplete == 1  # no caption is made up for a.png
    assert records.question(0, RNG) is None and records.caption(0, RNG) == "a lion"
    (pictures / "big_cats" / "b.txt").unlink()
    assert said(data.Records(str(pictures / "big_cats"), 16)) == [(70, ("big cats",), ()), (80, ("big cats",), ())]
    write_jsonl(pictures / "metadata.jsonl", [{"file_name": "3.png", "text": "three"}])
    assert said(data.Records(str(pictures), 16)) == [(30, ("three",), ())]


ROWS = [({"image": "0.png", "caption": "zero"}, (0, ("zero",), ())),
        ({"image_path": "1.png", "caption": "one", "re_caption": "a one"}, (10, ("a one",), ())),
        ({"image": "2.png", "question": "which?", "answers": "two"}, (20, (), (("which?", "two"),))),
        ({"image": "3.png", "question": "?", "answers": [{"answer": "b"}, {"answer": "a"}, {"answer": "a"}]},
         (30, (), (("?", "a", "a", "b"),))),
        ({"image": "4.png", "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "four"},
            {"from": "human", "value": "sure?"}, {"from": "gpt", "value": "yes"}]},
         (40, (), (("what is it?", "four"), ("sure?", "yes"))))]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_json_in_every_form(pictures, ending):
    rows, wanted = zip(*ROWS)
    rows += ({"conversations": ROWS[4][0]["conversations"]},)  # about no image: left out
    if ending == "jsonl":
        path = write_jsonl(pictures / "d.jsonl", [*rows, ""])
    else:
        path = str(pictures / "d.json")
        (pictures / "d.json").write_text(json.dumps(rows))
    records = data.Records(path, 16)
    assert said(records) == list(wanted) and records.incomplete == 1
    assert {records.question(4, RNG) for _ in range(50)} == set(wanted[4][2])
    assert [records.caption(i, RNG) for i in range(5)] == ["zero", "a one", None, None, None]
    assert records.question(3, RNG) == ("?", "a")  # what most people said
    assert (records.captioned, records.questioned) == (2, 3) and records.question(0, RNG) is None
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
    assert said(data.Records([str(pictures / f"s-00{k}.tar") for k in range(2)], 16)) == [
        (0, ("number 0",), ()), (10, ("nr. 1",), (("n?", "1"),)),
        (20, ("number 2",), ()), (30, ("nr. 3",), (("n?", "3"),))]
    (pictures / "s-002.tar").write_bytes((pictures / "s-001.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="s-002.tar: not a readable .tar shard"):
        data.Records(str(pictures / "s-002.tar"), 16)


def make_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            add(tar, name, content)
    return str(path)


def test_damaged_shards_are_reported(pictures):
    """Cut off anywhere, or with any header overwritten: never fewer images without a word. Only what follows the first
    block of zeros may be missing."""
    image = (pictures / "1.png").read_bytes()
    path = make_shard(pictures / "s.tar", [
        (f"{k:03d}.{end}", content) for k in range(20)
        for end, content in (("png", image + b"x" * (97 * k % 600)), ("txt", b"text"))])
    whole, rng = (pictures / "s.tar").read_bytes(), np.random.default_rng(0)
    headers = [member.offset for member in tarfile.open(path)]
    end = tarfile.open(path).getmembers()[-1].offset + 1024  # the header and the text
    cut = {int(n) for n in rng.integers(0, len(whole), 200)} | {*headers, end, end + 511, end + 512}
    assert min(cut) < end < max(cut)
    damaged = [(whole[:n], n >= end + 512) for n in sorted(cut)]
    for at in (headers[k] for k in rng.integers(0, len(headers), 60)):
        blocks = rng.bytes(512), bytes(512), b"\xff" * 512
        damaged += [(whole[:at] + block + whole[at + 512:], False) for block in blocks]
    for content, harmless in damaged:
        (pictures / "s.tar").write_bytes(content)
        if harmless:
            assert len(list(data.read_shard(path))) == 20
        else:
            with pytest.raises(ValueError, match="s.tar: not a readable .tar shard") as raised:
                list(data.read_shard(path))
            assert "\n" not in str(raised.value)


def test_names_in_shards(pictures):
    image = (pictures / "1.png").read_bytes()
    (pictures / "x.tar").mkdir()  # a folder of that name is no shard
    path = make_shard(pictures / "x.tar" / "s.tar", [
        ("./a.png", image), ("a.txt", b"a"), (".hidden.png", image), (".hidden.txt", b"hidden"), (".b.png", image),
        (".b.txt", b"\xef\xbb\xbfb"), ("c.old/c.PNG", image), ("c.old/c.json", b'{"caption": "c"}')])
    records = data.Records([path, str(pictures / "x.tar" / "s.tar")], 16)
    assert said(records) == 2 * [(10, (text,), ()) for text in ("a", "c")]
    shutil.copy(pictures / "2.png", pictures / "x.tar" / "2.png")
    os.remove(path)
    assert said(data.Records(str(pictures / "x.tar"), 16)) == [(20, ("x.tar",), ())]
    with pytest.raises(ValueError, match="s.tar: .*a.seg.png: a second image, in the sample of .*a.png"):
        data.Records(make_shard(path, [("a.png", image), ("a.seg.png", image)]), 16)


def test_only_plain_image_formats_are_read(tmp_path):
    """By its content a file could be a program for another one to run (PostScript), whatever its name is."""
    save(tmp_path / "x.eps", "RGB", "red")
    os.replace(tmp_path / "x.eps", tmp_path / "x.png")
    with pytest.raises(ValueError, match="x.png: cannot be read as an image .none of JPEG, PNG"):
        data.load_image(tmp_path / "x.png", 16)
    for end in (".jpg", ".png", ".webp", ".gif", ".bmp", ".tif", ".ppm", ".avif", ".jp2"):
        assert end in data.EXTENSIONS
        image = np.asarray(data.load_image(save(tmp_path / f"x{end}", "RGB", (200, 30, 30)), 16)).astype(int)
        assert abs(image - (200, 30, 30)).max() < 12, end


def test_odd_images_and_no_warnings_of_others(tmp_path, monkeypatch, recwarn):
    warnings.simplefilter("always")
    for size in ((1, 1), (1, 10_000), (10_000, 1)):
        assert data.load_image(save(tmp_path / "thin.png", "RGB", "red", size), 16).size == (16, 16)
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(data.load_image(tmp_path / "moving.gif", 16))[8, 8].tolist() == [255, 0, 0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)  # 400 pixels bring a warning, more than 600 an error
    assert data.load_image(tmp_path / "moving.gif", 16).size == (16, 16)
    with pytest.raises(ValueError, match="big.png: cannot be read as an image"):
        data.load_image(save(tmp_path / "big.png", "RGB", "red", (40, 40)), 16)
    broken = Image.Exif()
    broken[0x010E] = "what it shows"
    content = broken.tobytes()
    save(tmp_path / "exif.jpg", "RGB", "red", (16, 16), exif=content[:-10])
    assert data.load_image(tmp_path / "exif.jpg", 16).size == (16, 16)
    assert not recwarn.list


def test_the_fingerprint_is_of_the_data_and_not_of_their_place(pictures, tmp_path):
    def fingerprint(rows, folder):
        folder.mkdir(exist_ok=True)
        for k in range(6):
            shutil.copy(pictures / f"{k}.png", folder)  # made anew: other times
        return data.fingerprint(data.Records(write_jsonl(folder / "d.jsonl", rows), 16, tmp_path / "kept"))

    rows = [row for row, _ in ROWS]
    first = fingerprint(rows, tmp_path / "here")
    assert first == fingerprint(rows, tmp_path / "there") == fingerprint(rows, tmp_path / "here")
    others = [rows[:-1], rows[::-1], [rows[0] | {"caption": "Zero"}, *rows[1:]],
              [rows[0] | {"image": "5.png"}, *rows[1:]]]
    assert len({first, *(fingerprint(other, tmp_path / "here") for other in others)}) == 5
    for folder in ("here", "there"):
        image = (pictures / "1.png").read_bytes()
        make_shard(tmp_path / folder / "s.tar", [("a.png", image), ("a.txt", b"a")])
    two = []
    for folder in ("here", "there"):
        write_jsonl(tmp_path / folder / "d.jsonl", rows)
        paths = [str(tmp_path / folder / name) for name in ("s.tar", "d.jsonl")]
        two.append(data.fingerprint(data.Records(paths, 16)))
    assert two[0] == two[1]
    worlds = [World(), World(1), World(0, "held"), World(0, kinds=("color",)), World(0, kinds=list(data.KINDS))]
    prints = [data.fingerprint(world) for world in worlds]
    assert len(set(prints)) == 4 and prints[0] == prints[4]


def test_records_are_pickled_small_and_opened_again(tmp_path):
    save(tmp_path / "x.png", "L", 7)
    rows = [{"image": "x.png", "caption": f"number {k}", "question": "?", "answer": str(k)} for k in range(10_000)]
    records = data.Records(write_jsonl(tmp_path / "d.jsonl", rows), 16)
    records.record(5)
    content = pickle.dumps(records)
    assert len(content) < 1000
    again = pickle.loads(content)
    assert len(again) == 10_000 and again.record(9999) == records.record(9999) and again.image(0)[0, 0, 0] == 7
    assert again.captioned == 10_000 and again.split(1)[0].shape == (10_000,)
    del again  # the index stays, as it is the first one's
    assert pickle.loads(content).caption(3, RNG) == "number 3"


@pytest.mark.parametrize("name, content, message", [
    ("d.jsonl", b'{"image": "0.png", "caption"', "d.jsonl, line 1: .*not valid JSON"),
    ("d.jsonl", b"\n7", "d.jsonl, line 2: .*want"),
    ("d.jsonl", b'\n{"image": "0.png", "caption": "\xff"}', "d.jsonl, line 2: its text is neither UTF-8"),
    ("d.jsonl", b"", "d.jsonl: holds no image"), ("d.json", b'{"images": []}', "d.json, line 1: has not one .image."),
    ("d.json", b"[7]", "d.json, item 1: not in a form"), ("d.json", b"[\n7,,]", "d.json: not valid JSON .*line 2")])
def test_a_bad_line_or_file_is_named(pictures, name, content, message):
    (pictures / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        data.Records(str(pictures / name), 16)
    assert "\n" not in str(raised.value)


def test_records_without_an_image_or_a_text_are_left_out_and_counted(pictures, tmp_path):
    rows = [{"image": "1.png", "caption": "one"}, {"image": "1.png"}, {"caption": "no image"}, {"image": "1.png",
            "question": "?"}, {"image": "1.png", "caption": ""}, {"image": None, "caption": "none"},
            {"image": "missing.png", "caption": "no such image"}]
    rows += [{"image": f"{k}.png", "caption": "one"} for k in range(1, 2) for _ in range(6)]
    for _ in range(2):  # also when the index is there
        records = data.Records(write_jsonl(pictures / "d.jsonl", rows), 16, tmp_path / "kept")
        assert said(records) == 7 * [(10, ("one",), ())] and records.incomplete == 6


def test_an_image_that_vanishes(pictures, tmp_path, capsys):
    path = write_jsonl(pictures / "d.jsonl", [{"image": f"{k}.png", "caption": str(k)} for k in range(5)])
    records = data.Records(path, 16, tmp_path / "kept")
    os.remove(pictures / "3.png")
    assert data.readable(records, 3) is None and data.readable(records, 2) is not None
    assert f"No such file or directory: '{pictures / '3.png'}'; left out" in capsys.readouterr().err


class Numbers:
    """A source whose records are their own numbers, and a tokenizer whose texts are numbers."""
    size = 8
    eos_id = 1

    def image(self, i):
        return np.full((8, 8, 3), i, np.uint8)

    def caption(self, i, rng):
        return str(i)

    def question(self, i, rng):
        return str(i), str(rng.integers(100))

    def encode(self, text, length):
        return [int(text or -1)] * length

    def answer_room(self, length):
        return 0

    def text_ids(self, text, length, caption_prompt, answer_suffix):
        if isinstance(text, str):
            return self.encode(text, length), [True] * (length - 1) + [False]
        question, answer = text
        return [int(question)] + [int(answer)] * (length - 1), [False] + [True] * (length - 1)


SETTINGS = Settings(length=3)


def batches_of(count, batch, rows=None, passes=1, texts=None, drop=0.0, questions=0.0):
    recipe, numbers = SimpleNamespace(batch=batch, drop=drop, questions=questions), Numbers()
    images = data.Subset(numbers, np.arange(count))
    return data.Batches(images, texts or images, numbers, SETTINGS, recipe, 5, rows or slice(0, batch), passes)


def test_every_epoch_has_every_record_once_whatever_the_batch():
    for total in (10, 103):
        def stream(batch):
            batches = batches_of(total, batch)
            return [int(i) for step in range(3 * total // batch) for i in batches[step][0].tokens[:, 0]]
        numbers = stream(1)
        assert all(sorted(numbers[k * total:(k + 1) * total]) == list(range(total)) for k in range(3))
        assert numbers[:total] != numbers[total:2 * total]
        assert stream(7) == numbers[:3 * total // 7 * 7]


def tensors(batch):
    batch = default_convert(batch)
    text_images = batch.images if batch.text_images is None else batch.text_images
    return batch.images, text_images, batch.captions, batch.tokens, batch.maskable


def test_batches_are_the_same_on_any_number_of_processes():
    other = data.Subset(Numbers(), np.arange(50, 80))
    for texts in (None, other):
        def step(*args):
            return batches_of(50, 64, *args, texts, 0.1, 0.5)[5]
        (whole,), (one,), (two,), four = step(None, 1), step(slice(0, 16), 1), step(slice(16, 64), 1), step(None, 4)
        assert [part.rows for part in four] == [slice(k, k + 16) for k in (0, 16, 32, 48)]
        assert (whole.rows, one.rows, two.rows) == (slice(0, 64), slice(0, 16), slice(16, 64))
        for parts in ((one, two), four):
            for wanted, *pieces in zip(tensors(whole), *map(tensors, parts)):
                assert torch.equal(wanted, torch.cat(pieces))
        about = tensors(whole)[1]
        assert (((about[:, 0, 0, 0] + 1) * 127.5).round() == whole.tokens[:, 0]).all()
        assert (whole.text_images is None) == (texts is None)
        assert 10 < (~whole.maskable[:, 0]).sum() < 54 and 0 < (whole.captions[:, 0] < 0).sum() < 20


def test_the_next_image_takes_a_bad_ones_place():
    class Bad(Numbers):
        def image(self, i):
            if i % 5 == 2 or i > 90:
                raise ValueError(f"{i} is bad")
            return super().image(i)
    subset = data.Subset(Bad(), np.arange(90))
    assert [subset.record(k)[0] for k in (1, 2, 87, 91, 92)] == [1, 3, 88, 1, 3]
    with pytest.raises(ValueError, match="a hundred images in a row cannot be read"):
        data.Subset(Bad(), np.arange(91, 92)).record(0)


def test_latents_are_encoded_once(pictures, tmp_path):
    """Bad images are left out."""
    vae, numbers = VAE(VAEConfig(channels=32, multipliers=(1, 1), latent_channels=4)), np.arange(6)
    (pictures / "3.png").write_bytes(b"")
    path = write_jsonl(pictures / "d.jsonl", [{"image": f"{k}.png", "caption": str(k)} for k in range(6)])
    subset, encoded = data.Subset(data.Records(path, 16, tmp_path), numbers), []
    assert data.with_latents(subset, vae, str(tmp_path), 5) is subset
    encoded.append(data.with_latents(subset, vae, str(tmp_path), 6))
    latents, whole = encoded[0].latents, np.array(data.mapped(encoded[0].latents))
    assert whole.shape == (6, 2, 4, 8, 8) and whole.dtype == np.float16 and np.isnan(whole).all((1, 2, 3, 4))[3]
    assert encoded[0].ids.tolist() == [0, 1, 2, 4, 5]
    mean, logvar = vae.encode(torch.from_numpy(data.to_pixels([subset.source.image(5)])))
    i, moments = encoded[0].record(4)
    assert i == 5 and np.allclose(moments, torch.stack([mean, logvar], 1)[0].detach(), atol=5e-3)
    again = data.with_latents(subset, vae, str(tmp_path), 6)
    recipe = SimpleNamespace(batch=8, drop=0, questions=0)
    batches = data.Batches(again, again, Numbers(), SETTINGS, recipe, 0, slice(0, 8))
    batches[0]
    copy = pickle.dumps(batches)
    assert len(copy) < 2000  # paths, not arrays
    assert np.array_equal(pickle.loads(copy)[3][0].images, batches[3][0].images)
    save(pictures / "5.png", "L", 250)  # another picture in the same place
    subset = data.Subset(data.Records(path, 16, tmp_path), numbers)
    anew = data.with_latents(subset, vae, str(tmp_path), 6)
    assert anew.latents != latents and (anew.record(4)[1] != moments).any()
    assert np.array_equal(anew.record(3)[1], encoded[0].record(3)[1])
    vae.encoder.conv_in.bias.data += 1
    assert data.with_latents(subset, vae, str(tmp_path), 6).latents != latents


def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="x.png: could not be written"), data.replacing(str(path)) as beside:
            Image.effect_noise((99, 99), 50).save(beside, format="PNG")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["x.png"]
    with data.replacing(str(path)) as beside:
        Image.new("RGB", (9, 9)).save(beside, format="PNG")
    os.umask(umask := os.umask(0))
    assert path.read_bytes() != b"before" and path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_only_what_cannot_be_written_is_said_to_be_so(tmp_path):
    for error in (FileNotFoundError(2, "No such file", "another"), TypeError("ours"), ValueError("bad data")):
        with pytest.raises(type(error)) as raised, data.replacing(str(tmp_path / "x")) as beside:
            open(beside, "w").close()
            raise error
        assert raised.value is error and not os.listdir(tmp_path)
    with pytest.raises(OSError, match="x: could not be written") as raised, data.replacing(str(tmp_path / "x")):
        raise SafetensorError("no space")
    assert isinstance(raised.value.__cause__, SafetensorError)


def test_the_index_is_kept_and_made_anew_when_the_data_change(tmp_path, monkeypatch):
    save(tmp_path / "x.png", "L", 7)
    path = write_jsonl(tmp_path / "d.jsonl", [{"image": "x.png", "caption": "one"}])
    assert data.Records(path, 16, tmp_path / "kept").record(0).captions == ("one",)
    read = []
    monkeypatch.setattr(data, "read_list", lambda path, read_list=data.read_list: read.append(path) or read_list(path))
    assert data.Records(path, 16, tmp_path / "kept").record(0).captions == ("one",) and not read
    write_jsonl(tmp_path / "d.jsonl", [{"image": "x.png", "caption": "two"}])
    os.utime(path, (1, 1))
    assert data.Records(path, 16, tmp_path / "kept").record(0).captions == ("two",) and read == [path]


# ---------------------------------------------------------------- what people's folders and lists are really like

ONE = "a cat, number {}"
CSV = "file_name,text\n" + "".join(f'{{}}{k}.png,"{ONE.format(k)}"\n' for k in range(3))
LINES = "".join(json.dumps({"file_name": f"{k}.png", "text": ONE.format(k)}) + "\n" for k in range(3))


@pytest.mark.parametrize("files", [
    {"train/metadata.csv": CSV.replace("{}", "")}, {"metadata.csv": CSV.replace("{}", "train/")},
    {"train/metadata.jsonl": LINES}, *({f"train/{k}{end}": ONE.format(k) for k in range(3)} for end in (
        ".caption", ".TXT", ".png.txt")),
    {f"train/{k}.json": json.dumps({"caption": ONE.format(k)}) for k in range(3)}])
def test_captions_are_found_where_tools_put_them(tmp_path, files):
    (tmp_path / "train").mkdir()
    for k in range(3):
        save(tmp_path / "train" / f"{k}.png", "L", 10 * k)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert said(data.Records(str(tmp_path), 16)) == [(10 * k, (ONE.format(k),), ()) for k in range(3)]


def test_captions_in_an_unknown_form_are_not_replaced_by_the_folder_s_name(pictures, capsys):
    folder = pictures / "cats"
    folder.mkdir()
    save(folder / "1.png", "L", 1)
    assert said(data.Records(str(folder), 16)) == [(1, ("cats",), ())]
    assert f"{folder}: 1 images without texts, so the names of their folders are their captions" in \
        capsys.readouterr().err
    for name in ("captions.txt", "x.parquet", "Labels.csv"):
        (folder / name).write_text("?")
        with pytest.raises(ValueError, match="1.png: has no text: a .txt, .caption or .json"):
            data.Records(str(folder), 16)
        (folder / name).unlink()


def test_what_systems_leave_behind_is_no_data_and_links_are_followed_once(tmp_path):
    cats, jpeg = tmp_path / "all" / "cats", io.BytesIO()
    Image.new("RGB", (16, 16)).save(jpeg, "JPEG")
    for name in ("1", "2", "._1", "__MACOSX/3", ".ipynb_checkpoints/1"):
        for end, content in ((".jpg", jpeg.getvalue()), (".txt", name.encode())):
            os.makedirs(os.path.dirname(cats / f"{name}{end}"), exist_ok=True)
            (cats / f"{name}{end}").write_bytes(content)
    os.symlink(tmp_path / "all", cats / "loop")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for path in sorted(cats.rglob("*.*")):
            if path.is_file() and "loop" not in str(path):
                tar.add(path, f"./{path.relative_to(tmp_path)}")
    (tmp_path / "linked").mkdir()
    os.symlink(cats, tmp_path / "linked" / "there")
    for source in ("all", "linked", "x.tar"):
        records = data.Records(str(tmp_path / source), 16)
        assert [records.record(i).captions for i in range(len(records))] == [("1",), ("2",)], source


def test_in_a_shard_nothing_replaces_a_text_and_order_matters(pictures):
    image = (pictures / "1.png").read_bytes()
    null, full = b'{"caption": null, "url": "u"}', b'{"caption": "a cat", "url": "u"}'
    for members in ([("txt", b"a cat"), ("json", null)], [("json", null), ("txt", b"a cat")],
                    [("json", full), ("txt", b"")], [("txt", b""), ("json", full)]):
        path = make_shard(pictures / "s.tar", [(f"0.{end}", content) for end, content in [("png", image), *members]])
        assert said(data.Records(path, 16)) == [(10, ("a cat",), ())]
    path = make_shard(pictures / "s.tar", [*((f"{k}.png", image) for k in "ab"), *((f"{k}.txt", b"a") for k in "ab")])
    assert said(data.Records(path, 16)) == 2 * [(10, ("a",), ())]


def test_falsy_is_not_missing_and_one_odd_record_is_not_a_broken_file(pictures):
    asked = {"image": "1.png", "question": "how many?"}
    for fields, want in (({"answer": 3}, "3"), ({"answer": 0}, "0"), ({"answers": [0, 0, 1]}, "0"),
                         ({"answers": None, "answer": "2"}, "2"), ({"answers": [], "answer": 2.5}, "2.5")):
        records = data.Records(write_jsonl(pictures / "d.jsonl", [asked | fields]), 16)
        assert records.record(0).questions[0][:2] == ("how many?", want)
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]
    good = {"image": "2.png", "caption": "a cat"}
    for odd, usable in (({"image": ["0.png", "1.png"], "conversations": talk}, 2),
                        ({"image": ["1.png"], "caption": "x"}, 3),
                        ({"image": "1.png", "conversations": [talk[0], {"from": "gpt", "value": None}]}, 2),
                        ({"image": "1.png", "caption": ["a cat", "the cat"]}, 3), ("no object", 2)):
        records = data.Records(write_jsonl(pictures / "d.json", [good, odd, good]), 16)  # lines, whatever the name
        assert len(records) == usable and records.incomplete == 3 - usable


def test_a_png_with_a_long_text_and_a_large_jpeg_are_pictures(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 1_500_000, zip=True)
    Image.new("RGB", (64, 64), (200, 100, 50)).save(tmp_path / "1.png", pnginfo=info)
    assert data.load_image(tmp_path / "1.png", 16).getpixel((8, 8)) == (200, 100, 50)
    smooth = Image.fromarray(np.linspace(0, 255, 1200 * 1600 * 3).reshape(1200, 1600, 3).astype(np.uint8))
    smooth.save(tmp_path / "1.jpg", quality=95)
    with Image.open(tmp_path / "1.jpg") as whole:
        want = ImageOps.fit(whole.convert("RGB"), (64, 64), Image.Resampling.BICUBIC)
    assert abs(np.asarray(data.load_image(tmp_path / "1.jpg", 64), float) - np.asarray(want)).mean() < 0.5


# ---------------------------------------------------------------- what is held out stays held out, and nothing is lost

def make_picture(code):
    """A picture of four pixels that no other code has."""
    return b"P6 2 2 255\n" + np.random.default_rng(code).bytes(12)


def make_source(folder, kind, codes, copies):
    """Writes pictures, whose captions are their codes, as a folder, a list, one of pictures elsewhere, or a shard."""
    names = [f"{k}-{code}.ppm" for k, code in enumerate(codes)]
    os.makedirs(folder)
    if kind == "shard":
        members = [pair for name, code in zip(names, codes)
                   for pair in ((name, make_picture(code)), (f"{name[:-4]}.txt", str(code).encode()))]
        return make_shard(folder / "s.tar", members)
    if kind == "elsewhere":
        names = [f"../{copies}/{code}.ppm" for code in codes]
    else:
        for name, code in zip(names, codes):
            (folder / name).write_bytes(make_picture(code))
            if kind == "beside":
                (folder / f"{name[:-4]}.txt").write_text(str(code))
    if kind == "csv":
        rows = [f"{name},{code}\n" for name, code in zip(names, codes)]
        (folder / "metadata.csv").write_text("file_name,text\n" + "".join(rows))
    if kind in ("list", "elsewhere"):
        return write_jsonl(folder / "l.jsonl", [{"image": n, "caption": str(c)} for n, c in zip(names, codes)])
    return str(folder)


def test_no_stage_learns_what_another_holds_out(tmp_path):
    """200 random mixtures of two stages: lists, folders and shards, with copies under other names, overlaps, and a
    folder that moves between the stages. Each holds out 2 to 9%."""
    rng, pool, sources = np.random.default_rng(0), 3000, []
    os.makedirs(tmp_path / "all")
    for code in range(pool):
        (tmp_path / "all" / f"{code}.ppm").write_bytes(make_picture(code))
    for k, kind in enumerate(["beside", "list", "csv", "shard", "elsewhere"] * 4):
        codes = rng.integers(pool, size=rng.integers(100, 180)).tolist()  # some of them twice
        sources.append(make_source(tmp_path / f"{k}", kind, codes, "all"))
    moving = [tmp_path / "here", tmp_path / "there"]
    make_source(moving[0], "beside", rng.integers(pool, size=60).tolist(), "all")
    recipe = SimpleNamespace(batch=50, drop=0.0, questions=0.0)
    np.save(tmp_path / "latents.npy", np.zeros((3000, 1)))  # so that no picture need be decoded
    for mixture in range(200):
        given, held = [], []
        for folder in moving:
            if not folder.exists():
                os.rename(moving[0] if moving[0].exists() else moving[1], folder)
            paths = rng.choice(sources, size=rng.integers(3, 6), replace=False).tolist() + [str(folder)]
            records = data.Records(paths, 2, str(tmp_path / "kept"))
            told = [int(records.caption(i, RNG)) for i in range(len(records))]
            unseen, ids = records.split(250)
            held.append({told[i] for i in unseen})
            assert 200 < len(set(told)) == records.count_images()
            assert 0.02 <= len(held[-1]) / len(set(told)) <= 0.09
            if mixture % 20:
                given.append({told[i] for i in ids})
                continue
            subset = data.Subset(records, ids, str(tmp_path / "latents.npy"))
            batches = data.Batches(subset, subset, Numbers(), SETTINGS, recipe, 0, slice(0, 50))
            rows = [batches[step][0].tokens[:, 0] for step in range(len(ids) // 50 + 1)]  # an epoch
            given.append(set(np.concatenate(rows).tolist()))
        assert not (given[0] | given[1]) & (held[0] | held[1])


def read(path, folder=None):
    """-> {image: (captions, questions)}, how many are left out, the warning or error."""
    messages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "warn", messages.append)
        try:
            records = data.Records(str(path), 16, folder)
        except ValueError as error:
            return {}, 0, str(error)
    rows = [records.record(i) for i in range(len(records))]
    return {os.path.basename(row.image): row[1:3] for row in rows}, records.incomplete, " ".join(messages)


def test_time_says_only_what_must_be_looked_at_again(pictures, tmp_path):
    """A list, an image and a text that change under their old time, and an image that was not there at first."""
    rows = [{"image": "0.png", "caption": "one"}, {"image": "9.png", "caption": "nine"}]
    path, kept = write_jsonl(pictures / "d.jsonl", rows), tmp_path
    assert read(path, kept)[:2] == ({"0.png": (("one",), ())}, 1)
    for file, content in (("d.jsonl", (pictures / "d.jsonl").read_bytes().replace(b"one", b"two")),
                          ("0.png", (pictures / "5.png").read_bytes())):
        before, old = os.stat(pictures / file), data.Records(path, 16, kept)
        (pictures / file).write_bytes(content)
        os.utime(pictures / file, ns=(before.st_atime_ns, before.st_mtime_ns))
        new = data.Records(path, 16, kept)
        assert new.hash != old.hash and new.stamp != old.stamp
    assert said(new) == [(50, ("two",), ())]
    save(pictures / "9.png", "L", 90)
    assert len(read(path, kept)[0]) == 2
    shutil.copytree(pictures, tmp_path / "copied")
    assert data.Records(str(tmp_path / "copied" / "d.jsonl"), 16).hash == data.Records(path, 16, kept).hash


@pytest.mark.parametrize("name, content, caption", [
    ("l.jsonl", '{"image": "0.png", "caption": "naïve"}\n'.encode("utf-16"), "naïve"),
    ("l.json", b'\xef\xbb\xbf[{"image": "0.png", "caption": "na\xc3\xafve"}]', "naïve"),
    ("0.txt", "a cat".encode("utf-16-le"), None),  # without a byte order mark
    ("0.txt", "naïve".encode("latin-1"), None), ("0.txt", "a cat".encode("utf-32"), None),
    ("l.csv", b'file_name,text\n0.png, "a red, round ball"\n', "a red, round ball"),
    ("l.csv", b'file_name,text\n0.png,"' + b"long " * 50_000 + b'"\n', ("long " * 50_000).strip()),
    ("l.csv", 'image,caption\n0.png,naïve\n'.encode("utf-16"), "naïve"),
    ("l.csv", 'image,caption\n0.png,naïve\n'.encode("cp1252"), None),
    ("l.csv", b'image,caption\n0.png,a,b\n', None),
    ("l.csv", b'image,caption\n0.png,"a sign says "stop""\n', "line 2: ',' expected"),
    ("l.csv", b'image,caption\n0.png,a cat\n1.png,"a dog\n', "line 3: unexpected end of data"),
    ("l.jsonl", b'{"image": "0.png", "caption": NaN}', None),
    ("l.jsonl", b'{"image": "0.png", "caption": "\\ud83d"}', None),
    ("l.jsonl", b'{"image": "0.png", "question": ["a?", "b?"], "answer": ["c"], "caption": "d"}', None)])
def test_a_text_is_read_as_it_was_written_or_left_out(pictures, name, content, caption):
    """Beside a good one."""
    folder = pictures / "new"
    folder.mkdir()
    for k in (0, 1):
        shutil.copy(pictures / f"{k}.png", folder)
    (folder / name).write_bytes(content)
    (folder / "1.txt").write_text("one")
    found, left_out, message = read(folder if name == "0.txt" else folder / name)
    if caption is None:
        assert "0.png" not in found and (left_out == 1 or name != "0.txt") and message
    elif caption.startswith("line "):
        assert not found and f"{name}, {caption}" in message
    else:
        assert found["0.png"] == ((caption,), ()) and not left_out


def test_every_text_and_every_picture_of_a_folder_is_read_or_counted(pictures):
    row = json.dumps({"file_name": "0.png", "text": "listed"})
    image = (pictures / "0.png").read_bytes()
    files = {"a/both.png": image, "a/both.txt": b"a caption", "a/README.txt": b"?", "a/LICENSE.txt": b"?",
             "a/both.json": b'{"caption": "no", "question": ["which?", "how many?"], "answer": ["this", "2"]}',
             "a/notes.md": b"?",
             "a/caf\u00e9.png": image, "a/cafe\u0301.txt": b"in another normal form",
             "a/1.svg": b"<svg/>", "a/none.txt": b"of no picture", "a/more.csv": b"?", "a/bare.png": image,
             "hub/metadata.jsonl": row.encode(), "hub/0.png": image, "hub/1.png": image}
    for name, content in files.items():
        os.makedirs(os.path.dirname(pictures / "in" / name), exist_ok=True)
        (pictures / "in" / name).write_bytes(content)
    os.symlink("nowhere", pictures / "in" / "unmounted")
    found, left_out, message = read(pictures / "in")
    assert found == {"both.png": (("a caption",), (("which?", "this"), ("how many?", "2"))),
                     "caf\u00e9.png": (("in another normal form",), ()), "0.png": (("listed",), ())}
    assert left_out == 6 and "unmounted: a link to nothing" in message  # and svg, none.txt, more.csv, bare.png, 1.png


def test_a_folder_that_cannot_be_opened_is_an_error(pictures, monkeypatch):
    (pictures / "closed").mkdir()
    for k in range(6):
        (pictures / f"{k}.txt").write_text("text")

    def scandir(path, scandir=os.scandir):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="closed"):
        data.Records(str(pictures), 16)


def test_names_are_bytes(pictures):
    name = os.fsdecode(b"caf\xe9.png")
    os.rename(pictures / "1.png", pictures / name)
    path = write_jsonl(pictures / "l.jsonl", [{"image": name, "caption": "one"}, {"image": "2.png", "caption": "two"}])
    assert said(data.Records(path, 16)) == [(10, ("one",), ()), (20, ("two",), ())]
    (pictures / "l.csv").write_bytes(b"image,caption\ncaf\xe9.png,one\n")
    assert said(data.Records(str(pictures / "l.csv"), 16)) == [(10, ("one",), ())]
    data.write_text(str(pictures / "held-out.txt"), f"{name}\n")
    assert (pictures / "held-out.txt").read_bytes() == b"caf\xe9.png\n"


@pytest.mark.parametrize("name", ["x.zip", "x.npz", "x.jpg", "x.tar.bz2", "x.jsonl.gz"])
def test_a_wrong_kind_of_file_is_told_what_is_wanted(tmp_path, name):
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(ValueError, match=f"{name}: give a folder, a list .* or a .tar that is not compressed"):
        data.Records(str(tmp_path / name), 16)


def test_what_train_py_wrote_is_no_data(pictures):
    """Whether it stands in a folder of its own or among the pictures."""
    for folder in ("runs/mine", "."):
        os.makedirs(pictures / folder / "stage1")
        (pictures / folder / "stage1" / "run.json").write_text("{}")
        for name in ("samples.png", "../drawn.png")[:1 if folder == "." else 2]:
            shutil.copy(pictures / "0.png", pictures / folder / "stage1" / name)
    assert len(data.Records(str(pictures), 16)) == 6


def test_processes_share_the_reading_of_shards_and_what_is_read_stays(pictures, tmp_path, monkeypatch):
    image = (pictures / "1.png").read_bytes()
    paths = [make_shard(pictures / f"{k}.tar", [("a.png", image + bytes([k])), ("a.txt", str(k).encode())])
             for k in range(7)]
    alone, read = data.Records(paths, 16), []

    def read_shard(path, read_shard=data.read_shard):
        if path == paths[4] and len(read) < 5:
            raise KeyboardInterrupt
        read.append(path)
        return read_shard(path)
    monkeypatch.setattr(data, "read_shard", read_shard)
    with pytest.raises(KeyboardInterrupt):
        data.Records(paths, 16, tmp_path)
    assert read == paths[:4]
    read += ["once more"]
    values, barrier, found = {}, threading.Barrier(2), {}

    def work(rank):
        def exchange(value):
            values[rank] = value
            barrier.wait(30)
            return [values[0], values[1]]
        found[rank] = data.Records(paths, 16, tmp_path, part=slice(rank, None, 2), exchange=exchange)
    threads = [threading.Thread(target=work, args=[rank]) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read[5:]) == paths[4:]
    for records in found.values():
        assert (records.hash, records.stamp) == (found[0].hash, found[0].stamp) and records.hash == alone.hash
        assert [records.record(i).captions for i in range(7)] == [(f"{k}",) for k in range(7)]
        assert (records.split()[0] == alone.split()[0]).all()
