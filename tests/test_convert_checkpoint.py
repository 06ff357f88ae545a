"""A checkpoint leaves for transformers, answers there as it does here, and comes back unchanged."""

import filecmp
import json
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataset.conversation import encode, left_pad, placeholder_ids
from dataset.video import FrameTransform, read_frames
from model.checkpoint import load_language_model, load_video_language_model, save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import generate
from model.minimind import MiniMind
from model.vision_tower import VisionTower
from scripts.convert_checkpoint import image_processor, main

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


def write_clip(path, seed):
    """16 frames of coloured noise."""
    pictures = np.random.default_rng(seed).integers(0, 255, (16, 4, 5, 3), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 160, 128, "yuv420p"
        for picture in pictures:
            large = picture.repeat(32, 0).repeat(32, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(large, format="rgb24")))
        container.mux(stream.encode())
    return path


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
    meta = {"training": {"num_frames": 4}, "lineage": {"vision_tower": tower.fingerprint()}}
    save_model(root / "vlm.pth", Cinego(config), meta)
    clips = [write_clip(root / f"{seed}.mp4", seed) for seed in (0, 1)]
    main([str(root / "vlm.pth"), str(root / "hub-v1.0"), "--vision_path", str(tiny_tower)])

    (root / "fresh.py").write_text(FRESH)
    command = [sys.executable, "-I", "fresh.py", "hub-v1.0", "again", *map(str, clips)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home")}
    fresh = subprocess.run(
        command,
        input=json.dumps(QUESTIONS),
        env=os.environ | offline,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert fresh.returncode == 0, fresh.stderr
    return root, tiny_tower, tokenizer, clips, json.loads(fresh.stdout)


def our_inputs(model, tower, tokenizer, clips):
    transform = FrameTransform.from_pretrained(tower)
    frames = [transform(read_frames(clip, num_frames=4).frames) for clip in clips]
    prompts = [
        encode(
            tokenizer,
            [{"role": "user", "content": question}],
            [model.config.tokens_per_visual(4)] * question.count("<video>"),
            add_generation_prompt=True,
        )
        for question in QUESTIONS
    ]
    return prompts, frames


@pytest.fixture(scope="module")
def ours(world):
    """(logits of the last token, new tokens) of each question, asked alone, by our own code."""
    root, tower, tokenizer, clips, _ = world
    model = load_video_language_model(root / "vlm.pth", tower)
    prompts, frames = our_inputs(model, tower, tokenizer, clips)
    logits, answers = [], []
    for row, prompt in enumerate(prompts):
        inputs = left_pad([prompt])
        if row < len(frames):
            inputs |= {"pixel_values": frames[row], "frames_per_visual": [4]}
        answers += generate(model, inputs, TOKENS, tokenizer.eos_token_id)
        with torch.no_grad():
            logits.append(model(**inputs).logits[0, -1])
    return torch.stack(logits), answers


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


@pytest.mark.parametrize(
    "family, qk_norm", [("LlamaForCausalLM", False), ("Qwen3ForCausalLM", True)]
)
def test_a_language_model_alone_is_a_llama_or_a_qwen3(tmp_path, family, qk_norm):
    torch.manual_seed(0)
    config = LanguageModelConfig(6400, 48, 2, 4, 2, qk_norm=qk_norm, embedding_std=0.3)
    model = MiniMind(config).eval()
    save_model(tmp_path / "lm.pth", model, {"step": 7})
    main([str(tmp_path / "lm.pth"), str(tmp_path / "lm")])

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert type(theirs).__name__ == family
    ids = torch.randint(0, 6400, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "lm").eos_token_id == theirs.config.eos_token_id

    main([str(tmp_path / "lm"), str(tmp_path / "back.pth")])
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "lm.pth").read_bytes()
    assert (tmp_path / "back.json").read_bytes() == (tmp_path / "lm.json").read_bytes()


def test_the_language_model_of_a_video_language_model(world, tmp_path):
    root, *_ = world
    main([str(root / "hub-v1.0"), str(tmp_path / "lm"), "--llm_only"])
    ids = torch.randint(0, 6400, (1, 9))
    whole = load_video_language_model(root / "vlm.pth").language_model
    assert torch.equal(load_language_model(tmp_path / "lm")(ids).logits, whole(ids).logits)


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
    with pytest.raises(ValueError, match="no tokenizer in"):
        main([vlm, str(tmp_path / "x"), "--vision_path", str(tiny_tower), "--tokenizer_path", "y"])
    assert not os.listdir(tmp_path)
