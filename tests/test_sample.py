"""The samplers against exact laws on toy networks."""
import itertools
from types import SimpleNamespace

import pytest
import torch

import sample
from losses import alpha

V, L, MASK = 3, 3, 2  # two real tokens and the mask token


def toy_system():
    table = torch.randn(V ** L, L, V, generator=torch.Generator().manual_seed(3)) * 1.5

    def ddit(latents, t, text, predict=None, draw=None):
        assert (t == 0).all() and draw == 0
        return None, table[text @ torch.tensor([V * V, V, 1])][predict]

    return SimpleNamespace(tokenizer=SimpleNamespace(mask_id=MASK), device="cpu", t5=lambda tokens: tokens, ddit=ddit,
                           table=table)


def ancestral_law(dd, steps):
    """The distribution after ancestral sampling, by following every state of the chain through every step."""
    law = {(MASK,) * L: 1.0}
    for k in range(steps, 0, -1):
        t, s = torch.tensor([k / steps, (k - 1) / steps], dtype=torch.float64)
        reveal = ((alpha(s) - alpha(t)) / (1 - alpha(t))).item()
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


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_unmask_has_the_law_of_ancestral_sampling(steps):
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


def test_unmask_runs_only_at_occupied_steps_and_only_those_rows():
    dd, seen = toy_system(), []
    ddit = dd.ddit
    dd.ddit = lambda latents, t, text, predict, draw: seen.append(predict) or ddit(latents, t, text, predict, draw)
    tokens = torch.tensor([[MASK, 0, MASK], [1, 0, 1], [1, MASK, 0]])
    drawn, passes = sample.unmask(dd, torch.zeros(3, 1), tokens, tokens == MASK, 1000,
                                  generator=torch.Generator().manual_seed(0))
    assert passes == len(seen) == 3  # three blanks, a thousand steps
    assert all(p.any(1).all() for p in seen) and sum(p.sum() for p in seen) == 3
    assert (drawn[tokens != MASK] == tokens[tokens != MASK]).all() and (drawn != MASK).all()


def test_confidence_order_fills_everything_surest_first():
    dd = toy_system()
    tokens = torch.full((5, L), MASK)
    for steps in (1, 2, 3, 7):
        drawn, passes = sample.unmask(dd, torch.zeros(5, 1), tokens, tokens == MASK, steps, "confidence", 0.0)
        assert (drawn != MASK).all() and passes == min(steps, L)
    probs = torch.softmax(dd.table[-1][:, :-1].double(), 1)  # -1: the state of three masks
    first = probs.max(1).values.argmax()
    assert drawn[0, first] == probs[first].argmax()


def test_drawn_tokens_follow_the_softmax_and_never_the_mask():
    logits = torch.tensor([[0.0, 1.0, 2.0, 50.0]]).expand(50_000, 4)
    drawn, _ = sample.draw_tokens(logits, 2.0, torch.Generator().manual_seed(0))
    expected = torch.softmax(logits[0, :3].double() / 2, 0)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert shares[3] == 0 and (shares[:3] - expected).abs().max() < 0.01


def test_euler_and_guidance_in_closed_form():
    """A network whose velocity is a constant that depends on the text: the path is a straight line."""
    def ddit(latents, t, text, predict=None, draw=None):
        return torch.ones_like(latents) * text[:, :1, None, None], None

    dd = SimpleNamespace(
        config=SimpleNamespace(settings=SimpleNamespace(size=16, length=2),
                               vae=SimpleNamespace(latent_channels=1, factor=8)),
        tokenizer=SimpleNamespace(encode=lambda text, length: [len(text)] * length), device="cpu",
        t5=lambda ids: ids.float(), ddit=ddit, decode_image=lambda x: x)
    noise = torch.randn(2, 1, 2, 2)
    for steps, cfg, shift in ((1, 1.0, 1.0), (28, 1.0, 3.0), (5, 4.0, 3.0)):
        drawn = sample.text_to_image(dd, ["abc", "abcde"], "x", steps=steps, cfg=cfg, shift=shift, noise=noise)
        velocity = torch.tensor([1 + cfg * (3 - 1), 1 + cfg * (5 - 1)])[:, None, None, None]
        assert torch.allclose(drawn, noise - velocity, atol=1e-5)
    grid = sample.time_grid(4, 3.0)
    assert torch.allclose(grid, torch.tensor([1, 0.9, 0.75, 0.5, 0.0]))  # 3t / (1 + 2t)
