"""The samplers against exact laws on toy networks."""
import itertools
import os
import re
import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import losses
import sample
from data import load_image, to_pixels
from model import DualDiffusion
from t5 import train_tokenizer

V, L, MASK = 3, 3, 2  # two real tokens and the mask token


def toy_system(eos_id=-1):
    table = torch.randn(V ** L, L, V, generator=torch.Generator().manual_seed(3)) * 1.5

    def ddit(latents, t, text, predict=None, image_rows=None):
        assert (t == 0).all() and image_rows == 0
        return None, table[text @ torch.tensor([V * V, V, 1])][predict]

    return SimpleNamespace(tokenizer=SimpleNamespace(mask_id=MASK, eos_id=eos_id), device="cpu", table=table,
                           t5=lambda tokens: tokens, ddit=ddit)


def ancestral_law(dd, steps):
    """The distribution after ancestral sampling, by following every state of the chain through every step."""
    law = {(MASK,) * L: 1.0}
    for k in range(steps, 0, -1):
        t, s = torch.tensor([k / steps, (k - 1) / steps], dtype=torch.float64)
        reveal = ((losses.alpha(s) - losses.alpha(t)) / (losses.alpha(0 * t) - losses.alpha(t))).item()
        after = {}
        for state, p in law.items():
            probs = torch.softmax(dd.table[torch.tensor(state) @ torch.tensor([V * V, V, 1])][:, :-1].double(), 1)
            for out in itertools.product(range(V), repeat=L):
                q = p
                for i in range(L):
                    if state[i] != MASK:
                        q *= out[i] == state[i]
                    else:
                        q *= 1 - reveal if out[i] == MASK else reveal * probs[i, out[i]].item()
                if q > 0:
                    after[out] = after.get(out, 0) + q
        law = after
    return law


def cosine(t):
    """Another schedule, MaskGIT's: slow at first, then fast."""
    return torch.cos(torch.pi / 2 * t)


@pytest.mark.parametrize("schedule", [losses.alpha, cosine])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_unmask_has_the_law_of_ancestral_sampling(monkeypatch, steps, schedule):
    """Of any schedule: losses.alpha is the one place that knows it, for training and for sampling."""
    monkeypatch.setattr(losses, "alpha", schedule)
    dd, n = toy_system(), 20_000
    law = ancestral_law(dd, steps)
    assert abs(sum(law.values()) - 1) < 1e-9 and all(MASK not in out for out in law)
    tokens = torch.full((n, L), MASK)
    drawn, passes = sample.unmask(dd, torch.zeros(n, 1), tokens, tokens == MASK, steps,
                                  generator=torch.Generator().manual_seed(steps))
    assert passes <= steps
    counts = {}
    for row in drawn.tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    chi2 = sum((counts.get(out, 0) - n * p) ** 2 / (n * p) for out, p in law.items())
    assert len(law) == 8 and chi2 < 24.3, chi2  # 99.9% point, 7 degrees of freedom


def test_of_a_straight_line_every_step_reveals_the_same_share(straight_line):
    expected = torch.arange(8, dtype=torch.float64) / 7
    assert torch.allclose(sample.revealed_share(7), expected, atol=1e-12)


def test_unmask_runs_only_at_occupied_steps_and_only_those_rows():
    dd, seen = toy_system(), []
    ddit = dd.ddit
    dd.ddit = lambda *inputs, **choice: seen.append(choice["predict"]) or ddit(*inputs, **choice)
    tokens = torch.tensor([[MASK, 0, MASK], [1, 0, 1], [1, MASK, 0]])
    drawn, passes = sample.unmask(dd, torch.zeros(3, 1), tokens, tokens == MASK, 1000,
                                  generator=torch.Generator().manual_seed(0))
    assert passes == len(seen) == 2  # two blanks in a row, a thousand steps
    assert [p.sum(1).tolist() for p in seen] == [[1, 1], [1]]
    assert (drawn[tokens != MASK] == tokens[tokens != MASK]).all() and (drawn != MASK).all()


@pytest.mark.parametrize("order", sample.ORDERS)
def test_rows_leave_once_their_reading_is_complete(order):
    """Read is what stands before the first EOS. Its law is as if every row had been unmasked to its end (for random
    order also by enumeration), but fewer rows go through the network."""
    n, steps, eos = 20_000, 3, 0
    tokens = torch.full((n, L), MASK)
    readings, rows = [], []
    for eos_id in (eos, -1):
        dd, ddit, count = toy_system(eos_id), toy_system().ddit, []
        dd.ddit = lambda latents, *inputs, **more: count.append(len(latents)) or ddit(latents, *inputs, **more)
        drawn, _ = sample.unmask(dd, torch.zeros(n, 1), tokens, tokens == MASK, steps, order,
                                 generator=torch.Generator().manual_seed(eos_id + 7))
        ended = (drawn == eos).cumsum(1) > 0
        assert (drawn != MASK).all()
        readings.append(torch.bincount((torch.where(ended, eos, drawn) * torch.tensor([4, 2, 1])).sum(1), minlength=8))
        rows.append(sum(count))
    early, full = readings
    both = early + full
    assert rows[0] < 0.9 * rows[1] and (both > 0).sum() == 4  # the readings: nothing, one token, two, three
    assert ((early - full).square()[both > 0] / both[both > 0]).sum() < 16.3  # 99.9% point, 3 degrees of freedom
    if order == "random":
        law = torch.zeros(8, dtype=torch.float64)
        for out, p in ancestral_law(dd, steps).items():
            out = [token * all(out[:i + 1]) for i, token in enumerate(out)]
            law[out[0] * 4 + out[1] * 2 + out[2]] += p
        assert ((early - n * law).square()[law > 0] / (n * law[law > 0])).sum() < 16.3


def joint_system(seed):
    """A network that knows the true law of its texts, (2,) * L probabilities, and gives exact conditionals of it."""
    joint = torch.rand((2,) * L, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) ** 6
    joint /= joint.sum()

    def conditionals(state):
        law = joint[tuple(slice(None) if token == MASK else slice(token, token + 1) for token in state)]
        law = law / law.sum()
        return law, [law.sum([j for j in range(L) if j != i]) for i in range(L)]

    def ddit(latents, t, text, predict=None, image_rows=None):
        logits = torch.full((*text.shape, V), -100.0, dtype=torch.float64)
        for row, state in enumerate(text.tolist()):
            for i in range(L):
                if state[i] == MASK:
                    logits[row, i, :2] = conditionals(state)[1][i].log()
        return None, logits[predict]
    return joint, conditionals, SimpleNamespace(tokenizer=SimpleNamespace(mask_id=MASK, eos_id=-1), device="cpu",
                                                t5=lambda tokens: tokens, ddit=ddit)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 9.0])
def test_entropy_order_keeps_its_bound(monkeypatch, gamma):
    """By enumeration of all states in which a pass can begin: what a pass reveals has, as independent draws, at most
    gamma nats of divergence from its true joint law, and one token more would have broken the bound."""
    monkeypatch.setattr(sample, "GAMMA", gamma)
    sizes = []
    for seed, state in itertools.product(range(5), itertools.product(range(V), repeat=L)):
        if MASK not in state:
            continue
        joint, conditionals, dd = joint_system(seed)
        reveals = []
        tokens = torch.tensor([state])
        _, passes = sample.unmask(dd, torch.zeros(1, 1), tokens, tokens == MASK, 1, "entropy",
                                  generator=torch.Generator().manual_seed(seed),
                                  watch=lambda _, reveal: reveals.append(reveal[0].nonzero()[:, 0].tolist()))
        assert passes == len(reveals) and sorted(sum(reveals, [])) == [i for i in range(L) if state[i] == MASK]
        law, marginals = conditionals(state)
        entropy = [torch.special.entr(p).sum().item() for p in marginals]
        first, rest = reveals[0], [i for i in range(L) if state[i] == MASK and i not in reveals[0]]
        bound = sum(entropy[i] for i in first) - max(entropy[i] for i in first)
        others = [i for i in range(L) if i not in first]
        true = law.sum(others) if others else law
        divergence = sum(p * (p / torch.stack([marginals[i][x] for i, x in zip(first, xs)]).prod()).log()
                         for xs in itertools.product(*(range(len(marginals[i])) for i in first)) if (p := true[xs]) > 0)
        assert divergence <= bound + 1e-9 and bound <= gamma + 1e-9
        if rest:
            following = min(rest, key=lambda i: entropy[i])
            assert entropy[following] >= max(entropy[i] for i in first) - 1e-9
            assert sum(entropy[i] for i in first) > gamma - 1e-9
        sizes.append(len(first))
    assert min(sizes) == 1 and (max(sizes) > 1) == (gamma > 0)


def test_drawn_tokens_follow_the_softmax_and_never_the_mask():
    logits = torch.tensor([[0.0, 1.0, 2.0, 50.0]]).expand(50_000, 4)
    drawn, entropies = sample.draw_tokens(logits, 2.0, torch.rand(50_000, generator=seeded()))
    expected = torch.softmax(logits[0, :3].double() / 2, 0)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert shares[3] == 0 and (shares[:3] - expected).abs().max() < 0.01
    assert torch.allclose(entropies, -(expected * expected.log()).sum())


def test_euler_and_guidance_in_closed_form():
    """A network whose velocity is a constant that depends on the text: the path is a straight line."""
    rows = []

    def ddit(latents, t, text, predict=None, image_rows=None):
        rows.append(len(latents))
        return torch.ones_like(latents) * text[:, :1, None, None], None

    dd = SimpleNamespace(
        config=SimpleNamespace(settings=SimpleNamespace(size=16, length=2, cfg_times=(0.0, 1.0)),
                               vae=SimpleNamespace(latent_channels=1, factor=8)),
        tokenizer=SimpleNamespace(encode=lambda text, length: [len(text)] * length), device=torch.device("cpu"),
        t5=lambda ids: ids.float(), ddit=ddit, decode_image=lambda x: x)
    noise = torch.randn(2, 1, 2, 2)
    for steps, cfg, shift in ((1, 1.0, 1.0), (28, 1.0, 3.0), (5, 4.0, 3.0)):
        drawn = sample.text_to_image(dd, ["abc", "abcde"], "x", steps=steps, cfg=cfg, shift=shift, noise=noise)
        velocity = torch.tensor([1 + cfg * (3 - 1), 1 + cfg * (5 - 1)])[:, None, None, None]
        assert torch.allclose(drawn, noise - velocity, atol=1e-5)
    grid = sample.time_grid(4, 3.0)
    assert torch.allclose(grid, torch.tensor([1, 0.9, 0.75, 0.5, 0.0]))  # 3t / (1 + 2t)

    dd.config.settings.cfg_times = 0.6, 0.95  # so the steps from 0.9 and 0.75 are guided, in all 0.4 of the path
    rows.clear()
    drawn = sample.text_to_image(dd, ["abc", "abcde"], "x", steps=4, cfg=4.0, shift=3.0, noise=noise)
    assert rows == [2, 4, 4, 2]
    velocity = torch.tensor([0.4 * (1 + 4 * (n - 1)) + 0.6 * n for n in (3, 5)])[:, None, None, None]
    assert torch.allclose(drawn, noise - velocity, atol=1e-5)


# ---------------------------------------------------------------- the shipped model

SCENE = os.path.join(os.path.dirname(sample.SHIPPED), "scene.png")


@pytest.fixture(scope="module")
def dd():
    return DualDiffusion.load(sample.SHIPPED)


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(to_pixels([load_image(SCENE, 64)]))


@pytest.fixture
def settings(dd):
    before = dict(vars(dd.config.settings))
    yield dd.config.settings
    vars(dd.config.settings).update(before)


def seeded(k=0):
    return torch.Generator().manual_seed(k)


def spy(monkeypatch, module, name="forward"):
    """The shapes of the first argument of all calls of it."""
    seen, call = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda x, *rest, **more: seen.append(tuple(x.shape)) or call(x, *rest, **more))
    return seen


@pytest.mark.parametrize("count, height, width", [(1, 64, 64), (3000, 64, 64), (9, 512, 512), (2, 4096, 4096)])
def test_batches_hold_every_image_once_and_no_more_pixels_than_said(count, height, width):
    parts = list(data.slices(count, height, width, torch.device("cpu")))
    sizes = [len(range(count)[part]) for part in parts]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    assert all(size == 1 or size * height * width <= data.PIXELS["cpu"] for size in sizes)
    assert all((size + 1) * height * width > data.PIXELS["cpu"] for size in sizes[:-1])  # and no fewer


def test_pictures_do_not_depend_on_batches(dd, monkeypatch):
    texts = [f"a small {color} circle" for color in ("red", "green", "blue", "cyan", "red")]
    once = sample.text_to_image(dd, texts, steps=3, cfg=3, generator=seeded())
    monkeypatch.setitem(data.PIXELS, "cpu", 2 * 64 * 64)
    seen = spy(monkeypatch, dd.ddit), spy(monkeypatch, dd.vae, "decode")
    again = sample.text_to_image(dd, texts, steps=3, cfg=3, generator=seeded())
    assert (once - again).abs().max() < 1e-4
    assert [shape[0] for shape in seen[0]] == [2, 4, 4, 2, 4, 4, 1, 2, 2]  # at t = 1 without guidance
    assert [shape[0] for shape in seen[1]] == [1] * 5  # decoding takes more memory, so half as many


def test_more_pictures_begin_with_the_same_ones(dd):
    four, eight = (sample.text_to_image(dd, ["a red circle"] * n, steps=3, cfg=1, generator=seeded(1)) for n in (4, 8))
    assert (four - eight[:4]).abs().max() < 1e-4 and (eight[0] - eight[4]).abs().max() > 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_readings_do_not_depend_on_batches(dd, pixels, monkeypatch, temperature):
    images = torch.cat([pixels, pixels.flip(3), pixels.flip(2)])
    asked = ["what color is the circle?", "how many shapes are there?", "is there a square?"]
    texts = ["a _ green triangle", "a _ _", "_"]

    def all_three():
        how = {"temperature": temperature, "generator": seeded()}
        return [sample.caption(dd, images, steps=4, **how), sample.answer(dd, images, asked, **how),
                sample.infill(dd, images, texts, **how)]
    once = all_three()
    monkeypatch.setitem(data.PIXELS, "cpu", 1)
    seen = spy(monkeypatch, dd.vae, "encode")
    assert all_three() == once and {shape[0] for shape in seen} == {1} and len(seen) == 9
    assert all(len(texts) == 3 for texts in once)


@pytest.mark.parametrize("height, width, message", [
    (64, 256, "larger than the model's 8x8 positions"), (4096, 64, "larger than"), (8, 64, "multiples of 16, not 64x8"),
    (40, 64, "multiples of 16, not 64x40")])
def test_sizes_are_refused_before_any_work(dd, monkeypatch, height, width, message):
    for part in (dd.vae.encoder, dd.vae.decoder, dd.t5):
        monkeypatch.setattr(part, "forward", None)
    with pytest.raises(ValueError, match=message):
        sample.text_to_image(dd, ["x"], height=height, width=width)
    with pytest.raises(ValueError, match=message):
        sample.caption(dd, torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("temperature, dtype", [(0.0, torch.float32), (1.0, torch.float64)])
def test_probabilities_are_few_at_a_time_and_a_draw_is_in_float64(monkeypatch, temperature, dtype):
    logits, seen = torch.randn(1000, 7, generator=seeded()), spy(monkeypatch, torch, "softmax")
    drawn, entropies = sample.draw_tokens(logits, temperature, torch.rand(1000, generator=seeded()))
    assert max(shape[0] for shape in seen) <= 256 and sum(shape[0] for shape in seen) == 1000
    monkeypatch.undo()
    probs = torch.softmax(logits[:, :-1].to(dtype), 1)
    assert torch.equal(entropies, torch.special.entr(probs).sum(1)) and entropies.dtype == dtype
    assert temperature or torch.equal(drawn, probs.argmax(1))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(dd, pixels, monkeypatch, broken):
    weights = dd.ddit.x_embedder.proj.bias
    monkeypatch.setattr(weights, "data", torch.full_like(weights, broken))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="weights are damaged"):
            sample.caption(dd, pixels, steps=1, temperature=temperature)
    with pytest.raises(ValueError, match="weights are damaged"):
        sample.text_to_image(dd, ["x"], steps=1)


def test_captions_by_question_and_answers_with_a_suffix(dd, pixels, settings, monkeypatch):
    seen = []
    monkeypatch.setattr(sample, "unmask", lambda dd, latents, tokens, maskable, *how: (
        seen.append((tokens, maskable, how)) or (tokens, 0)))
    settings.caption_prompt, settings.answer_suffix = "describe the image", "one word"
    sample.caption(dd, pixels, steps=7)
    sample.caption(dd, pixels, order="random")
    sample.answer(dd, pixels, ["what color is the circle?"], order="random")
    texts = ["describe the image", "describe the image", "what color is the circle? one word"]
    for (tokens, maskable, _), prompt in zip(seen, [dd.tokenizer.prompt_ids(text, 24) for text in texts]):
        assert tokens[0, :len(prompt)].tolist() == prompt and (tokens[0, len(prompt):] == dd.tokenizer.eos_id).all()
        assert not maskable[0, :len(prompt)].any() and maskable[0, len(prompt):-1].all()
    assert [how[:2] for _, _, how in seen] == [(7, "random"), (settings.caption_steps, "random"),
                                               (settings.answer_steps, "random")]
    settings.caption_prompt = ""
    sample.caption(dd, pixels)
    assert seen[-1][1].sum() == 23 and seen[-1][2][1] == "entropy"  # a text of nothing but blanks, as before


def test_training_and_sampling_give_the_same_prompt(dd, settings):
    """That of a caption is `caption_prompt`; that of a question has the suffix, but only once."""
    settings.caption_prompt, settings.answer_suffix = "describe the image", "one word"
    source = SimpleNamespace(image=lambda i: np.zeros((64, 64, 3), np.uint8), caption=lambda i, rng: "a red circle",
                             question=lambda i, rng: ("what color?", "red"))
    subset = data.Subset(source, np.arange(1))
    for share, text, asked in ((0, "", "describe the image"), (1, ("what color?", ""), "what color? one word"),
                               (1, ("what color? one word", ""), "what color? one word")):
        prompt = dd.tokenizer.prompt_ids(asked, settings.length)
        recipe = SimpleNamespace(batch=1, drop=0, questions=share)
        learned, = data.Batches(subset, subset, dd.tokenizer, settings, recipe, 0, slice(0, 1))[0]
        ids, maskable = sample.text_ids(dd, text)
        assert ids[:len(prompt)] == learned.tokens[0, :len(prompt)].tolist() == prompt
        assert maskable == learned.maskable[0].tolist() == [len(prompt) <= i < 23 for i in range(24)]


@pytest.mark.parametrize("text, is_cut", [
    ("a red circle", False), ("red " * 22, False), ("red " * 23, True), (("what is it?", "red"), False),
    (("what " * 11, "red"), False), (("what " * 14, "red"), True)])
def test_a_text_that_is_too_long_is_cut_and_a_line_says_so(dd, settings, capsys, text, is_cut):
    data.warn_once.cache_clear()
    source = SimpleNamespace(image=lambda i: np.zeros((64, 64, 3), np.uint8), caption=lambda i, rng: text,
                             question=lambda i, rng: text)
    subset = data.Subset(source, np.arange(1))
    recipe = SimpleNamespace(batch=2, drop=1, questions=not isinstance(text, str))
    learned, = data.Batches(subset, subset, dd.tokenizer, settings, recipe, 0, slice(0, 2))[0]
    if isinstance(text, str):
        assert dd.tokenizer.decode(learned.tokens[0]) == text.strip()  # of 23 words each has a place, but EOS has none
    assert capsys.readouterr().err.count("warning: some texts fill --length 24 or are cut") == is_cut


def test_empty_answers(dd, pixels, monkeypatch):
    monkeypatch.setattr(sample, "unmask", lambda dd, z, tokens, maskable, *how: (
        torch.where(maskable, dd.tokenizer.eos_id, tokens), 0))
    assert sample.caption(dd, pixels) == sample.answer(dd, pixels, ["what?"]) == [""]
    assert sample.infill(dd, pixels, ["_"]) == [""]


def test_an_image_of_one_token(dd, pixels):
    assert len(sample.caption(dd, pixels[:, :, :16, :16])) == 1
    assert sample.text_to_image(dd, [""], height=16, width=16, steps=1).shape == (1, 3, 16, 16)


def test_blanks_are_filled_with_what_is_in_the_picture(dd, pixels):
    """assets/scene.png: a large green triangle, below it a small red circle and a small green square."""
    text = "a _ green _ above a small _ circle and a small green square"
    for seed in range(3):
        assert sample.infill(dd, pixels, [text], generator=seeded(seed)) == [
            "a large green triangle above a small red circle and a small green square"]


def test_the_score_is_the_bound_by_enumeration(monkeypatch):
    """Eq. 7 over all masks of every size: a token that is revealed first, second, third..., each order as likely."""
    table, text = toy_system().table, [1, 0, 1]
    exact = 0.0
    for order in itertools.permutations(range(L)):
        state = [MASK] * L
        for i in order:
            logits = table[torch.tensor(state) @ torch.tensor([V * V, V, 1])][i, :-1]
            exact -= torch.log_softmax(logits, 0)[text[i]].item() / 6
            state[i] = text[i]
    monkeypatch.setattr(sample, "text_ids", lambda dd, text: (text, [True] * L))
    dd = toy_system()
    dd.config, dd.encode_image = SimpleNamespace(settings=SimpleNamespace(length=L)), lambda image: image
    nats = sample.score(dd, torch.zeros(2, 1, 1, 1), [text, text], draws=200_000)
    assert nats[0] == nats[1] and abs(nats[0] - exact) < 0.02 * exact


def test_scores_tell_right_from_wrong(dd, pixels):
    """assets/scene.png: a large green triangle, below it a small red circle and a small green square."""
    images, rest = pixels.expand(3, -1, -1, -1), " green triangle above a small red circle and a small green square"
    right, size, colour = sample.score(dd, images, [f"a large{rest}", f"a small{rest}", f"a large{rest[:-6]}circle"])
    assert right + 3 < min(size, colour)
    shown = torch.cat([pixels, pixels.flip(2), pixels.flip(2), pixels])
    kept = sample.keep_likeliest(dd, shown, [f"a large{rest}", f"a large{rest}"], 2)
    assert torch.equal(kept, shown[[0, 3]])


def test_words_are_put_in_lower_case_where_a_small_vocabulary_knows_them_so(dd, capsys):
    assert sample.prepare_text(dd, "What color is the CIRCLE?", 20) == "what color is the circle?"
    assert sample.prepare_text(dd, "a Square", 20) == "a square" and sample.prepare_text(dd, "A", 20) == "A"
    lines = ["a sign that says STOP", "The cat and the dog say stop now"] * 50
    with_capitals = SimpleNamespace(tokenizer=train_tokenizer(lines, 200))
    assert sample.prepare_text(with_capitals, "say STOP NOW", 20) == "say STOP now"  # it has STOP as a piece
    only_small = SimpleNamespace(tokenizer=train_tokenizer([line.lower() for line in lines], 200))
    assert sample.prepare_text(only_small, "say STOP NOW", 20) == "say stop now"


def test_a_long_question_loses_its_own_end_and_keeps_the_suffix(dd):
    tokens, suffix = dd.tokenizer, "answer in a word."
    ids, maskable = tokens.text_ids(("is the circle red or blue? " * 5, ""), 24, answer_suffix=suffix)
    text = tokens.pieces.decode([i for i, may in zip(ids, maskable) if not may][:-1])
    assert text.startswith("Q: is the") and text.endswith(f"{suffix} A:") and sum(maskable) == 7
    asked = [("is it red?", ""), (f"is it red? {suffix}", "")]  # it may have been typed
    assert tokens.text_ids(asked[0], 40, answer_suffix=suffix) == tokens.text_ids(asked[1], 40, answer_suffix=suffix)
    ids, maskable = tokens.text_ids(("is it red?", ""), 24, answer_suffix=f"{suffix} " * 20)
    assert len(ids) == len(maskable) == 24


def test_infinity_is_no_white(dd, monkeypatch):
    monkeypatch.setattr(dd.vae, "decode", lambda z: torch.full((1, 3, 64, 64), float("inf")))
    with pytest.raises(ValueError, match="NaN or infinity"):
        dd.decode_image(torch.zeros(1, 16, 8, 8))


def test_a_small_vocabulary_learns_from_long_texts():
    tokenizer = train_tokenizer(["a zebra beside a café, " * 1000] * 3, 200)
    assert "▁zebra" in tokenizer.pieces.encode("a zebra", out_type=str)
    assert tokenizer.pieces.unk_id() not in tokenizer.pieces.encode("café")


def test_a_sheet(tmp_path):
    """Four cells per row, even if there are fewer; as high as the longest text; a full disk leaves what was there."""
    image, path = np.zeros((64, 64, 3), np.uint8), tmp_path / "x.png"
    sample.sheet(str(path), [(image, "one line")] * 5)
    assert Image.open(path).size == (4 * 200 - 8, 2 * (200 + 15) - 8)
    sample.sheet(str(path), [(image, "one line"), (image, "some words " * 5 + "\nand two\n\nlines")])
    assert Image.open(path).size == (4 * 200 - 8, 192 + 15 * 4)
    assert np.asarray(Image.open(path))[:192, :192].max() == 0  # the image alone, nothing over it
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError, match="x.png: could not be written"):
            sample.sheet(str(path), [(image, "text")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize("count, columns, size", [(1, 1, (10, 6)), (3, 2, (22, 14)), (4, 4, (46, 6))])
def test_a_page(count, columns, size):
    images = [np.full((6, 10, 3), k, np.uint8) for k in range(count)]
    page = sample.page(images, columns)
    assert page.size == size
    assert [page.getpixel((k % columns * 12, k // columns * 8)) for k in range(count)] == [
        (k, k, k) for k in range(count)]


def test_a_blank_before_given_words_is_never_the_end():
    """A network that always says EOS: it may in the last blank, not in those that words follow."""
    eos, mask = 1, 9

    def ddit(latents, t, text, predict=None, image_rows=None):
        return None, torch.tensor([0.0, 5, 0, 0, 4, 0, 0, 0, 0, 0]).expand(int(predict.sum()), -1).clone()

    dd = SimpleNamespace(tokenizer=SimpleNamespace(mask_id=mask, eos_id=eos), device="cpu", t5=lambda x: x, ddit=ddit)
    tokens = torch.tensor([[2, mask, mask, 3, mask, eos], [2, 3, mask, mask, eos, eos]])
    for order in sample.ORDERS:
        filled, _ = sample.unmask(dd, torch.zeros(2, 1), tokens, tokens == mask, 8, order, 0.0,
                                  torch.Generator().manual_seed(0))
        assert filled.tolist() == [[2, 4, 4, 3, eos, eos], [2, 3, eos, eos, eos, eos]]


def test_the_method_of_the_readme_is_the_code_s(dd, monkeypatch, capsys):
    """README's lines, part by part: its losses and gradients are joint_loss's, its drawing is text_to_image's without
    guidance and shift, its reading is caption's from left to right."""
    readme = open(os.path.join(os.path.dirname(sample.SHIPPED), "..", "README.md")).read()
    lines = re.search(r"```python\n(.*# Train: .*?)```", readme, re.DOTALL)[1]
    monkeypatch.chdir(os.path.dirname(os.path.dirname(sample.SHIPPED)))
    parts, names = re.split("(?=# Draw: |# Read: )", lines), {}
    try:
        torch.manual_seed(1)
        exec(parts[0], names)
        images = losses.ImageHalf(names["latents"], names["noise"], names["noisy_latents"], names["image_t"],
                                  names["tokens"])
        texts = losses.TextHalf(names["latents"], names["tokens"], names["noisy_tokens"], names["masked"],
                                names["text_t"])
        theirs = [p.grad for p in names["dd"].ddit.parameters()]
        ours = DualDiffusion.load(sample.SHIPPED)
        total, image_loss, text_loss = losses.joint_loss(ours.ddit, ours.t5, images, texts)
        total.backward()
        assert torch.allclose(image_loss, names["image_loss"]) and torch.allclose(text_loss, names["text_loss"])
        assert all(torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5) for p, g in zip(ours.ddit.parameters(), theirs))
        torch.manual_seed(2)
        noise = torch.randn(1, 16, 8, 8)
        torch.manual_seed(2)
        exec(parts[1], names)
        prompt = "a large red square below a small blue circle"
        drawn = sample.text_to_image(dd, [prompt], cfg=1, shift=1, noise=noise)
        assert (drawn - names["image"]).abs().max() < 1e-3
        exec(parts[2], names)
    finally:
        torch.set_grad_enabled(True)

    def from_left(masked, predict, step_of):
        tokens, _ = predict(masked)
        return masked & (masked.cumsum(1) == 1), tokens

    monkeypatch.setitem(sample.ORDERS, "left", from_left)
    assert sample.caption(dd, names["image"], order="left") == capsys.readouterr().out.splitlines()
