"""Reading text: T5's SentencePiece tokenizer, texts as tokens, and the encoder half of T5 v1.1.

The encoder knows nothing of diffusion. It takes tokens, the mask token among them (to T5 a token like any other), and
returns one vector per token. The transformer does the rest.
References: Raffel et al., T5, arXiv 1910.10683; v1.1 (gated GELU, no weight sharing), Shazeer, arXiv 2002.05202
  Zhang & Sennrich, RMSNorm, arXiv 1910.07467
  Kudo & Richardson, SentencePiece, arXiv 1808.06226
"""
import io
import itertools
import math
import re
import string
from dataclasses import dataclass

import sentencepiece
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

SENTINELS = 100  # <extra_id_0> ... <extra_id_99>, counted down from the top of the vocabulary


class Tokenizer:
    """Text to ids and back. Ids: the SentencePiece model's own pieces (pad 0, end of sequence 1, unknown 2), then
    the 100 sentinels, the last of which, `<extra_id_0>`, serves as the mask token.

    The sentinels live outside the SentencePiece model, so nothing a user types can become one."""
    def __init__(self, model: bytes):
        """`model`: the bytes of a `spiece.model` file. Raises ValueError for anything else."""
        self.model, self.pieces = model, open_pieces(model)
        self.eos_id = self.pieces.eos_id()
        self.vocab_size = len(self.pieces) + SENTINELS
        self.mask_id = self.vocab_size - 1

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """-> ids ending in EOS; with `length`, exactly that many: cut (EOS kept) or padded with further EOS."""
        ids = self.pieces.encode(text) + [self.eos_id]
        if length is not None:
            ids = ids[:length - 1] + [self.eos_id] * max(1, length - len(ids))
        return ids

    def decode(self, ids) -> str:
        """Ids -> text, up to the first EOS. Sentinels are spelt out as T5 does, `<extra_id_7>`."""
        text, ids = [], itertools.takewhile(lambda i: i != self.eos_id, map(int, ids))
        for plain, run in itertools.groupby(ids, lambda i: i < len(self.pieces)):
            text += [self.pieces.decode(list(run))] if plain else [f"<extra_id_{self.mask_id - i}>" for i in run]
        return " ".join(filter(None, text))

    # How texts become tokens. There is no attention mask: a shorter text is padded with EOS, and to the model this
    # padding is text like any other. It is masked, predicted and counted in the loss; so the model learns where to
    # stop, and `decode` cuts at the first EOS. The functions below give ids and which of them may be masked (maskable).

    def caption_ids(self, text, length):
        """-> ids, maskable: all but the last token. That one is EOS in every text, so leaving it gives nothing away. If
        it too were masked, sampling would start from nothing but mask tokens, and T5, which knows only relative
        positions, could not tell them apart. The EOS shows each how far away the end is. (The authors mask it too.)"""
        return self.encode(text, length), [True] * (length - 1) + [False]

    def question_ids(self, question, answer, length):
        """-> ids, maskable: the answer and the EOS tokens after it but the last, never the question."""
        prompt = self.prompt_ids(question, length)
        ids, maskable = self.caption_ids(answer, length - len(prompt))
        return prompt + ids, [False] * len(prompt) + maskable

    def prompt_ids(self, question, length):
        """"Q: {question} A:" as ids, without EOS, in the words of the authors' code. A question that is too long loses
        its end, not the "A:". A third of the length, but at most eight tokens, is kept for the answer."""
        room = length - min(8, length // 3)
        asks = self.encode("A:")[:-1]
        return self.encode(f"Q: {question}")[:-1][:room - len(asks)] + asks

    def blank_ids(self, text, length):
        """A text with underscores -> ids, maskable: each underscore is one token to fill in."""
        first, *others = (self.encode(part)[:-1] for part in text.split("_"))
        space = self.pieces.piece_to_id("▁")  # SentencePiece begins every text with it, but in "_?" it is out of place
        ids = first
        for part in others:
            ids = ids + [self.mask_id] + (part[1:] if part[:1] == [space] else part)
        ids = ids[:length - 1] + [self.eos_id] * max(1, length - len(ids))
        return ids, [i == self.mask_id for i in ids]


@dataclass
class T5Config:
    """The defaults are T5-XXL's encoder."""
    d_model: int = 4096
    num_layers: int = 24
    num_heads: int = 64
    d_kv: int = 64
    d_ff: int = 10240
    vocab_size: int = 32128
    buckets: int = 32
    max_distance: int = 128


class RMSNorm(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


def relative_position_bucket(distance, buckets, max_distance):
    """Key position minus query position -> bucket: half the buckets for each direction; in each half, one bucket per
    distance up to a quarter of them all, then ever wider ones (logarithmically) up to `max_distance`."""
    half, exact = buckets // 2, buckets // 4
    near = distance.abs()
    far = exact + (torch.log(near.clamp(min=1) / exact) / math.log(max_distance / exact) * (half - exact)).long()
    return (distance > 0) * half + torch.where(near < exact, near, far.clamp(max=half - 1))


class SelfAttention(nn.Module):
    """T5's: no 1/sqrt(d) (it is folded into the initialisation), no bias, positions as a bias on the scores."""
    def __init__(self, config, has_relative_bias):
        super().__init__()
        self.config, inner = config, config.num_heads * config.d_kv
        self.q, self.k, self.v = (nn.Linear(config.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_bias:
            table = torch.empty(config.buckets, config.num_heads)  # filled by init_weights, or from a file
            self.relative_attention_bias = nn.Embedding.from_pretrained(table, freeze=False)

    def position_bias(self, length, device):
        at = torch.arange(length, device=device)
        bucket = relative_position_bucket(at[None, :] - at[:, None], self.config.buckets, self.config.max_distance)
        bias = rearrange(self.relative_attention_bias(bucket), "q k heads -> 1 heads q k")
        return bias.contiguous()  # once here; fused attention would copy it in every layer

    def forward(self, x, bias):
        q, k, v = (rearrange(f(x), "b l (h d) -> b h l d", h=self.config.num_heads) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        return self.o(rearrange(out, "b h l d -> b l (h d)"))


class DenseGated(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x):
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Block(nn.Module):
    """Module names are the checkpoint's: `layer.0` attends, `layer.1` is the feed-forward."""
    def __init__(self, config, first):
        super().__init__()
        attend = nn.ModuleDict({"SelfAttention": SelfAttention(config, first), "layer_norm": RMSNorm(config.d_model)})
        dense = nn.ModuleDict({"DenseReluDense": DenseGated(config), "layer_norm": RMSNorm(config.d_model)})
        self.layer = nn.ModuleList([attend, dense])

    def forward(self, x, bias):
        attend, dense = self.layer
        x = x + attend["SelfAttention"](attend["layer_norm"](x), bias)
        return x + dense["DenseReluDense"](dense["layer_norm"](x))


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.d_model), False)  # not frozen
        self.encoder = nn.ModuleDict({
            "block": nn.ModuleList(Block(config, first=i == 0) for i in range(config.num_layers)),
            "final_layer_norm": RMSNorm(config.d_model)})
        init_weights(self)

    def forward(self, tokens):
        """Tokens (B,L), long -> states (B,L,d_model), on the tokens' device even if T5 itself is on another.
        No attention mask: padding is text too (it is EOS)."""
        x, blocks = self.shared(tokens.to(self.shared.weight.device)), self.encoder["block"]
        bias = blocks[0].layer[0]["SelfAttention"].position_bias(tokens.shape[1], x.device)
        for block in blocks:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x).to(tokens.device)


# ------------------------------------------------- the chapter ends here; what follows makes it practical


def init_weights(encoder):
    """As T5's authors did: every matrix but the table has standard deviation 1/sqrt(fan-in), q's divided by sqrt(d_kv),
    the attention scale that T5 leaves out. Only the position bias differs. It alone tells the order of the tokens,
    and an optimizer takes thousands of small steps to sharpen it; so it starts sharp, as in ALiBi (Press et al.,
    arXiv 2108.12409): even heads look back, odd heads ahead, some near and some far."""
    c = encoder.config
    if encoder.shared.weight.is_meta:  # a file will give the values
        return
    for name, p in encoder.named_parameters():
        std = {"q": (c.d_model * c.d_kv) ** -0.5, "o": (c.num_heads * c.d_kv) ** -0.5, "wo": c.d_ff ** -0.5,
               "shared": 1.0}.get(name.split(".")[-2], c.d_model ** -0.5)
        if p.ndim == 2:
            nn.init.normal_(p, std=std)
    away = torch.arange(-c.max_distance, c.max_distance + 1)
    bucket = relative_position_bucket(away, c.buckets, c.max_distance)
    table = encoder.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias.weight
    with torch.no_grad():
        for head in range(c.num_heads):
            slope, wrong_way = 2.0 ** -(head // 2 * 8 / c.num_heads), away > 0 if head % 2 == 0 else away < 0
            table[bucket, head] = -slope * away.abs() - 4.0 * wrong_way


@dataclass
class EmbeddingsConfig:
    d_model: int
    positions: int  # tokens in the longest text
    vocab_size: int = 32128


class Embeddings(nn.Module):
    """In T5's place (D-DiT, Table 9): learned embeddings of tokens and positions."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Parameter(torch.randn(config.positions, config.d_model) * config.d_model ** -0.5)
        self.encoder = nn.ModuleDict({"final_layer_norm": RMSNorm(config.d_model)})

    def forward(self, tokens):
        x = self.shared(tokens.to(self.shared.weight.device)) + self.positions[:tokens.shape[1]]
        return self.encoder["final_layer_norm"](x).to(tokens.device)


def open_pieces(model):
    """The bytes of a `spiece.model` -> SentencePiece's object. Raises ValueError if they are another model's."""
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError("not a SentencePiece model (T5's is named spiece.model)") from error
    special = pieces.pad_id(), pieces.eos_id(), pieces.unk_id()
    if special != (0, 1, 2):  # Llama's, for one, has as many pieces as T5's
        raise ValueError(f"not T5's: its pad, end and unknown are pieces {special}, not (0, 1, 2)")
    return pieces


def train_tokenizer(lines, vocab_size):
    """Text lines -> a Tokenizer of at most `vocab_size` pieces, numbered as T5's are. It uses byte-pair merges, unlike
    T5's: in a small vocabulary they keep every frequent word whole."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            required_chars=string.ascii_letters + string.digits + ".,?!:;'-", minloglevel=2, num_threads=1)
    except RuntimeError as error:
        raise ValueError(f"these texts have more letters than --vocab {vocab_size}: give more ({error})") from error
    return Tokenizer(model.getvalue())


def unseen_words(tokenizer, text):
    """The words that this vocabulary cannot write or, if it is small (not T5's), spells almost letter by letter."""
    def spelt(word):
        ids = tokenizer.pieces.encode(word)
        small = len(tokenizer.pieces) < 10_000 and word.isalnum()
        return tokenizer.pieces.unk_id() in ids or small and len(ids) > max(1, len(word) / 2)
    return list(dict.fromkeys(filter(spelt, re.findall(r"\w+|[^\w\s]", text.replace("_", " ")))))
