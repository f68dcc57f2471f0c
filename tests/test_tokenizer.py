"""T5's real tokenizer against transformers' T5 tokenizer, on 6,000 lines of all kinds. Runs where its spiece.model is:

    SPIECE=path/to/spiece.model python -m pytest tests/test_tokenizer.py

Of the ids that transformers gives, golden.safetensors has the checksum; where transformers is installed, it is asked.
"""
import hashlib
import json
import os

import make_golden
import pytest
from safetensors import safe_open

from t5 import Tokenizer

SPIECE = os.environ.get("SPIECE", "spiece.model")
pytestmark = pytest.mark.skipif(not os.path.exists(SPIECE), reason="needs T5's spiece.model (SPIECE=...)")


def test_ids_are_the_reference_s():
    tokenizer = Tokenizer(open(SPIECE, "rb").read())
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id) == (32100, 32099, 1)
    ours = [tokenizer.encode(line) for line in make_golden.tokenizer_lines()]
    with safe_open(make_golden.PATH, framework="pt") as f:
        assert hashlib.sha256(json.dumps(ours).encode()).hexdigest() == f.metadata()["tokenizer"]


def test_the_checksum_is_the_reference_s():
    pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")  # transformers reads spiece.model with it
    with safe_open(make_golden.PATH, framework="pt") as f:
        assert make_golden.tokenizer_checksum(SPIECE) == f.metadata()["tokenizer"]


@pytest.mark.parametrize("text", ["<extra_id_0>", "a <extra_id_7> b", "</s>", "<pad>", "<unk>", "▁<extra_id_99>▁"])
def test_no_sentinel_can_be_typed(text):
    tokenizer = Tokenizer(open(SPIECE, "rb").read())
    ids = tokenizer.encode(text)
    assert max(ids) < 32000 and ids.count(1) == 1 and ids[-1] == 1 and 0 not in ids
