"""The measures of the published benchmarks, as pure functions. What each takes and gives, and whose definition it
follows, its docstring says. Where an official program has an oddity that changes a score, so has this file, and says
it.
"""
import functools
import itertools
import math
import re
from collections import Counter

import numpy as np

# ---------------------------------------------------------------- VQA: an answer among those of ten people

NUMBERS = {"none": "0"} | {name: str(n) for n, name in enumerate(
    "zero one two three four five six seven eight nine ten".split())}
ARTICLES = {"a", "an", "the"}
CONTRACTIONS = """
    ain't aren't can't couldn't couldn't've could've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've
    needn't not've o'clock oughtn't 'ow's'at shan't she'd've shouldn't shouldn't've should've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've
    we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's
    who've why'll why're why's won't wouldn't wouldn't've would've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've""".split()
# Each is known by itself with any one apostrophe left out. The official list has one misprint, which is kept.
CONTRACTIONS = {word[:k] + word[k + 1:]: word for word in CONTRACTIONS for k in range(len(word)) if word[k] == "'"}
CONTRACTIONS["somebody'd"] = "somebodyd"


@functools.lru_cache(maxsize=2 ** 20)
def normal_answer(text):
    """An answer as VQA compares it: without punctuation and articles, small numbers as digits, contractions with their
    apostrophes. A mark that touches a blank goes; any other becomes a blank, but if the answer has a comma between
    digits, all marks go. A period goes where no digit follows. Apostrophes and colons stay."""
    marks = ';/[]"{}()=+\\_-><@`,?!'
    goes = {mark: re.search(r"\d,\d", text) or f"{mark} " in text or f" {mark}" in text for mark in marks}
    text = "".join(letter if letter not in goes else "" if goes[letter] else " " for letter in text)
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_score(answer, truths):
    """How right an answer is, 0 to 1, by the answers of people, usually ten (Antol et al., arXiv 1505.00468): one
    third for each person who says the same, at most 1, and this averaged over all choices that leave out one person.

    As the official program does, answers are normalised only where people differ."""
    answer, *truths = (re.sub(r"[\n\t]", " ", text).strip() for text in (answer, *truths))
    if len(set(truths)) > 1:
        answer, *truths = map(normal_answer, (answer, *truths))
    n, same = len(truths), sum(truth.lower() == answer.lower() for truth in truths)
    return (same * min(1, (same - 1) / 3) + (n - same) * min(1, same / 3)) / n


# ---------------------------------------------------------------- POPE, MME: yes or no


def pope_says_yes(answer):
    """What POPE's program takes an answer for: no, if the first sentence has the word no, No or not; else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def pope_scores(labels, answers):
    """labels: list of str, "yes" or "no" -> accuracy, precision, recall, f1 (of "yes"), share of yes, all from 0 to 1
    (Li et al., arXiv 2305.10355). A ratio of nothing to nothing is 0."""
    pairs = Counter((label == "yes", pope_says_yes(answer)) for label, answer in zip(labels, answers))
    right, wrong, missed = pairs[True, True], pairs[False, True], pairs[True, False]
    precision, recall = right / max(right + wrong, 1), right / max(right + missed, 1)
    return {"accuracy": (right + pairs[False, False]) / len(labels), "precision": precision, "recall": recall,
            "f1": 2 * precision * recall / max(precision + recall, 1e-9), "yes_ratio": (right + wrong) / len(labels)}


def mme_score(pairs):
    """One task of MME (Fu et al., arXiv 2306.13394): [((truth, answer), (truth, answer))], the two questions about each
    image -> 0 to 200, the per cent of right answers plus the per cent of images with two right answers.

    The first four letters of an answer decide: yes if "yes" is among them, else no if "no" is, else neither."""
    def says(answer):
        start = answer.lower()[:4]
        return next((word for word in ("yes", "no") if word in start), None)

    rights = [[says(answer) == truth.lower() for truth, answer in pair] for pair in pairs]
    return 100 * (np.mean(rights) + np.mean([all(pair) for pair in rights]))


# ---------------------------------------------------------------- captions: tokens, CIDEr-D

ABBREVIATIONS = """
    a.m p.m ph.d adj adm adv al ala alex apr assn assoc asst atty aug ave bldg blvd brig bros calif capt cf cmdr co
    col colo conn corp cos cpl ct dec dept det dr drs elec esq est etc ext feb fla fri ft ga gen gov govs hon inc ind
    insp intl jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs
    ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc prof pres pvt rd rep reps rev rt sen sens sep sept seq
    sfc sgt spc sq sr st ste supt sys tel tenn thu thurs tue tues univ va vs vt wed wis wisc wm wyo"""
ABBREVIATIONS = f"(?i:{'|'.join(map(re.escape, sorted(ABBREVIATIONS.split(), key=len, reverse=True)))})"
TOKEN = re.compile(rf"""
    (?:https?://|www\.)\S*[\w/] | [\w.]+@\w[\w.]*\w | [@#][a-zA-Z]\w*    # addresses, names, tags
  | (?:[a-zA-Z]\.)+[a-zA-Z](?![\w'])\.? | [a-zA-Z]\.(?!\w)               # u.s. and T.
  | {ABBREVIATIONS}\.(?!\w) | (?:Az|La|Pa|Ark|Del|Ill|Ore|Tex|Mass|Miss|Wash)\.(?!\w) | [Nn]o\.(?=\s*\d)
  | \d*(?:[.,:]\d+)+ | (?:(?<!\S)[+-])?\d+(?:[/-]\d+)*(?![\w/-])         # times, numbers, dates
  | '[nN]'(?!\w) | '\d0s | (?<!\d)'\d\d(?!\w) | '(?:em|til|s)(?!\w) | 't(?=is|was) | <[a-zA-Z/][^<>]*>
  | [^\W_]+(?:(?:[./_-]|(?<=[A-Z])&(?=[A-Z])|(?<=[^\W\d])'(?!n')(?=[^\W\d]))[^\W_]+)*  # t-shirt, and/or, AT&T, o'clock
  | [?!]+ | \.\.+ | --+ | \S""", re.VERBOSE)
ENDINGS = re.compile(r"(?i)(.+?)(n't|'s|'m|'re|'ve|'ll|'d)$")  # what follows a word as a token of its own
TWO_WORDS = {"cannot": 3, "gonna": 3, "gotta": 3, "wanna": 3, "gimme": 3, "lemme": 3}  # and where the second begins
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "£": "#", "€": "$"}


def ptb_tokens(caption):
    """A caption -> list of str, its tokens by the rules of the Penn Treebank, in lower case, without punctuation: what
    COCO's evaluation makes of ordinary captions with Stanford's tokenizer (its brackets stay, as -lrb- and -rrb-)."""
    tokens = []
    for token in TOKEN.findall(re.sub("[’‘]", "'", caption)):
        ends = []
        while match := ENDINGS.match(token):
            token, ends = match[1], [match[2], *ends]
        if token.lower().startswith("y'all"):
            tokens, token = [*tokens, "y'"], token[2:]
        cut = TWO_WORDS.get(token.lower(), 0)
        tokens += [part.lower() for part in (token[:cut], token[cut:], *ends) if part]
    mark = re.compile(r"""[.,:;'"`“”–—…?!]|\.\.+|-+""")
    return [BRACKETS.get(token, token) for token in tokens if not mark.fullmatch(token)]


def cider_d(captions, references):
    """CIDEr-D of each image (Vedantam et al., arXiv 1411.5726), 0 to 10. captions: tokens of one caption per image;
    references: per image the tokens of each of people's captions. The score of all is the mean.

    For n from 1 to 4, captions are vectors of their n-grams: how often, times how rare (log of images per images that
    have it in a reference). Cosines of caption and reference, in which no n-gram of the caption counts more than in the
    reference, lowered by a Gaussian (sigma 6) of the difference in length; then the mean over n and references, times
    10. Length is counted in 2-grams, as in the official program."""
    def ngrams(tokens):
        return Counter(tuple(tokens[k:k + n]) for n in range(1, 5) for k in range(len(tokens) - n + 1))

    def vectors(tokens):
        """-> n-gram's weight for each n, their norms, the length"""
        parts = [{}, {}, {}, {}]
        for ngram, count in ngrams(tokens).items():
            parts[len(ngram) - 1][ngram] = count * (total - math.log(max(1, images_with[ngram])))
        return parts, [sum(w * w for w in part.values()) ** 0.5 for part in parts], max(len(tokens) - 1, 0)

    def similarity(a, b):
        penalty = math.exp(-(a[2] - b[2]) ** 2 / (2 * 6 ** 2))
        return penalty * np.mean([sum(min(w, y.get(ngram, 0)) * y.get(ngram, 0) for ngram, w in x.items()) /
                                  (x_norm * y_norm or 1) for x, y, x_norm, y_norm in zip(a[0], b[0], a[1], b[1])])

    images_with = Counter(itertools.chain.from_iterable(set().union(*map(ngrams, texts)) for texts in references))
    total = math.log(len(references))
    return [10 * np.mean([similarity(vector, vectors(text)) for text in texts])
            for vector, texts in zip(map(vectors, captions), references)]


# ---------------------------------------------------------------- any score


def interval(scores):
    """Wilson's 95% interval of a share, from its scores, in per cent. Of scores between 0 and 1 it is a safe one: none
    vary more, with the same mean, than those that are all 0 or 1."""
    z, n = 1.96, max(len(scores), 1)
    p = sum(scores) / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return tuple(100 * min(max((middle + sign * half) / (1 + z * z / n), 0), 1) for sign in (-1, 1))


def mean(name, scores):
    """A score's line, in per cent, and its interval's."""
    low, high = interval(scores)
    return [f"{name} {100 * np.mean(scores):.2f}", f"  95% interval [{low:.2f}, {high:.2f}], {len(scores)} answers"]
