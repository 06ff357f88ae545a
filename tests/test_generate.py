"""Generation: a batch answers as each prompt alone, and stops where an answer ends."""

import pytest
import torch
import torch.nn.functional as F

from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import generate, stream

P, D, EOS, NEVER = 4, 16, 2, 10_000


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LanguageModelConfig(50, 32, 2, 4, initializer_range=0.3, embedding_std=0.5)
    return Cinego(CinegoConfig(config, "ours", D, P)).eval()


def prompt(text_before, num_frames, text_after):
    """ids, mask and frames of one prompt; num_frames 0: no visual."""
    tokens = P if num_frames else 0
    ids = torch.randint(5, 50, (text_before + tokens + text_after,))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[text_before : text_before + tokens] = True
    return ids, mask, torch.randn(num_frames, P, D)


def left_padded(*prompts):
    length = max(len(ids) for ids, _, _ in prompts)
    pads = [length - len(ids) for ids, _, _ in prompts]
    rows = list(zip(pads, prompts, strict=True))
    inputs = {
        "input_ids": torch.stack([F.pad(ids, (pad, 0)) for pad, (ids, _, _) in rows]),
        "visual_mask": torch.stack([F.pad(mask, (pad, 0)) for pad, (_, mask, _) in rows]),
        "attention_mask": torch.stack([torch.arange(length) >= pad for pad in pads]),
    }
    features = torch.cat([features for _, _, features in prompts])
    if len(features):
        counts = [len(features) for _, _, features in prompts if len(features)]
        inputs |= {"visual_features": features, "frames_per_visual": counts}
    return inputs


PROMPTS = [(2, 8, 5), (1, 1, 3), (9, 0, 0), (3, 4, 11), (1, 8, 2)]


def plain_greedy(model, one, count):
    """The definition: the whole text again for every token, no cache, no padding."""
    inputs, answer = left_padded(one), []
    del inputs["attention_mask"]
    for _ in range(count):
        token = model(**inputs).logits[0, -1].argmax()
        answer.append(int(token))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token[None, None]], dim=1)
        inputs["visual_mask"] = F.pad(inputs["visual_mask"], (0, 1))
    return answer


def test_a_batch_with_a_cache_answers_as_each_prompt_alone_without(model):
    prompts = [prompt(*sizes) for sizes in PROMPTS]
    answers = generate(model, left_padded(*prompts), 12, NEVER)
    assert answers == [plain_greedy(model, one, 12) for one in prompts]
    assert len({tuple(answer) for answer in answers}) == len(answers)


def test_an_answer_ends_before_the_end_token_and_the_others_go_on(model):
    prompts = [prompt(*sizes) for sizes in PROMPTS]
    free = generate(model, left_padded(*prompts), 12, NEVER)
    # The token that the most rows come to at different times serves as the end token.
    eos = max(range(50), key=lambda token: len({a.index(token) for a in free if token in a}))
    lengths = [answer.index(eos) if eos in answer else 12 for answer in free]
    assert len(set(lengths)) > 1

    answers = generate(model, left_padded(*prompts), 12, eos)

    assert answers == [answer[:end] for answer, end in zip(free, lengths, strict=True)]
    assert answers == [generate(model, left_padded(one), 12, eos)[0] for one in prompts]


def test_finished_rows_cost_nothing_more(model):
    prompts = [prompt(*sizes) for sizes in PROMPTS]
    first = generate(model, left_padded(*prompts), 1, NEVER)
    batches = []
    model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    generate(model, left_padded(*prompts), 2, eos_token_id=first[0][0])
    assert batches == [5, 5 - [answer[0] for answer in first].count(first[0][0])]


def test_a_stream_gives_the_same_ids_one_at_a_time(model):
    inputs = left_padded(prompt(2, 8, 5))
    tokens = stream(model, inputs, 12, NEVER)
    first = next(tokens)
    assert not torch.is_inference_mode_enabled()  # the caller's own code runs between two tokens
    assert [first, *tokens] == generate(model, inputs, 12, NEVER)[0]
    with pytest.raises(ValueError, match="one prompt, not 2"):
        next(stream(model, left_padded(prompt(1, 0, 1), prompt(1, 0, 1)), 3, NEVER))


def test_a_seed_repeats_a_draw_and_a_small_top_p_is_greedy(model):
    inputs = left_padded(prompt(2, 8, 5), prompt(3, 0, 1))

    def draw(**how):
        return generate(model, inputs, 20, NEVER, **how)

    assert draw(temperature=2.0, seed=1) == draw(temperature=2.0, seed=1)
    assert draw(temperature=2.0, seed=1) != draw(temperature=2.0, seed=2)
    assert draw(temperature=2.0, top_p=1e-6, seed=1) == draw()


def test_top_p_draws_only_from_the_most_likely():
    from model.generate import _choose

    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = _choose(logits, 1.0, 0.7, generator).bincount(minlength=4)
    assert drawn[2:].sum() == 0
    assert drawn[0] / 2000 == pytest.approx(0.5 / 0.8, abs=0.04)


def test_right_padding_and_wrong_settings_are_refused(model):
    inputs = left_padded(prompt(2, 0, 5), prompt(1, 0, 1))
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, inputs, 3, EOS)
    with pytest.raises(ValueError, match="top_p 0"):
        generate(model, left_padded(prompt(2, 0, 5)), 3, EOS, temperature=1.0, top_p=0)


def test_training_mode_comes_back(model):
    model.train()
    generate(model, left_padded(prompt(2, 0, 5)), 2, NEVER)
    assert model.training
