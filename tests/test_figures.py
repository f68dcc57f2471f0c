"""The READMEs' pictures: drawn anew, and not behind what they show."""
import os
import re
import sys

import figures


def test_the_pictures_of_the_readmes_are_drawn_and_up_to_date(tmp_path, monkeypatch):
    committed = figures.ASSETS
    monkeypatch.setattr(figures, "ASSETS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["figures.py", "--runs", str(tmp_path)])
    figures.main()
    shown, drawn = {*re.findall(r'src="(?:../)?assets/(\w+\.\w+)"', figures.readmes())}, {*os.listdir(tmp_path)}
    assert shown == {*os.listdir(committed)} - {"tiny.safetensors"}
    assert drawn == {"both.png", "samples.png", "orders.svg"} < shown  # no training has left curves here
    assert (tmp_path / "orders.svg").read_text() == open(os.path.join(committed, "orders.svg")).read()
