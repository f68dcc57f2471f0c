"""sample.py and train.py as a user types them, mistakes first. Each mistake: one line, exit status 2."""
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import sample
import train
from model import DualDiffusion

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCENE = os.path.join(ROOT, "assets", "scene.png")


def run(script, *args):
    return subprocess.run([sys.executable, os.path.join(ROOT, script), *map(str, args)], text=True,
                          capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of things that can go wrong."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("not a picture")
    (folder / "text.safetensors").write_text("not a checkpoint")
    shipped = open(os.path.join(ROOT, "assets", "tiny.safetensors"), "rb").read()
    (folder / "cut.safetensors").write_bytes(shipped[:len(shipped) // 2])
    save_file({"x": torch.zeros(2)}, folder / "other.safetensors")
    shipped = DualDiffusion.load(os.path.join(ROOT, "assets", "tiny.safetensors"))
    shipped.ddit = shipped.t5 = None
    shipped.save(str(folder / "stage0.safetensors"))
    Image.new("RGB", (20, 20), "red").save(folder / "ok.png")
    (folder / "broken.jsonl").write_text('{"image": "ok.png", "caption": \n{"image": "ok.png", \n')
    (folder / "missing.jsonl").write_text(json.dumps({"image": "gone.png", "caption": "c"}) + "\n")
    (folder / "void").mkdir()
    (folder / "many").mkdir()
    for i in range(25):
        Image.new("RGB", (20, 20), (i, i, i)).save(folder / "many" / f"{i}.png")
    return folder


MISTAKES = {
    "sample.py": [
        (["--vqa", "none.png", "what?"], "none.png: no such image"),
        (["--vqa", "empty.png", "what?"], "empty.png: cannot be read as an image (none of JPEG"),
        (["--caption", "void"], "void: Is a directory"),
        (["--vqa", "ok.png"], "argument --vqa: expected 2 arguments"),
        (["--infill", "ok.png", "no blank"], "has no blank"),
        ([], "nothing to do"),
        (["--caption", "ok.png", "--device", "abacus"], "there is no device abacus here"),
        (["--t2i", "x", "--out", "void/none/x.png"], "void/none/x.png"),
        (["--t2i", "x", "--out", "x.docx"], "x.docx"),
        (["--caption", "ok.png", "--ckpt", "none.safetensors"], "none.safetensors"),
        (["--caption", "ok.png", "--ckpt", "text.safetensors"], "text.safetensors: not a whole"),
        (["--caption", "ok.png", "--ckpt", "cut.safetensors"], "cut.safetensors: not a whole"),
        (["--caption", "ok.png", "--ckpt", "other.safetensors"], "other.safetensors"),
        (["--caption", "ok.png", "--ckpt", "void"], "void: holds no .safetensors file"),
        (["--caption", "ok.png", "--ckpt", "stage0.safetensors"], "stage0.safetensors: holds no transformer and no T5"),
        (["--caption", "ok.png", "--t5", "stage0.safetensors"], "stage0.safetensors: holds no T5"),
        (["--caption", "ok.png", "--spiece", "text.png"], "text.png: not a SentencePiece model"),
        (["--t2i", "x", "--size", "100"], "multiples of 16"),
        (["--t2i", "a circle", "--size", "64x256"], "larger than the model's 8x8 positions"),
        (["--t2i", "x", "--steps", "-1"], "argument --steps: -1 is too small: give at least 1"),
        (["--caption", "ok.png", "--temperature", "nan"], "argument --temperature: nan is too small: give at least 0"),
        (["--t2i", "x", "--trace", "x.ico"], "argument --trace: x.ico: give a name like"),
        (["--caption", "ok.png", "--trace", "x.png"], "--trace shows what --t2i draws"),
    ],
    "train.py": [
        ([], "--stage"),
        (["--stage", "2"], "stage1"),
        (["--stage", "1", "--data", "none.jsonl"], "none.jsonl: No such file"),
        (["--stage", "1", "--data", "broken.jsonl"], "broken.jsonl, line 1: a record: not valid JSON"),
        (["--stage", "1", "--data", "missing.jsonl"], "missing.jsonl, line 1: no such image: gone.png"),
        (["--stage", "1", "--data", "void"], "void: holds no image"),
        (["--stage", "1", "--batch", "6", "--accumulate", "4"], "--batch 6 cannot be shared equally"),
        (["--stage", "2hr", "--image-data", "many"], "give --image-data and --text-data, or one of them"),
        (["--stage", "1", "--size", "128"], "the built-in world has 64 pixels a side"),
        (["--stage", "1", "--parallel", "fsdp"], "give --muon 0, or --parallel ddp"),
        (["--stage", "1", "--preset", "sd3-medium", "--data", "many"], "--init"),
        (["--stage", "1", "--seed", "1.5"], "argument --seed: invalid seed value: '1.5'"),
    ],
}


def test_a_closed_output():
    code = f"exec {sys.executable} {ROOT}/sample.py --vqa {SCENE} 'what color is the circle?' >&-"
    assert subprocess.run(["sh", "-c", code], timeout=300, stderr=subprocess.PIPE).stderr == b""


def test_a_traceback_that_is_wanted(monkeypatch):
    monkeypatch.setenv("DDIT_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="none: No such file") as raised:
        sample.run_program(lambda: open("none"))
    assert isinstance(raised.value.__context__, FileNotFoundError)  # where it came from


def test_seeds_of_other_programs(monkeypatch, capsys):
    pictures = []
    for seed in ("-1", str(2 ** 32 - 1), str(2 ** 64 - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["sample.py", "--t2i", "x", "--seed", seed])
            pictures.append(sample.parse_args().seed)
    assert pictures == [2 ** 32 - 1] * 3


def test_texts_are_utf_8_whatever_the_locale(monkeypatch):
    for name, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(name, value)
    done = run("sample.py", "--t2i", os.fsdecode(b"caf\xe9"))
    assert done.returncode == 2 and done.stderr == "sample.py: 'caf\\udce9' is not UTF-8\n"
    done = run("sample.py", "--infill", SCENE, "naïve caf\u00e9 _")
    assert "expect little: naïve, café" in done.stderr and done.returncode == 0 and done.stdout


@pytest.mark.parametrize("script, args, message", [(s, *case) for s, cases in MISTAKES.items() for case in cases])
def test_mistakes_give_one_line_and_status_2(files, tmp_path, monkeypatch, capsys, script, args, message):
    monkeypatch.chdir(files)
    if script == "train.py":
        args = [*args, "--out", str(tmp_path)]  # a folder of its own, as the lock is held until the process ends
    monkeypatch.setattr(sys, "argv", [os.path.join(ROOT, script), *args])
    with pytest.raises(SystemExit) as end:  # in this process: importing torch thirty times would take a minute
        runpy.run_path(sys.argv[0], run_name="__main__")
    out, err = capsys.readouterr()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    assert end.value.code == 2, err
    assert out == "" and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert message in err, err


def test_the_shipped_model_answers_alone_on_stdout():
    done = run("sample.py", "--vqa", SCENE, "what color is the circle?",
               "--vqa", SCENE, "how many shapes are there?")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "red\n3\n"


def call(monkeypatch, *args):
    """sample.py in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
    sample.run_program(sample.main)


def test_capital_letters_are_heard(monkeypatch, capsys):
    call(monkeypatch, "--vqa", SCENE, "What color is the CIRCLE?", "--infill", SCENE, "_" * 20)
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "red" and err == ""


def test_odd_questions_still_get_an_answer_and_a_warning(monkeypatch, capsys, tmp_path):
    Image.new("LA", (300, 90), (120, 40)).save(tmp_path / "odd.png")
    call(monkeypatch, "--vqa", tmp_path / "odd.png", "is there a " + "very " * 40 + "small circle?",
         "--vqa", SCENE, "what colour is the zebra?")
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 2 and "its end is left out" in err


def test_what_comes_first_is_printed_first(files, monkeypatch, capsys):
    def asked(*images):
        return [word for image in images for word in ("--vqa", image, "how many shapes are there?")]

    scenes = [SCENE] * 3 + [files / "ok.png"]
    call(monkeypatch, *asked(*scenes), "--caption", *scenes, "--steps", 4)
    once = capsys.readouterr()
    monkeypatch.setitem(data.PIXELS, "cpu", 2 * 64 * 64)
    call(monkeypatch, *asked(*scenes), "--caption", *scenes, "--steps", 4)
    assert capsys.readouterr() == once and once.err == "" and once.out.count("\n") == 8  # a bar only on a terminal
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, *asked(*scenes[:3], files / "text.png"), "--steps", 4)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "3\n3\n" and "text.png: cannot be read" in err and err.count("\n") == 1


def test_length_and_negative(monkeypatch, capsys, tmp_path):
    seen, unmask, denoise = [], sample.unmask, sample.denoise
    monkeypatch.setattr(sample, "unmask", lambda dd, z, tokens, *how, **more: seen.append(tokens.shape) or unmask(
        dd, z, tokens, *how, **more))
    monkeypatch.setattr(sample, "denoise", lambda dd, x, prompts, negative, length, *how: seen.append(
        (negative, length)) or denoise(dd, x, prompts, negative, length, *how))
    args = ["--vqa", SCENE, "what color is the circle?", "--caption", SCENE, "--infill", SCENE, "a _", "--steps", 1,
            "--t2i", "a circle", "--out", tmp_path / "a.png"]
    call(monkeypatch, *args, "--length", 20, "--negative", "a Square")
    assert seen == [(1, 20)] * 3 + [("a square", 20)]
    seen.clear()
    call(monkeypatch, *args)
    assert seen == [(1, 24)] * 3 + [("", 24)] and capsys.readouterr().err == ""


def test_each_pass_of_a_text_is_a_line(monkeypatch, capsys):
    """Every token is revealed in one of them and stays. The last line is the text."""
    eos = DualDiffusion.load(sample.SHIPPED).tokenizer.pieces.id_to_piece(1)
    for how in ([], ["--steps", 6]):
        call(monkeypatch, "--caption", SCENE, "--show-passes", *how)
        *passes, text = capsys.readouterr().out.splitlines()
        rows = [line.split() for line in passes]
        for before, after in zip(rows, rows[1:]):
            assert before != after and len(before) == len(after)
            assert all(b in ("_", a) for b, a in zip(before, after))
        words = rows[-1][:rows[-1].index(eos)]
        assert "_" not in words and "".join(words) == text.replace(" ", "")
        assert 1 < len(passes) and "_" in rows[0]
    assert len(passes) <= 6


def test_a_trace_of_a_drawing(monkeypatch, capsys, tmp_path):
    """A frame per step, each a page of all images; the last step is held."""
    out = tmp_path / "a.png"
    for name in ("b.gif", "b.webp", "b.png"):
        call(monkeypatch, "--t2i", "a red circle", "--num", 2, "--steps", 3, "--out", out, "--trace", tmp_path / name)
        assert capsys.readouterr().out.split() == [str(out), str(tmp_path / name)]
        film, drawn = Image.open(tmp_path / name), Image.open(out)
        assert film.n_frames >= 3 and film.size == drawn.size
    film.seek(film.n_frames - 1)
    assert np.array_equal(film.convert("RGB"), drawn)  # the end is what is drawn; .gif and .webp lose a little


@pytest.mark.parametrize("name, format", [("a.jpg", "JPEG"), ("a.webp", "WEBP"), ("A.PNG", "PNG")])
def test_pictures_are_of_the_kind_that_their_name_says(monkeypatch, tmp_path, name, format):
    call(monkeypatch, "--t2i", "a circle", "--steps", 1, "--out", tmp_path / name)
    assert Image.open(tmp_path / name).format == format and os.listdir(tmp_path) == [name]


ENDS = [
    (lambda: signal.raise_signal(signal.SIGINT), 130, "stopped"),
    (lambda: torch.empty(2 ** 60), 2, "out of memory: lower --batch"),
    (lambda: np.empty(2 ** 58), 2, "out of memory: lower --batch"),
    (lambda: exec("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.\\nMore')",
                  {"torch": torch}), 2, "out of memory: lower --batch"),
    (lambda: int("x"), 2, "invalid literal for int() with base 10: 'x'"),
    (lambda: open("none"), 2, "none: No such file or directory"),
    (lambda: exec("raise ValueError('Caught ValueError in DataLoader worker process.\\nTraceback\\nValueError: bad')"),
     2, "ValueError: bad"),
    (lambda: exec("raise RuntimeError('DataLoader worker (pid 1) is killed by signal: Killed. ')"),
     2, "DataLoader worker (pid 1) is killed by signal: Killed."),
]


@pytest.mark.parametrize("main, status, message", ENDS)
def test_ends_of_a_program(monkeypatch, capsys, main, status, message):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        sample.run_program(main, lower="--batch")
    assert end.value.code == status and capsys.readouterr().err == f"train.py: {message}\n"


@pytest.mark.parametrize("args, steps", [(["--stage", "2"], 40), (["--preset", "sd3-medium", "--stage=2hr"], 80_000)])
def test_help_has_the_numbers_of_the_stage(monkeypatch, capsys, args, steps):
    monkeypatch.setattr(sys, "argv", ["train.py", *args, "--help"])
    with pytest.raises(SystemExit) as end:
        train.parse_args()
    out = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and f"Optimizer steps (default: {steps})." in out and "--checkpointing" in out


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        sample.run_program(lambda: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(ZeroDivisionError):
        sample.run_program(lambda: 1 / 0)


def test_drawing_captioning_and_filling_in(monkeypatch, capsys, tmp_path):
    out = tmp_path / "two.png"
    call(monkeypatch, "--caption", SCENE, "--infill", SCENE, "a _ _ circle", "--t2i", "a small red circle",
         "a large blue square", "--num", 2, "--out", out)
    caption, filled, path = capsys.readouterr().out.splitlines()
    assert path == str(out) and Image.open(out).size == (2 * 64 + 2, 2 * 64 + 2)
    assert "circle" in caption and filled.startswith("a ") and filled.endswith(" circle") and len(filled.split()) == 4


def test_another_process_draws_the_same(monkeypatch, tmp_path):
    args = ["--t2i", "a small red circle", "--steps", 4, "--seed", 3, "--out"]
    done = run("sample.py", *args, tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    call(monkeypatch, *args, tmp_path / "b.png")
    a, b = (Image.open(tmp_path / name) for name in ("a.png", "b.png"))
    assert a.tobytes() == b.tobytes()


READMES = [path for path in (os.path.join(ROOT, name) for name in ("README.md", "tests/README.md"))
           if os.path.exists(path)]


def readme_commands():
    """The READMEs, and every line of them that is to be typed, those that end in a backslash with the next."""
    text = "\n".join(open(path).read() for path in READMES).replace("\\\n", " ")
    return text, list(dict.fromkeys(re.findall(r"^    (?:pip .* && )?((?:python|torchrun) .+)$", text, re.MULTILINE)))


def test_the_readme_s_commands_that_use_the_model(tmp_path, monkeypatch, capsys):
    """And the Python; in another folder, so that nothing is written here. What is shown below them, they print."""
    readme, commands = readme_commands()
    os.symlink(os.path.join(ROOT, "assets"), tmp_path / "assets")
    monkeypatch.chdir(tmp_path)
    printed = {}
    for command in commands:
        if command.startswith("python sample.py") and "--ckpt" not in command:
            call(monkeypatch, *shlex.split(command)[2:])
            out, err = capsys.readouterr()
            assert out and not err
            printed[command] = out.splitlines()
    assert len(printed) > 5
    known = {"a _ green _ above": "a large green triangle above a small red circle and a small green square"}
    assert all(line in lines for command, lines in printed.items() for words, line in known.items() if words in command)
    shown = 0
    for block in re.finditer(r"^```(\w*)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL):
        typed = re.findall(r"(?:^    .+\n)+", readme[:block.start()], re.MULTILINE)[-1]  # the last before it
        typed = [re.sub(".*&& ", "", command.strip()) for command in typed.splitlines()]
        lines = [line for command in typed for line in printed.get(command, [])]
        if block[1] == "python" and "sample" in block[2] and "time.time" not in block[2]:  # others measure, make data
            exec(block[2], {})
        elif not block[1] and lines:
            assert block[2].splitlines() == lines
            shown += 1
    assert shown


def test_the_readme_s_other_commands_are_understood(monkeypatch):
    """Training and judging take too long to be run here: but every program and every flag exists."""
    others = [shlex.split(line) for line in readme_commands()[1] if "sample.py" not in line or "--ckpt" in line]
    assert len(others) > 10
    monkeypatch.setattr(sample.os.path, "exists", lambda path: True)  # of pictures
    for line in others:
        script = next(k for k, word in enumerate(line) if word.endswith(".py") or word == "pytest")
        if line[script].endswith(("sample.py", "train.py", "evaluate.py")):
            program = importlib.import_module(os.path.basename(line[script])[:-3])
            monkeypatch.setattr(sys, "argv", line[script:])
            program.parse_args()
        else:
            assert line[script] == "pytest" or os.path.isfile(os.path.join(ROOT, line[script]))
