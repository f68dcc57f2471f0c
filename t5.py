"""Reading text: T5's SentencePiece tokenizer, texts as tokens, and the encoder half of T5 v1.1.

The encoder knows nothing of diffusion. It takes tokens and returns one vector per token. The mask
token is to T5 a token like any other. The transformer (model.py) does the rest.
References: Raffel et al., T5, arXiv 1910.10683; v1.1 (gated GELU), Shazeer, arXiv 2002.05202
  Zhang & Sennrich, RMSNorm, arXiv 1910.07467
  Kudo & Richardson, SentencePiece, arXiv 1808.06226
"""
import io
import math
import re
import string
from dataclasses import dataclass

import sentencepiece
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

SENTINELS = 100  # <extra_id_99> ... <extra_id_0>, the last ids of the vocabulary


class Tokenizer:
    """Turns text into ids and back. The ids are SentencePiece's own pieces (padding 0, end of sequence or
    EOS 1, unknown 2), then the 100 sentinels, of which the last, `<extra_id_0>`, is the mask token.
    SentencePiece does not know the sentinels, so nothing that a user types can become one.
    There is no attention mask anywhere. A shorter text is padded with EOS, and to the model this padding
    is text like any other. So it learns where to stop, and `decode` cuts at the first EOS."""
    def __init__(self, model: bytes):
        """`model`: the bytes of a `spiece.model` file. Raises ValueError for anything else."""
        self.model = model
        self.pieces = open_pieces(model)
        self.eos_id = self.pieces.eos_id()
        self.vocab_size = len(self.pieces) + SENTINELS
        self.mask_id = self.vocab_size - 1

    def encode(self, text, length=None):
        """Returns ids that end in EOS; with `length`, exactly that many."""
        ids = self.pieces.encode(text)
        return self.pad(ids, length or len(ids) + 1)

    def pad(self, ids, length):
        """Returns exactly `length` ids: cut, or padded with EOS. The last is EOS in either case."""
        ids = ids[:length - 1]
        return ids + [self.eos_id] * (length - len(ids))

    def decode(self, ids):
        """Returns the text of ids up to the first EOS. Sentinels are left out."""
        ids = [int(i) for i in ids]
        if self.eos_id in ids:
            ids = ids[:ids.index(self.eos_id)]
        return self.pieces.decode([i for i in ids if i < len(self.pieces)])

    def text_ids(self, text, length, caption_prompt="", answer_suffix=""):
        """Turns a caption (str), or a question with its answer (a pair of str), into ids, and says which of
        them may be masked -> ids, maskable: two lists of this length.
        A question becomes "Q: {question} {answer_suffix} A:", and only its answer may be masked. A caption
        stands alone, or it answers the question `caption_prompt`. If a text is too long, its end is cut off.
        The last token of every text is EOS and is never masked. T5 knows only distances between tokens. In
        a text of masks alone it could not tell them apart; the last EOS shows each how far away the end is."""
        if isinstance(text, str):
            prompt = self.prompt_ids(caption_prompt, length) if caption_prompt else []
        else:
            question, text = text
            question = question.removesuffix(answer_suffix)  # it may have been typed
            prompt = self.prompt_ids(question, length, answer_suffix)
        ids = self.pad(prompt + self.pieces.encode(text), length)
        room = length - 1 - len(prompt)
        return ids, [False] * len(prompt) + [True] * room + [False]

    def prompt_ids(self, question, length, suffix=""):
        """Returns "Q: {question} {suffix} A:", the authors' words, as ids without EOS. A question that is too
        long is cut, so that room is left for the answer: a third of the length, but at most eight tokens."""
        room = length - self.answer_room(length)
        question = self.pieces.encode(f"Q: {question}")
        ending = self.pieces.encode(f"{suffix} A:")[-room:]
        return question[:room - len(ending)] + ending

    def answer_room(self, length):
        return min(8, length // 3)

    def blank_ids(self, text, length):
        """Turns a text with underscores into ids, maskable: each is one token to fill in."""
        space = self.pieces.piece_to_id("▁")
        ids = []
        for k, part in enumerate(text.split("_")):
            part = self.pieces.encode(part)
            if k > 0:
                ids.append(self.mask_id)
                if part[:1] == [space]:  # SentencePiece has put it there
                    part = part[1:]
            ids += part
        ids = self.pad(ids, length)
        return ids, [i == self.mask_id for i in ids]


@dataclass
class T5Config:
    """The defaults are those of T5-XXL's encoder."""
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
    """Maps a distance, key position minus query position, to a bucket. Each direction has half of the
    buckets. Short distances have one each; longer ones share buckets, which grow wider logarithmically
    up to `max_distance`."""
    half = buckets // 2
    exact = buckets // 4
    near = distance.abs()
    growth = torch.log(near.clamp(min=1) / exact) / math.log(max_distance / exact)
    far = exact + (growth * (half - exact)).long()
    bucket = torch.where(near < exact, near, far.clamp(max=half - 1))
    return (distance > 0) * half + bucket


class SelfAttention(nn.Module):
    """T5's attention has no biases in its projections and no division by sqrt(d_kv), which
    is part of the initial weights instead. Positions enter as a bias on the scores."""
    def __init__(self, config, has_relative_bias):
        super().__init__()
        self.config = config
        inner = config.num_heads * config.d_kv
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_bias:
            self.relative_attention_bias = empty_embedding(config.buckets, config.num_heads)

    def position_bias(self, length, device):
        """Returns (1,heads,length,length), to be added to the scores of every layer."""
        config = self.config
        position = torch.arange(length, device=device)
        distance = position[None, :] - position[:, None]
        bucket = relative_position_bucket(distance, config.buckets, config.max_distance)
        # contiguous once here, or fused attention would copy it in every layer
        return rearrange(self.relative_attention_bias(bucket), "q k heads -> 1 heads q k").contiguous()

    def forward(self, x, bias):
        heads = self.config.num_heads
        q = rearrange(self.q(x), "b l (h d) -> b h l d", h=heads)
        k = rearrange(self.k(x), "b l (h d) -> b h l d", h=heads)
        v = rearrange(self.v(x), "b l (h d) -> b h l d", h=heads)
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
    """Attention (`layer.0` in the checkpoint), then the feed-forward network (`layer.1`)."""
    def __init__(self, config, has_relative_bias):
        super().__init__()
        attention = {"SelfAttention": SelfAttention(config, has_relative_bias), "layer_norm": RMSNorm(config.d_model)}
        dense = {"DenseReluDense": DenseGated(config), "layer_norm": RMSNorm(config.d_model)}
        self.layer = nn.ModuleList([nn.ModuleDict(attention), nn.ModuleDict(dense)])

    def forward(self, x, bias):
        attention, dense = self.layer
        x = x + attention["SelfAttention"](attention["layer_norm"](x), bias)
        return x + dense["DenseReluDense"](dense["layer_norm"](x))


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = empty_embedding(config.vocab_size, config.d_model)
        blocks = nn.ModuleList(Block(config, has_relative_bias=(k == 0)) for k in range(config.num_layers))
        self.encoder = nn.ModuleDict({"block": blocks, "final_layer_norm": RMSNorm(config.d_model)})
        init_weights(self)

    def forward(self, tokens):
        """Tokens (B,L), long -> states (B,L,d_model), one vector per token, on the tokens' device."""
        x = self.shared(tokens.to(self.shared.weight.device))
        blocks = self.encoder["block"]
        bias = blocks[0].layer[0]["SelfAttention"].position_bias(tokens.shape[1], x.device)  # serves all
        for block in blocks:
            x = block(x, bias)
        return self.encoder["final_layer_norm"](x).to(tokens.device)


# ------------------------------------------------- the chapter ends here; what follows makes it practical

def empty_embedding(rows, dim):
    """Makes a table that `init_weights` fills, or a file. (nn.Embedding would draw it twice.)"""
    return nn.Embedding.from_pretrained(torch.empty(rows, dim), freeze=False)


def init_weights(encoder):
    """Draws the initial weights as T5's authors did: the standard deviation of a matrix is 1/sqrt(fan-in),
    of the token table 1. That of q is smaller by sqrt(d_kv), since T5's attention does not divide by it."""
    config = encoder.config
    if encoder.shared.weight.is_meta:  # a file will give the values
        return
    for name, p in encoder.named_parameters():
        if p.ndim == 2:
            fan_in = p.shape[1]
            if ".q." in name:
                fan_in *= config.d_kv
            elif name == "shared.weight":
                fan_in = 1
            nn.init.normal_(p, std=fan_in ** -0.5)
    init_position_bias(encoder.encoder["block"][0].layer[0]["SelfAttention"].relative_attention_bias.weight, config)


@torch.no_grad()
def init_position_bias(table, config):
    """Fills the position bias, in which we differ from T5's authors. It alone tells the order of the
    tokens, and an optimizer takes thousands of small steps to sharpen it. So it starts sharp, as in ALiBi
    (Press et al., arXiv 2108.12409): even heads look back and odd heads look ahead, some near, some far."""
    distance = torch.arange(-config.max_distance, config.max_distance + 1)
    bucket = relative_position_bucket(distance, config.buckets, config.max_distance)
    farthest = dict(zip(bucket.tolist(), distance.tolist()))  # the last distance of each
    bucket = list(farthest)
    distance = torch.tensor(list(farthest.values()))
    for head in range(config.num_heads):
        slope = 2.0 ** -(head // 2 * 8 / config.num_heads)
        wrong_way = distance > 0 if head % 2 == 0 else distance < 0
        table[bucket, head] = -slope * distance.abs() - 4.0 * wrong_way


@dataclass
class EmbeddingsConfig:
    d_model: int
    positions: int  # tokens in the longest text
    vocab_size: int = 32128


class Embeddings(nn.Module):
    """Learned embeddings of tokens and positions, in T5's place (D-DiT, Table 9)."""
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Parameter(torch.randn(config.positions, config.d_model) * config.d_model ** -0.5)
        self.encoder = nn.ModuleDict({"final_layer_norm": RMSNorm(config.d_model)})

    def forward(self, tokens):
        length = tokens.shape[1]
        most = len(self.positions)
        if length > most:
            raise ValueError(f"this model has learned texts of at most {most} tokens, not {length}")
        x = self.shared(tokens.to(self.shared.weight.device)) + self.positions[:length]
        return self.encoder["final_layer_norm"](x).to(tokens.device)


def open_pieces(model):
    """Makes SentencePiece's object from a `spiece.model`'s bytes. Raises ValueError for another's."""
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError("not a SentencePiece model (T5's spiece.model), or a git-lfs pointer to one") from error
    special = pieces.pad_id(), pieces.eos_id(), pieces.unk_id()
    if special != (0, 1, 2):  # Llama's, for one, has as many pieces as T5's
        raise ValueError(f"not T5's: its pad, end and unknown are pieces {special}, not (0, 1, 2)")
    return pieces


def train_tokenizer(lines, vocab_size):
    """Makes a Tokenizer of at most `vocab_size` pieces from lines of text. Raises ValueError for too many letters."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe",
            vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            required_chars=string.ascii_letters + string.digits + ".,?!:;'-", minloglevel=2, num_threads=1,
            max_sentence_length=2 ** 30)  # without it a text of more than 4,192 bytes is dropped, in silence
    except RuntimeError as error:
        raise ValueError(f"these texts have more letters than --vocab {vocab_size}: give more ({error})") from error
    return Tokenizer(model.getvalue())


def unseen_words(tokenizer, text):
    """Lists the words that this vocabulary cannot write or, if small, spells almost by letters."""
    unseen = []
    small = len(tokenizer.pieces) < 10_000
    for word in re.findall(r"\w+|[^\w\s]", text.replace("_", " ")):
        ids = tokenizer.pieces.encode(word)
        is_unknown = tokenizer.pieces.unk_id() in ids
        is_spelt = small and word.isalnum() and len(ids) > max(1, len(word) / 2)
        if (is_unknown or is_spelt) and word not in unseen:
            unseen.append(word)
    return unseen
