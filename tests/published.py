"""The published benchmarks: what they ask, and how their files and result files look. No model is needed for this.

A benchmark of questions is a function of the arguments. It gives a list of Questions, one per result file, and a
function from the answers (for each of those a list) to the lines to print. A benchmark of drawings gives the images to
draw, as (prompt, path), and the other files to write, as {path: text}.
"""
import glob
import json
import os
import re
from collections import Counter
from typing import NamedTuple

import metrics
import numpy as np
from metrics import mean

import data


class Questions(NamedTuple):
    """What is asked for one result file."""
    path: str         # of the result file
    fields: tuple     # the names that a result has there for the question and for the answer; (): it is a table
    keys: list        # what names each question there: its id; in a table, all columns before the answer
    images: list      # of each question the image's name
    texts: list       # the questions; None: a caption is wanted


def vqa(args):
    """VQAv2, OK-VQA, VizWiz, TextVQA as published: accuracy among the answers of ten people, overall and per type.

    By the VQA challenge's definition (metrics.vqa_score). --questions can be left out if the annotations hold the
    questions (VizWiz, TextVQA). Results: [{"question_id", "answer"}], in VizWiz [{"image", "answer"}]."""
    rows = read_rows(args.annotations, "annotations", "data")[:args.num]
    field = "question_id" if "question_id" in rows[0] else "image"
    asked = read_rows(args.questions, "questions", "data") if args.questions else []
    asked, rows = by_id(asked, field, args.questions), by_id(rows, field, args.annotations)
    people = [[a if isinstance(a, str) else a["answer"] for a in answers]
              for answers in truths(rows, "answers", args.annotations)]
    rows = [asked.get(key, {}) | row for key, row in rows.items()]
    unknown = [row[field] for row in rows if "question" not in row]
    if unknown and not args.results:
        raise ValueError(f"{args.questions or args.annotations}: has no question {unknown[0]}; give --questions")
    images = [str(row.get("image") or row.get("image_id")) for row in rows]
    texts = [row.get("question") for row in rows]

    def score(answers):
        scores = list(map(metrics.vqa_score, answers, people))
        types = [row.get("answer_type") for row in rows]
        return mean("accuracy", scores) + [
            f"  {kind} {100 * np.mean([score for score, of in zip(scores, types) if of == kind]):.2f}"
            for kind in dict.fromkeys(types) if kind]
    return [Questions(args.out, (field, "answer"), [row[field] for row in rows], images, texts)], score


def gqa(args):
    """GQA as published, of its questions the balanced ones: exact match with the one right answer.

    By the official program's definition (Hudson & Manning, arXiv 1902.09506): capitals count, but the model's answers
    are written in lower case and without a full stop. Results: [{"questionId", "prediction"}]."""
    rows = read_rows(args.questions)
    rows = dict([(key, row) for key, row in rows.items() if row.get("isBalanced", True)][:args.num])
    right = truths(rows, "answer", args.questions)
    images, texts = [str(row["imageId"]) for row in rows.values()], [row["question"] for row in rows.values()]
    return [Questions(args.out, ("questionId", "prediction"), list(rows), images, texts)], lambda answers: mean(
        "accuracy", [answer == truth for answer, truth in zip(answers, right)])


def pope(args):
    """POPE as published: are objects in the image that are not there? Accuracy, precision, recall, f1, share of yes.

    By the official program's definition (metrics.pope_scores), all in per cent. Questions: JSON lines of "question_id",
    "image", "text", "label", here in any case. Results: JSON lines of "question_id", "answer"."""
    rows = read_rows(args.questions)[:args.num]
    labels = truths(by_id(rows, "question_id", args.questions), "label", args.questions)
    labels = [label.lower() for label in labels]
    if wrong := [row["label"] for row, label in zip(rows, labels) if label not in ("yes", "no")]:
        raise ValueError(f"{args.questions}: label {wrong[0]!r} is neither yes nor no")

    def score(answers):
        right = [metrics.pope_says_yes(answer) == (label == "yes") for label, answer in zip(labels, answers)]
        lines = [f"{name} {100 * value:.2f}" for name, value in metrics.pope_scores(labels, answers).items()]
        return lines[:1] + mean("accuracy", right)[1:] + lines[1:]
    keys, images, texts = ([row[name] for row in rows] for name in ("question_id", "image", "text"))
    return [Questions(args.out, ("question_id", "answer"), keys, images, texts)], score


def mme(args):
    """MME as published, a folder of TASK.txt: per task the per cent of right answers, plus that of images all right.

    By the official program's definition (metrics.mme_score). A line has image, question, truth, with tabs between; two
    lines in a row are about one image, in the folder TASK, TASK/images or the one that holds them all. Results: the
    same with the answer in a fourth column. The total is the sum of the tasks in the folder; "perception" and
    "cognition", which are published apart, are sums of its two parts."""
    folder, tasks = args.questions or args.results, []
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder")
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.txt"))):
        rows = [line.split("\t")[:3] for line in read_lines(path)[:args.num and -(-args.num // 2) * 2]]
        for n, row in enumerate(rows, 1):
            if len(row) != 3 or row[2].lower() not in ("yes", "no"):
                raise ValueError(f"{path}, line {n}: wants an image, a question and Yes or No, with tabs between")
        images, texts = [row[0] for row in rows], [row[1] for row in rows]
        if images[::2] != images[1::2]:
            raise ValueError(f"{path}: wants two lines in a row about each image")
        task = os.path.basename(path)
        tasks.append(Questions(os.path.join(args.out, task), (), ["\t".join(row) for row in rows], images, texts))
    if not tasks:
        raise ValueError(f"{folder}: holds no TASK.txt")

    def score(*answers):
        points = {}
        for task, texts in zip(tasks, answers):
            pairs = list(zip((key.split("\t")[2] for key in task.keys), texts))
            points[os.path.basename(task.path)[:-4]] = metrics.mme_score(list(zip(pairs[::2], pairs[1::2])))
        thought = {"code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"} & set(points)
        total, cognition = sum(points.values()), sum(points[task] for task in thought)
        parts = {"perception": total - cognition, "cognition": cognition} if 0 < len(thought) < len(points) else {}
        return [f"{name} {value:.2f}" for name, value in (points | parts | {"total": total}).items()]
    return tasks, score


def coco(args):
    """Captions of COCO, for its own program to score. Results: [{"image_id", "caption"}]."""
    rows = read_rows(args.annotations)
    captioned = {row["image_id"] for row in rows["annotations"]}
    names = {row["id"]: row.get("file_name", str(row["id"]))
             for row in by_id(rows["images"], "id", args.annotations).values() if row["id"] in captioned}
    keys, images = list(names)[:args.num], list(names.values())[:args.num]
    return [Questions(args.out, ("image_id", "caption"), keys, images, None)], lambda captions: [
        f"{args.out}: {len(captions)} captions"]


def geneval(args):
    """The images that GenEval's own program judges: four of each prompt, in the folder tree that it reads.

    --prompts: its evaluation_metadata.jsonl. Writes OUT/00000/metadata.jsonl and OUT/00000/samples/0000.png to
    0003.png, and so on (Ghosh et al., arXiv 2310.11513)."""
    folders = {os.path.join(args.out, f"{k:05}"): row for k, row in enumerate(read_rows(args.prompts)[:args.num])}
    jobs = [(row["prompt"], os.path.join(folder, "samples", f"{n:04}.png"))
            for folder, row in folders.items() for n in range(4)]
    return jobs, {os.path.join(folder, "metadata.jsonl"): json.dumps(row) for folder, row in folders.items()}


def pictures(args):
    """One image of each prompt, OUT/00000.png and so on: for programs that compute FID or CLIP scores of a folder.

    --prompts: a text file, one prompt per line."""
    lines = read_lines(args.prompts)[:args.num]
    return [(line.strip(), os.path.join(args.out, f"{k:05}.png")) for k, line in enumerate(lines)], {}


# ---------------------------------------------------------------- published files and result files


def parse(raw, where, kind, form="an object"):
    """Bytes or str -> what they hold: JSON (`kind` list or dict), or of bytes the text (`kind` str). For messages:
    `where`, and `form`, what a value of that kind looks like here. Raises ValueError with one line."""
    try:
        value = str(raw, "utf-8-sig") if kind is str else json.loads(raw, object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"{where}: not valid {'UTF-8' if kind is str else 'JSON'} ({data.one_line(error)})") from None
    if not isinstance(value, kind):
        raise ValueError(f"{where}: want {form}")
    return value


def once(pairs, what="name"):
    """Pairs of key and value -> dict. Raises ValueError if a key is given twice; a dict would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"{what} {Counter(key for key, _ in pairs).most_common(1)[0][0]} is given twice")
    return found


def by_id(rows, field, path):
    """The rows of a file -> {id, as text: row}."""
    return once([(str(row[field]), row) for row in rows], f"{path}: {field}")


def truths(rows, name, path):
    """The truths in {id: row} -> list. Raises ValueError if there is none, by which the official programs fail too."""
    if without := [key for key, row in rows.items() if not row.get(name)]:
        raise ValueError(f"{path}: question {without[0]} has no {name} ({len(without)} of {len(rows)} have none)")
    return [row[name] for row in rows.values()]


def read_lines(path):
    """The lines of a text file that are not empty -> list of str, at least one."""
    with open(path, "rb") as f:
        lines = [line.rstrip("\r") for line in parse(f.read(), path, str).split("\n") if line.strip()]
    if not lines:
        raise ValueError(f"{path}: is empty")
    return lines


def read_rows(path, *names):
    """JSON lines -> list of objects; any other JSON: the list or object that it is, or the list that an object has
    under one of these names. The content decides, for POPE's .json are JSON lines."""
    lines = read_lines(path)
    try:
        if path.endswith(".json") and (len(lines) == 1 or not isinstance(json.loads(lines[0]), dict)):
            raise ValueError
    except ValueError:
        value = parse("\n".join(lines), path, (list, dict), "a list or an object")
        if names and isinstance(value, dict):
            value = value[next((name for name in names if name in value), names[0])]
        if not value:
            raise ValueError(f"{path}: is empty") from None
        return value
    return [parse(line, f"{path}, line {k}", dict) for k, line in enumerate(lines, 1)]


def find_images(folder, names, task=""):
    """The paths of images: by their file names, also in the folder of a task; or else by a name without its ending, or
    by the number that a name ends in (COCO_val2014_000000000042.jpg is 42). Raises FileNotFoundError for any other."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such folder of images")
    folders, by_name = [os.path.join(folder, task, "images"), os.path.join(folder, task), folder], {}
    for file in sorted(os.listdir(folder), reverse=True):
        stem, ending = os.path.splitext(file)
        if ending.lower() in data.EXTENSIONS:
            if number := re.search(r"\d+$", stem):
                by_name.setdefault(str(int(number[0])), file)
            by_name[stem] = file
    paths, missing = [], []
    for name in names:
        options = [os.path.join(place, name) for place in folders] + [os.path.join(folder, by_name.get(name, name))]
        paths.append(next(filter(os.path.isfile, options), None))
        missing += [options[-1]] * (paths[-1] is None)
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such image ({len(missing)} of {len(names)} are missing)")
    return paths


def write_results(asked, texts):
    """The answers to all questions, as a result file."""
    rows = [dict(zip(asked.fields, pair)) for pair in zip(asked.keys, texts)]
    with data.replacing(asked.path) as beside, open(beside, "w") as f:
        if asked.path.endswith(".json"):
            json.dump(rows, f)
        else:
            f.writelines(f"{json.dumps(row)}\n" if row else f"{key}\t{text}\n"
                         for row, key, text in zip(rows, asked.keys, texts))


def read_results(asked):
    """A result file -> list of str, the answer to each question."""
    if not asked.fields:
        lines = [line.split("\t", 3) for line in read_lines(asked.path)]
        if ["\t".join(line[:3]) for line in lines] != asked.keys or any(len(line) < 4 for line in lines):
            raise ValueError(f"{asked.path}: wants the questions, in their order, and a fourth column of answers")
        return [line[3] for line in lines]
    key, answer = asked.fields
    try:
        answers = {name: row[answer] for name, row in by_id(read_rows(asked.path), key, asked.path).items()}
    except (LookupError, TypeError):
        raise ValueError(f'{asked.path}: wants results like {{"{key}": ..., "{answer}": ...}}') from None
    keys = list(map(str, asked.keys))
    if wrong := [text for text in answers.values() if not isinstance(text, str)]:
        raise ValueError(f"{asked.path}: {wrong[0]!r} is no text")
    if unknown := sorted(answers.keys() - set(keys)):
        raise ValueError(f"{asked.path}: {key} {unknown[0]} is not among what was asked")
    missing = [key for key in keys if key not in answers]
    if missing:
        raise ValueError(f"{asked.path}: has no answer to {missing[0]} ({len(missing)} of {len(keys)} are missing)")
    return [answers[key] for key in keys]
