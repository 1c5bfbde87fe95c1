"""VQA accuracy as in the VQA challenge (https://visualqa.org/evaluation.html)."""

import re
from collections.abc import Sequence

_NUMBERS = {w: str(n) for n, w in enumerate("zero one two three four five six seven eight nine ten".split())}
_NUMBERS["none"] = "0"
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")  # not the point of a decimal fraction
_DIGITS_COMMA = re.compile(r"\d,\d")

# What the challenge mends: each of these with one apostrophe left out. Words like "well" and "shed" are not touched.
_CONTRACTIONS = {
    full[:i] + full[i + 1 :]: full
    for full in (
        "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
        "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
        "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
        "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
        "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
        "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
        "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
        "you'll you're you've"
    ).split()
    for i, letter in enumerate(full)
    if letter == "'"
}


def normalize_answer(text: str) -> str:
    """Lower case, without articles and most punctuation, number words as digits, apostrophes put back."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    joined = text
    for mark in _PUNCTUATION:
        # The challenge drops a mark that touches a space, or any mark where there is a number like 1,000.
        drop = f"{mark} " in text or f" {mark}" in text or _DIGITS_COMMA.search(text)
        joined = joined.replace(mark, "" if drop else " ")
    words = (_NUMBERS.get(word, word) for word in _PERIOD.sub("", joined).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Score of one prediction, 0 to 1.

    With four or more human answers: the challenge's, the mean over the answers left out one by one of
    min(1, equal others / 3). With fewer, which that cannot score in full: 1 if equal to any of them.
    """
    predicted = normalize_answer(prediction)
    equal = [normalize_answer(answer) == predicted for answer in answers]
    if len(answers) < 4:
        return float(any(equal))
    total = sum(equal)
    return sum(min(1.0, (total - own) / 3) for own in equal) / len(equal)
