"""The losses against closed forms, exhaustive enumeration and statistical bounds."""
import glob
import itertools
import math
import os
import re

import torch
import torch.nn.functional as F

import losses

V, L, MASK = 4, 3, 3  # three real tokens and the mask token


def toy_logits(tokens):
    """A fixed random network: every noisy sequence has logits of its own. (B,L) -> (B,L,V)."""
    table = torch.randn(V ** L, L, V, generator=torch.Generator().manual_seed(7))
    return table[tokens @ torch.tensor([V * V, V, 1])]


def test_eq7_agrees_with_exhaustive_enumeration(straight_line):
    tokens = torch.tensor([0, 2, 1])
    times = torch.linspace(losses.MIN_TIME, 1, 20001, dtype=torch.float64)
    exact = torch.zeros_like(times)
    for mask in itertools.product([False, True], repeat=L):
        mask = torch.tensor(mask)
        noisy = torch.where(mask, MASK, tokens)
        nats = F.cross_entropy(toy_logits(noisy[None])[0, :, :-1].double(), tokens, reduction="none")[mask].sum()
        hidden = (1 - losses.MIN_TIME) * times
        exact += hidden ** mask.sum() * (1 - hidden) ** (~mask).sum() * nats / times / L
    exact = (torch.trapezoid(exact, times) / (1 - losses.MIN_TIME)).item()

    n, generator = 100_000, torch.Generator().manual_seed(0)
    batch = tokens.expand(n, L)
    t = losses.stratified_times(n, generator=generator)
    noisy, masked = losses.mask_tokens(batch, t, torch.ones(n, L, dtype=torch.bool), MASK,
                                       generator)
    logits = toy_logits(noisy)
    estimate = losses.masked_diffusion_loss(logits[masked], batch, masked, t).item()
    assert estimate == losses.masked_diffusion_loss(logits, batch, masked, t).item()
    assert abs(estimate / exact - 1) < 0.01, (estimate, exact)


def test_the_mask_token_costs_nothing_and_is_never_learned(straight_line):
    logits = torch.zeros(1, 1, V, requires_grad=True)
    loss = losses.masked_diffusion_loss(logits[0], torch.tensor([[1]]), torch.tensor([[True]]), torch.tensor([0.5]))
    loss.backward()
    assert math.isclose(loss.item(), 2 * math.log(3), rel_tol=1e-6)  # weight 1/t, three tokens left to choose from
    assert logits.grad[0, 0, MASK] == 0


def test_stratified_times_hit_every_stratum():
    for n in (1, 2, 7, 64):
        t = losses.stratified_times(n, generator=torch.Generator().manual_seed(n))
        stratum = ((t - losses.MIN_TIME) / (1 - losses.MIN_TIME) * n).floor().long()
        assert sorted(stratum.tolist()) == list(range(n))
        assert t.min() >= losses.MIN_TIME and t.max() <= 1


def test_mask_tokens_masks_at_the_stated_rate_and_only_what_may_be(straight_line):
    n, generator = 40_000, torch.Generator().manual_seed(0)
    tokens = torch.arange(5).expand(n, 5)
    maskable = torch.tensor([True, True, True, True, False]).expand(n, 5)
    for t in (losses.MIN_TIME, 0.3, 1.0):
        noisy, masked = losses.mask_tokens(tokens, torch.full((n,), t), maskable, 99, generator)
        p, rate = (1 - losses.MIN_TIME) * t, masked[:, :4].float().mean().item()
        assert abs(rate - p) < 5 * math.sqrt(p * (1 - p) / (4 * n)) + 1e-9
        assert not masked[:, 4].any()
        assert (noisy[masked] == 99).all() and (noisy[~masked] == tokens[~masked]).all()


def test_logit_normal_times_have_their_law():
    n = 200_000
    t = losses.logit_normal_times(n, mean=0.4, std=1.3, generator=torch.Generator().manual_seed(0)).double()
    logit = torch.log(t / (1 - t))
    assert abs(logit.mean() - 0.4) < 5 * 1.3 / math.sqrt(n)
    assert abs(logit.std() - 1.3) < 5 * 1.3 / math.sqrt(2 * n)
    for q in (0.1, 0.5, 0.9):  # P(t < q) in closed form
        p = 0.5 * (1 + math.erf((math.log(q / (1 - q)) - 0.4) / 1.3 / math.sqrt(2)))
        assert abs((t < q).double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n)


def test_flow_matching_is_minimal_at_the_true_velocity():
    x, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    assert losses.flow_matching_loss(noise - x, x, noise) == 0
    assert math.isclose(losses.flow_matching_loss(noise - x + 0.5, x, noise).item(), 0.25, rel_tol=1e-5)
    t = torch.tensor([0.0, 0.25, 0.5, 1.0])  # the velocity is the path's derivative
    step = losses.noise_latents(x, noise, t + 1e-2) - losses.noise_latents(x, noise, t)
    assert torch.allclose(step / 1e-2, noise - x, atol=1e-3)


def test_texts_may_be_about_other_images_or_alone():
    """(That the stacked pass has the gradients of two passes is tested with README's method.)"""
    torch.manual_seed(0)
    mix = torch.nn.Linear(6, 5)
    rows = []

    def ddit(latents, t, text, predict, image_rows):
        rows.append(len(latents))
        h = text + latents.mean((1, 2, 3))[:, None, None] + t[:, None, None]
        return latents[:image_rows] * h.mean((1, 2))[:image_rows, None, None, None], mix(h[image_rows:][predict])

    t5 = torch.nn.Embedding(5, 6)
    latents, other, noise = torch.randn(3, 8, 2, 4, 4)
    captions, tokens = torch.randint(4, (2, 8, 6))
    t = losses.stratified_times(8)
    noisy, masked = losses.mask_tokens(tokens, t, torch.ones(8, 6, dtype=torch.bool), 4)
    images = losses.ImageHalf(latents, noise, losses.noise_latents(latents, noise, t), t, captions)
    others = images._replace(latents=other, noisy=losses.noise_latents(other, noise, t))
    texts = losses.TextHalf(latents, tokens, noisy, masked, t)
    total, image, text = losses.joint_loss(ddit, t5, images, texts)
    assert torch.isclose(total, image + 0.2 * text)
    _, other_image, same_text = losses.joint_loss(ddit, t5, others, texts)
    assert other_image != image and torch.equal(same_text, text)

    nothing = losses.ImageHalf(*(x[:0] for x in images))
    alone = losses.joint_loss(ddit, t5, nothing, texts, image_weight=0)
    assert rows == [16, 16, 8] and alone[1] == 0 and torch.isclose(alone[0], 0.2 * text)
    alone[0].backward()
    assert all(p.grad.isfinite().all() for p in mix.parameters())


def test_the_schedule_is_the_paper_s():
    t = torch.linspace(0, 1, 11)
    assert torch.allclose(losses.alpha(t), 1 - 0.999 * t), "losses.alpha is not the paper's schedule"


def test_the_weight_follows_the_schedule():
    """Eq. 7's weight, -alpha'(t) / (1 - alpha(t)), of losses.alpha by autograd."""
    t = torch.linspace(losses.MIN_TIME, 1, 1000, dtype=torch.float64, requires_grad=True)
    alpha = losses.alpha(t)
    slope, = torch.autograd.grad(alpha.sum(), t)
    assert torch.allclose(losses.reveal_rate(t), -slope / (1 - alpha), rtol=1e-6)


def test_the_equations_of_the_code_and_the_lines_of_the_chapters_are_those_of_the_readme_s_table():
    """`# Eq. N` stands in the file that README's table names for it, and nowhere else; and a chapter has as many lines
    as the table says."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    in_code, in_table, lines = set(), set(), {}
    for path in glob.glob(os.path.join(root, "*.py")):
        code, name = open(path).read(), os.path.basename(path)
        in_code |= {(name, int(number)) for number in re.findall(r"# Eq\. (\d+)", code)}
        lines[name] = re.split("# -+ the chapter ends here", code)[0].count("\n")
    for row in re.findall(r"^\|.*\|$", open(os.path.join(root, "README.md")).read(), re.MULTILINE):
        file, numbers, count = (re.search(pattern, row) for pattern in (
            r"`(\w+\.py)`", r"Eq\. (\d+(?:, ?\d+)*)", r"\| (\d+) \|"))
        if file and numbers:
            in_table |= {(file[1], int(number)) for number in numbers[1].split(",")}
        if file and count and file[1] in lines:
            assert lines[file[1]] == int(count[1]), row
    assert in_code == in_table
    assert {number for _, number in in_code} == set(range(1, 11)) - {4}  # 4, the Markov chain itself, is only described
