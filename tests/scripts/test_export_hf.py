"""A checkpoint leaves for transformers, answers there as it does here, and comes back unchanged."""

import filecmp
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dataset.conversation import encode, left_pad, placeholder_ids
from dataset.video import FrameTransform, read_frames
from model.checkpoint import load_language_model, load_video_language_model, save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import generate
from model.minimind import MiniMind
from model.vision_tower import VisionTower
from scripts.export_hf import image_processor, main
from tests.model.ancestors import add_projector, cinego_2025, old_state

TOKENIZER = "model/text_tokenizer"
BIKES = Path(__file__).resolve().parents[3] / "shared/clips/bikes.mp4"  # filmed, if it is there
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


# The same, and no more than an answer to each question about one clip.
ANSWER = """
import json, sys, time
from transformers import AutoModelForCausalLM, AutoProcessor


def peak():  # of resident memory; Linux alone tells it
    try:
        lines = open("/proc/self/status").read().splitlines()
    except FileNotFoundError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


clip, *directories = sys.argv[1:]
found = []
for directory in directories:
    before, cpu = peak(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    after, loaded = peak(), time.process_time()
    processor = AutoProcessor.from_pretrained(directory, trust_remote_code=True)
    content = [{"type": "video", "path": clip}, {"type": "text", "text": "What happens?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True,
    )
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    found.append({
        "tokens": ids[0, inputs["input_ids"].shape[1] :].tolist(),
        "bytes": after - before,
        "CPU-seconds to load": loaded - cpu,
        "CPU-seconds to answer": time.process_time() - loaded,
    })
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

    found = in_a_fresh_process(
        root, FRESH, "hub-v1.0", "again", *clips, stdin=json.dumps(QUESTIONS)
    )
    return root, tiny_tower, tokenizer, clips, found


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

    theirs.save_pretrained(tmp_path / "again")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "lm" / name).read_bytes()

    main([str(tmp_path / "lm"), str(tmp_path / "back.pth")])
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "lm.pth").read_bytes()
    assert (tmp_path / "back.json").read_bytes() == (tmp_path / "lm.json").read_bytes()


@pytest.mark.parametrize("norm_topk_prob, top", [(True, 1), (True, 2), (False, 1)])
def test_experts_alone_are_a_qwen3_moe(tmp_path, norm_topk_prob, top):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": top, "norm_topk_prob": norm_topk_prob}
    config = LanguageModelConfig(6400, 48, 2, 4, 2, qk_norm=True, embedding_std=0.3, **experts)
    model = MiniMind(config).eval()
    save_model(tmp_path / "lm.pth", model, {})
    main([str(tmp_path / "lm.pth"), str(tmp_path / "lm")])

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert type(theirs).__name__ == "Qwen3MoeForCausalLM"
    ids = torch.randint(0, 6400, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    main([str(tmp_path / "lm"), str(tmp_path / "back.pth")])
    assert (tmp_path / "back.pth").read_bytes() == (tmp_path / "lm.pth").read_bytes()


@pytest.mark.parametrize(
    "settings, reason",
    [({"qk_norm": True, "num_shared_experts": 1}, "has one"), ({}, "doesn't normalise them")],
)
def test_experts_without_a_family_say_so(tmp_path, settings, reason):
    config = LanguageModelConfig(6400, 16, 1, 2, 2, num_experts=2, **settings)
    save_model(tmp_path / "lm.pth", MiniMind(config), {})
    with pytest.raises(ValueError, match=f"This model {reason}: convert it to a .pth"):
        main([str(tmp_path / "lm.pth"), str(tmp_path / "lm")])


def test_the_language_model_of_a_video_language_model(world, tmp_path):
    root, *_ = world
    main([str(root / "hub-v1.0"), str(tmp_path / "lm"), "--llm_only"])
    ids = torch.randint(0, 6400, (1, 9))
    whole = load_video_language_model(root / "vlm.pth").language_model
    assert torch.equal(load_language_model(tmp_path / "lm")(ids).logits, whole(ids).logits)


# ---- ancestors, and full size


def write_tower(directory, **settings):
    torch.manual_seed(2)
    config = CLIPVisionConfig(**settings)
    CLIPVisionModel(config).save_pretrained(directory)
    size = config.image_size
    about = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    about |= {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    (directory / "preprocessor_config.json").write_text(json.dumps(about))
    return directory


def our_answer(path, tower, clip, num_frames=8):
    """The 12 likeliest tokens, by our own code; no end token ends them."""
    model = load_video_language_model(path, tower)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    frames = FrameTransform.from_pretrained(tower)(read_frames(clip, num_frames=num_frames).frames)
    turns = [{"role": "user", "content": "<video>\nWhat happens?"}]
    visual = model.config.tokens_per_visual(num_frames)
    inputs = left_pad([encode(tokenizer, turns, [visual], add_generation_prompt=True)])
    inputs |= {"pixel_values": frames, "frames_per_visual": [num_frames]}
    return generate(model, inputs, TOKENS, eos_token_id=-1)[0]


def write_siglip(directory):
    """SigLIP's class, which most SigLIP2 are of, too: 9 places a frame and no CLS."""
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "image_size": 48, "patch_size": 16}
    torch.manual_seed(3)
    SiglipVisionModel(SiglipVisionConfig(**config)).save_pretrained(directory)
    about = {"size": {"height": 48, "width": 48}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (directory / "preprocessor_config.json").write_text(json.dumps(about))
    return directory


def test_ancestors_and_other_towers_leave_as_whole_models(tmp_path):
    """MiniMind-V 2024 and Cinego 2025, from their own files, and ours on SigLIP."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2}
    minimind_v = old_state(vocab=6400, kv_heads=4)
    add_projector(minimind_v, "vision_proj.vision_proj.0", 32)
    cinego, _ = cinego_2025(32, vocab=6400)
    language_model = LanguageModelConfig(6400, 64, 2, 8, 2, embedding_std=0.3)
    language_model.initializer_range = 0.3
    on_siglip = Cinego(CinegoConfig(language_model, vision_hidden_size=32, tokens_per_frame=9))
    models = {
        "minimind_v": (minimind_v, write_tower(tmp_path / "B-32", patch_size=32, **small)),
        "cinego": (cinego, write_tower(tmp_path / "B-16", patch_size=16, **small)),
        "on_siglip": (on_siglip.state_dict(), write_siglip(tmp_path / "siglip")),
    }
    clip = write_clip(tmp_path / "0.mp4", 0)
    for name, (state, tower) in models.items():
        torch.save(state, tmp_path / f"{name}.pth")
        paths = [str(tmp_path / f"{name}.pth"), str(tmp_path / name)]
        main([*paths, "--vision_path", str(tower), "--num_frames", "4"])

    found = in_a_fresh_process(tmp_path, ANSWER, clip, *(tmp_path / name for name in models))
    for (name, (_, tower)), theirs in zip(models.items(), found, strict=True):
        ours = our_answer(tmp_path / f"{name}.pth", tower, clip, num_frames=4)
        assert theirs["tokens"] == ours and len(set(ours)) > 3
        back = tmp_path / f"{name}_back.pth"  # under our names from here on
        main([str(tmp_path / name), str(back), "--tower_to", str(tmp_path / f"{name}_tower")])
        assert our_answer(back, tmp_path / f"{name}_tower", clip, num_frames=4) == ours


@pytest.mark.slow
@pytest.mark.parametrize("dim, n_layers", [(512, 8), (768, 16)])
def test_full_size_with_vit_b_32(tmp_path, dim, n_layers):
    """Random weights of every part; what it costs is printed (pytest -s)."""
    tower = write_tower(tmp_path / "clip-vit-base-patch32")  # transformers' defaults are ViT-B/32
    language_model = LanguageModelConfig(
        hidden_size=dim, num_hidden_layers=n_layers, initializer_range=0.05, embedding_std=0.3
    )
    torch.manual_seed(0)
    save_model(tmp_path / "vlm.pth", Cinego(CinegoConfig(language_model)), {})
    clip = BIKES if BIKES.exists() else write_clip(tmp_path / "0.mp4", 0)
    start = time.process_time()
    main([str(tmp_path / "vlm.pth"), str(tmp_path / "hub"), "--vision_path", str(tower)])
    print(f"\n{dim} x {n_layers}: {time.process_time() - start:.1f} CPU-seconds to convert")

    found = in_a_fresh_process(tmp_path, ANSWER, clip, tmp_path / "hub")[0]
    size = (tmp_path / "hub/model.safetensors").stat().st_size
    print(f"file {size / 1e6:.0f} MB, ratio {found['bytes'] / size:.2f}, {found}")
    assert found["tokens"] == our_answer(tmp_path / "vlm.pth", tower, clip)
    assert found["bytes"] < 1.5 * size


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
