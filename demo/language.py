"""What can be said about a demo scene, in English and Chinese: captions, questions, exact answers.

All is derived from the scene's truth, never from its pixels. Conversations come as `(language,
[(question, answer), …], scoring)`, where `scoring` has one entry a turn: the question's type, for
captions the facts in their order, and for answers that change when the clip is played backwards the
name of the pair that the forward and the backward question form.
"""

import re

import numpy as np

from demo.objects import COLOURS, ICONS, SHAPES, Object
from demo.scene import Scene

LANGUAGES = ("en", "zh")
Conversation = tuple[str, list[tuple[str, str]], list[dict]]

VERBS = {  # motion: (English for one, English for several, Chinese)
    "left": ("moves left", "move left", "向左移动"),
    "right": ("moves right", "move right", "向右移动"),
    "up": ("moves up", "move up", "向上移动"),
    "down": ("moves down", "move down", "向下移动"),
    "grow": ("grows", "grow", "变大"),
    "shrink": ("shrinks", "shrink", "变小"),
    "spin": ("spins", "spin", "旋转"),
    "blink": ("blinks", "blink", "闪烁"),
    "stay": ("stays still", "stay still", "不动"),
}
DIRECTIONS = {"left": "向左", "right": "向右", "up": "向上", "down": "向下"}
NUMBERS = {1: ("one", "一个"), 2: ("two", "两个"), 3: ("three", "三个"), 4: ("four", "四个")}

# Two ways to ask each question; `{x}` is the object that it names.
QUESTIONS = {
    "en": {
        "caption": ["Describe the video.", "What happens in this video?"],
        "object": ["What is in the video?", "What do you see?"],
        "colour": ["What colour is the {x}?", "Which colour does the {x} have?"],
        "direction": ["Which way does the {x} move?", "In which direction does the {x} go?"],
        "motion": ["What does the {x} do?", "What happens to the {x}?"],
        "two_step": [
            "What does the {x} do first, and what next?",
            "Which two things does the {x} do?",
        ],
        "first": ["What moves first?", "Which one is the first to move?"],
        "last": ["What moves last?", "Which one is the last to move?"],
        "first_way": ["Which way does the first one move?", "Where does the first to move go?"],
        "last_way": ["Which way does the last one move?", "Where does the last to move go?"],
        "count": ["How many {x} are there?", "Count the {x}."],
        "total": ["How many things are there in all?", "Count everything."],
    },
    "zh": {
        "caption": ["描述这个视频。", "这个视频里发生了什么?"],
        "object": ["视频里有什么?", "你看到了什么?"],
        "colour": ["{x}是什么颜色?", "{x}是哪种颜色的?"],
        "direction": ["{x}往哪个方向移动?", "{x}朝哪边走?"],
        "motion": ["{x}在做什么?", "{x}怎么了?"],
        "two_step": ["{x}先做什么,再做什么?", "{x}做了哪两件事?"],
        "first": ["什么先动?", "哪一个最先移动?"],
        "last": ["什么后动?", "哪一个最后移动?"],
        "first_way": ["先动的往哪个方向移动?", "最先移动的朝哪边走?"],
        "last_way": ["后动的往哪个方向移动?", "最后移动的朝哪边走?"],
        "count": ["有几个{x}?", "数一数{x}。"],
        "total": ["一共有几个东西?", "数一数所有的东西。"],
    },
}
LEARNT_LAST = ("first", "last", "count", "total", "caption")
PRONOUN = {"en": "it", "zh": "它"}


# ---- words


def name_of(item: Object, language: str, plural: bool = False) -> str:
    """The object's bare name, such as "red star", "cups" or "红色星星"."""
    if language == "zh":
        return COLOURS[item.colour][0] + SHAPES[item.shape] if item.colour else ICONS[item.shape]
    noun = f"{item.colour} {item.shape}" if item.colour else item.shape
    return noun if not plural or noun == "fish" else noun + "s"


def with_article(item: Object, language: str, definite: bool = False) -> str:
    noun = name_of(item, language)
    if language == "zh":
        return noun if definite else "一个" + noun
    return ("the " if definite else "an " if noun[0] in "aeiou" else "a ") + noun


def with_number(item: Object, number: int, language: str) -> str:
    """The object with its number: "a cup", "two cups", "两个杯子"."""
    if number == 1:
        return with_article(item, language)
    if language == "zh":
        return NUMBERS[number][1] + name_of(item, "zh")
    return f"{NUMBERS[number][0]} {name_of(item, 'en', plural=True)}"


def predicate(steps: tuple[str, ...], language: str, plural: bool = False) -> str:
    """What the subject does: "moves right, then grows", or "先向右移动,再变大"."""
    if language == "zh":
        verbs = [VERBS[step][2] for step in steps]
        return verbs[0] if len(verbs) == 1 else f"先{verbs[0]},再{verbs[1]}"
    return ", then ".join(VERBS[step][plural] for step in steps)


def describe(scene: Scene, language: str) -> str:
    """The caption: one sentence that holds all that is asked about the scene."""
    zh = language == "zh"
    space, first = "" if zh else " ", scene.actors[0]
    if scene.type == "order":
        clauses = [
            with_article(actor.object, language) + space + predicate((actor.motion,), language)
            for actor in scene.in_order()
        ]
        sentence = "先是{},然后{}" if zh else "first {}, then {}"
        sentence = sentence.format(*clauses)
    else:
        subjects = [with_number(item, n, language) for item, n in scene.counts().items()]
        subject = ("和" if zh else " and ").join(subjects)
        sentence = subject + space + predicate(first.steps, language, len(scene.actors) > 1)
    return sentence + "。" if zh else sentence[0].upper() + sentence[1:] + "."


def _fact_pattern(language: str) -> re.Pattern:
    zh = language == "zh"
    words = [*(SHAPES | ICONS | DIRECTIONS).values()] if zh else [*SHAPES, *ICONS, *DIRECTIONS]
    words += [chinese for chinese, _ in COLOURS.values()] if zh else [*COLOURS]
    words += [NUMBERS[n][zh] for n in (2, 3, 4)]
    # English motions are named by their verbs, but for "moves": a direction says more.
    words += [verb for *_, verb in VERBS.values()] if zh else [*VERBS]
    pattern = "|".join(sorted(words, key=len, reverse=True))
    return re.compile(pattern if zh else rf"\b(?:{pattern})s?\b")


_FACTS = {language: _fact_pattern(language) for language in LANGUAGES}


def facts(sentence: str, language: str) -> list[str]:
    """Objects, colours, numbers and motion words of a caption, in their order."""
    return _FACTS[language].findall(sentence.lower())


# ---- conversations


def answers(scene: Scene, language: str) -> dict[str, tuple[str, str, str]]:
    """All questions that fit the scene, by their key in QUESTIONS: the type that they are scored
    as, the object that they name, and the answer."""
    first = scene.actors[0]
    named = name_of(first.object, language)
    it_does = PRONOUN[language] + ("" if language == "zh" else " ")
    it_does += predicate(first.steps, language)

    def way(motion: str) -> str:
        return DIRECTIONS[motion] if language == "zh" else motion

    found = {"caption": ("caption", "", describe(scene, language))}
    if scene.type in ("single", "two_step"):
        found["object"] = ("object", "", with_article(first.object, language))
    if scene.type == "single":
        step = first.steps[0]
        found["motion"] = (step if step in ("spin", "stay") else "motion", named, it_does)
        if step in DIRECTIONS:
            found["direction"] = ("direction", named, way(step))
        if (colour := first.object.colour) is not None:
            # Only the shape is named, or the question would hold its answer.
            zh, shape = language == "zh", first.object.shape
            colour = COLOURS[colour][0] if zh else colour
            found["colour"] = ("colour", SHAPES[shape] if zh else shape, colour)
    elif scene.type == "two_step":
        found["two_step"] = ("two_step", named, it_does)
    elif scene.type == "order":
        order = dict(zip(("first", "last"), scene.in_order(), strict=True))
        for which, actor in order.items():
            found[which] = ("order", "", with_article(actor.object, language, definite=True))
        for which, actor in order.items():
            found[f"{which}_way"] = ("direction", "", way(actor.motion))
    else:
        total = len(scene.actors)
        number = NUMBERS[total][language == "zh"]
        if len(scene.counts()) == 1:
            plural = name_of(first.object, language, plural=True)
            found["count"] = (f"count_{total}", plural, number)
        found["total"] = (f"count_{total}", "", number)
    return found


def make_turn(
    scene: Scene, key: str, language: str, wording: int, pronoun: bool = False
) -> tuple[str, str, dict]:
    """Question, answer and scoring entry; with `pronoun` the question names nothing but "it"."""
    scored_as, named, answer = answers(scene, language)[key]
    question = QUESTIONS[language][key][wording]
    if pronoun:
        question, named = question.replace("the {x}", "{x}"), PRONOUN[language]
    entry = {"type": scored_as}
    if key == "caption":
        entry["facts"] = facts(answer, language)
    return question.replace("{x}", named), answer, entry


def make_captions(rng: np.random.Generator, scene: Scene) -> list[Conversation]:
    """The scene's caption in both languages."""
    turns = [(lang, make_turn(scene, "caption", lang, rng.integers(2))) for lang in LANGUAGES]
    return [(lang, [(question, answer)], [entry]) for lang, (question, answer, entry) in turns]


def make_questions(
    rng: np.random.Generator, scene: Scene, training: bool, pair_name: str
) -> list[Conversation]:
    """Questions about a scene: every type that fits it, some of them as a talk of two turns.

    For training what is learnt last is asked in both languages; for scoring each question in one,
    so that the two languages share them evenly.
    """
    backwards = {language: answers(scene.backwards(), language) for language in LANGUAGES}
    conversations: list[Conversation] = []
    for key in answers(scene, "en"):
        both = training and (key in LEARNT_LAST or rng.random() < 0.25)
        for language in LANGUAGES if both else (LANGUAGES[rng.integers(2)],):
            wording = rng.integers(2)
            if key == "caption":
                wording = rng.integers(2)  # once more: a seed means the same words as ever
            question, answer, entry = make_turn(scene, key, language, wording)
            reverse = backwards[language].get(key)
            if key != "caption" and reverse is not None and reverse[2] != answer:
                entry["pair"] = f"{pair_name}-{key}-{language}"
            conversations.append((language, [(question, answer)], [entry]))
    if scene.type == "single" and rng.random() < 0.4:
        # Two turns: what it is, then what "it" does.
        language, wording = LANGUAGES[rng.integers(2)], rng.integers(2)
        turns = [make_turn(scene, key, language, wording, True) for key in ("object", "motion")]
        conversations.append((language, [turn[:2] for turn in turns], [turn[2] for turn in turns]))
    return conversations
