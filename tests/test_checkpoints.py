"""Checkpoint files: SD3's single file, the diffusers layout and the authors' release, on random weights in the exact
layouts, against what diffusers and transformers make of them (golden values, see make_golden.py); the way back; and
every file that is not one. Full size: tests/full_size.py."""
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace

import make_golden
import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_networks import GOLDEN, SHAPES, assert_close

import model
from model import Config, DualDiffusion, Settings, find_parts, read_part
from sample import SHIPPED, text_to_image
from t5 import EmbeddingsConfig, train_tokenizer

with safe_open(make_golden.PATH, framework="pt") as f:
    FOLDERS = json.loads(f.metadata()["folders"])
PREFIX = {"single": "model.diffusion_model.", "vae": "first_stage_model.", "t5": "text_encoders.t5xxl.transformer."}


def header(config):
    return {"config": json.dumps(asdict(config))}


SMALL = header(Config(make_golden.SINGLE, make_golden.T5, make_golden.VAE_))  # without it a file is SD3-medium's


def states(*parts):
    """Random weights as an SD3 file has them."""
    result = {part: make_golden.random_state(SHAPES[part]) for part in parts}
    if "single" in result:
        result["single"] = make_golden.sd3_part(result["single"], make_golden.SINGLE)
    return result


def single_file(path, *parts, dtype=torch.float32):
    save_file({PREFIX[part] + name: w.to(dtype).contiguous() for part, state in states(*parts).items()
               for name, w in state.items()}, path, SMALL)
    return str(path)


def folder(path, kind, dtype=torch.float32, shards=1):
    """kind: "sd3" or "authors" -> a folder in diffusers layout with the golden file's random weights."""
    for part, shapes in FOLDERS[kind].items():
        os.makedirs(path / part)
        config = make_golden.FOLDER[part]
        if kind == "authors" and part == "transformer":
            config = config | {"vocab_size": make_golden.FOLDER["text_encoder"]["vocab_size"] - 4}  # of the text head
        (path / part / "config.json").write_text(json.dumps(config))
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
    config, parts, _ = find_parts(path, **files)
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
        save_file(states("t5")["t5"], tmp_path / "t5.safetensors", SMALL)
        dd = load(single_file(tmp_path / "sd3.safetensors", "single", "vae"), t5=str(tmp_path / "t5.safetensors"))
    assert dd.config.ddit == make_golden.SINGLE
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
    assert (config.ddit.heads, config.vae.groups, config.vae.scaling_factor, config.settings.shift) == (2, 4, 1.3, 2.5)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_narrow_types_on_disk(tmp_path, dtype):
    """What is read in float32 is what the file says, exactly: against the same numbers written in float32."""
    rounded = {name: w.to(dtype).float() for name, w in states("t5")["t5"].items()}
    save_file(rounded, tmp_path / "wide.safetensors", SMALL)
    save_file({name: w.to(dtype) for name, w in rounded.items()}, tmp_path / "narrow.safetensors", SMALL)
    wide, narrow = (load(str(tmp_path / f"{name}.safetensors")).t5.state_dict() for name in ("wide", "narrow"))
    assert wide.keys() == narrow.keys() and all(torch.equal(wide[name], narrow[name]) for name in wide)
    config, parts, _ = find_parts(str(tmp_path / "narrow.safetensors"))
    as_stored = read_part("t5", parts["t5"], config.t5, "cpu", None).state_dict()
    assert all(torch.equal(wide[name], as_stored[name].float()) for name in wide)
    assert {w.dtype for w in as_stored.values()} == {torch.float16 if dtype.itemsize == 1 else dtype}


def test_a_file_without_configuration_is_as_the_one_that_it_completes(tmp_path):
    prefix = "text_encoders.t5xxl.transformer."
    tensors = {name.removeprefix(prefix): w for name, w in load_file(SHIPPED).items() if name.startswith(prefix)}
    save_file(tensors, tmp_path / "t5.safetensors")
    dd = DualDiffusion.load(SHIPPED, t5=str(tmp_path / "t5.safetensors"))
    assert torch.equal(dd.t5.shared.weight, tensors["shared.weight"].float())


def test_a_type_for_every_part():
    dd = DualDiffusion.load(SHIPPED, dtype={"t5": torch.bfloat16, "vae": torch.float16})
    assert [{w.dtype for w in part.parameters()} for part in (dd.ddit, dd.t5, dd.vae)] == [
        {torch.float32}, {torch.bfloat16}, {torch.float16}]


def test_a_new_text_head_reads_nothing(tmp_path):
    path = single_file(tmp_path / "sd3.safetensors", "single", "vae", "t5")
    dd = load(path)
    dd_dict = dd.ddit.state_dict()
    assert not dd_dict["text_head.linear.weight"].any()
    last = dd_dict["joint_blocks.1.context_block.adaLN_modulation.1.weight"]
    assert last[:256].any() and not last[256:].any()


WRONG = {
    "cut.safetensors": "cut.safetensors: not a whole",
    "lora.safetensors": "lora.safetensors: holds no part",
    "sd35m.safetensors": "has a tensor joint_blocks.0.x_block.attn2.qkv.weight, as no transformer",
    "lacks.safetensors": "lacks.safetensors: the tensor joint_blocks.1.x_block.mlp.fc1.bias is missing",
    "shape.safetensors": "the tensor joint_blocks.1.x_block.mlp.fc1.bias is (3,), it should be (512,)",
    "small.safetensors": "small.safetensors: the tensor pos_embed is (1, 64, 128), it should be (1, 36864, 1536)",
    "shardless": "is missing",
    "pickled": "transformer: holds no .safetensors file",
    "config": "transformer/config.json: not valid JSON",
}


def make_wrong(tmp_path, name):
    path, file = tmp_path / name, states("single")["single"]
    file = {PREFIX["single"] + n: w for n, w in file.items()}
    bias = PREFIX["single"] + "joint_blocks.1.x_block.mlp.fc1.bias"
    more = {"lora": "joint_blocks.0.x_block.lora_A.weight",
            "sd35m": PREFIX["single"] + "joint_blocks.0.x_block.attn2.qkv.weight"}
    kind = name.split(".")[0]
    if kind in ("shardless", "pickled", "config"):
        folder(path, "sd3", shards=3)
        transformer = path / "transformer"
        if kind == "shardless":
            os.remove(transformer / "diffusion_pytorch_model-00002-of-00003.safetensors")
        elif kind == "config":
            (transformer / "config.json").write_text("{")
        else:
            for shard in transformer.glob("diffusion*"):
                os.remove(shard)
            (transformer / "diffusion_pytorch_model.bin").touch()
    elif kind == "cut":
        os.truncate(single_file(path, "single"), 100_000)
    else:
        if kind == "lacks":
            del file[bias]
        elif kind == "shape":
            file[bias] = torch.zeros(3)
        elif kind != "small":
            file = (file if kind == "sd35m" else {}) | {more[kind]: torch.zeros(2)}
        save_file(file, path, None if kind == "small" else SMALL)
    return str(path)


@pytest.mark.parametrize("name", WRONG)
def test_files_that_are_refused(tmp_path, name):
    path = make_wrong(tmp_path, name)
    with pytest.raises((ValueError, OSError)) as error:
        DualDiffusion.load(path)
    message = str(error.value)
    assert WRONG[name] in message and "\n" not in message, message


@pytest.mark.parametrize("more", ["0.layer.0.SelfAttention.q.scale_weight",  # scaled fp8
                                  "1.layer.0.SelfAttention.relative_attention_bias.weight"])  # UMT5
def test_t5_that_is_not_t5(tmp_path, more):
    save_file(states("t5")["t5"] | {f"encoder.block.{more}": torch.zeros(2)}, tmp_path / "t5.safetensors", SMALL)
    with pytest.raises(ValueError, match=f"has a tensor encoder.block.{more}, as no T5"):
        load(str(tmp_path / "t5.safetensors"))


def test_a_folder_without_a_part(tmp_path):
    path = folder(tmp_path / "sd3", "sd3")
    shutil.rmtree(f"{path}/vae")
    dd = DualDiffusion.load(path)  # as SD3's own folder, or its single file, without a tokenizer beside it
    assert dd.tokenizer is None
    assert refused(model.check_complete, dd, path) == f"{path}: holds no VAE (--vae) and no tokenizer (--spiece)"


# ---------------------------------------------------------------- files that say what cannot be


with safe_open(SHIPPED, framework="pt") as f:
    HEADER = json.loads(f.metadata()["config"])


def refused(function, *args, **kwargs):
    """-> the one line that it raises."""
    with pytest.raises((ValueError, OSError)) as error:
        function(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400, message
    return message


@pytest.mark.parametrize("part, field", [("ddit", "qk_norm"), ("settings", "answer_steps")])
def test_a_header_of_other_fields(tmp_path, part, field):
    """A configuration that lacks a field, or has one more, is another program's: nothing is guessed."""
    lacking = {name: value for name, value in HEADER[part].items() if name != field}
    for wrong, name in ((lacking, field), (HEADER[part] | {"more": 1}, "more")):
        save_file(load_file(SHIPPED), tmp_path / "x.safetensors", {"config": json.dumps(HEADER | {part: wrong})})
        message = refused(DualDiffusion.load, str(tmp_path / "x.safetensors"))
        assert "x.safetensors: the configuration in its header" in message and part in message and name in message


def test_embeddings_in_the_place_of_t5(tmp_path):
    """Table 9's: no layers, and a vector for every position."""
    whole, path = DualDiffusion.load(SHIPPED), str(tmp_path / "x.safetensors")
    config = replace(whole.config, t5=EmbeddingsConfig(128, positions=24))
    made = DualDiffusion.build(config, whole.tokenizer)
    made.save(path)
    loaded = DualDiffusion.load(path)
    assert loaded.config == config and loaded.t5(torch.zeros(1, 24, dtype=torch.long)).shape == (1, 24, 128)
    whole.t5 = whole.ddit = None  # what stage 0 leaves
    whole.save(path)
    assert "holds no transformer and no T5" in refused(model.check_complete, DualDiffusion.load(path), path)


def test_parts_that_do_not_fit(tmp_path):
    """T5 of another width, a VAE of other latents, another tokenizer: all are named, before anything is built."""
    t5, vae, spiece = tmp_path / "t5.safetensors", tmp_path / "vae", tmp_path / "spiece.model"
    save_file(states("t5")["t5"], t5, SMALL)
    message = refused(DualDiffusion.load, SHIPPED, t5=str(t5))
    assert "takes 128 channels from its T5 (--t5), this one gives 16" in message
    os.makedirs(vae)
    (vae / "config.json").write_text('{"latent_channels": 4}')
    narrow = make_golden.VAE(make_golden.VAEConfig(channels=8, groups=4, latent_channels=4))
    save_file(narrow.state_dict(), vae / "model.safetensors")
    message = refused(DualDiffusion.load, SHIPPED, vae=str(vae))
    assert "takes 16 channels from its VAE (--vae), this one gives 4" in message
    other = train_tokenizer(["a b c d e"], 100)
    spiece.write_bytes(other.model)
    message = refused(DualDiffusion.load, SHIPPED, tokenizer=str(spiece))
    assert "knows 474 tokens" in message and "--spiece" in message


def test_another_model_s_tokenizer(tmp_path):
    """Llama's has 32,000 pieces, as T5's, but its end is 2."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c d e"]), model_writer=made, vocab_size=20,
                                             model_type="bpe", hard_vocab_limit=False, minloglevel=2)
    (tmp_path / "spiece.model").write_bytes(made.getvalue())
    assert "spiece.model: not T5's" in refused(find_parts, SHIPPED, tokenizer=str(tmp_path / "spiece.model"))


def test_authors_settings(tmp_path):
    """Their release is to be asked as it was tuned; SD3's folder, and what says otherwise itself, is not."""
    path = folder(tmp_path / "authors", "authors")
    settings = find_parts(path)[0].settings
    assert (settings.size, settings.length, settings.shift) == (512, 128, 2.5)
    assert settings.caption_prompt == "Describe the image concisely."
    assert settings.answer_suffix == "Answer the question using a single word or phrase."
    assert find_parts(folder(tmp_path / "sd3", "sd3"))[0].settings == Settings(shift=2.5)


def test_an_answer_needs_no_compiler_and_opens_its_file_once(tmp_path):
    """Neither torch's compiler, which takes a second to import, nor an opening for every tensor."""
    program = """
import sys, model, sample, torch
times, open_file = [], model.safe_open
model.safe_open = lambda *path, **how: times.append(path) or open_file(*path, **how)
dd = model.DualDiffusion.load(sample.SHIPPED)
sample.answer(dd, torch.zeros(1, 3, 64, 64), ["what color is the circle?"], steps=1)
print(len(times), sorted(name for name in sys.modules if name.startswith(("torch._dynamo", "torch._inductor")))[:3])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          cwd=os.path.dirname(model.__file__))
    times, modules = done.stdout.split(maxsplit=1)
    assert int(times) <= 5 and modules.strip() == "[]", done.stdout + done.stderr


# ---------------------------------------------------------------- where diffusers and transformers are installed

LIVE = [  # depth, heads, context width, VAE width, file type, shard size, latents (h, w)
    (1, 4, 40, 32, "float32", "10GB", (8, 8)),
    (3, 3, 24, 64, "float16", "10GB", (12, 6)),
    (4, 1, 64, 32, "bfloat16", "200KB", (4, 16)),
]


@pytest.mark.parametrize("depth, heads, context, vae_width, dtype, shard, latent", LIVE)
def test_files_that_diffusers_wrote(tmp_path, depth, heads, context, vae_width, dtype, shard, latent):
    """diffusers and transformers write a folder, we read it: the same velocity, states, latents and pictures."""
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


# ---------------------------------------------------------------- what people's files are really like


def test_a_t5_of_another_kind_is_refused(tmp_path):
    """UMT5 has T5's names and sizes, but a position bias in every block and eight times the vocabulary."""
    state = {name.removeprefix(PREFIX["t5"]): w for name, w in load_file(SHIPPED).items()
             if name.startswith(PREFIX["t5"])}
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    more_bias = state | {bias.format(1): state[bias.format(0)].clone()}
    more_words = state | {"shared.weight": torch.cat([state["shared.weight"]] * 8)}
    config = find_parts(SHIPPED)[0]
    that_says_so = replace(config, t5=replace(config.t5, vocab_size=4096))
    for wrong, its_config, message in ((more_bias, config, bias.format(1)),
                                       (more_words, config, "shared.weight is (4096, 128), it should be (512, 128)"),
                                       (more_words, that_says_so, "T5 4096, the tokenizer 474")):
        save_file(wrong, tmp_path / "umt5.safetensors", header(its_config))
        assert message in refused(DualDiffusion.load, SHIPPED, t5=str(tmp_path / "umt5.safetensors"))


def test_what_is_not_needed_does_not_stop_what_is(tmp_path):
    """CLIP's folder beside T5's, not downloaded; a shift that is null; another tool's "config" in a header."""
    path = folder(tmp_path / "sd3", "sd3")
    os.rename(f"{path}/text_encoder", f"{path}/text_encoder_3")
    os.makedirs(f"{path}/text_encoder")
    (tmp_path / "sd3" / "text_encoder" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    config = tmp_path / "sd3" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift_factor": None}))
    weights = f"{path}/vae/diffusion_pytorch_model.safetensors"
    for other in (json.dumps({"_class_name": "AutoencoderKL", "settings": 7}), "{'lr': 1e-4}"):
        save_file(load_file(weights), weights, {"format": "pt", "config": other})
        dd = load(path)
        assert dd.t5 and dd.ddit and dd.config.vae.shift_factor == 0


def test_a_git_lfs_pointer_is_called_one(tmp_path):
    for file in ("transformer/diffusion_pytorch_model.safetensors", "tokenizer/spiece.model"):
        path = folder(tmp_path / os.path.dirname(file), "authors")
        os.makedirs(f"{path}/tokenizer")
        with open(f"{path}/{file}", "w") as f:
            f.write("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4170000000\n")
        message = refused(DualDiffusion.load, path)
        assert f"{file}: " in message and "git-lfs pointer" in message
