"""Checkpoint files: SD3's single file, the diffusers layout and the authors' release, on random weights in the exact
layouts, against what diffusers and transformers make of them (golden values, see make_golden.py); the way back; and
every file that is not one. Full size: tests/full_size.py."""
import json
import os
import shutil

import make_golden
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_networks import GOLDEN, SHAPES, assert_close

from model import DualDiffusion, describe, inspect, read_part
from sample import SHIPPED, text_to_image

with safe_open(make_golden.PATH, framework="pt") as f:
    FOLDERS = json.loads(f.metadata()["folders"])
UMASK = os.umask(0)
os.umask(UMASK)
PREFIX = {"single": "model.diffusion_model.", "vae": "first_stage_model.", "t5": "text_encoders.t5xxl.transformer."}




def states(*parts):
    """Random weights as an SD3 file has them."""
    found = {part: make_golden.random_state(SHAPES[part]) for part in parts}
    if "single" in found:
        found["single"] = make_golden.sd3_part(found["single"], make_golden.SINGLE)
    return found


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
    """The shipped model to diffusers' layout, in small shards, and back: every number the same, names diffusers'."""
    before = DualDiffusion.load(SHIPPED, dtype=None)
    before.export(str(tmp_path), shard=1 << 20)
    after = DualDiffusion.load(str(tmp_path), dtype=None)
    assert after.config.ddit == before.config.ddit and after.config.t5 == before.config.t5
    assert after.tokenizer.model == before.tokenizer.model and after.config.settings == before.config.settings
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mode & 0o444 == 0o444 & ~UMASK
    ours, again = before.state_dict(), after.state_dict()
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) and ours[name].dtype == again[name].dtype for name in ours)
    index = json.loads((tmp_path / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shapes = {}
    for file in set(index["weight_map"].values()):
        assert (tmp_path / "transformer" / file).stat().st_size < 1.2 * (1 << 20)
        shapes |= {name: tuple(w.shape) for name, w in load_file(tmp_path / "transformer" / file).items()}
    assert shapes.keys() == index["weight_map"].keys()
    authors = FOLDERS["authors"]["transformer"]
    last = {name.replace("blocks.2.", "blocks.5.") for name in authors if "blocks.1." not in name}
    inner = ["norm_q", "norm_k", "norm_added_q", "norm_added_k", *(f"blocks.{i}." for i in range(1, 5))]
    assert {name for name in shapes if not any(piece in name for piece in inner)} == last


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
    assert load(path).missing == ["VAE"]


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
    dd.export(str(tmp_path / "back"), shard=300_000)
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
