"""The READMEs' pictures: drawn anew, and not behind what they show."""
import os
import re
import sys

import figures
import numpy as np


def test_the_pictures_of_the_readmes_are_drawn_and_up_to_date(tmp_path, monkeypatch):
    committed = figures.ASSETS
    monkeypatch.setattr(figures, "ASSETS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["figures.py", "--runs", str(tmp_path)])
    figures.main()
    shown, drawn = {*re.findall(r'src="(?:../)?assets/(\w+\.\w+)"', figures.readmes())}, {*os.listdir(tmp_path)}
    assert shown == {*os.listdir(committed)} - {"tiny.safetensors"}
    assert drawn < shown and shown - drawn == {"scene.png", "curves.svg"}  # no training has left curves here
    for name in ("block.svg", "velocity.svg", "orders.svg"):  # the others have pixels that the model draws
        assert (tmp_path / name).read_text() == open(os.path.join(committed, name)).read(), f"draw {name} anew"


def test_paths_along_the_mean_velocity_never_cross_and_have_the_lines_histograms():
    rng, count = np.random.default_rng(1), 10_000
    paths = figures.follow(np.sort(rng.standard_normal(count)))
    assert (np.diff(paths) > 0).all()
    for on_lines, on_paths in figures.positions((1, 0.75, 0.5, 0.25, 0), rng, count):
        both = np.concatenate([on_lines, on_paths])
        below = [np.searchsorted(np.sort(x), both, "right") / count for x in (on_lines, on_paths)]
        assert abs(below[0] - below[1]).max() < 1.95 * (2 / count) ** 0.5  # Kolmogorov-Smirnov, 99.9%
