"""The paper's benchmarks: the measures, against values of the official programs; files, results, runs cut off."""
import json
import os

import metrics
import numpy as np
import pytest
from PIL import Image
from test_evaluate import figures, run

import data
import sample
from data import World

with open(os.path.join(os.path.dirname(__file__), "golden_scores.json")) as f:
    GOLDEN = json.load(f)  # its "about" says where the values come from
N = 12  # images in `published`


# ---------------------------------------------------------------- the measures


def test_vqa_as_the_official_program():
    for case in GOLDEN["vqa"]:
        assert metrics.vqa_score(case["answer"], case["people"]) == pytest.approx(case["score"], abs=1e-6), case


@pytest.mark.parametrize("text, normal", {
    "The 2 dogs.": "2 dogs", "two-thirds": "2 thirds", "t - shirt": "t shirt", "1,000 (about)": "1000 about",
    "None": "0", "dont": "don't", "youd've": "you'd've", "3.5": "3.5", "U.S.": "us", "a b. c": "b c", "a": "",
    "man's": "man's", "10:30": "10:30", "somebody'd": "somebodyd", "well": "well", "TEN an": "10"}.items())
def test_normal_answers(text, normal):
    assert metrics.normal_answer(text) == normal


def test_vqa_with_few_people():
    assert [metrics.vqa_score("two", ["two"] * n) for n in (1, 2, 3, 4)] == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_pope_by_hand():
    answers = ["Yes, it is.", "No.", "There is not a dog", "yes. no", "NO", "no, never", "I see nothing", "Yes"]
    assert [metrics.pope_says_yes(text) for text in answers] == [True, False, False, True, True, False, True, True]
    scores = metrics.pope_scores(["yes", "no", "yes", "yes", "no", "no", "no", "yes"], answers)
    assert scores == pytest.approx({"accuracy": 5 / 8, "precision": 3 / 5, "recall": 3 / 4, "f1": 2 / 3,
                                    "yes_ratio": 5 / 8})
    assert metrics.pope_scores(["no"], ["no"])["f1"] == 0


def test_mme_by_hand():
    pairs = [(("Yes", "Yes, sure"), ("No", "no")), (("Yes", " yes"), ("No", "I do not know")),
             (("Yes", "maybe"), ("No", "No."))]
    assert metrics.mme_score(pairs) == pytest.approx(100 * 4 / 6 + 100 * 1 / 3)
    assert metrics.mme_score(pairs[:1]) == 200


# ---------------------------------------------------------------- files and runs


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Scenes of the world in the form of each benchmark, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng, world = np.random.default_rng(0), World(3)
    questions, people, gqa, pope, mme, images, captions = [], [], {}, [], [], [], []
    os.makedirs("img/sub")
    for i in range(N):
        name = f"COCO_val2014_{i:012}.png"
        Image.fromarray(world.image(i)).save(f"img/{name}")
        (question, answer), (exists, label) = world.question(i, rng, "where"), world.question(i, rng, "exists")
        questions.append({"image_id": i, "question_id": 10 * i, "question": question})
        people.append({"image_id": i, "question_id": 10 * i, "answer_type": "other" if i % 3 else "number", "answers": [
            {"answer": answer if k < 8 else "it", "answer_id": k} for k in range(10)]})
        gqa[str(i)] = {"question": question, "imageId": str(i), "answer": answer, "isBalanced": i != 5}
        pope.append({"question_id": i, "image": name, "text": exists, "label": label})
        mme += [f"{name}\t{exists}\t{label}", f"{name}\tis there a blue dog?\tno"]
        images.append({"id": i, "file_name": name})
        captions += [{"image_id": i, "caption": world.caption(i, rng)} for _ in range(3)]
    write("q.json", {"questions": questions})
    write("a.json", {"annotations": people})
    write("viz.json", [{"image": row["file_name"], "question": q["question"], "answers": p["answers"]}
                       for row, q, p in zip(images, questions, people)])
    write("g.json", gqa)
    write("c.json", {"images": images, "annotations": captions})
    os.mkdir("mme_q")
    drawn = [json.dumps({"prompt": "a red circle", "tag": k}) for k in range(2)]
    for path, lines in {"p.json": map(json.dumps, pope), "mme_q/existence.txt": mme, "g.jsonl": drawn,
                        "prompts.txt": ["a red circle"] * 3}.items():
        with open(path, "w") as f:
            f.write("\n".join(lines) + "\n")


def write(path, value):
    with open(path, "w") as f:
        json.dump(value, f)


def read(path):
    with open(path, "rb") as f:
        return f.read()


COMMANDS = {  # kind: files, those without a model, the result file
    "vqa": ("--annotations a.json --questions q.json --images img --out r.json", "--annotations a.json", "r.json"),
    "vizwiz": ("--annotations viz.json --images img --out v.json", "--annotations viz.json", "v.json"),
    "gqa": ("--questions g.json --images img --out g_r.json", "--questions g.json", "g_r.json"),
    "pope": ("--questions p.json --images img --out p_r.jsonl", "--questions p.json", "p_r.jsonl"),
    "mme": ("--questions mme_q --images img --out mme_r", "", "mme_r"),
    "coco": ("--annotations c.json --images img --out c_r.json", "", "c_r.json")}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_run_and_its_results(published, name, monkeypatch, capsys):
    files, without, results = COMMANDS[name]
    kind = "vqa" if name == "vizwiz" else name
    out, _ = run(monkeypatch, capsys, kind, *files.split())
    if name != "coco":
        scored, _ = run(monkeypatch, capsys, kind, *without.split(), "--results", results, "--ckpt", "no/model")
        assert scored == out
    scores = dict(line.rsplit(" ", 1) for line in out.splitlines() if "interval" not in line)
    if name == "coco":
        assert out == f"c_r.json: {N} captions\n"
        assert [row.keys() == {"image_id", "caption"} for row in json.loads(read(results))] == [True] * N
    elif name == "mme":
        assert scores["total"] == scores["existence"] and 100 < float(scores["total"]) <= 200
        assert len(read("mme_r/existence.txt").splitlines()[0].split(b"\t")) == 4
    else:
        assert float(scores["accuracy"]) > 80 and "95% interval [" in out
    if name == "vqa":
        assert {"accuracy", "  number", "  other"} == scores.keys()
    if name == "vizwiz":
        assert json.loads(read(results))[0].keys() == {"image", "answer"}
    if name == "gqa":
        assert len(json.loads(read(results))) == N - 1  # one is not balanced
    if name == "pope":
        assert list(scores) == ["accuracy", "precision", "recall", "f1", "yes_ratio"]
        assert json.loads(read(results).splitlines()[0]).keys() == {"question_id", "answer"}


def test_known_results(published, monkeypatch, capsys):
    """Scores of results whose right score is known, from results in the order of their own."""
    write("r.json", [{"question_id": 10 * i, "answer": "it" if i < 6 else "Nowhere!"} for i in reversed(range(N))])
    out = run(monkeypatch, capsys, "vqa", "--annotations", "a.json", "--results", "r.json")[0]
    one = (2 * 1 / 3 + 8 * 2 / 3) / 10  # of two who say "it", one or none is left out
    assert out.splitlines()[0] == f"accuracy {100 * one / 2:.2f}"


@pytest.mark.parametrize("out", ["p_r.jsonl", "p_r.json", "p_r.txt"])
def test_a_run_is_scored_by_what_its_file_holds(published, out, monkeypatch, capsys):
    command = ["pope", "--questions", "p.json"]
    scores = run(monkeypatch, capsys, *command, "--images", "img", "--out", out)[0]
    assert run(monkeypatch, capsys, *command, "--results", out)[0] == scores


def test_drawings(published, monkeypatch, capsys):
    run(monkeypatch, capsys, "geneval", "--prompts", "g.jsonl", "--out", "gen")
    assert sorted(os.listdir("gen")) == [".begun", "00000", "00001"]
    assert json.loads(read("gen/00001/metadata.jsonl")) == {"prompt": "a red circle", "tag": 1}
    assert sorted(os.listdir("gen/00000/samples")) == [f"000{k}.png" for k in range(4)]
    images = [read(f"gen/0000{k}/samples/000{n}.png") for k in range(2) for n in range(4)]
    assert len(set(images)) == 8
    run(monkeypatch, capsys, "pictures", "--prompts", "prompts.txt", "--out", "pics")
    assert sorted(os.listdir("pics")) == [".begun", "00000.png", "00001.png", "00002.png"]
    assert Image.open("pics/00000.png").size == (64, 64)
    err = run(monkeypatch, capsys, "pictures", "--prompts", "prompts.txt", "--out", "pics", "--num", 1, status=2)[1]
    assert "pics/.begun: was begun with another model, seed, type or inputs" in err
    drawn, before = np.asarray(Image.open("pics/00001.png"), int), os.stat("pics/00000.png").st_mtime_ns
    os.remove("pics/00001.png")  # as if it had been interrupted
    run(monkeypatch, capsys, "pictures", "--prompts", "prompts.txt", "--out", "pics")
    assert abs(np.asarray(Image.open("pics/00001.png"), int) - drawn).max() < 3  # up to rounding
    assert os.stat("pics/00000.png").st_mtime_ns == before
    os.remove("pics/.begun")
    err = run(monkeypatch, capsys, "pictures", "--prompts", "prompts.txt", "--out", "pics", status=2)[1]
    assert "pics: holds files; give an empty folder" in err


def test_answers_are_kept_as_they_come(published, monkeypatch, capsys):
    """Two images at once; the third batch fails, and the same command goes on there. Another seed is refused."""
    command, asked = ["pope", *"--questions p.json --images img --out p_r.jsonl".split()], []
    whole = run(monkeypatch, capsys, *command)[0]
    os.remove("p_r.jsonl.begun")
    monkeypatch.setitem(data.PIXELS, "cpu", 2 * 64 * 64)

    def answer(dd, pixels, texts, answer=sample.answer, **how):
        asked.append(len(texts))
        if len(asked) == 3:
            raise ValueError("a bad day")
        return answer(dd, pixels, texts, **how)
    monkeypatch.setattr(sample, "answer", answer)
    assert "a bad day" in run(monkeypatch, capsys, *command, status=2)[1]
    assert len(json.loads(read("p_r.jsonl.begun"))["texts"]) == 4
    err = run(monkeypatch, capsys, *command, "--seed", 1, status=2)[1]
    assert "p_r.jsonl.begun: was begun with another model" in err
    done = len(asked)
    assert run(monkeypatch, capsys, *command)[0] == whole and sum(asked[done:]) == N - 4


def test_ten_answers_of_the_users_data(published, monkeypatch, capsys):
    with open("q.json") as f, open("a.json") as g:
        rows = [{"image": f"img/COCO_val2014_{q['image_id']:012}.png"} | q | a
                for q, a in zip(json.load(f)["questions"], json.load(g)["annotations"])]
    rows[0]["answers"] = rows[0]["answers"][:2]  # of two people, each is right
    for row in rows[1:4]:
        row["answers"] = [{"answer": "it"}] * 9 + [row["answers"][0]]  # only one is right: (9 * 1/3 + 0) / 10
    write("d.json", rows)
    scores = figures(run(monkeypatch, capsys, "data", "--data", "d.json")[0])
    assert scores["answers"][1] == N and scores["answers"][0] == pytest.approx(N - 3 + 3 * 0.3)


@pytest.mark.parametrize("args, message", [
    ("vqa", "vqa wants --annotations"), ("vqa --annotations a.json", "vqa wants --images"),
    ("vqa --annotations a.json --images img", "a.json: has no question 0; give --questions"),
    ("vqa --annotations a.json --results q.json", 'q.json: wants results like {"question_id": ..., "answer": ...}'),
    ("vqa --annotations q.json --results q.json", "not in the form in which vqa is published (no 'annotations')"),
    ("vqa --annotations prompts.txt --results q.json", "prompts.txt, line 1: not valid JSON"),
    ("vqa --annotations a.json --results few.json", "few.json: has no answer to 10 (11 of 12 are missing)"),
    ("vqa --annotations a.json --results other.json", "other.json: question_id 7 is not among what was asked"),
    ("vqa --annotations a.json --results few.json --num 1", "leave out --num"),
    ("coco --annotations c.json --images img --results c_r.json", "leave out --results"),
    ("vqa --annotations a.json --questions q.json --images img --out x.txt", "a name that ends in .json"),
    ("vqa --annotations a2.json --results few.json", "a2.json: question_id 0 is given twice"),
    ("vqa --annotations a.json --questions q2.json --images img", "q2.json: question_id 0 is given twice"),
    ("vqa --annotations a.json --results few2.json", "few2.json: question_id 0 is given twice"),
    ("pope --questions p2.json --images img", "p2.json: question_id 3 is given twice"),
    ("gqa --questions g2.json --images img", "g2.json: not valid JSON (name 7 is given twice)"),
    ("coco --annotations c2.json --images img", "c2.json: id 4 is given twice"),
    ("vqa --annotations bare.json --results few.json", "bare.json: question 10 has no answers (2 of 3 have none)"),
    ("gqa --questions g0.json --images img", "g0.json: question 7 has no answer"),
    ("gqa --questions g1.json --images img", "g1.json: no question has a truth"),
    ("coco --annotations c0.json --images img", "c0.json: no question has a truth"),
    ("pope --questions p0.json --images img", "p0.json: question 1 has no label"),
    ("pope --questions p1.json --images img", "p1.json: label 'maybe' is neither yes nor no"),
    ("gqa --questions g.json --images none", "none: no such folder of images"),
    ("gqa --questions g.json --images img/sub", "img/sub/0: no such image (11 of 11 are missing)"),
    ("pope --questions p.json --images img --data p.json", "pope has no use for it: leave out --data"),
    ("mme --results mme_q", "mme_q/existence.txt: wants the questions, in their order, and a fourth column"),
    ("geneval --prompts g.jsonl", "geneval wants --out"), ("world --out o", "leave out --out"),
    ("pictures --prompts empty.txt --out o", "empty.txt: is empty"),
    ("pictures --prompts none.txt --out o", "none.txt: No such file")])
def test_mistakes_give_one_line_and_status_2(published, monkeypatch, capsys, args, message):
    write("few.json", [{"question_id": 0, "answer": "a"}])
    write("other.json", [{"question_id": 7, "answer": "a"}])
    write("few2.json", [{"question_id": 0, "answer": "a"}, {"question_id": "0", "answer": "b"}])
    first, second = ({"question_id": k, "question": "?", "answers": ["a"]} for k in (0, 10))
    write("a2.json", [first, second, first])
    write("q2.json", [first, second, first])
    write("bare.json", [first, second | {"answers": []}, {"question_id": 20}])
    for name, row in {"g0.json": {}, "g1.json": {"answer": "a", "isBalanced": False}}.items():
        write(name, {"7": {"imageId": "1", "question": "?"} | row})
    with open("g2.json", "w") as f:
        f.write('{"7": {}, "8": {}, "7": {}}')
    for name, ids, labels in ("p2.json", (1, 3, 3), "yes no no"), ("p0.json", (1,), ""), ("p1.json", (1,), "maybe"):
        write(name, [{"question_id": k, "image": "a.png", "text": "?"} | ({"label": label} if label else {})
                     for k, label in zip(ids, labels.split(" "))])
    write("c0.json", {"images": [{"id": 4}], "annotations": []})
    write("c2.json", {"images": [{"id": 4}, {"id": 4}], "annotations": [{"image_id": 4, "caption": "a"}]})
    open("empty.txt", "w").close()
    out, err = run(monkeypatch, capsys, *args.split(), status=2)
    assert out == "" and len(err.strip().splitlines()) == 1 and message in err, err


def test_an_image_that_is_none(published, monkeypatch, capsys):
    with open("img/COCO_val2014_000000000003.png", "wb") as f:
        f.write(b"no image")
    err = run(monkeypatch, capsys, *"coco --annotations c.json --images img --out r.json".split(), status=2)[1]
    assert len(err.strip().splitlines()) == 1 and "000000000003.png: cannot be read as an image" in err
