"""The measures of the published benchmarks, as pure functions. What each takes and gives, and whose definition it
follows, its docstring says. Where an official program has an oddity that changes a score, so has this file, and says
it.
"""
import functools
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
