"""The three networks against other people's code (golden values, see make_golden.py), and their full-size shapes."""
import copy
import json
from dataclasses import replace

import make_golden
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from model import PRESETS, DDiT, DDiTConfig, DualDiffusion, TextHead, sincos_table
from sample import SHIPPED
from t5 import (
    Embeddings,
    EmbeddingsConfig,
    T5Config,
    T5Encoder,
    relative_position_bucket,
)
from vae import VAE, VAEConfig

with safe_open(make_golden.PATH, framework="pt") as f:
    SHAPES = json.loads(f.metadata()["shapes"])
    GOLDEN = {name: f.get_tensor(name) for name in f.keys()}


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 1e-5, f"relative error {error:.1e}"


def load(module, part):
    state = make_golden.random_state(SHAPES[part])
    if part == "ddit":  # the constant y_embedder(0) goes into the last bias of t_embedder
        _, b0, w2, b2 = (state.pop(name) for name in make_golden.y_embedder(1))
        state["t_embedder.mlp.2.bias"] += w2 @ F.silu(b0) + b2
    module.load_state_dict(state, strict=True)
    return module.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread_and_no_grad():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ddit():
    return load(DDiT(make_golden.DDIT), "ddit")


def inputs():
    return GOLDEN["latents"], GOLDEN["t"], GOLDEN["text"]


def test_transformer(ddit):
    velocity, logits = ddit(*inputs())
    assert_close(velocity, GOLDEN["velocity"])
    assert_close(logits, GOLDEN["logits"])


def test_velocity_needs_only_what_sd3_has_of_the_last_block():
    model = load(DDiT(make_golden.DDIT), "ddit")
    last = model.joint_blocks[-1].context_block
    for linear in (last.attn.proj, last.mlp.fc1, last.mlp.fc2):
        linear.weight.normal_(), linear.bias.normal_()
    rest = last.adaLN_modulation[1]
    rest.weight[2 * model.config.width:].normal_(), rest.bias[2 * model.config.width:].normal_()
    velocity, logits = model(*inputs())
    assert_close(velocity, GOLDEN["velocity"])
    assert (logits - GOLDEN["logits"]).abs().max() > 0.1


def test_predict_and_draw_give_the_same_rows(ddit):
    velocity, logits = ddit(*inputs())
    predict = logits[:, :, 0] > 0
    assert 0 < predict[1:].sum() < predict[1:].numel()
    for image_rows in range(4):
        drawn, predicted = ddit(*inputs(), predict=predict[image_rows:], image_rows=image_rows)
        torch.testing.assert_close(drawn, velocity[:image_rows], rtol=0, atol=1e-5)
        torch.testing.assert_close(predicted, logits[image_rows:][predict[image_rows:]], rtol=0, atol=1e-5)


def test_image_larger_than_the_position_table(ddit):
    with pytest.raises(ValueError, match="9x4 patches"):
        ddit(torch.zeros(3, 16, 18, 8), *inputs()[1:])


def test_position_table():
    assert_close(sincos_table(192, 64)[0, ::389], GOLDEN["pos_embed"])


def test_t5():
    assert_close(load(T5Encoder(make_golden.T5), "t5")(GOLDEN["tokens"].long()), GOLDEN["states"])


@pytest.mark.parametrize("i", range(len(make_golden.BUCKETS)))
def test_relative_position_buckets(i):
    ours = relative_position_bucket(torch.arange(-300, 301), *make_golden.BUCKETS[i])
    assert torch.equal(ours, GOLDEN["buckets"][i].long())


def test_vae():
    vae = load(VAE(make_golden.VAE_), "vae")
    mean, logvar = vae.encode(GOLDEN["pixels"])
    assert_close(mean, GOLDEN["mean"])
    assert_close(logvar, GOLDEN["logvar"])
    assert_close(vae.decode(GOLDEN["z"]), GOLDEN["decoded"])
    vae.encoder.conv_out.bias += make_golden.BEYOND
    assert torch.equal(vae.encode(GOLDEN["pixels"])[1], GOLDEN["clamped"])


def test_norms():
    """An eps ten times larger would change the golden values by less than their tolerance."""
    norms = [m for model in (DDiT(make_golden.DDIT), VAE(make_golden.VAE_)) for m in model.modules()
             if isinstance(m, (torch.nn.LayerNorm, torch.nn.GroupNorm))]
    assert {m.eps for m in norms} == {1e-6}


def test_text_logits_are_float32():
    """In bf16 the two largest of many logits are often equal; computed in float32 they are not, and training sees their
    gradients all the same."""
    torch.manual_seed(0)
    head = TextHead(replace(make_golden.DDIT, width=64, vocab=32100))
    with torch.enable_grad():
        states = torch.randn(200, 64).bfloat16()
        logits = head.bfloat16()(states)
        assert logits.dtype == torch.float32
        logits.square().mean().backward()
    assert head.linear.weight.grad.dtype == torch.bfloat16 and head.linear.weight.grad.any()
    first, second = logits.topk(2, dim=1).values.T
    assert (first > second).all()
    narrow = head.linear(head.norm_final(states))
    assert (logits - narrow).abs().max() < 0.05
    first, second = narrow.topk(2, dim=1).values.T
    assert (first == second).any()  # else this test would show nothing


def test_position_bias_lies_as_attention_reads_it():
    bias = load(T5Encoder(make_golden.T5), "t5").encoder["block"][0].layer[0]["SelfAttention"].position_bias(9, "cpu")
    assert bias.shape == (1, make_golden.T5.num_heads, 9, 9) and bias.is_contiguous()


# What `build` gives for seed 0, the last two numbers of each.
BUILT = {
    "ddit.joint_blocks.0.x_block.attn.qkv.weight": (-0.045685671269893646, 0.06544813513755798),
    "ddit.joint_blocks.5.context_block.mlp.fc2.weight": (-0.002842429094016552, -0.030600469559431076),
    "ddit.pos_embed": (0.9999504089355469, 0.9999721050262451), "t5.shared.weight": (-0.9893674850, 1.2735219002),
    "t5.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (-12.0, -8.0),
    "t5.encoder.block.1.layer.1.DenseReluDense.wo.weight": (0.032919976860284805, -0.06130969524383545),
    "vae.decoder.conv_out.weight": (0.03431503847241402, 0.032431915402412415)}


def test_fresh_weights_are_those_of_the_seed():
    """And modules built on the "meta" device, as for loading, draw no random number."""
    tokenizer = DualDiffusion.load(SHIPPED).tokenizer
    torch.manual_seed(0)
    state = DualDiffusion.build(copy.deepcopy(PRESETS["tiny"]), tokenizer).state_dict()
    for name, wanted in BUILT.items():
        assert torch.allclose(state[name].flatten()[-2:], torch.tensor(wanted), atol=1e-6), name
    before = torch.get_rng_state()
    DualDiffusion.load(SHIPPED)
    assert torch.equal(before, torch.get_rng_state())


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_full_size():
    """The defaults are SD3-medium, its autoencoder and T5-XXL's encoder. Counts: diffusers', transformers'."""
    with torch.device("meta"):
        ddit, t5, vae = DDiT(DDiTConfig()), T5Encoder(T5Config()), VAE(VAEConfig())
    assert parameters(t5) == 4_762_310_656
    assert parameters(vae) == 83_819_683

    d = 1536
    y_embedder = (2048 * d + d) + (d * d + d)
    last_block = (d * d + d) + (8 * d * d + 5 * d) + 4 * (d * d + d)  # proj, mlp, 4 of 6 parts of the modulation
    assert parameters(ddit) == 2_028_328_000 - y_embedder + last_block + (d + 1) * 32100


def test_against_the_originals():
    """Needs diffusers and transformers: the golden values are still theirs, and so are the full-size shapes."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    live = make_golden.golden()
    assert live.keys() == GOLDEN.keys()
    for name, tensor in live.items():
        assert_close(tensor, GOLDEN[name])
    with torch.device("meta"):  # loading is strict
        state = DDiT(DDiTConfig()).state_dict()
        state |= {name: torch.empty(shape) for name, shape in make_golden.y_embedder(1536).items()}
        assert parameters(make_golden.sd3_transformer(state, DDiTConfig())) == 2_028_328_000
        assert parameters(make_golden.autoencoder(VAE(VAEConfig()).state_dict(), VAEConfig())) == 83_819_683
        assert parameters(make_golden.t5_encoder(T5Encoder(T5Config()).state_dict(), T5Config())) == 4_762_310_656


def test_learned_positions_have_an_end():
    embeddings = Embeddings(EmbeddingsConfig(8, 24, 100))
    assert embeddings(torch.zeros(1, 24, dtype=torch.long)).shape == (1, 24, 8)
    with pytest.raises(ValueError, match="texts of at most 24 tokens, not 25"):
        embeddings(torch.zeros(1, 25, dtype=torch.long))
