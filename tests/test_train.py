"""Training: resuming, processes, what learns in which stage, the user's own data."""
import contextlib
import copy
import fcntl
import io
import json
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter
from torch.utils.data import default_convert

import data
import model
import sample
import train
from losses import ImageHalf, TextHalf
from model import DualDiffusion, Settings
from sample import SHIPPED

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
START = os.path.join(tempfile.gettempdir(), f"start-{os.getpid()}.safetensors")  # a model to begin with
OWN = ["--batch", "16", "--warmup", "2", "--dtype", "fp32", "--ema", "0.9"]  # for one's own pictures
SMALL = [*OWN, "--pool", "64"]
FIRST = ["--stage", 1, "--init", START, *SMALL]
SLOW = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes; SLOW=1 runs it")


@pytest.fixture(scope="module", autouse=True)
def small():
    """The preset, and START, are a twentieth of the shipped model, so that a step and a checkpoint take less time."""
    shipped = DualDiffusion.load(SHIPPED)
    config = model.Config(
        model.DDiTConfig(depth=2, width=32, heads=2, text_dim=32, pos_size=8, qk_norm=True),
        model.T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=64, max_distance=32),
        shipped.config.vae, shipped.config.settings)
    dd = DualDiffusion.build(copy.deepcopy(config), shipped.tokenizer, ["ddit", "t5"])
    dd.vae = shipped.vae
    for p in dd.ddit.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))  # no gate is zero
    dd.save(START, torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.PRESETS, "tiny", config)
        yield
    os.remove(START)


def command(*args, processes=1):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*(launch if processes > 1 else launch[:1]), os.path.join(ROOT, "train.py"), *map(str, args)]


def threads(processes):
    return {**os.environ, "OMP_NUM_THREADS": "1"} if processes > 1 else None


def run(*args, processes=1, status=0, program="train.py"):
    """A program as if typed -> what it wrote to stdout and to stderr. One process is this one: to start fifty and
    import torch in each would take minutes."""
    if processes > 1:
        done = subprocess.run(command(*args, processes=processes), capture_output=True, text=True, timeout=280,
                              env=threads(processes))
        out, err, ended = done.stdout, done.stderr, done.returncode
    else:
        streams, ended = [io.TextIOWrapper(io.BytesIO(), write_through=True) for _ in range(2)], 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(streams[0]), \
                contextlib.redirect_stderr(streams[1]):
            for name in ("text_to_image", "caption", "answer"):  # sheets in full would take longer than the training
                patch.setattr(sample, name, partial(getattr(sample, name), steps=1))
            patch.setattr(sys, "argv", [os.path.join(ROOT, program), *map(str, args)])
            data.warn_once.cache_clear()  # a new process has warned of nothing yet
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                ended = end.code
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        out, err = (stream.buffer.getvalue().decode() for stream in streams)
    assert ended == status, err
    return out, err


def weights(out, stage=1):
    return load_file(os.path.join(out, f"stage{stage}", "model.safetensors"))


def checkpoints(out, stage=1):
    return train.checkpoints(os.path.join(out, f"stage{stage}", "checkpoints"))


def shards(path):
    """The files of a checkpoint; none of them is a pickle, which could run a program when it is read."""
    names = sorted(os.listdir(path))
    assert names and all(name.endswith(".safetensors") for name in names)
    return [os.path.join(path, name) for name in names]


def state(out, stage=1):
    """The newest checkpoint, put together: {name: tensor} of the weights and their running averages."""
    pieces = {}
    for file in shards(checkpoints(out, stage)[-1]):
        with safe_open(file, "pt") as f:
            at = json.loads(f.metadata()["DCP_SHARDING_INFO"])
            for name in f.keys():
                if name.startswith(("modules.", "averages.")):
                    parts = pieces.setdefault(name.removeprefix("modules."), {})
                    parts[at[name]["saved_offsets"][0]] = f.get_tensor(name)
    return {name: torch.cat([piece for _, piece in sorted(parts.items())]) for name, parts in pieces.items()}


def losses(out, stage=1):
    lines = [*map(json.loads, open(os.path.join(out, f"stage{stage}", "metrics.jsonl")))]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))  # each once, also after a kill
    return [(line["step"], *(line[k] for k in line if k.endswith(("loss", "reconstruction", "kl")))) for line in lines]


def apart(a, b):
    """How far two states are from each other, relative to their size."""
    assert a.keys() == b.keys()
    between = sum((a[name].double() - b[name].double()).square().sum() for name in a) ** 0.5
    return float(between / sum(a[name].double().square().sum() for name in a) ** 0.5)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Stage 1, six steps, in one go."""
    out = tmp_path_factory.mktemp("run")
    run(*FIRST, "--steps", 6, "--save-minutes", 0, "--out", out)
    return out


@pytest.fixture(scope="module")
def on_pictures(tmp_path_factory, pictures):
    """Stage 1, two steps, on the user's own images."""
    out = tmp_path_factory.mktemp("on-pictures")
    err = run("--stage", 1, "--init", START, "--data", pictures / "b.jsonl", "--steps", 2, "--out", out, *OWN)[1]
    assert re.search(r"parameters learn from 3\d records", err)  # about one in twenty of the 40 is held out
    return out


@pytest.fixture(scope="module")
def without_t5(tmp_path_factory):
    """Stage 1, two steps, with learned embeddings in T5's place (Table 9)."""
    out = tmp_path_factory.mktemp("without-t5")
    run("--stage", 1, "--steps", 2, "--out", out, *SMALL, "--text-encoder", "none", "--length", 16)
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """The user's own images: forty noisy ones, red or blue, one of them empty; and others, for a second data set."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("a", "b"):
        rows = []
        for i in range(40):
            color, picture = ("red", "blue")[i % 2], Image.effect_noise((50, 40), 20).convert("RGB")
            picture = Image.blend(picture, Image.new("RGB", picture.size, color), 0.5 + rng.random() / 4)
            picture.save(folder / f"{name}{i}.jpg")
            rows.append({"image": f"{name}{i}.jpg", "caption": f"noise in {color}", "question": "what color?",
                         "answer": color})
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "a7.jpg").write_bytes(b"")
    return folder


def family(pid):
    """A process and all that it started; torchrun puts its workers out of reach of a signal to the group."""
    children = open(f"/proc/{pid}/task/{pid}/children").read().split()
    return [pid, *(member for child in children for member in family(int(child)))]


def kill(args, processes=1, after=lambda: True):
    """Start a run, kill -9 it and all its processes once `after()` holds -> False if it ended before."""
    running = subprocess.Popen(command(*args, processes=processes), env=threads(processes),
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not after():
        if running.poll() is not None:
            return False
        time.sleep(0.02)
    for pid in family(running.pid):
        os.kill(pid, signal.SIGKILL)
    running.wait()
    return True


def test_a_killed_run_ends_with_the_same_weights(uninterrupted, tmp_path):
    args = [*FIRST, "--steps", 6, "--save-minutes", 0, "--out", tmp_path]
    assert kill(args, after=lambda: len(checkpoints(tmp_path)) == 3)
    result, left = tmp_path / "stage1" / "model.safetensors", checkpoints(tmp_path)
    assert not result.exists() and len(left) <= 3
    half = tmp_path / "stage1" / "checkpoints" / "step-00000005.partial"  # as a kill may leave behind
    half.mkdir(exist_ok=True)
    (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half a checkpoint")

    err = run(*args)[1]
    assert re.search(r"going on from step ([1-5])\n.*\1/6", err, re.DOTALL)  # not anew
    a, b = weights(uninterrupted), weights(tmp_path)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert losses(uninterrupted) == losses(tmp_path)
    assert [os.path.basename(path) for path in checkpoints(tmp_path)] == [f"step-0000000{n}" for n in (4, 5, 6)]
    assert not half.exists()


@SLOW
def test_kills_at_random_on_one_and_two_processes_ddp_and_fsdp_in_turn(tmp_path, kills=20):
    """With the same processes throughout, bit for bit; with other numbers of them, to rounding (which the paper's rate
    lets not grow; one step too many or with other data would set the weights 5e-4 apart)."""
    args = [*FIRST, "--steps", 20 * kills, "--save-minutes", 0, "--muon", 0, "--rate", 5e-5]
    turns = [(1, "ddp"), (2, "fsdp"), (2, "ddp"), (1, "fsdp")]
    run(*args, "--out", tmp_path / "whole")
    random.seed(0)
    for name, ways in (("same", turns[:1]), ("mixed", turns)):
        out, wanted = tmp_path / name, 5
        for k in range(kills):
            processes, parallel = ways[k % len(ways)]
            def far_enough(out=out, wanted=wanted):
                return any(int(path[-8:]) >= wanted for path in checkpoints(out)) and random.random() < 0.1
            if not kill([*args, "--out", out, "--parallel", parallel], processes, far_enough):
                break
            wanted = int(checkpoints(out)[-1][-8:]) + 5
        run(*args, "--out", out, "--parallel", ways[kills % len(ways)][1], processes=ways[kills % len(ways)][0])
        print(name, k + 1, "kills, apart:", apart(state(tmp_path / "whole"), state(out)))
    whole, same = state(tmp_path / "whole"), state(tmp_path / "same")
    assert all(torch.equal(whole[name], same[name]) for name in whole)
    assert apart(whole, state(tmp_path / "mixed")) < 1e-5


WAYS = {"ddp": ["--accumulate", 4], "fsdp": ["--accumulate", 2, "--checkpointing"]}
OTHERS = [("1", "ddp"), *[(stage, parallel) for stage in ("0", "2", "2hr", "3") for parallel in WAYS]]


@pytest.mark.parametrize("stage, parallel", [("1", "fsdp"), *[pytest.param(*other, marks=SLOW) for other in OTHERS]])
def test_two_processes_learn_what_one_does(tmp_path, pictures, stage, parallel):
    """In several passes a step, and fsdp goes on from where one process left: the same losses and weights, after 6
    steps, as one process alone. And so does one that goes on from where they left, and to whose newest checkpoint a
    file is missing: that is noticed, and the one before it used."""
    start = [] if stage == "0" else ["--init", START]
    split = ["--image-data", pictures / "a.jsonl", "--text-data", pictures / "b.jsonl"] if stage == "2hr" else []
    args = ["--stage", stage, "--steps", 6, "--muon", 0, "--rate", 5e-5, "--save-minutes", 0, "--keep", 5,
            "--show-every", 4, *start, *split, *(OWN if split else SMALL)]
    run(*args, "--out", tmp_path / "one")
    if parallel == "fsdp":
        shutil.copytree(tmp_path / "one", tmp_path / "two")
        for path in checkpoints(tmp_path / "two", stage)[1:]:
            shutil.rmtree(path)
    run(*args, "--parallel", parallel, *WAYS[parallel], "--out", tmp_path / "two", processes=2)
    one, two = state(tmp_path / "one", stage), state(tmp_path / "two", stage)
    newest = checkpoints(tmp_path / "two", stage)[-1]
    os.remove(shards(newest)[parallel == "fsdp"])
    err = run(*args, "--out", tmp_path / "two")[1]
    assert f"{newest}: cannot be read" in err and "going on from step 5" in err
    assert apart(one, two) < 1e-5 and apart(one, state(tmp_path / "two", stage)) < 1e-5
    assert (tmp_path / "two" / f"stage{stage}" / "samples-000004.png").exists()
    assert np.allclose(losses(tmp_path / "one", stage)[-1], losses(tmp_path / "two", stage)[-1], rtol=1e-5)


def test_blocks_are_compiled_with_and_without_checkpointing(monkeypatch):
    """`module.compile()`, with FSDP's hooks and a checkpoint inside, compiled nothing, and did not say so."""
    plain, subset = torch.compile, data.Subset(data.World(), [0, 1])
    recipe = replace(train.RECIPES["tiny"]["2"], batch=8)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    counts, gradients = [], []
    for flags in ({"compile": False, "checkpointing": False}, {"compile": True, "checkpointing": False},
                  {"compile": True, "checkpointing": True}):
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(plain, backend=(counter := CompileCounter())))
        dd = DualDiffusion.load(START)
        learner = train.Learner(dd, {"ddit": dd.ddit, "t5": train.MaskRow(dd.t5, dd.tokenizer.mask_id)}, recipe,
                                SimpleNamespace(parallel="ddp", **flags), torch.float32, "")
        batch, = data.Batches(subset, subset, dd.tokenizer, dd.config.settings, recipe, 0, slice(0, 8))[0]
        loss, *_ = train.training_losses(learner, default_convert(batch))
        loss.backward()
        counts.append(counter.frame_count)
        gradients.append(torch.cat([p.grad.to_local().flatten() for p in learner.parameters]))
    torch.distributed.destroy_process_group()
    assert counts == [0, 3, 3]  # a block of the transformer, its last, and one of T5
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])


def test_the_average_of_the_weights(tmp_path):
    """After two steps at decay 0.5: a quarter of the first weights, a quarter of the second, half of the third. It is
    what the stage leaves."""
    run(*FIRST, "--steps", 2, "--save-minutes", 0, "--out", tmp_path, "--ema", 0.5)
    two = state(tmp_path)
    shutil.rmtree(checkpoints(tmp_path)[-1])
    first, one, left, prefix = load_file(START), state(tmp_path), weights(tmp_path), "model.diffusion_model."
    learned = [name for name, _ in DualDiffusion.load(START).named_parameters() if not name.startswith("vae.")]
    assert learned[0] == "ddit.x_embedder.proj.weight" and len(learned) == sum("averages" in name for name in two)
    for k, name in enumerate(learned):
        here = name.replace("ddit.", prefix, 1).replace("t5.", "text_encoders.t5xxl.transformer.", 1)
        mean = first[here].float() / 4 + one[name] / 4 + two[name] / 2
        assert torch.allclose(two[f"averages.{k}"], mean, rtol=0, atol=1e-6), name
        assert torch.allclose(left[here].float(), mean, rtol=1e-3, atol=1e-6), name  # stored in half precision
        assert not torch.equal(mean, two[name])


def test_a_loss_that_is_no_number_is_not_saved(tmp_path):
    err = run(*FIRST, "--steps", 40, "--show-every", 3, "--rate", "1e30", "--out", tmp_path, status=2)[1]
    assert "not a number at step" in err
    assert not checkpoints(tmp_path)


def test_stage_2_changes_one_row_of_t5(uninterrupted):
    args = ["--stage", 2, "--steps", 3, "--out", uninterrupted, *SMALL]
    run(*args)
    before, after = weights(uninterrupted), weights(uninterrupted, 2)
    tokenizer = DualDiffusion.load(str(uninterrupted / "stage2" / "model.safetensors")).tokenizer
    table = "text_encoders.t5xxl.transformer.shared.weight"
    changed = (before[table] != after[table]).any(1).nonzero().flatten().tolist()
    assert changed == [tokenizer.mask_id]
    for name in before:
        if name.startswith("text_encoders") and name != table or name.startswith("first_stage"):
            assert torch.equal(before[name], after[name]), name
    assert any((before[n] != after[n]).any() for n in before if n.startswith("model.diffusion_model.joint_blocks"))


def test_a_folder_holds_one_run(uninterrupted, tmp_path):
    """Other settings are refused; more steps are not, and are noted."""
    args = [*FIRST, "--out", uninterrupted, "--steps"]
    assert "rate 0.002 is now 0.1" in run(*args, 6, "--rate", 0.1, status=2)[1]
    assert "seed 0 is now 5" in run(*args, 6, "--seed", 5, status=2)[1]
    assert "dtype fp32 is now bf16" in run(*args, 6, "--dtype", "bf16", status=2)[1]
    shutil.copytree(uninterrupted / "stage1", tmp_path / "stage1")
    run(*args, 7, "--out", tmp_path)
    assert json.load(open(tmp_path / "stage1" / "run.json"))["steps"] == 7


def test_a_stage_goes_on_with_the_file_that_it_began_with(uninterrupted, tmp_path):
    """The stage before it, started again when done, writes the same file again, at another time. Another is refused."""
    shutil.copytree(uninterrupted / "stage1", tmp_path / "stage1")
    args, path = ["--stage", 2, "--out", tmp_path, *SMALL, "--steps"], tmp_path / "stage1" / "model.safetensors"
    run(*args, 1)
    content = path.read_bytes()
    run(*FIRST, "--out", tmp_path, "--steps", 6)
    assert path.read_bytes() == content
    run(*args, 2)
    dd = DualDiffusion.load(str(path))
    torch._foreach_mul_([p.data for p in dd.ddit.parameters()], 1.01)
    dd.save(str(path), torch.float16)
    assert "stage2 holds a run with other settings (files" in run(*args, 2, status=2)[1]


def test_a_full_disk_costs_no_checkpoint(uninterrupted, tmp_path):
    """Simulated by a limit on the size of files, which is met in the middle of writing the second checkpoint."""
    args = [*FIRST, "--steps", 6, "--save-minutes", 0, "--out", tmp_path]
    shutil.copytree(uninterrupted / "stage1", tmp_path / "stage1")
    for path in checkpoints(tmp_path)[1:]:
        shutil.rmtree(path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        err = run(*args, status=2)[1]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-00000005: could not be written (" in err and "Traceback" not in err
    assert re.search(r"(^|[\r\n])train.py: ", err)  # on a line of its own
    (left,) = (tmp_path / "stage1" / "checkpoints").iterdir()
    assert left.name == "step-00000004"


def test_every_stage_runs_on_the_users_own_images(pictures, tmp_path):
    source, out = ["--data", pictures / "a.jsonl"], tmp_path / "runs"
    for stage in ("0", "1", "2", "3"):
        share = ["--held-out", 0.2] if stage == "0" else []  # the next stages take it from the file
        _, err = run("--stage", stage, *source, "--steps", 2, "--batch", 16, "--out", out, *share)
        assert json.load(open(out / f"stage{stage}" / "run.json"))["held_out"] == 0.2
        assert stage != "0" or "a7.jpg: cannot be read as an image" in err  # a bad one is left out, and named once
        for name in ("data.png", "samples.png"):
            assert Image.open(out / f"stage{stage}" / name).size[0] > 200
    model = out / "stage3" / "model.safetensors"
    args = ["--stage", 3, *source, "--steps", 3, "--batch", 16, "--out", out, "--held-out", 0.1]
    assert "--held-out has to be the same in all stages, not 0.1 and 0.2" in run(*args, status=2)[1]
    held_out = (out / "stage3" / "held-out.txt").read_text().split()
    unseen = run("data", "--ckpt", model, *source, "--unseen", program="tests/evaluate.py")[0]
    assert f"/{len(held_out)}\n" in unseen
    run("--ckpt", model, "--vqa", pictures / "a0.jpg", "what color?", program="sample.py")
    assert "/6" in run("data", "--ckpt", model, *source, "--num", 6, program="tests/evaluate.py")[0]


def test_images_too_many_to_keep_are_read_as_they_come_by_other_processes(pictures, tmp_path):
    """And SIGTERM to all of them, as a cluster's scheduler sends it, lets the step end and saves it."""
    args = ["--stage", 1, "--init", START, "--data", pictures / "a.jsonl", "--steps", 8, *OWN, "--batch", 8,
            "--latents", 8, "--save-minutes", 0]
    run(*args, "--out", tmp_path / "none", "--workers", 0)
    args += ["--out", tmp_path / "two", "--workers", 2]
    running = subprocess.Popen(command(*args), stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not checkpoints(tmp_path / "two") and running.poll() is None:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGTERM)
    err = running.communicate(timeout=60)[1]
    step = int(checkpoints(tmp_path / "two")[-1][-8:])
    assert running.returncode == 128 + signal.SIGTERM and step < 8
    assert f"train.py: stopped after step {step}; the same command goes on" in err and "Traceback" not in err
    assert f"going on from step {step}" in run(*args)[1]
    assert apart(state(tmp_path / "none"), state(tmp_path / "two")) == 0


def test_bad_images_without_end(pictures, tmp_path):
    """None that can be read among those that are learned; and the error of a process that makes batches."""
    shutil.copytree(pictures, tmp_path / "here")
    source = data.Records(str(tmp_path / "here" / "b.jsonl"), 64)
    for i in source.split(2)[1]:
        open(source.record(i).image, "wb").close()
    args = ["--stage", 1, "--init", START, "--data", tmp_path / "here" / "b.jsonl", "--steps", 10, "--out", tmp_path]
    assert "none of the images can be read" in run(*args, *OWN, status=2)[1]
    err = run(*args, *OWN, "--latents", 8, "--workers", 1, status=2)[1]
    assert "a hundred images in a row cannot be read" in err and "Traceback" not in err


def test_understanding_alone_can_be_trained(tmp_path):
    """Table 10: no image half."""
    run("--stage", 1, "--steps", 2, "--out", tmp_path, *SMALL, "--image-weight", 0)
    assert losses(tmp_path)[-1][1] == 0 < losses(tmp_path)[-1][2]  # of images, of texts


def test_a_model_without_t5_goes_on_with_longer_texts(without_t5, tmp_path):
    shutil.copytree(without_t5 / "stage1", tmp_path / "stage1")
    dd = DualDiffusion.load(str(without_t5 / "stage1" / "model.safetensors"))
    assert {name for name, _ in dd.t5.named_parameters()} == {"positions", "shared.weight",
                                                              "encoder.final_layer_norm.weight"}
    run("--stage", 2, "--steps", 2, "--out", tmp_path, *SMALL)


def test_a_step_is_the_same_on_any_number_of_processes(monkeypatch):
    """Rows, times, noise and masks of the whole batch, of two processes' parts of it, and of four passes."""
    recipe = replace(train.RECIPES["tiny"]["3"], min_time=0.3)
    tokenizer = DualDiffusion.load(SHIPPED).tokenizer
    feed, settings = data.Subset(data.World(), np.arange(100)), Settings(length=recipe.length)
    plain = SimpleNamespace(sample=lambda mean, logvar, noise: noise, normalize=lambda z: z)
    dd = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"), vae=plain, ddit="a network", t5=None)
    learner = SimpleNamespace(dd=dd, recipe=recipe,
                              moments=lambda images: torch.zeros(len(images), 2, 16, 8, 8))
    monkeypatch.setattr(train.losses, "joint_loss", lambda ddit, t5, images, texts, *weights: (images, texts))

    def halves(rows, passes=1):
        for batch in data.Batches(feed, feed, tokenizer, settings, recipe, 0, rows, passes)[5]:
            yield batch.rows, *train.training_losses(learner, default_convert(batch))
    (whole,), four = halves(slice(0, 64)), [*halves(slice(0, 64), 4)]
    two = [*halves(slice(0, 16)), *halves(slice(16, 64))]
    assert [rows for rows, _, _ in four] == [slice(k, k + 16) for k in (0, 16, 32, 48)]
    for parts in (two, four):
        for half, field in [(1, f) for f in ImageHalf._fields] + [(2, f) for f in TextHalf._fields]:
            assert torch.equal(getattr(whole[half], field), torch.cat([getattr(part[half], field) for part in parts]))
    texts, noise = whole[2], torch.cat([whole[1].noise, texts_noise := whole[2].latents])
    assert torch.equal(texts.masked, texts.tokens != texts.noisy) and texts.masked.any()
    assert 0.3 < texts.t.min() < 0.32  # the first of 64 strata
    assert not torch.equal(whole[1].noise, texts_noise)  # what samples the posterior is not the noise of the loss
    assert abs(noise.mean()) < 5 / noise.numel() ** 0.5 and abs(noise.std() - 1) < 0.02


def in_process(monkeypatch, *args):
    """train.py in this process and from this module, so that its parts can be replaced."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    try:
        train.main()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("by_flags", [True, False])
def test_the_model_learns_prompts_of_the_flags_or_of_the_starting_file(monkeypatch, tmp_path, by_flags):
    """And the file that a stage leaves has them."""
    prompts, flags = {"caption_prompt": "what is there?", "answer_suffix": "in a word"}, []
    start, path = DualDiffusion.load(START), str(tmp_path / "start.safetensors")
    for name, text in prompts.items():
        if by_flags:
            flags += ["--" + name.replace("_", "-"), text]
        else:
            setattr(start.config.settings, name, text)
    start.save(path)
    asked, plain = [], train.training_losses

    def watch(learner, batch):
        for ids, may in zip(batch.tokens, batch.maskable):
            asked.append(start.tokenizer.decode(ids[~may]))
        return plain(learner, batch)
    monkeypatch.setattr(train, "training_losses", watch)
    monkeypatch.setattr(train, "show_samples", lambda *_: None)
    in_process(monkeypatch, "--stage", 3, "--init", path, "--steps", 1, "--length", 40, "--out", tmp_path, *SMALL,
               *flags)
    captions = asked.count("Q: what is there? A:")
    questions = sum(bool(re.fullmatch(r"Q: .+\? in a word A:", text)) for text in asked)
    assert captions > 0 < questions and captions + questions == len(asked)
    left = DualDiffusion.load(str(tmp_path / "stage3" / "model.safetensors")).config.settings
    assert left == Settings(**vars(start.config.settings) | prompts | {"length": 40})


@pytest.mark.parametrize("rank, device, index", [(None, "cuda", 0), (None, "cuda:5", 5), (3, "cuda", 3)])
def test_a_gpu_carries_its_number_and_no_other_is_touched(monkeypatch, rank, device, index):
    """CUDA's calls, replaced by recorders: what a GPU would be asked for before anything is computed."""
    seen = []

    class Reached(Exception):
        pass

    def set_device(device):
        seen.append(torch.device(device))
        raise Reached

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    for name in ("zeros", "empty", "randn"):
        def allocate(*args, made=getattr(torch, name), device="cpu", **kwargs):
            assert torch.device(device).type == "cpu", "allocated on a GPU before one was chosen"
            return made(*args, **kwargs)
        monkeypatch.setattr(torch, name, allocate)
    if rank is not None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 8, "LOCAL_WORLD_SIZE": 8}.items():
            monkeypatch.setenv(name, str(value))
    with pytest.raises(Reached):
        in_process(monkeypatch, "--stage", 1, *(["--device", device] if ":" in device else []))
    assert seen == [torch.device("cuda", index)]


def test_kept_latents_are_those_of_float32(tmp_path):
    """A rounding there would stay for good."""
    for dtype in ("fp32", "bf16"):
        run("--stage", 1, "--steps", 1, "--out", tmp_path / dtype, *SMALL, "--dtype", dtype)
    (a,), (b,) = ((tmp_path / dtype).glob("latents-*.npy") for dtype in ("fp32", "bf16"))
    assert a.name == b.name and (np.load(a) == np.load(b)).all()


def test_learned_embeddings_are_never_rounded(without_t5, tmp_path):
    run("--stage", 3, "--steps", 1, "--rate", 0, "--muon", 0, "--weight-decay", 0, "--learn-t5", "no", *SMALL,
        "--dtype", "bf16", "--init", without_t5 / "stage1" / "model.safetensors", "--out", tmp_path)
    before, after = weights(without_t5), weights(tmp_path, 3)
    name = "text_encoders.t5xxl.transformer.shared.weight"
    assert torch.equal(before[name], after[name])


def test_a_smaller_size_than_the_start_had_is_said(tmp_path, pictures):
    dd = DualDiffusion.load(START)
    dd.config.settings.size = 128  # as stage 2hr leaves 512, and stage 3 would take 256
    dd.save(str(tmp_path / "large.safetensors"))
    args = ["--stage", 3, "--init", tmp_path / "large.safetensors", "--data", pictures / "a.jsonl", "--steps", 1]
    assert "was trained at --size 128; this stage takes 64" in run(*args, "--out", tmp_path / "a", *OWN)[1]
    assert "--size" not in run(*args, "--out", tmp_path / "b", *OWN, "--size", 128)[1]


def test_changed_data_are_another_run(on_pictures, tmp_path, pictures):
    """The data are compared, not where they lie."""
    shutil.copytree(on_pictures, tmp_path / "out")
    shutil.copytree(pictures, tmp_path / "there")
    args = ["--stage", 1, "--init", START, "--steps", 2, "--out", tmp_path / "out", *OWN]
    run(*args, "--data", tmp_path / "there" / "b.jsonl")
    text = (tmp_path / "there" / "b.jsonl").read_text()
    (tmp_path / "there" / "b.jsonl").write_text(text.replace("noise in red", "something red", 1))
    assert "with other settings (data [" in run(*args, "--data", tmp_path / "there" / "b.jsonl", status=2)[1]


def test_data_that_cannot_teach_what_a_stage_is_for(tmp_path, pictures):
    rows = [json.loads(line) for line in open(pictures / "b.jsonl")]
    for row in rows:
        row["image"] = str(pictures / row["image"])
    for name, wanted in (("captions", ("image", "caption")), ("questions", ("image", "question", "answer"))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({k: row[k] for k in wanted}) for row in rows))
    args = ["--steps", 1, "--out", tmp_path, *OWN, "--data"]
    err = run("--stage", 1, *args, tmp_path / "questions.jsonl", status=2)[1]
    assert "no image has a caption, which stage 1 learns from" in err
    err = run("--stage", 1, *args, tmp_path / "captions.jsonl")[1]
    assert "know only coloured shapes" in err and "python train.py --stage 0 --data" in err
    err = run("--stage", 3, "--init", START, *args, tmp_path / "captions.jsonl")[1]
    assert "no image has a question" in err
    out = tmp_path / "other"
    assert "wrote" in run("--stage", 3, "--init", START, *args[:2], "--out", out, *OWN, "--data",
                          tmp_path / "questions.jsonl")[0]


def test_sheets_show_unseen_images_of_every_kind():
    """In data sorted by kind, the first and the last eight would be of two."""
    asked = []

    class Sorted(data.World):
        def image(self, i):
            asked.append(i)
            return super().image(i)
    train.sample_cells(DualDiffusion.load(START), data.Subset(Sorted(), np.arange(200)))
    assert len({i // 20 for i in asked}) > 4


def test_what_cannot_be_read_is_moved_aside_and_does_not_count(uninterrupted, tmp_path):
    """A later empty checkpoint, and one that is cut off."""
    shutil.copytree(uninterrupted / "stage1", tmp_path / "stage1")
    folder = tmp_path / "stage1" / "checkpoints"
    (folder / "step-00000099").mkdir()
    (part,) = shards(checkpoints(tmp_path)[2])
    os.truncate(part, os.path.getsize(part) // 2)
    err = run(*FIRST, "--steps", 6, "--save-minutes", 0, "--out", tmp_path, "--keep", 1)[1]
    assert "step-00000099: cannot be read" in err and "step-00000006: cannot be read" in err and "5/6" in err
    assert os.listdir(folder) == ["step-00000006"]  # what was put aside went when it was saved
    assert apart(state(tmp_path), state(uninterrupted)) == 0


def test_what_is_no_damage_moves_no_checkpoint_aside(uninterrupted, tmp_path, monkeypatch):
    """Out of memory, say. And what was put aside before is in nobody's way."""
    shutil.copytree(uninterrupted / "stage1", tmp_path / "stage1")
    folder = tmp_path / "stage1" / "checkpoints"
    before = sorted(os.listdir(folder))
    with monkeypatch.context() as patch:
        patch.setattr(train.dcp, "load", lambda *args, **how: torch.empty(2 ** 60))
        assert "out of memory" in run(*FIRST, "--steps", 7, "--out", tmp_path, status=2)[1]
    assert sorted(os.listdir(folder)) == before
    shutil.copytree(folder / before[-1], folder / f"{before[-1]}.unreadable")
    (part,) = shards(folder / before[-1])
    os.truncate(part, 1000)
    assert train.newest_checkpoint(str(folder)) == str(folder / before[-2])
    assert os.path.getsize(folder / f"{before[-1]}.unreadable" / os.path.basename(part)) == 1000
    for path in checkpoints(tmp_path):
        os.truncate(*shards(path), 1000)
    left = sorted(os.listdir(folder))
    for _ in range(2):  # a run does not begin anew where its checkpoints lie
        with pytest.raises(SystemExit):
            train.newest_checkpoint(str(folder))
    assert sorted(os.listdir(folder)) == left


def test_a_batch_that_does_not_come_is_said(monkeypatch):
    said = []
    monkeypatch.setattr(train, "warn", said.append)
    monkeypatch.setattr(threading, "Timer", lambda minute, *how, Timer=threading.Timer: Timer(minute / 300, *how))

    def loader():
        for wait in (0, 0.5, 0):
            time.sleep(wait)
            yield [data.Batch(np.zeros((1, 3, 2, 2), np.float32), None, *np.zeros((3, 1, 2), int), slice(0, 1), 0)]
    batches = [batch for step in train.batches_of(loader(), pinned=False) for batch in step]
    assert len(batches) == 3 and batches[1].images.shape == (1, 3, 2, 2) and torch.is_tensor(batches[1].tokens)
    assert said == ["no batch for a minute: the disk that images are on may be slow, or gone"]


@pytest.mark.parametrize("env, flags, message", [
    ({"GLOO_SOCKET_IFNAME": "nowhere"}, [], "cannot join the other processes: .*nowhere"),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["--parallel", "fsdp", "--muon", 0],
     "LOCAL_WORLD_SIZE is not set")])
def test_what_the_system_refuses_is_one_line(tmp_path, monkeypatch, env, flags, message):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    err = run(*FIRST, "--steps", 1, "--out", tmp_path, *flags, status=2)[1]
    assert len(err.splitlines()) == 1 and re.search(message, err), err


@SLOW
def test_a_compiler_that_is_not_there_is_one_line(tmp_path):
    env = {"CXX": "/nonexistent/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(command("--stage", 1, "--out", tmp_path, "--compile"), env=os.environ | env,
                          capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--compile finds no compiler that works" in done.stderr


WATCHING = """
import sys
sys.path.insert(0, {root!r})
import train
watch = train.Watch()
watch.in_loop = True
print("ready", flush=True)
train.dist.HashStore().get("never")
"""


def test_a_run_can_be_ended_while_it_waits():
    """It waits outside Python, as it does for another process that stands still. A terminal that closes sends SIGHUP
    twice, which is as one SIGTERM. A SIGTERM some seconds later ends the process. nohup's process is told nothing."""
    code = WATCHING.format(root=ROOT)
    two = []
    for prepare in (None, lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)):
        two.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    text=True, preexec_fn=prepare))
    for process in two:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
    saving = "warning: saving after this step; again ends at once, without saving\n"
    assert two[0].stderr.readline() == saving
    time.sleep(3.2)
    assert [process.poll() for process in two] == [None, None]
    for process in two:
        process.send_signal(signal.SIGTERM)
    assert two[0].wait(5) == 128 + signal.SIGTERM
    assert two[0].stderr.read() == "warning: ended; the same command goes on from the last checkpoint\n"
    time.sleep(0.2)
    two[1].kill()
    assert two[1].communicate()[1] == saving


def test_a_sheet_leaves_out_what_has_vanished(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "here")
    source = data.Records(str(tmp_path / "here" / "b.jsonl"), 64)
    for i in range(0, len(source), 2):
        os.remove(source.record(i).image)
    dd = DualDiffusion.load(START)
    assert len(train.sample_cells(dd, data.Subset(source, np.arange(len(source))))) == 16


@pytest.mark.parametrize("faster", ["fp32", "bf16"])
def test_a_cpu_takes_the_dtype_that_is_faster_there(monkeypatch, faster):
    def timeit(product, number):
        dtype = product().dtype
        return 0.1 if dtype == train.DTYPES[faster] else 0.2
    monkeypatch.setattr(train.timeit, "timeit", timeit)
    args = SimpleNamespace(device=torch.device("cpu"), stage="1")
    assert train.default_dtype(args) == faster


@pytest.mark.parametrize("shape", [(8, 3), (4, 2, 3, 3)])
def test_muon_is_its_closed_form(shape):
    """Newton-Schulz changes the singular values alone: it applies a polynomial to each, five times."""
    torch.manual_seed(0)
    p, one, two = map(torch.nn.Parameter, torch.randn(3, *shape))
    weight = p.detach().flatten(1).double()
    for tensor in (p, one, two):
        tensor.to_local = tensor.detach
    optimizer = train.Muon([{"params": [p], "lr": 0.1, "weight_decay": 0.5}], {})
    # The second momentum is 0.05 (two + 0.95 one). Of it 0.95, and 0.05 of two, is the direction, here times 20.
    for gradient, direction in ((one, one), (two, 1.95 * two + 0.9025 * one)):
        p.grad = gradient
        optimizer.step()
        u, s, vh = torch.linalg.svd(direction.flatten(1).double(), full_matrices=False)
        s = s / s.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
        weight = 0.95 * weight - 0.1 * max(1, len(u) / len(vh.T)) ** 0.5 * (u * s) @ vh
    assert torch.allclose(p.flatten(1).double(), weight, atol=1e-5)


def test_learning_rate_rises_then_holds_or_falls():
    recipe = train.Recipe(steps=100, warmup=10, schedule="linear")
    assert [train.rate_factor(recipe, s) for s in (0, 4, 50)] == pytest.approx([0.1, 0.5 * 0.96, 0.5])
    assert train.rate_factor(train.Recipe(steps=100, warmup=10), 99) == 1


# ---------------------------------------------------------------- what people's computers are really like


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    """Lustre without -o flock answers ENOSYS, NFS without a lock daemon ENOLCK."""
    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    data.claim(str(tmp_path / ".lock")).close()
    err = capsys.readouterr().err
    assert "warning: " in err and "no locks here (" in err


def test_a_file_system_without_rights_is_no_error(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    with data.replacing(str(tmp_path / "x")) as beside:
        open(beside, "w").close()
    assert os.listdir(tmp_path) == ["x"]


def test_windows_has_no_fcntl():
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            assert not re.search("^(import|from) (fcntl|resource)", open(os.path.join(ROOT, name)).read(), re.MULTILINE)


def test_more_letters_than_the_vocabulary_takes(tmp_path):
    rows = []
    for k in range(40):
        Image.new("RGB", (16, 16), (6 * k, 0, 0)).save(tmp_path / f"{k}.png")
        rows.append({"image": f"{k}.png", "caption": "".join(chr(0x4e00 + (37 * k + j) % 3000) for j in range(16))})
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    err = run("--stage", 0, "--data", tmp_path / "d.jsonl", "--steps", 1, "--out", tmp_path / "run", status=2)[1]
    assert "these texts have more letters than --vocab 412: give more" in err
