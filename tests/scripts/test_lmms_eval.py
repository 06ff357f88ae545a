"""The task that lmms-eval runs scores as eval.py does. lmms-eval itself lives elsewhere."""

import importlib.util
import json
import re
import tomllib
from pathlib import Path

from scripts.convert.common import one_turn

FOLDER = Path(__file__).parents[2] / "scripts/lmms_eval"


def load_utils():
    spec = importlib.util.spec_from_file_location("utils", FOLDER / "tasks/utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines() -> list[dict]:
    """A caption; one question about a clip and its reversed twin."""

    def line(question, answer, **scoring):
        about = {"video": "clips/a.mp4", "language": "en", "scoring": [scoring]}
        return about | {"conversations": one_turn(question, answer)}

    return [
        line("Describe it.", "a red car moves up", type="caption", facts=["red", "car", "up"]),
        line("Which way?", "left", type="direction", pair="a"),
        line("Which way?", "right", type="direction", pair="a"),
    ]


def test_a_figure_of_each_kind():
    utils = load_utils()

    def figures(answers: list[str]) -> list[float]:
        scored = [utils.score(doc, [text]) for doc, text in zip(lines(), answers, strict=True)]
        names = ("all", "reversed", "captions")
        return [getattr(utils, f"mean_{name}")([each[name] for each in scored]) for name in names]

    assert figures(["A red car moves up.", "Left", "right."]) == [1, 1, 1]
    assert figures(["a red car", "left", "left"]) == [0.5, 0, 2 / 3]


def test_a_question_keeps_its_video_and_loses_its_tag():
    utils, doc = load_utils(), lines()[1]
    (message,) = utils.messages(doc, {"images_path": "data"})
    assert message["content"] == [
        {"type": "video", "url": "data/clips/a.mp4"},
        {"type": "text", "text": "Which way?"},
    ]
    assert utils.target(doc) == "left"
    json.dumps(message)  # as the API sends it


def test_the_task_calls_only_what_there_is():
    task, utils = (FOLDER / "tasks/cinego_questions.yaml").read_text(), load_utils()
    called = re.findall(r"!function utils\.(\w+)", task)
    assert len(called) == 8 and all(callable(getattr(utils, name)) for name in called)
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())
    (where,) = project["project"]["entry-points"]["lmms_eval.models"].values()
    module, _, name = where.partition(":")
    assert f"\n{name} = " in (FOLDER / f"{module}.py").read_text()
