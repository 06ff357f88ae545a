"""A checkpoint leaves for transformers, answers there as it does here, and comes back unchanged."""

import filecmp
import json
import os
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.conversation import encode, left_pad, placeholder_ids
from dataset.video import FrameTransform, read_frames
from model.checkpoint import load_language_model, load_video_language_model, save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import generate
from model.minimind import MiniMind
from model.tokenizer import OURS
from model.vision_tower import VisionTower
from scripts.export_hf import main
from tests.clips import make_clip
from tests.commands import run
from tests.model.ancestors import add_projector, cinego_2025, old_state

TOKENIZER = "model/text_tokenizer"
QUESTIONS = ["<video>\nWhat happens?", "<video>\n红色的圆往哪里走? Say it in a few words.", "Hello"]

# Runs where nothing of this repository can be imported, and the network is off.
FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoProcessor


def examine(directory, asked):
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)

    def turns(clip, question):
        parts = [{"type": "video", "path": clip}] if clip else []
        text = question.removeprefix("<video>\\n")
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    def inputs(conversations):
        return processor.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )

    def answers(batch, **how):
        ids = model.generate(**batch, **({"do_sample": False, "max_new_tokens": 12} | how))
        return ids[:, batch["input_ids"].shape[1] :].tolist()

    conversations = [turns(*pair) for pair in asked]
    batch, alone = inputs(conversations), [inputs(each) for each in conversations]
    text = processor.apply_chat_template(conversations, add_generation_prompt=True)
    clips = [clip for clip, _ in asked if clip]
    found = {
        "logits": [model(**row).logits[0, -1].tolist() for row in alone],
        "alone": [answers(row)[0] for row in alone],
        "batch": answers(batch),
        "from text": answers(processor(text=text, videos=clips)),
        "beams": answers(batch, num_beams=3),
        "beams alone": [answers(row, num_beams=3)[0] for row in alone],
    }
    for name in ("sampled", "sampled again"):
        torch.manual_seed(0)
        found[name] = answers(batch, do_sample=True, num_return_sequences=2)
    row = alone[0]
    labels = torch.where(row["visual_mask"], -100, row["input_ids"])
    loss = model.train()(**row, labels=labels).loss
    loss.backward()
    learns = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    model.eval()
    for part in (model, processor):
        part.save_pretrained(directory + "-again")
    return found | {"loss": float(loss), "learns": sorted(learns)}


asked = json.load(sys.stdin)
json.dump([examine(directory, asked) for directory in sys.argv[1:]], sys.stdout)
"""


def examine_in_a_fresh_process(root, asked, *directories):
    """What FRESH finds in each directory."""
    (root / "fresh.py").write_text(FRESH)
    alone = {"cwd": root, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}
    typed = json.dumps(asked, default=str)
    return json.loads(
        run(sys.executable, "-I", "fresh.py", *directories, typed=typed, **alone).stdout
    )


OF_OURS = {"lineage": {"tokenizer": OURS}}  # what an untrained model is taken to be


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tower):
    """A small model, its export, questions, and what a fresh process made of the export."""
    root = tmp_path_factory.mktemp("export")
    torch.manual_seed(1)
    # With small weights every video would get the same answer.
    large = {"initializer_range": 0.3, "embedding_std": 0.4}
    language_model = LanguageModelConfig(6400, 64, 2, 4, 2, qk_norm=True, rope_theta=1e4, **large)
    ids = placeholder_ids(AutoTokenizer.from_pretrained(TOKENIZER))
    config = CinegoConfig(language_model, vision_hidden_size=32, image_ids=ids)
    tower = VisionTower.from_pretrained(tiny_tower).fingerprint()
    meta = {"training": {"num_frames": 4}, "lineage": {"vision_tower": tower, "tokenizer": OURS}}
    save_model(root / "vlm.pth", Cinego(config), meta)
    main([str(root / "vlm.pth"), str(root / "hub-v1.0"), "--vision_path", str(tiny_tower)])
    clips = [make_clip(root / f"{shade}.mp4", shade) for shade in (40, 200)]
    asked = list(zip([*clips, None], QUESTIONS, strict=True))
    return root, tiny_tower, asked, *examine_in_a_fresh_process(root, asked, "hub-v1.0")


def our_answer(path, tower, clip, question):
    """(logits after the prompt, the most probable tokens from there on) by our own code."""
    model = load_video_language_model(path, tower)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = [model.config.tokens_per_visual(4)] * bool(clip)
    turns = [{"role": "user", "content": question}]
    inputs = left_pad([encode(tokenizer, turns, lengths, add_generation_prompt=True)])
    if clip:
        frames = read_frames(clip, num_frames=4).frames
        inputs["pixel_values"] = FrameTransform.from_pretrained(tower)(frames)
        inputs["frames_per_visual"] = [4]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    return logits, generate(model, inputs, 12, tokenizer.eos_token_id)[0]


def until_end(rows, end=2):  # <|im_end|>
    return [row[: row.index(end)] if end in row else row for row in rows]


def test_a_fresh_process_answers_as_we_do_and_samples_and_trains(world):
    root, tower, asked, found = world
    ours = [our_answer(root / "vlm.pth", tower, *pair) for pair in asked]
    logits, answers = map(list, zip(*ours, strict=True))
    theirs = torch.tensor(found["logits"])
    torch.testing.assert_close(theirs, torch.stack(logits), atol=1e-4, rtol=0)
    assert answers[0] != answers[1] and all(answers)  # the video is seen
    for way in ("alone", "batch", "from text"):
        assert until_end(found[way]) == answers, way
    # Beams, sampling and training.
    assert until_end(found["beams"]) == until_end(found["beams alone"])
    assert found["beams"] != found["batch"]  # three beams find a better answer to something
    assert found["sampled"] == found["sampled again"]
    assert len(found["sampled"]) == 6 and found["sampled"][0] != found["sampled"][1]
    assert 0 < found["loss"] < 100 and found["learns"] == ["cinego"]  # the tower is frozen


def test_saved_again_or_brought_back_whole_or_the_language_model_alone_it_is_the_same(
    world, tmp_path
):
    root, *_ = world
    first, again = (root / name for name in ("hub-v1.0", "hub-v1.0-again"))
    names = sorted(os.listdir(first))
    assert names == sorted(set(os.listdir(again)) - {"__pycache__"})
    assert filecmp.cmpfiles(first, again, names, shallow=False)[0] == names
    assert str(root) not in (first / "config.json").read_text()
    main([str(again), str(tmp_path / "vlm.pth")])
    for name in ("vlm.pth", "vlm.json"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()
    main([str(first), str(tmp_path / "lm"), "--llm_only"])
    whole = load_video_language_model(root / "vlm.pth").language_model
    ids = torch.randint(0, 6400, (1, 9))
    assert torch.equal(load_language_model(tmp_path / "lm")(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("family, settings", [("Llama", {}), ("Qwen3", {"qk_norm": True})])
def test_a_language_model_alone_is_of_a_family_of_transformers(tmp_path, family, settings):
    torch.manual_seed(0)
    config = LanguageModelConfig(6400, 48, 2, 4, 2, embedding_std=0.3, **settings)
    model = MiniMind(config).eval()
    save_model(tmp_path / "lm.pth", model, {"step": 7, **OF_OURS})
    main([str(tmp_path / "lm.pth"), str(tmp_path / "lm")])

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert type(theirs).__name__ == f"{family}ForCausalLM"
    ids = torch.randint(0, 6400, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "lm").eos_token_id == theirs.config.eos_token_id

    theirs.save_pretrained(tmp_path / "again")
    main([str(tmp_path / "lm"), str(tmp_path / "back.pth")])
    names = ("config.json", "generation_config.json", "model.safetensors")
    pairs = [(f"again/{name}", f"lm/{name}") for name in names]
    for back, first in (*pairs, ("back.pth", "lm.pth"), ("back.json", "lm.json")):
        assert (tmp_path / back).read_bytes() == (tmp_path / first).read_bytes()


# ---- ancestors, and other towers


def write_tower(directory, family, side, patch, preprocessor):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": side, "patch_size": patch}
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}VisionConfig")(**sizes)
    getattr(transformers, f"{family}VisionModel")(config).save_pretrained(directory)
    about = preprocessor | {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(about))
    return directory


def test_ancestors_and_other_towers_leave_as_whole_models(tmp_path):
    """MiniMind-V 2024 and Cinego 2025, from their own files, and ours on SigLIP (without CLS)."""
    minimind_v = old_state(vocab=6400, kv_heads=4)
    add_projector(minimind_v, "vision_proj.vision_proj.0", 32)
    large = {"initializer_range": 0.3, "embedding_std": 0.3}
    language_model = LanguageModelConfig(6400, 64, 2, 8, 2, **large)
    on_siglip = Cinego(CinegoConfig(language_model, vision_hidden_size=32, tokens_per_frame=9))
    crop = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    squash = {"size": {"height": 48, "width": 48}}
    models = {
        "minimind_v": (minimind_v, ("CLIP", 224, 32), crop),
        "cinego": (cinego_2025(32, vocab=6400)[0], ("CLIP", 224, 16), crop),
        "on_siglip": (on_siglip.state_dict(), ("Siglip", 48, 16), squash),
    }
    clip, towers = make_clip(tmp_path / "a.mp4", 40), {}
    for name, (state, shape, preprocessor) in models.items():
        towers[name] = write_tower(tmp_path / f"{name}_tower", *shape, preprocessor)
        torch.save(state, tmp_path / f"{name}.pth")
        paths = [str(tmp_path / f"{name}.pth"), str(tmp_path / name)]
        main([*paths, "--vision_path", str(towers[name]), "--num_frames=4", "--accept_tokenizer"])

    asked = [(clip, QUESTIONS[0])]
    found = examine_in_a_fresh_process(tmp_path, asked, *(tmp_path / name for name in models))
    for name, theirs in zip(models, found, strict=True):
        _, ours = our_answer(tmp_path / f"{name}.pth", towers[name], clip, QUESTIONS[0])
        assert until_end(theirs["alone"]) == [ours] and len(set(ours)) > 3
        back = tmp_path / f"{name}_back.pth"  # under our names from here on
        main([str(tmp_path / name), str(back)])
        assert our_answer(back, towers[name], clip, QUESTIONS[0])[1] == ours


def test_what_cannot_be_written_says_why(world, tiny_tower, tmp_path):
    root, *_ = world
    vlm, tower = root / "vlm.pth", ["--vision_path", tiny_tower]
    config = LanguageModelConfig(6400, 16, 1, 2, 2, num_experts=2)
    save_model(root / "experts.pth", MiniMind(config), OF_OURS)
    for reason, *words in (
        ("there already", vlm, root / "hub-v1.0", *tower),
        ("no vision tower in", vlm, tmp_path / "x", "--vision_path", tmp_path),
        ("_path y: no such folder", vlm, tmp_path / "x", *tower, "--tokenizer_path", "y"),
        ("mixture of experts .* convert it to a .pth", root / "experts.pth", tmp_path / "x"),
    ):
        with pytest.raises(ValueError, match=reason):
            main([*map(str, words)])
    assert not os.listdir(tmp_path)
