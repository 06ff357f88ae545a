"""A checkpoint leaves for transformers, answers there as it does here, and comes back unchanged."""

import filecmp
import json
import os
import subprocess
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
from scripts.export_hf import image_processor, main
from tests.clips import make_clip
from tests.model.ancestors import add_projector, cinego_2025, old_state

TOKENIZER = "model/text_tokenizer"
TOKENS = 12
QUESTIONS = ["<video>\nWhat happens?", "<video>\n红色的圆往哪里走? Say it in a few words.", "Hello"]

# Runs where nothing of this repository can be imported, and the network is off.
FRESH = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

directory, again, clips = sys.argv[1], sys.argv[2], sys.argv[3:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
asked = json.load(sys.stdin)


def turns(row):
    parts = [{"type": "video", "path": clips[row]}] if row < len(clips) else []
    text = asked[row].removeprefix("<video>\\n")
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def inputs(conversations):
    return processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True
    )


def answers(batch, **how):
    ids = model.generate(**batch, **({"do_sample": False, "max_new_tokens": TOKENS} | how))
    return ids[:, batch["input_ids"].shape[1] :].tolist()


TOKENS = 12
batch = inputs([turns(row) for row in range(3)])
alone = [inputs(turns(row)) for row in range(3)]
rendered = [processor.apply_chat_template(turns(r), add_generation_prompt=True) for r in range(3)]
found = {
    "logits": [model(**row).logits[0, -1].tolist() for row in alone],
    "alone": [answers(row)[0] for row in alone],
    "batch": answers(batch),
    "from text": answers(processor(text=rendered, videos=clips)),
    "no cache": answers(batch, use_cache=False),
    "top 1": answers(batch, do_sample=True, top_k=1),
    "beams": answers(batch, num_beams=3),
    "beams, no cache": answers(batch, num_beams=3, use_cache=False),
    "beams alone": [answers(row, num_beams=3)[0] for row in alone],
}
for name in ("sampled", "sampled again"):
    torch.manual_seed(0)
    found[name] = answers(batch, do_sample=True, num_return_sequences=2)
# One token read after the cache of the prompt, as a chat goes on.
row = alone[0]
first = model(**row, use_cache=True)
token = first.logits[:, -1:].argmax(-1)
found["second by hand"] = int(
    model(token, past_key_values=first.past_key_values).logits[0, -1].argmax()
)
labels = torch.where(row["visual_mask"], -100, row["input_ids"])
loss = model.train()(**row, labels=labels).loss
loss.backward()
found["loss"] = float(loss)
found["learns"] = sorted({n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad})
model.eval()
model.save_pretrained(again)
processor.save_pretrained(again)
json.dump(found, sys.stdout)
"""


# The same, and no more than an answer of each directory about one clip.
ANSWER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoProcessor

clip, *directories = sys.argv[1:]
found = []
for directory in directories:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    content = [{"type": "video", "path": clip}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True,
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    found.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
json.dump(found, sys.stdout)
"""


def in_a_fresh_process(root, script, *arguments, stdin=""):
    """What `script` prints as JSON, where nothing of this repository can be imported."""
    (root / "fresh.py").write_text(script)
    run = subprocess.run(
        [sys.executable, "-I", "fresh.py", *map(str, arguments)],
        input=stdin,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")},
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


OF_OURS = {"lineage": {"tokenizer": OURS}}  # what an untrained model is taken to be


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_tower):
    """A small model, its export, and what a fresh process made of that."""
    root = tmp_path_factory.mktemp("convert")
    tower = VisionTower.from_pretrained(tiny_tower)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(1)
    language_model = LanguageModelConfig(
        len(tokenizer), 64, 2, 4, 2, qk_norm=True, rope_theta=1e4, embedding_std=0.4
    )
    language_model.initializer_range = 0.3  # or every video would get the same answer
    config = CinegoConfig(
        language_model, vision_hidden_size=32, image_ids=placeholder_ids(tokenizer)
    )
    lineage = {"vision_tower": tower.fingerprint(), "tokenizer": OURS}
    meta = {"training": {"num_frames": 4}, "lineage": lineage}
    save_model(root / "vlm.pth", Cinego(config), meta)
    clips = [make_clip(root / f"{shade}.mp4", shade) for shade in (40, 200)]
    main([str(root / "vlm.pth"), str(root / "hub-v1.0"), "--vision_path", str(tiny_tower)])

    found = in_a_fresh_process(
        root, FRESH, "hub-v1.0", "again", *clips, stdin=json.dumps(QUESTIONS)
    )
    return root, tiny_tower, tokenizer, clips, found


def our_answer(path, tower, question, clip=None, num_frames=4, end=None):
    """(logits after the prompt, the most probable tokens from there on) by our own code."""
    model = load_video_language_model(path, tower)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    lengths = [model.config.tokens_per_visual(num_frames)] * bool(clip)
    turns = [{"role": "user", "content": question}]
    inputs = left_pad([encode(tokenizer, turns, lengths, add_generation_prompt=True)])
    if clip:
        frames = read_frames(clip, num_frames=num_frames).frames
        inputs["pixel_values"] = FrameTransform.from_pretrained(tower)(frames)
        inputs["frames_per_visual"] = [num_frames]
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    end = tokenizer.eos_token_id if end is None else end
    return logits, generate(model, inputs, TOKENS, end)[0]


@pytest.fixture(scope="module")
def ours(world):
    """Logits and answers to each question, asked alone."""
    root, tower, _, clips, _ = world
    asked = zip(QUESTIONS, [*clips, None], strict=True)
    logits, answers = zip(
        *(our_answer(root / "vlm.pth", tower, question, clip) for question, clip in asked),
        strict=True,
    )
    return torch.stack(logits), list(answers)


def until_end(rows, tokenizer):
    end = tokenizer.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in rows]


def test_a_fresh_process_answers_as_we_do(world, ours):
    *_, tokenizer, _, found = world
    logits, answers = ours
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-4, rtol=0)
    assert answers[0] != answers[1] and all(answers)  # the video is seen
    assert until_end(found["alone"], tokenizer) == answers


@pytest.mark.parametrize("way", ["batch", "from text", "no cache", "top 1"])
def test_every_way_to_greedy_tokens_gives_the_same(world, ours, way):
    *_, tokenizer, _, found = world
    assert until_end(found[way], tokenizer) == ours[1]


def test_beams_sampling_and_a_cache_by_hand(world, ours):
    *_, tokenizer, _, found = world
    assert found["beams"] == found["beams, no cache"]
    alone = until_end(found["beams alone"], tokenizer)
    assert until_end(found["beams"], tokenizer) == alone
    assert alone != ours[1]  # three beams find a better answer to something
    assert found["sampled"] == found["sampled again"]
    assert len(found["sampled"]) == 6 and found["sampled"][0] != found["sampled"][1]
    assert found["second by hand"] == ours[1][0][1]
    assert 0 < found["loss"] < 100 and found["learns"] == ["cinego"]  # the tower is frozen


def test_what_transformers_saves_again_is_the_same_to_the_byte(world):
    root, *_ = world
    first, second = (sorted(os.listdir(root / name)) for name in ("hub-v1.0", "again"))
    assert first == [name for name in second if name != "__pycache__"]
    assert filecmp.cmpfiles(root / "hub-v1.0", root / "again", first, shallow=False)[0] == first
    assert str(root) not in (root / "hub-v1.0/config.json").read_text()


def test_it_comes_back_to_the_byte_with_its_tower(world, tmp_path):
    root, tower, *_ = world
    main([str(root / "again"), str(tmp_path / "vlm.pth"), "--tower_to", str(tmp_path / "tower")])
    for name in ("vlm.pth", "vlm.json"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()
    fingerprints = {
        VisionTower.from_pretrained(d).fingerprint() for d in (tower, tmp_path / "tower")
    }
    assert len(fingerprints) == 1
    assert FrameTransform.from_pretrained(tmp_path / "tower") == FrameTransform.from_pretrained(
        tower
    )


EXPERTS = {"qk_norm": True, "num_experts": 4}


@pytest.mark.parametrize(
    "family, settings",
    [
        ("Llama", {}),
        ("Qwen3", {"qk_norm": True}),
        ("Qwen3Moe", EXPERTS | {"num_experts_per_tok": 1}),
        ("Qwen3Moe", EXPERTS | {"num_experts_per_tok": 2}),
        ("Qwen3Moe", EXPERTS | {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    ],
)
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
    same = ["config.json", "generation_config.json"]
    # transformers has its own names for experts, all in one tensor.
    for name in same + ["model.safetensors"] * ("num_experts" not in settings):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "lm" / name).read_bytes()
    main([str(tmp_path / "lm"), str(tmp_path / "back.pth")])
    for suffix in (".pth", ".json"):
        back, first = (tmp_path / f"{name}{suffix}" for name in ("back", "lm"))
        assert back.read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    "settings, reason",
    [({"qk_norm": True, "num_shared_experts": 1}, "has one"), ({}, "doesn't normalise them")],
)
def test_experts_without_a_family_say_so(tmp_path, settings, reason):
    config = LanguageModelConfig(6400, 16, 1, 2, 2, num_experts=2, **settings)
    save_model(tmp_path / "lm.pth", MiniMind(config), OF_OURS)
    with pytest.raises(ValueError, match=f"This model {reason}: convert it to a .pth"):
        main([str(tmp_path / "lm.pth"), str(tmp_path / "lm")])


def test_the_language_model_of_a_video_language_model(world, tmp_path):
    root, *_ = world
    main([str(root / "hub-v1.0"), str(tmp_path / "lm"), "--llm_only"])
    ids = torch.randint(0, 6400, (1, 9))
    whole = load_video_language_model(root / "vlm.pth").language_model
    assert torch.equal(load_language_model(tmp_path / "lm")(ids).logits, whole(ids).logits)


# ---- ancestors, and other towers


def write_tower(directory, family, side, patch, **preprocessor):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "image_size": side, "patch_size": patch}
    torch.manual_seed(2)
    config = getattr(transformers, f"{family}VisionConfig")(**sizes)
    getattr(transformers, f"{family}VisionModel")(config).save_pretrained(directory)
    about = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, **preprocessor}
    (directory / "preprocessor_config.json").write_text(json.dumps(about))
    return directory


def test_ancestors_and_other_towers_leave_as_whole_models(tmp_path):
    """MiniMind-V 2024 and Cinego 2025, from their own files, and ours on SigLIP (without CLS)."""
    minimind_v = old_state(vocab=6400, kv_heads=4)
    add_projector(minimind_v, "vision_proj.vision_proj.0", 32)
    language_model = LanguageModelConfig(6400, 64, 2, 8, 2, embedding_std=0.3)
    language_model.initializer_range = 0.3
    on_siglip = Cinego(CinegoConfig(language_model, vision_hidden_size=32, tokens_per_frame=9))
    crop = {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
    squash = {"size": {"height": 48, "width": 48}}
    models = {
        "minimind_v": (minimind_v, write_tower(tmp_path / "B-32", "CLIP", 224, 32, **crop)),
        "cinego": (
            cinego_2025(32, vocab=6400)[0],
            write_tower(tmp_path / "B-16", "CLIP", 224, 16, **crop),
        ),
        "on_siglip": (
            on_siglip.state_dict(),
            write_tower(tmp_path / "siglip", "Siglip", 48, 16, **squash),
        ),
    }
    clip = make_clip(tmp_path / "a.mp4", 40)
    for name, (state, tower) in models.items():
        torch.save(state, tmp_path / f"{name}.pth")
        paths = [str(tmp_path / f"{name}.pth"), str(tmp_path / name)]
        main([*paths, "--vision_path", str(tower), "--num_frames", "4", "--accept_tokenizer"])

    found = in_a_fresh_process(tmp_path, ANSWER, clip, *(tmp_path / name for name in models))
    for (name, (_, tower)), theirs in zip(models.items(), found, strict=True):
        _, ours = our_answer(tmp_path / f"{name}.pth", tower, QUESTIONS[0], clip, end=-1)
        assert theirs == ours and len(set(ours)) > 3
        back = tmp_path / f"{name}_back.pth"  # under our names from here on
        main([str(tmp_path / name), str(back), "--tower_to", str(tmp_path / f"{name}_tower")])
        again = our_answer(back, tmp_path / f"{name}_tower", QUESTIONS[0], clip, end=-1)[1]
        assert again == ours


@pytest.mark.parametrize("resize, resample", [("crop", 3), ("squash", 2)])  # CLIP's, SigLIP's
def test_a_towers_settings_pass_through_transformers(resize, resample):
    transform = FrameTransform(96, (0.5, 0.4, 0.3), (0.2, 0.3, 0.2), resize, 1 / 127.5, resample)
    settings = json.loads(image_processor(transform).to_json_string())
    assert FrameTransform.from_config(settings, "it") == transform


def test_what_cannot_be_written_says_why(world, tiny_tower, tmp_path):
    root, *_ = world
    vlm = str(root / "vlm.pth")
    with pytest.raises(ValueError, match="there already"):
        main([vlm, str(root / "hub-v1.0"), "--vision_path", str(tiny_tower)])
    with pytest.raises(ValueError, match="no vision tower in"):
        main([vlm, str(tmp_path / "x"), "--vision_path", str(tmp_path)])
    with pytest.raises(ValueError, match="--tokenizer_path y: no such folder"):
        main([vlm, str(tmp_path / "x"), "--vision_path", str(tiny_tower), "--tokenizer_path", "y"])
    assert not os.listdir(tmp_path)
