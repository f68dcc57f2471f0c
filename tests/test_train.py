"""Training: resuming, processes, what learns in which stage, the user's own data."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from model import DualDiffusion
from sample import SHIPPED

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = ["--batch", "8", "--pool", "64", "--judge", "2", "--warmup", "2", "--dtype", "fp32", "--ema", "0.9"]


def command(*args):
    return [sys.executable, os.path.join(ROOT, "train.py"), *map(str, args)]


def run(*args, launch=None, **env):
    launch = launch or command()[:1]
    done = subprocess.run([*launch, *command(*args)[1:]], capture_output=True, text=True, timeout=280,
                          env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done


def weights(out, stage=1):
    return load_file(os.path.join(out, f"stage{stage}", "model.safetensors"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Stage 1, 30 steps, in one go."""
    out = tmp_path_factory.mktemp("run")
    run("--stage", 1, "--steps", 30, "--save-every", 10, "--out", out, *SMALL)
    return out


def test_a_killed_run_ends_with_the_same_weights(uninterrupted, tmp_path):
    args = ["--stage", 1, "--steps", 30, "--save-every", 10, "--out", tmp_path, *SMALL]
    checkpoint, result = tmp_path / "stage1" / "checkpoint.pt", tmp_path / "stage1" / "model.safetensors"
    running = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not checkpoint.exists():
        assert running.poll() is None and time.time() < deadline
        time.sleep(0.02)
    time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not result.exists() and torch.load(checkpoint)["step"] in (10, 20)
    (tmp_path / "stage1" / "checkpoint.pt.partial").write_bytes(b"half a checkpoint")  # as a kill may leave behind

    done = run(*args)
    assert "10/30" in done.stderr or "20/30" in done.stderr  # went on, not anew
    a, b = weights(uninterrupted), weights(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    steps = [json.loads(line)["step"] for line in open(tmp_path / "stage1" / "metrics.jsonl")]
    assert steps == [20, 30]


def test_the_average_of_the_weights(tmp_path):
    """After two steps at decay 0.5: a quarter of the first weights, a quarter of the second, half of the third."""
    args = ["--stage", 1, "--init", SHIPPED, *SMALL, "--out"]
    for name, steps, ema in (("one", 1, 0), ("two", 2, 0), ("mean", 2, 0.5)):
        run(*args, tmp_path / name, "--steps", steps, "--ema", ema)
    first, one, two, mean = load_file(SHIPPED), *(weights(tmp_path / name) for name in ("one", "two", "mean"))
    for name in (n for n in mean if n.startswith("model.diffusion_model.joint_blocks.0")):
        wanted = first[name].double() / 4 + one[name].double() / 4 + two[name].double() / 2
        assert torch.allclose(mean[name].double(), wanted, rtol=0, atol=2e-3), name  # they are stored in half precision
        assert not torch.equal(mean[name], two[name])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_polite_kill_leaves_a_checkpoint(tmp_path, processes):
    """SIGTERM, as a cluster sends it. Two processes get it at different steps, and stop at the same one."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29533"]
    args = ["--stage", 1, "--steps", 10_000, "--save-every", 10_000, "--out", tmp_path, *SMALL]
    launch = launch if processes == 2 else command()[:1]
    running = subprocess.Popen([*launch, *command(*args)[1:]], env={**os.environ, "OMP_NUM_THREADS": "1"},
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stage1" / "metrics.jsonl").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    err = running.communicate(timeout=60)[1]
    step = torch.load(tmp_path / "stage1" / "checkpoint.pt")["step"]
    assert running.returncode != 0 and 20 <= step < 10_000 and (processes == 1 or step % 20 == 0)
    assert f"stopped after step {step}; the same command goes on from there" in err


def test_a_loss_that_is_no_number_is_not_saved(tmp_path):
    done = subprocess.run(command("--stage", 1, "--steps", 40, "--save-every", 5, "--rate", "1e30", "--out", tmp_path,
                                  *SMALL), capture_output=True, text=True)
    assert done.returncode == 2 and "not a number at step" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "stage1" / "checkpoint.pt").exists()


def test_two_processes_learn_what_one_does(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29531"]
    args = ["--stage", 1, "--steps", 10, "--muon", 0, *SMALL]  # Muon's bf16 iteration would amplify rounding
    run(*args, "--out", tmp_path / "one")
    run(*args, "--out", tmp_path / "two", launch=launch, OMP_NUM_THREADS="1")
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    learned = [name for name in one if name.startswith(("model.", "text_encoders")) and "pos_embed" not in name]
    apart = sum((one[name].double() - two[name].double()).square().sum() for name in learned) ** 0.5
    size = sum(one[name].double().square().sum() for name in learned) ** 0.5
    assert apart / size < 1e-3, apart / size  # float16 on disk rounds to 5e-4; other data would give 1e-1


def test_stage_2_changes_one_row_of_t5(uninterrupted):
    run("--stage", 2, "--steps", 3, "--out", uninterrupted, *SMALL)
    before, after = weights(uninterrupted), weights(uninterrupted, 2)
    tokenizer = DualDiffusion.load(str(uninterrupted / "stage2" / "model.safetensors")).tokenizer
    table = "text_encoders.t5xxl.transformer.shared.weight"
    changed = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
    assert changed == [tokenizer.mask_id]
    for name in before:
        if name.startswith("text_encoders") and name != table or name.startswith("first_stage"):
            assert torch.equal(before[name], after[name]), name
    assert any((before[n] != after[n]).any() for n in before if n.startswith("model.diffusion_model.joint_blocks"))


def test_a_folder_holds_one_run_and_a_cut_checkpoint_is_named(uninterrupted):
    again = ["--stage", 1, "--steps", 30, "--out", uninterrupted, *SMALL]
    done = subprocess.run(command(*again, "--seed", 5), capture_output=True, text=True)
    assert done.returncode == 2 and "seed 0 is now 5" in done.stderr
    checkpoint = uninterrupted / "stage1" / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    done = subprocess.run(command(*again), capture_output=True, text=True)
    checkpoint.write_bytes(whole)
    assert done.returncode == 2 and "checkpoint.pt: cannot be read" in done.stderr and "Traceback" not in done.stderr


def test_every_stage_runs_on_the_users_own_images(tmp_path):
    rows, rng = [], np.random.default_rng(0)
    for i in range(40):
        color = ("red", "blue")[i % 2]
        picture = Image.effect_noise((50, 40), 20).convert("RGB")
        Image.blend(picture, Image.new("RGB", picture.size, color), 0.5 + rng.random() / 4).save(tmp_path / f"{i}.jpg")
        rows.append({"image": f"{i}.jpg", "caption": f"noise in {color}", "question": "what color?", "answer": color})
    (tmp_path / "7.jpg").write_bytes(b"")  # a bad one is left out, and named
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source, out = ["--data", tmp_path / "d.jsonl"], tmp_path / "runs"
    for stage in range(4):
        done = run("--stage", stage, *source, "--steps", 4, "--batch", 8, "--out", out)
    assert "answers" in done.stdout
    (bad,) = out.glob("images-*.bad.txt")
    assert bad.read_text() == f"{tmp_path / '7.jpg'}: cannot be read as an image (the file is empty)\n"
    assert Image.open(out / "stage3" / "samples.png").size[0] > 200
    model = out / "stage3" / "model.safetensors"
    answered = subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), "--ckpt", model,
                               "--vqa", tmp_path / "0.jpg", "what color?"], capture_output=True, text=True)
    assert answered.returncode == 0, answered.stderr
    judged = run("--eval", model, *source, "--judge", 6)
    assert "/6" in judged.stdout


def test_rows_are_drawn_once_an_epoch_whatever_the_batch():
    assert sorted(train.draw_rows(0, 0, 10, 10)) == list(range(10))
    stream = train.draw_rows(0, 0, 30, 10)
    assert stream == train.draw_rows(0, 0, 7, 10) + train.draw_rows(0, 7, 23, 10)
    assert stream[:10] != stream[10:20] and sorted(stream[20:]) == list(range(10))


def test_learning_rate_rises_then_holds_or_falls():
    recipe = train.Recipe(steps=100, warmup=10, schedule="linear")
    assert [train.learning_rate(recipe, s) for s in (0, 4, 50)] == pytest.approx([0.1, 0.5 * 0.96, 0.5])
    assert train.learning_rate(train.Recipe(steps=100, warmup=10), 99) == 1


def test_cast_computes_in_bf16_and_keeps_gradients_in_fp32():
    layer = torch.nn.Linear(4, 4)
    out = train.Cast(layer, torch.bfloat16)(torch.ones(2, 4, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_wilson_interval():
    low, high = train.interval(95, 100)
    assert (round(low, 2), round(high, 2)) == (88.82, 97.85)  # the published example values
