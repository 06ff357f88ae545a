"""What can be said about a demo scene, in English and Chinese: captions, questions, exact answers.

A scene is told from its truth (`demo.world.Scene`), never from its pixels. Conversations
come as `(language, [(question, answer), …], scoring)`, where `scoring` has one entry a turn: the
question type, for captions the facts in their order, and for answers that change when the clip is
played backwards the name of the pair that the forward and the backward question form.
"""

from __future__ import annotations

import re

from demo.objects import COLOURS, ICONS, SHAPES

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

# Two ways to ask each thing; `{x}` is the thing that the question names.
QUESTIONS = {
    "caption": {
        "en": ["Describe the video.", "What happens in this video?"],
        "zh": ["描述这个视频。", "这个视频里发生了什么?"],
    },
    "object": {
        "en": ["What is in the video?", "What do you see?"],
        "zh": ["视频里有什么?", "你看到了什么?"],
    },
    "colour": {
        "en": ["What colour is the {x}?", "Which colour does the {x} have?"],
        "zh": ["{x}是什么颜色?", "{x}是哪种颜色的?"],
    },
    "direction": {
        "en": ["Which way does the {x} move?", "In which direction does the {x} go?"],
        "zh": ["{x}往哪个方向移动?", "{x}朝哪边走?"],
    },
    "motion": {
        "en": ["What does the {x} do?", "What happens to the {x}?"],
        "zh": ["{x}在做什么?", "{x}怎么了?"],
    },
    "two_step": {
        "en": ["What does the {x} do first, and what next?", "Which two things does the {x} do?"],
        "zh": ["{x}先做什么,再做什么?", "{x}做了哪两件事?"],
    },
    "first": {
        "en": ["What moves first?", "Which one is the first to move?"],
        "zh": ["什么先动?", "哪一个最先移动?"],
    },
    "last": {
        "en": ["What moves last?", "Which one is the last to move?"],
        "zh": ["什么后动?", "哪一个最后移动?"],
    },
    "first_way": {
        "en": ["Which way does the first one move?", "Where does the first to move go?"],
        "zh": ["先动的往哪个方向移动?", "最先移动的朝哪边走?"],
    },
    "last_way": {
        "en": ["Which way does the last one move?", "Where does the last to move go?"],
        "zh": ["后动的往哪个方向移动?", "最后移动的朝哪边走?"],
    },
    "count": {
        "en": ["How many {x} are there?", "Count the {x}."],
        "zh": ["有几个{x}?", "数一数{x}。"],
    },
    "total": {
        "en": ["How many things are there in all?", "Count everything."],
        "zh": ["一共有几个东西?", "数一数所有的东西。"],
    },
}
SLOWLY_LEARNT = ("first", "last", "count", "total", "caption")
PRONOUN = {"en": "it", "zh": "它"}


def name(thing, language: str, several: bool = False) -> str:
    """The thing's bare name, such as "red star", "cups" or "红色星星"."""
    if language == "zh":
        return (
            COLOURS[thing.colour][0] + SHAPES[thing.shape] if thing.colour else ICONS[thing.shape]
        )
    noun = f"{thing.colour} {thing.shape}" if thing.colour else thing.shape
    return noun if not several or noun == "fish" else noun + "s"


def an(thing, language: str) -> str:
    """The thing with its indefinite article."""
    noun = name(thing, language)
    return "一个" + noun if language == "zh" else ("an " if noun[0] in "aeiou" else "a ") + noun


def some(thing, number: int, language: str) -> str:
    """The thing with its number: "a cup", "two cups", "两个杯子"."""
    if number == 1:
        return an(thing, language)
    if language == "zh":
        return NUMBERS[number][1] + name(thing, "zh")
    return f"{NUMBERS[number][0]} {name(thing, 'en', several=True)}"


def does(steps: tuple[str, ...], language: str, several: bool = False) -> str:
    """What one does: "moves right, then grows", or "先向右移动,再变大"."""
    if language == "zh":
        verbs = [VERBS[step][2] for step in steps]
        return verbs[0] if len(verbs) == 1 else f"先{verbs[0]},再{verbs[1]}"
    return ", then ".join(VERBS[step][several] for step in steps)


def _describe(scene, language: str) -> str:
    first = scene.actors[0]
    zh = language == "zh"
    if scene.kind in ("single", "two_step"):
        sentence = an(first.thing, language) + ("" if zh else " ") + does(first.steps, language)
    elif scene.kind == "order":
        parts = []
        for actor in in_order(scene):
            step = next(s for s in actor.steps if s != "stay")
            parts.append(an(actor.thing, language) + ("" if zh else " ") + does((step,), language))
        sentence = f"先是{parts[0]},然后{parts[1]}" if zh else f"first {parts[0]}, then {parts[1]}"
    else:
        counted = [some(thing, number, language) for thing, number in counts(scene).items()]
        who = ("和" if zh else " and ").join(counted)
        sentence = (
            who + ("" if zh else " ") + does(first.steps, language, several=len(scene.actors) > 1)
        )
    return sentence + "。" if zh else sentence[0].upper() + sentence[1:] + "."


def in_order(scene) -> list:
    """The actors of an "order" scene, the one that moves first first."""
    return sorted(scene.actors, key=lambda actor: actor.steps[0] == "stay")


def counts(scene) -> dict:
    """How many of each kind stand in the scene, in the order in which they are named."""
    things = [actor.thing for actor in scene.actors]
    return {thing: things.count(thing) for thing in dict.fromkeys(things)}


def _fact_pattern(language: str) -> re.Pattern:
    if language == "zh":
        words = [c[0] for c in COLOURS.values()] + [*SHAPES.values(), *ICONS.values()]
        words += [
            *DIRECTIONS.values(),
            *(v[2] for v in VERBS.values()),
            *(n[1] for n in NUMBERS.values() if n[0] != "one"),
        ]
        return re.compile("|".join(sorted(words, key=len, reverse=True)))
    nouns = [*SHAPES, *ICONS]
    words = [
        *COLOURS,
        *nouns,
        *(noun + "s" for noun in nouns),
        *(n[0] for n in NUMBERS.values() if n[0] != "one"),
        *DIRECTIONS,
    ]
    words += [v[k].split()[0] for m, v in VERBS.items() if m not in DIRECTIONS for k in (0, 1)]
    return re.compile(r"\b(?:" + "|".join(sorted(words, key=len, reverse=True)) + r")\b")


_FACTS = {language: _fact_pattern(language) for language in LANGUAGES}


def facts(sentence: str, language: str) -> list[str]:
    """Objects, colours, numbers and motion words of a caption, in their order."""
    return _FACTS[language].findall(sentence.lower())


def _caption_turn(rng, scene, language: str):
    answer = _describe(scene, language)
    changes = answer != _describe(scene.backwards(), language)
    question = QUESTIONS["caption"][language][rng.integers(2)]
    return question, answer, {"type": "caption", "facts": facts(answer, language)}, changes


def caption(rng, scene) -> list[Conversation]:
    """The scene's caption in both languages."""
    conversations = []
    for language in LANGUAGES:
        question, answer, scoring, _ = _caption_turn(rng, scene, language)
        conversations.append((language, [(question, answer)], [scoring]))
    return conversations


def ask(rng, scene, scored: bool, pair_name: str) -> list[Conversation]:
    """Questions about a scene: every type that fits it, some of them as a talk of two turns.

    For training (`scored=False`) what is learnt last is asked in both languages; for scoring each
    question in one, so that the two languages share them evenly.
    """
    makers = _makers(scene)
    backwards = dict(_makers(scene.backwards()))
    conversations: list[Conversation] = []
    for kind, make in makers:
        both = not scored and (kind in SLOWLY_LEARNT or rng.random() < 0.25)
        languages = LANGUAGES if both else (LANGUAGES[rng.integers(2)],)
        for language in languages:
            wording = int(rng.integers(2))
            if kind == "caption":
                question, answer, entry, changes = _caption_turn(rng, scene, language)
            else:
                question, answer, entry = make(language, wording, False)
                changes = (
                    kind in backwards and backwards[kind](language, wording, False)[1] != answer
                )
            if changes and kind != "caption":
                entry["pair"] = f"{pair_name}-{kind}-{language}"
            conversations.append((language, [(question, answer)], [entry]))
    if scene.kind == "single" and rng.random() < 0.4:
        # Two turns: what it is, then what "it" does. The second question names nothing.
        language, wording = LANGUAGES[rng.integers(2)], int(rng.integers(2))
        turns = [
            make(language, wording, True) for kind, make in makers if kind in ("object", "motion")
        ]
        conversations.append((language, [turn[:2] for turn in turns], [turn[2] for turn in turns]))
    return conversations


def _makers(scene) -> list[tuple]:
    """Kinds of question, each with (language, wording, pronoun?) → question, answer, scoring."""
    first = scene.actors[0]
    makers = [("caption", None)]
    add = lambda kind, *rest: makers.append((kind, _maker(kind, *rest)))  # noqa: E731
    if scene.kind == "single":
        step = first.steps[0]
        add("object", "object", None, lambda lang: an(first.thing, lang))
        kind = step if step in ("spin", "stay") else "motion"
        add("motion", kind, first.thing, lambda lang: _it(first.steps, lang))
        if step in DIRECTIONS:
            add("direction", "direction", first.thing, lambda lang: _direction(step, lang))
        if first.thing.colour:
            makers.append(("colour", _colour_maker(first.thing)))
    elif scene.kind == "two_step":
        add("object", "object", None, lambda lang: an(first.thing, lang))
        add("two_step", "two_step", first.thing, lambda lang: _it(first.steps, lang))
    elif scene.kind == "order":
        early, late = in_order(scene)
        add("first", "order", None, lambda lang: _the(early.thing, lang))
        add("last", "order", None, lambda lang: _the(late.thing, lang))
        for kind, actor in (("first_way", early), ("last_way", late)):
            step = next(s for s in actor.steps if s != "stay")
            add(kind, "direction", None, lambda lang, step=step: _direction(step, lang))
    else:
        total = len(scene.actors)
        if len(counts(scene)) == 1:
            add("count", f"count_{total}", first.thing, lambda lang: NUMBERS[total][lang == "zh"])
        add("total", f"count_{total}", None, lambda lang: NUMBERS[total][lang == "zh"])
    return makers


def _maker(kind: str, scored_as: str, thing, answer):
    def make(language: str, wording: int, pronoun: bool):
        text = QUESTIONS[kind][language][wording]
        if thing is not None:
            named = name(thing, language, several=kind == "count")
            named = PRONOUN[language] if pronoun else named
            text = text.replace("the {x}", "{x}") if pronoun else text
            text = text.replace("{x}", named)
        return text, answer(language), {"type": scored_as}

    return make


def _colour_maker(thing):
    def make(language: str, wording: int, pronoun: bool):
        # Only the shape is named: with the colour in the question there would be nothing to see.
        shape = SHAPES[thing.shape] if language == "zh" else thing.shape
        answer = COLOURS[thing.colour][0] if language == "zh" else thing.colour
        return (
            QUESTIONS["colour"][language][wording].replace("{x}", shape),
            answer,
            {"type": "colour"},
        )

    return make


def _it(steps: tuple[str, ...], language: str) -> str:
    return "它" + does(steps, "zh") if language == "zh" else "it " + does(steps, "en")


def _direction(step: str, language: str) -> str:
    return DIRECTIONS[step] if language == "zh" else step


def _the(thing, language: str) -> str:
    return name(thing, language) if language == "zh" else "the " + name(thing, language)
