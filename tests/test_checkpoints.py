"""Checkpoint files: SD3's single file, the diffusers layout and the authors' release, on random weights in the exact
layouts, against what diffusers and transformers make of them (golden values, see make_golden.py); the way back; and
every file that is not one. Full size: tests/full_size.py."""
import json
import math
import os
import resource
import shutil
import subprocess
import sys

import make_golden
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_networks import GOLDEN, SHAPES, assert_close

import model
from model import DualDiffusion, Settings, check_together, inspect, read_part
from sample import SHIPPED, describe, text_to_image
from t5 import train_tokenizer

with safe_open(make_golden.PATH, framework="pt") as f:
    FOLDERS = json.loads(f.metadata()["folders"])
UMASK = os.umask(0)
os.umask(UMASK)
PREFIX = {"single": "model.diffusion_model.", "vae": "first_stage_model.", "t5": "text_encoders.t5xxl.transformer."}


def states(*parts):
    """Random weights as an SD3 file has them."""
    result = {part: make_golden.random_state(SHAPES[part]) for part in parts}
    if "single" in result:
        result["single"] = make_golden.sd3_part(result["single"], make_golden.SINGLE)
    return result


def single_file(path, *parts, dtype=torch.float32):
    save_file({PREFIX[part] + name: w.to(dtype).contiguous() for part, state in states(*parts).items()
               for name, w in state.items()}, path)
    return str(path)


def folder(path, kind, dtype=torch.float32, shards=1):
    """kind: "sd3" or "authors" -> a folder in diffusers layout with the golden file's random weights."""
    for part, shapes in FOLDERS[kind].items():
        os.makedirs(path / part)
        (path / part / "config.json").write_text(json.dumps(make_golden.FOLDER[part]))
        state = {name: w.to(dtype) for name, w in make_golden.random_state(shapes).items()}
        stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
        if shards == 1:
            save_file(state, path / part / f"{stem}.safetensors")
            continue
        files = {name: f"{stem}-{k % shards + 1:05d}-of-{shards:05d}.safetensors" for k, name in enumerate(state)}
        for file in set(files.values()):
            save_file({name: w for name, w in state.items() if files[name] == file}, path / part / file)
        (path / part / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    os.makedirs(path / "scheduler")
    (path / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.5}')
    return str(path)


def load(path, **files):
    """DualDiffusion.load, but for the tokenizer: no random one has the golden vocabulary."""
    config, parts, _ = inspect(path, **files)
    return DualDiffusion(config, None, **{part: read_part(part, tensors, getattr(config, part), "cpu", torch.float32)
                                          for part, tensors in parts.items()}).eval()


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("together", [True, False])
def test_sd3_single_file(tmp_path, together):
    """All in one file, or T5 in its own, which has no prefix. The velocity is SD3's with the pooled vector at zero."""
    if together:
        dd = load(single_file(tmp_path / "all.safetensors", "single", "vae", "t5"))
    else:
        save_file(states("t5")["t5"], tmp_path / "t5.safetensors")
        dd = load(single_file(tmp_path / "sd3.safetensors", "single", "vae"), t5=str(tmp_path / "t5.safetensors"))
    assert dd.config.ddit.heads == 2 and dd.config.ddit.vocab == 32100
    assert_close(dd.ddit(GOLDEN["latents"], GOLDEN["t"], GOLDEN["text"])[0], GOLDEN["single.velocity"])
    assert_close(dd.t5(GOLDEN["tokens"].long()), GOLDEN["states"])
    assert_close(dd.vae.encode(GOLDEN["pixels"])[1], GOLDEN["logvar"])
    assert_close(dd.vae.decode(GOLDEN["z"]), GOLDEN["decoded"])


class Spoken:
    """A tokenizer of two sentences: the rows of tokens that the golden drawing was made with."""
    def encode(self, text, length):
        return GOLDEN["tokens"][int(text == "negative"), :length].tolist()


@pytest.mark.parametrize("shards", [1, 3])
def test_sd3_folder(tmp_path, shards):
    """diffusers' own layout and names; velocity, VAE and T5, then a whole drawing of 28 steps with guidance."""
    path = folder(tmp_path / "sd3", "sd3", shards=shards)
    shutil.move(f"{path}/text_encoder", f"{path}/text_encoder_3")  # as SD3's own folder has it, beside CLIP's two
    dd = load(path)
    config = dd.config
    assert (config.ddit.heads, config.vae.groups, config.vae.scale, config.settings.shift) == (2, 4, 1.3, 2.5)
    assert_close(dd.ddit(GOLDEN["latents"], GOLDEN["t"], GOLDEN["text"])[0], GOLDEN["sd3.velocity"])
    mean, logvar = dd.vae.encode(GOLDEN["pixels"])
    assert_close(mean, GOLDEN["sd3.mean"])
    assert_close(logvar, GOLDEN["sd3.logvar"])
    assert_close(dd.t5(GOLDEN["tokens"].long()[:, :7]), GOLDEN["sd3.states"])
    dd.tokenizer = Spoken()
    drawn = text_to_image(dd, ["prompt"], "negative", length=7, steps=make_golden.STEPS, cfg=make_golden.CFG,
                          shift=make_golden.SHIFT, noise=GOLDEN["latents"][:1], height=80, width=64)
    error = (drawn - GOLDEN["sd3.drawn"]).abs().max()
    assert error < 1e-3, error


def test_the_authors_folder(tmp_path):
    dd = load(folder(tmp_path / "authors", "authors"))
    velocity, logits = dd.ddit(GOLDEN["latents"], GOLDEN["t"], GOLDEN["text"])
    assert_close(velocity, GOLDEN["authors.velocity"])
    assert_close(logits, GOLDEN["authors.logits"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_types_on_disk(tmp_path, dtype):
    """What is read in float32 is what the file says, exactly: against the same numbers written in float32."""
    rounded = {name: w.to(dtype).float() for name, w in states("t5")["t5"].items()}
    save_file(rounded, tmp_path / "wide.safetensors")
    save_file({name: w.to(dtype) for name, w in rounded.items()}, tmp_path / "narrow.safetensors")
    wide, narrow = (load(str(tmp_path / f"{name}.safetensors")).t5.state_dict() for name in ("wide", "narrow"))
    assert wide.keys() == narrow.keys() and all(torch.equal(wide[name], narrow[name]) for name in wide)


def test_a_type_for_every_part():
    dd = DualDiffusion.load(SHIPPED, dtype={"t5": torch.bfloat16, "vae": torch.float16})
    assert [{w.dtype for w in part.parameters()} for part in (dd.ddit, dd.t5, dd.vae)] == [
        {torch.float32}, {torch.bfloat16}, {torch.float16}]
    with pytest.raises(ValueError, match="dtype names transformer; the parts are ddit, t5, vae"):
        DualDiffusion.load(SHIPPED, dtype={"transformer": torch.bfloat16})


def test_a_new_text_head_reads_nothing_and_is_said_so(tmp_path):
    path = single_file(tmp_path / "sd3.safetensors", "single", "vae", "t5")
    # without a tokenizer it can do nothing at all
    assert "to read, it must be trained first" not in describe(*inspect(path))
    assert "to read, it must be trained first" in describe(*inspect(path, tokenizer=spiece(tmp_path)))
    dd = load(path)
    dd_dict = dd.ddit.state_dict()
    assert not dd_dict["text_head.linear.weight"].any()
    last = dd_dict["joint_blocks.1.context_block.adaLN_modulation.1.weight"]
    assert last[:256].any() and not last[256:].any()


def spiece(folder):
    path = folder / "spiece.model"
    path.write_bytes(DualDiffusion.load(SHIPPED).tokenizer.model)
    return str(path)


def test_export_and_back(tmp_path):
    """The shipped model to diffusers' layout and back: every number the same, names diffusers'."""
    before = DualDiffusion.load(SHIPPED, dtype=None)
    before.export(str(tmp_path))
    after = DualDiffusion.load(str(tmp_path), dtype=None)
    assert after.config.ddit == before.config.ddit and after.config.t5 == before.config.t5
    assert after.tokenizer.model == before.tokenizer.model and after.config.settings == before.config.settings
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_mode & 0o444 == 0o444 & ~UMASK
    ours, again = before.state_dict(), after.state_dict()
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) and ours[name].dtype == again[name].dtype for name in ours)
    authors = FOLDERS["authors"]["transformer"]
    last = {name.replace("blocks.2.", "blocks.5.") for name in authors if "blocks.1." not in name}
    inner = ["norm_q", "norm_k", "norm_added_q", "norm_added_k", *(f"blocks.{i}." for i in range(1, 5))]
    assert {name for name in load_file(file) if not any(piece in name for piece in inner)} == last


WRONG = {
    "cut.safetensors": "cut.safetensors: not a readable",
    "header.safetensors": "header.safetensors: not a readable",
    "model.ckpt": "model.ckpt: a pickle",
    "lora.safetensors": "lora.safetensors: this is a LoRA",
    "flux.safetensors": "flux.safetensors: this is FLUX",
    "sdxl.safetensors": "sdxl.safetensors: this is a U-Net",
    "sd35.safetensors": "sd35.safetensors: this is SD3.5",
    "sd35m.safetensors": "sd35m.safetensors: this is SD3.5-medium",
    "clip.safetensors": "clip.safetensors: holds no part",
    "lacks.safetensors": "lacks.safetensors: the tensor joint_blocks.1.x_block.mlp.fc1.bias is missing",
    "shape.safetensors": "the tensor joint_blocks.1.x_block.mlp.fc1.bias is (3,), it should be (512,)",
    "type.safetensors": "type.safetensors: the tensor joint_blocks.1.x_block.mlp.fc1.bias is of type I8",
    "scaled.safetensors": "scaled.safetensors: this is T5 in scaled fp8",
    "shardless": "diffusion_pytorch_model-00002-of-00003.safetensors: this shard is missing",
    "pickled": "transformer: holds no .safetensors file",
    "index": "diffusion_pytorch_model.safetensors.index.json: not valid JSON",
}


def make_wrong(tmp_path, name):
    path, file = tmp_path / name, states("single")["single"]
    file = {PREFIX["single"] + n: w for n, w in file.items()}
    bias = PREFIX["single"] + "joint_blocks.1.x_block.mlp.fc1.bias"
    more = {"lora": "joint_blocks.0.x_block.lora_A.weight", "flux": "double_blocks.0.img_attn.qkv.weight",
            "sdxl": "model.diffusion_model.input_blocks.0.0.weight", "clip": "text_model.embeddings.weight",
            "sd35": PREFIX["single"] + "joint_blocks.0.x_block.attn.ln_q.weight",
            "sd35m": PREFIX["single"] + "joint_blocks.0.x_block.attn2.qkv.weight", "scaled": "encoder.x.scale_weight"}
    kind = name.split(".")[0]
    if kind in ("shardless", "pickled", "index"):
        folder(path, "sd3", shards=3)
        transformer = path / "transformer"
        if kind == "shardless":
            os.remove(transformer / "diffusion_pytorch_model-00002-of-00003.safetensors")
        elif kind == "index":
            (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text("{")
        else:
            for shard in transformer.glob("diffusion*"):
                os.remove(shard)
            (transformer / "diffusion_pytorch_model.bin").touch()
    elif kind in ("cut", "header"):
        whole = open(single_file(path, "single"), "rb").read()
        path.write_bytes(whole[:len(whole) // 2] if kind == "cut" else b"{" * 100)
    elif kind == "model":
        path.write_bytes(b"PK")
    else:
        if kind == "lacks":
            del file[bias]
        elif kind == "shape":
            file[bias] = torch.zeros(3)
        elif kind == "type":
            file[bias] = torch.zeros(512, dtype=torch.int8)
        else:
            file = (file if kind.startswith("sd35") else {}) | {more[kind]: torch.zeros(2)}
        save_file(file, path)
    return str(path)


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_refused(tmp_path, name):
    path = make_wrong(tmp_path, name)
    with pytest.raises((ValueError, OSError)) as error:
        DualDiffusion.load(path, tokenizer=spiece(tmp_path))
    message = str(error.value)
    assert WRONG[name] in message and "\n" not in message, message


def test_a_folder_without_a_part(tmp_path):
    path = folder(tmp_path / "sd3", "sd3")
    shutil.rmtree(f"{path}/vae")
    assert model.missing_parts(load(path)) == ["VAE"]


# ---------------------------------------------------------------- files that say what cannot be


with safe_open(SHIPPED, framework="pt") as f:
    HEADER = json.loads(f.metadata()["config"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The names and shapes of the shipped model's tensors, with nothing in them."""
    return {name: torch.zeros(w.shape, dtype=w.dtype) if w.ndim != 1 or w.dtype != torch.uint8 else w
            for name, w in load_file(SHIPPED).items()}


def refused(function, *args, **kwargs):
    """-> the one line that it raises."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400, message
    return message


PARTS = ("ddit", "t5", "vae", "settings")
BAD_VALUES = [
    ("ddit", "depth", 10 ** 9), ("ddit", "depth", 7), ("ddit", "depth", 0), ("ddit", "depth", -1),
    ("ddit", "depth", "6"), ("ddit", "depth", 6.5), ("ddit", "depth", True), ("ddit", "depth", None),
    ("ddit", "depth", [6]),
    ("ddit", "width", 10 ** 6), ("ddit", "width", 0), ("ddit", "heads", 3), ("ddit", "heads", 0), ("ddit", "heads", -2),
    ("ddit", "heads", 10 ** 30), ("ddit", "heads", "two"), ("ddit", "patch", 4), ("ddit", "channels", 4),
    ("ddit", "text_dim", 4096), ("ddit", "vocab", 32100), ("ddit", "vocab", math.nan), ("ddit", "pos_size", 10 ** 9),
    ("ddit", "qk_norm", False), ("ddit", "qk_norm", "yes"), ("ddit", "color", 3), ("ddit", "__init__", 1),
    ("t5", "num_layers", 10 ** 9), ("t5", "num_layers", 0), ("t5", "d_kv", 64), ("t5", "buckets", 0),
    ("t5", "max_distance", 0), ("t5", "max_distance", 8), ("t5", "max_distance", -1), ("t5", "max_distance", 1e3),
    ("t5", "max_distance", math.inf), ("t5", "places", 24), ("t5", "places", -1), ("t5", "vocab_size", 10 ** 12),
    ("vae", "multipliers", 4), ("vae", "multipliers", []), ("vae", "multipliers", [1, 2]), ("vae", "multipliers", None),
    ("vae", "multipliers", [1, 2, 4, "4"]), ("vae", "groups", 3), ("vae", "groups", 0), ("vae", "factor", 8),
    ("vae", "shift", math.nan), ("vae", "shift", "0"), ("vae", "scale", 0), ("vae", "scale", -1.0),
    ("vae", "scale", math.inf), ("vae", "scale", 10 ** 400),
    ("settings", "size", 0), ("settings", "size", 65), ("settings", "size", 16 * 10 ** 9), ("settings", "length", 1),
    ("settings", "length", "24"), ("settings", "cfg", math.nan), ("settings", "shift", 0), ("settings", "shift", None),
    ("settings", "caption_steps", 10 ** 12), ("settings", "answer_steps", 0), ("settings", "caption_prompt", 3),
    ("settings", "tempo", 3)]


@pytest.mark.parametrize("part, name, value", BAD_VALUES)
def test_a_header_that_cannot_be(tmp_path, small, part, name, value):
    path = str(tmp_path / "x.safetensors")
    save_file(small, path, {"config": json.dumps(HEADER | {part: HEADER[part] | {name: value}})})
    message = refused(inspect, path)
    assert message.startswith(path) and name in message, message


BAD_HEADERS = ["", "{", "null", "[]", "3", '"x"', '{"ddit": null}', '{"t5": []}', '{"vae": 3}', '{"settings": null}',
               "[" * 100_000, '{"ddit": ' * 100_000, '{"ddit": {"depth": ' + "9" * 5000 + "}}"]


@pytest.mark.parametrize("header", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_a_header_that_is_none(tmp_path, small, header):
    path = str(tmp_path / "x.safetensors")
    save_file(small, path, {"config": header})
    assert refused(inspect, path).startswith(path)


def test_an_older_header(tmp_path, small):
    """It may lack what came later."""
    later = ("qk_norm", "places", "answer_steps")
    old = {part: {name: value for name, value in HEADER[part].items() if name not in later} for part in PARTS}
    save_file(small, tmp_path / "x.safetensors", {"config": json.dumps(old)})
    config, _, _ = inspect(str(tmp_path / "x.safetensors"))
    wanted, _, _ = inspect(SHIPPED)
    assert config == wanted and config.settings.caption_prompt == "" and isinstance(config.vae.multipliers, tuple)


def test_embeddings_in_the_place_of_t5(tmp_path):
    """Table 9's: no layers, and a place for every token."""
    whole, path = DualDiffusion.load(SHIPPED), str(tmp_path / "x.safetensors")
    config = model.replace(whole.config, t5=model.replace(whole.config.t5, num_layers=0, places=24))
    made = DualDiffusion.build(config, whole.tokenizer)
    made.save(path)
    loaded = DualDiffusion.load(path)
    assert loaded.config == config and loaded.t5(torch.zeros(1, 24, dtype=torch.long)).shape == (1, 24, 128)
    assert "nothing written" in refused(loaded.export, str(tmp_path / "out"))
    whole.t5 = whole.ddit = None  # what stage 0 leaves
    whole.save(path)
    assert model.missing_parts(DualDiffusion.load(path)) == ["transformer", "T5"]


ODD = {"x_embedder.proj.weight": (128, 16), "context_embedder.weight": (128,), "pos_embed": (64,),
       "text_head.linear.weight": (474,), "joint_blocks.4000000000.x": (1,),
       "joint_blocks.5.context_block.adaLN_modulation.1.bias": (), "joint_blocks.0.x_block.attn.qkv.weight": (),
       "encoder.conv_in.weight": (8,), "encoder.conv_in.weight ": (0, 3, 3, 3), "encoder.conv_out.weight": (),
       "encoder.down.2.block.0.conv1.weight": (), "shared.weight": (512,),
       "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (4, 0),
       "encoder.block.0.layer.0.SelfAttention.q.weight": (), "x_embedder.proj.weight ": (0, 16, 2, 2)}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("header", [True, False])
def test_tensors_of_odd_shapes(tmp_path, small, name, header):
    """With a header that says otherwise, and without one."""
    file = {n.removeprefix(prefix): prefix for prefix in PREFIX.values() for n in small if n.startswith(prefix)}
    stored = name.strip() if name.strip() in file else "joint_blocks.0.x_block.attn.qkv.weight"
    path = str(tmp_path / "x.safetensors")
    save_file(small | {file[stored] + name.strip(): torch.zeros(ODD[name])}, path,
              {"config": json.dumps(HEADER)} if header else None)
    assert path in refused(DualDiffusion.load, path)


@pytest.mark.parametrize("file, content", [
    (file, content) for file in ("transformer/config.json", "d_dit.json", "scheduler/scheduler_config.json",
                                 "transformer/diffusion_pytorch_model.safetensors.index.json")
    for content in (b"null", b"[]", b"[" * 100_000, b'{"shift": \xff}', b"", b"3")]
    + [("transformer/config.json", b'{"num_attention_heads": %s}' % value)
       for value in (b"0", b"-1", b"null", b'"2"', b"3", b"1e9", b"[2]")]
    + [("transformer/config.json", b'{"num_layers": 1000000000}'), ("vae/config.json", b'{"norm_num_groups": 3}'),
       ("vae/config.json", b'{"scaling_factor": NaN}'), ("vae/config.json", b'{"shift_factor": null}'),
       ("text_encoder/config.json", b'{"relative_attention_max_distance": 0}'), ("d_dit.json", b'{"size": 100}'),
       ("d_dit.json", b'{"length": null}'), ("d_dit.json", b'{"tempo": 3}'),
       ("scheduler/scheduler_config.json", b'{"shift": "3"}')]
    + [("transformer/diffusion_pytorch_model.safetensors.index.json", b'{"weight_map": %s}' % value)
       for value in (b"null", b"[]", b"3", b'{"a": null}', b'{"a": ["b"]}', b'{"a": ".."}', b'{"a": ""}',
                     b'{"a": "../vae/diffusion_pytorch_model.safetensors"}', b'{"a": "/etc/passwd"}')])
def test_a_folder_that_cannot_be(tmp_path, file, content):
    path = folder(tmp_path / "sd3", "sd3", shards=2 if "index" in file else 1)
    (tmp_path / "sd3" / file).write_bytes(content)
    message = refused(inspect, path)
    where = path if "d_dit" in file or "scheduler" in file else os.path.join(path, os.path.dirname(file))
    assert message.startswith(where), message
    if not content.startswith(b'{"') or b"\xff" in content:
        assert os.path.join(path, file) in message
    if b"weight_map" in content:
        assert "weight_map" in message or "not a regular file" in message


def test_parts_that_do_not_fit(tmp_path, small):
    """T5 of another width, a VAE of other latents, another tokenizer: all are named, before anything is built."""
    narrow = {n: w[..., :16].contiguous() if n.endswith("shared.weight") else w
              for n, w in {PREFIX["t5"] + n: w for n, w in states("t5")["t5"].items()}.items()}
    save_file(narrow, tmp_path / "t5.safetensors")
    message = refused(DualDiffusion.load, SHIPPED, t5=str(tmp_path / "t5.safetensors"))
    assert "t5.safetensors: this T5 gives 16 channels" in message and "takes 128" in message and "--t5" in message
    vae = make_golden.VAE(make_golden.VAEConfig(channels=8, groups=4, latent_channels=4)).state_dict()
    save_file({PREFIX["vae"] + n: w for n, w in vae.items()}, tmp_path / "vae.safetensors")
    (tmp_path / "config.json").write_text('{"norm_num_groups": 4}')
    shutil.copy(tmp_path / "vae.safetensors", tmp_path / "model.safetensors")
    shutil.rmtree(tmp_path / "v", ignore_errors=True), os.makedirs(tmp_path / "v")
    for name in ("config.json", "model.safetensors"):
        shutil.move(tmp_path / name, tmp_path / "v" / name)
    message = refused(DualDiffusion.load, SHIPPED, vae=str(tmp_path / "v"))
    assert "v: this VAE gives 4 channels" in message and "takes 16" in message and "--vae" in message
    other = train_tokenizer(["a b c d e"], 100)
    (tmp_path / "spiece.model").write_bytes(other.model)
    message = refused(DualDiffusion.load, SHIPPED, tokenizer=str(tmp_path / "spiece.model"))
    assert "knows 474 tokens" in message and "--spiece" in message


def test_another_model_s_tokenizer(tmp_path):
    """Llama's has 32,000 pieces, as T5's, but its end is 2."""
    import io

    import sentencepiece
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e"]), model_writer=made, vocab_size=20,
                                             model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "spiece.model").write_bytes(made.getvalue())
    assert "spiece.model: not T5's" in refused(inspect, SHIPPED, tokenizer=str(tmp_path / "spiece.model"))


@pytest.mark.parametrize("part, name, value, dtype", [
    ("single", "joint_blocks.3.x_block.mlp.fc1.weight", math.inf, torch.float16),
    ("t5", "shared.weight", math.nan, torch.bfloat16), ("vae", "decoder.conv_out.bias", -math.inf, torch.float32)])
def test_weights_that_are_no_numbers(tmp_path, small, part, name, value, dtype):
    name, path = PREFIX[part] + name, str(tmp_path / "x.safetensors")
    file = {n: w.to(dtype, copy=True) if w.is_floating_point() else w for n, w in small.items()}
    file[name].view(-1)[-1] = value
    save_file(file, path, {"config": json.dumps(HEADER)})
    for wanted in (None, torch.float32):
        message = refused(DualDiffusion.load, path, dtype=wanted)
        assert message.startswith(path) and name in message and "NaN" in message


def test_large_weights_are_numbers(tmp_path, small):
    """A sum in float16 would overflow."""
    file = {n: torch.full_like(w, 6e4) if w.dtype == torch.float16 else w for n, w in small.items()}
    save_file(file, tmp_path / "x.safetensors", {"config": json.dumps(HEADER)})
    DualDiffusion.load(str(tmp_path / "x.safetensors"), dtype=None)


def not_files(folder):
    os.mkfifo(folder / "pipe.safetensors")
    os.makedirs(folder / "piped")
    os.mkfifo(folder / "piped" / "model.safetensors")
    os.makedirs(folder / "folder.safetensors" / "model.safetensors")
    shutil.copytree(folder / "whole", folder / "tokens")
    os.remove(folder / "tokens" / "tokenizer" / "spiece.model")
    os.mkfifo(folder / "tokens" / "tokenizer" / "spiece.model")
    shutil.copytree(folder / "whole", folder / "configured")
    os.remove(folder / "configured" / "vae" / "config.json")
    os.mkfifo(folder / "configured" / "vae" / "config.json")
    return [("pipe.safetensors", {}), ("piped", {}), ("folder.safetensors", {}), ("tokens", {}), ("configured", {}),
            ("/dev/zero", {}), ("whole", {"t5": "/dev/zero"}), ("whole", {"vae": "pipe.safetensors"}),
            ("whole", {"tokenizer": "pipe.safetensors"}), ("whole", {"tokenizer": "/dev/zero"}),
            ("whole", {"tokenizer": "whole"}), ("whole", {"tokenizer": "none"}), ("whole", {"tokenizer": "huge"})]


def test_what_is_no_file(tmp_path, monkeypatch):
    """Pipes, devices, folders and files far too long: one line, and no waiting."""
    monkeypatch.chdir(tmp_path)
    DualDiffusion.load(SHIPPED).export("whole")
    with open("huge", "wb") as f:
        f.truncate(1 << 40)
    for path, others in not_files(tmp_path):
        message = refused(inspect, path, **others)
        assert any(str(name) in message for name in (path, *others.values())), message

    def closed(path):
        raise PermissionError(13, "Permission denied", path)
    monkeypatch.setattr(os, "listdir", closed)
    assert "whole" in refused(inspect, "whole")


def test_authors_settings(tmp_path):
    """Their release is to be asked as it was tuned; SD3's folder, and what says otherwise itself, is not."""
    path = folder(tmp_path / "authors", "authors")
    settings = inspect(path)[0].settings
    assert (settings.size, settings.length, settings.shift) == (512, 128, 2.5)
    assert settings.caption_prompt == "Describe the image concisely."
    assert settings.answer_suffix == "Answer the question using a single word or phrase."
    assert inspect(folder(tmp_path / "sd3", "sd3"))[0].settings == Settings(shift=2.5)
    (tmp_path / "authors" / "d_dit.json").write_text('{"size": 64}')
    assert inspect(path)[0].settings == Settings(size=64, shift=2.5)


def test_an_answer_needs_no_compiler_and_opens_its_file_once(tmp_path):
    """Neither torch's compiler, which takes a second to import, nor an opening for every tensor."""
    program = """
import sys, model, sample, torch
times, open_file = [], model.open_safetensors
model.open_safetensors = lambda path: times.append(path) or open_file(path)
dd = model.DualDiffusion.load(sample.SHIPPED)
sample.answer(dd, torch.zeros(1, 3, 64, 64), ["what color is the circle?"], steps=1)
print(len(times), sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor")))[:3])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=os.path.dirname(model.__file__))
    times, modules = done.stdout.split(maxsplit=1)
    assert int(times) <= 5 and modules.strip() == "[]", done.stdout + done.stderr


# ---------------------------------------------------------------- files that are written


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """Both ways of writing, in a process whose files may not grow beyond 1 MB; and what is not an empty folder."""
    dd = DualDiffusion.load(SHIPPED)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"before")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        message, exported = refused(dd.save, str(path)), refused(dd.export, str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert message.startswith(f"{path}: could not be written") and "out" in exported
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["model.safetensors"]
    dd.save(str(path))
    assert DualDiffusion.load(str(path)).config == dd.config and path.stat().st_mode & 0o777 == 0o666 & ~UMASK


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    dd = DualDiffusion.load(SHIPPED)

    def interrupt(config):
        raise KeyboardInterrupt
    monkeypatch.setattr(model, "diffusers_configs", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dd.export(str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_where_an_export_goes(tmp_path, monkeypatch):
    """Into a new or an empty folder, over what a kill left beside; never into one that holds something."""
    monkeypatch.chdir(tmp_path)
    dd = DualDiffusion.load(SHIPPED)
    (tmp_path / "full").mkdir(), (tmp_path / "full" / "x").touch(), (tmp_path / "file").touch()
    for name in ("full", "file", "", ".", "full/"):
        assert "--export" in refused(dd.export, name)
        assert sorted(os.listdir()) == ["file", "full"]
    (tmp_path / "out.partial").mkdir(), (tmp_path / "out.partial" / "x").touch()
    dd.export("out/")
    assert sorted(os.listdir()) == ["file", "full", "out"] and not os.path.exists("out/x")


def test_describing_says_what_does_not_fit(tmp_path):
    (tmp_path / "spiece.model").write_bytes(train_tokenizer(["a b c d e"], 100).model)
    contents = inspect(SHIPPED, tokenizer=str(tmp_path / "spiece.model"))
    assert "transformer" in describe(*contents) and "--spiece" in refused(check_together, *contents)


# ---------------------------------------------------------------- where diffusers and transformers are installed

LIVE = [  # depth, heads, context width, VAE width, file type, shard size, latents (h, w)
    (1, 4, 40, 32, "float32", "10GB", (8, 8)),
    (3, 3, 24, 64, "float16", "10GB", (12, 6)),
    (4, 1, 64, 32, "bfloat16", "200KB", (4, 16)),
]


@pytest.mark.parametrize("depth, heads, context, vae_width, dtype, shard, latent", LIVE)
def test_files_that_diffusers_wrote(tmp_path, depth, heads, context, vae_width, dtype, shard, latent):
    """diffusers and transformers write a folder, we read it: the same velocity, states, latents and pictures. What we
    export of it they read back, bit for bit."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    torch.manual_seed(depth)
    made = {
        "transformer": diffusers.SD3Transformer2DModel(
            num_layers=depth, num_attention_heads=heads, attention_head_dim=64, joint_attention_dim=context,
            caption_projection_dim=64 * heads, pooled_projection_dim=16, pos_embed_max_size=12, out_channels=16),
        "vae": diffusers.AutoencoderKL(**make_golden.FOLDER["vae"] | {
            "block_out_channels": [vae_width, vae_width * 2, vae_width * 4, vae_width * 4], "norm_num_groups": 32}),
        "text_encoder_3": transformers.T5EncoderModel(transformers.T5Config(
            **make_golden.FOLDER["text_encoder"] | {"d_model": context}))}
    for part, module in made.items():
        for p in module.parameters():  # far from the initial values, many of which are 0 and 1
            p.add_(0.1 * torch.randn_like(p))
        module.to(getattr(torch, dtype)).save_pretrained(tmp_path / part, max_shard_size=shard)
        module.float().eval()
    dd = load(str(tmp_path))
    h, w = latent
    x, t, text = torch.randn(2, 16, h, w), torch.tensor([0.2, 0.9]), torch.randn(2, 5, context)
    velocity = dd.ddit(x, t, text)[0]
    assert_close(velocity, made["transformer"](x, text, torch.zeros(2, 16), 1000 * t).sample)
    tokens = torch.randint(64, (2, 9))
    assert_close(dd.t5(tokens), made["text_encoder_3"](tokens).last_hidden_state)
    pixels = torch.rand(1, 3, 8 * h, 8 * w)
    assert_close(dd.vae.encode(pixels)[0], made["vae"].encode(pixels).latent_dist.mean)
    assert_close(dd.vae.decode(x), made["vae"].decode(x).sample)

    dd.tokenizer = DualDiffusion.load(SHIPPED).tokenizer
    dd.export(str(tmp_path / "back"))
    t5 = transformers.T5EncoderModel.from_pretrained(tmp_path / "back" / "text_encoder")
    vae = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back" / "vae")
    assert type(diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "back" / "scheduler")).__name__
    transformer = diffusers.SD3Transformer2DModel.from_pretrained(
        tmp_path / "back" / "transformer", low_cpu_mem_usage=False, ignore_mismatched_sizes=True)
    new = ("norm_out", "proj_out", "time_text_embed.text_embedder", "time_text_embed.timestep_embedder.linear_2.bias",
           f"transformer_blocks.{depth - 1}.norm1_context")  # renamed by the authors, folded, or grown
    for theirs, first in ((vae, made["vae"]), (t5, made["text_encoder_3"]), (transformer, made["transformer"])):
        before = first.state_dict()
        shared = {name: p for name, p in theirs.state_dict().items() if not name.startswith(new)}
        assert len(shared) > 0.7 * len(before)
        for name, p in shared.items():
            assert torch.equal(p, before[name]), name
