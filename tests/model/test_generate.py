"""Generation: a batch answers as each prompt alone, and stops where an answer ends."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map_only
from transformers import RepetitionPenaltyLogitsProcessor

from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import DecodingBatch, Sampler, Sampling, generate, sample_tokens
from tests.model.test_packed import CountOperators

P, D, EOS, NEVER = 4, 16, 2, 10_000


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LanguageModelConfig(50, 32, 2, 4, initializer_range=0.3, embedding_std=0.5)
    return Cinego(CinegoConfig(config, "dct", D, P)).eval()


def prompt(text_before, num_frames, text_after):
    """ids, mask and frames of one prompt; num_frames 0: no visual."""
    tokens = P if num_frames else 0
    ids = torch.randint(5, 50, (text_before + tokens + text_after,))
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[text_before : text_before + tokens] = True
    return ids, mask, torch.randn(num_frames, P, D)


def left_padded(*prompts):
    ids, masks, features = zip(*prompts, strict=True)
    real = [torch.ones_like(row, dtype=torch.bool) for row in ids]
    columns = {"input_ids": ids, "visual_mask": masks, "attention_mask": real}
    inputs = {
        name: pad_sequence(rows, batch_first=True, padding_side="left")
        for name, rows in columns.items()
    }
    if counts := [len(frames) for frames in features if len(frames)]:
        inputs |= {"visual_features": torch.cat(features), "frames_per_visual": counts}
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


def test_a_seed_repeats_the_samples_and_a_small_top_p_is_greedy(model):
    inputs = left_padded(prompt(2, 8, 5), prompt(3, 0, 1))

    def draw(**how):
        return generate(model, inputs, 20, NEVER, **how)

    assert draw(temperature=2.0, seed=1) == draw(temperature=2.0, seed=1)
    assert draw(temperature=2.0, seed=1) != draw(temperature=2.0, seed=2)
    assert draw(temperature=2.0, top_p=1e-6, seed=1) == draw()


LOGITS = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()


def shares(**how) -> list[float]:
    """How often each of LOGITS is sampled."""
    samplers = [Sampler(Sampling(temperature=1.0, seed=seed, **how)) for seed in range(1000)]
    samples = torch.tensor(sample_tokens(LOGITS.expand(1000, 4), samplers))
    return (samples.bincount(minlength=4) / 1000).tolist()


@pytest.mark.parametrize(
    "how, kept",
    [
        ({"top_p": 0.7}, 2),  # the token that crosses it stays
        ({"top_p": 0.5}, 1),
        ({"top_k": 3}, 3),
        ({"top_k": 9}, 4),
        ({"min_p": 0.31}, 2),  # 0.15 is 0.3 of the first
        ({"min_p": 0.29}, 3),
        ({"top_k": 2, "top_p": 0.6}, 1),  # 0.5 of 0.8 crosses it already
        ({}, 4),
    ],
)
def test_only_the_most_probable_are_sampled_as_often_as_is_due(how, kept):
    due = LOGITS.exp()[:kept] / LOGITS.exp()[:kept].sum()
    assert shares(**how) == pytest.approx([*due.tolist(), *[0.0] * (4 - kept)], abs=0.06)


def test_a_repetition_penalty_is_that_of_transformers():
    logits, seen = torch.randn(1, 50), [3, 7, 7, 11]
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seen]), logits.clone())
    sampler = Sampler(Sampling(repetition_penalty=1.7), seen)
    assert sample_tokens(logits, [sampler]) == theirs.argmax(-1).tolist()
    best, sampler = logits.argmax().item(), Sampler(Sampling(repetition_penalty=100.0))
    assert sample_tokens(logits, [sampler]) == [best]
    assert sample_tokens(logits.abs(), [sampler]) != [best]  # it has been said


def test_a_row_samples_the_same_in_any_company_and_nothing_waits_for_the_device():
    cuts = [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"repetition_penalty": 1.5}]
    kinds = [{}, {"temperature": 0}, *cuts, {"temperature": 0, "repetition_penalty": 9.0}]
    how = [Sampling(**{"temperature": 1.5, "seed": 3} | kind) for kind in kinds]
    steps = torch.randn(20, len(how), 50)
    alone = [
        [sample_tokens(logits_BV[row : row + 1], [sampler])[0] for logits_BV in steps]
        for row, sampler in enumerate(Sampler(each, [7]) for each in how)
    ]
    samplers = [Sampler(each, [7]) for each in how]
    together = [sample_tokens(steps[0], samplers)]
    with CountOperators() as operators:
        together += [sample_tokens(logits_BV, samplers) for logits_BV in steps[1:]]
    assert [*map(list, zip(*together, strict=True))] == alone
    # Once a step Python's numbers become a tensor, which `pin_memory` lets a GPU fetch meanwhile;
    # reading the tokens is no operator here.
    assert operators.waiting == {"lift_fresh": 19}


def test_rows_join_and_leave_between_steps_and_decode_as_alone(model, monkeypatch):
    """By a growing cache, and by what a CUDA graph replays, one operator after the other: left
    padding, buffers that are used up or too many for the rows left, and the last position."""
    monkeypatch.setattr("model.generate.CAPACITY_STEP", 16)
    model.language_model.config.max_position_embeddings = 60
    growing, static = DecodingBatch(model, static=False), DecodingBatch(model, static=True)
    prompts = [prompt(*sizes) for sizes in [*PROMPTS, *PROMPTS[:2]]]
    rows, answers, buffers = [], [[] for _ in prompts], []  # rows: which prompts are in the batch

    def both(action, at):
        logits, found = action(growing), action(static)
        torch.testing.assert_close(found, logits, atol=1e-5, rtol=1e-5)
        hot = [[Sampler(Sampling(temperature=1.5, seed=row)) for row in at] for _ in range(2)]
        assert sample_tokens(logits, hot[0]) == sample_tokens(found, hot[1])
        for row, token in zip(at, logits.argmax(-1).tolist(), strict=True):
            answers[row].append(token)

    def decode(times):
        for _ in range(times):
            tokens = [answers[row][-1] for row in rows]
            both(lambda batch, tokens=tokens: batch.decode(tokens), rows)
            if (step := static.static_step) and (step.rows, step.capacity) not in buffers:
                buffers.append((step.rows, step.capacity))

    def join(*new):
        inputs = left_padded(*(prompts[row] for row in new))
        both(lambda batch: batch.prefill(inputs), new)
        rows.extend(new)

    def leave(*gone):
        places = [place for place, row in enumerate(rows) if row not in gone]
        growing.keep_rows(places), static.keep_rows(places)
        rows[:] = [rows[place] for place in places]

    join(0), decode(2), join(1, 2), decode(13), leave(0), decode(3), join(3), decode(4)
    join(4, 5, 6), decode(14)
    caches = [batch.cache_of(1) for batch in (growing, static)]
    leave(1, 3, 4, 5, 6), decode(60 - len(static.cache))
    assert buffers == [(4, 32), (8, 48), (1, 60)]
    pairs = zip(prompts, answers, strict=True)
    assert answers == [plain_greedy(model, one, len(answer)) for one, answer in pairs]
    for batch in (growing, static):
        with pytest.raises(ValueError, match="61 tokens are more than max_position_embeddings 60"):
            batch.decode([7])
    more = {"input_ids": torch.randint(5, 50, (1, 4))}  # what a row left isn't written to
    logits = [DecodingBatch(model).prefill(more, cache) for cache in caches]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_where_no_graph_can_be_captured_decoding_goes_on_without_and_says_why_once(
    model, monkeypatch
):
    def out_of_memory(*args):
        raise torch.OutOfMemoryError("no room for buffers")

    monkeypatch.setattr(DecodingBatch, "may_capture", True)
    monkeypatch.setattr("model.generate.StaticStep", out_of_memory)
    batch, one, answer = DecodingBatch(model, static=True), prompt(2, 8, 5), []
    logits = batch.prefill(left_padded(one))
    with pytest.warns(UserWarning, match="without CUDA graphs.*no room for buffers") as warned:
        for _ in range(20):
            answer += logits.argmax(-1).tolist()
            logits = batch.decode(answer[-1:])
    assert answer == plain_greedy(model, one, 20) and len(warned) == 1


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_static_step_repeats_its_operators_to_the_last_number_without_a_wait(model, place):
    """So a graph may replay them. The meta device, which takes a GPU's ways, has no numbers."""

    class Record(CountOperators):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = super().__torch_dispatch__(function, types, args, kwargs)
            parts = (function, args, kwargs, found)
            calls.append(tree_map_only(torch.Tensor, lambda tensor: tensor.shape, parts))
            return found

    model = model.language_model.to(place, torch.bfloat16)
    batch, steps = DecodingBatch(model, static=True), []
    batch.prefill({"input_ids": torch.ones(2, 9, dtype=torch.long, device=place)})
    for _ in range(10):
        batch.decode([7, 8])
    tokens = torch.tensor([[7], [8]], device=place)
    for _ in range(3):
        steps.append(calls := [])
        with Record() as operators:
            batch.static_step(tokens)
        assert not operators.waiting
    assert steps[0] == steps[1] == steps[2] and len(calls) > 50


def test_what_a_row_read_continues_in_another_batch(model):
    """Two turns of a chat with the cache kept are one text."""
    first, other, more = prompt(2, 8, 5), prompt(9, 0, 3), torch.randint(5, 50, (1, 4))
    batch = DecodingBatch(model)
    tokens = batch.prefill(left_padded(first, other)).argmax(-1).tolist()
    batch.decode(tokens)
    cache = batch.cache_of(0)
    assert len(cache) == len(first[0]) + 1  # without the padding
    batch.keep_rows([1])  # the columns that only the other row needed are forgotten
    assert len(batch.cache) == len(other[0]) + 1
    logits = DecodingBatch(model).prefill({"input_ids": more}, cache)

    whole = torch.cat([first[0], torch.tensor(tokens[:1]), more[0]])
    mask = F.pad(first[1], (0, len(whole) - len(first[1])))
    assert logits.argmax(-1).tolist() == plain_greedy(model, (whole, mask, first[2]), 1)


def test_right_padding_and_wrong_settings_are_refused(model):
    inputs = left_padded(prompt(2, 0, 5), prompt(1, 0, 1))
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="padded on the left"):
        generate(model, inputs, 3, EOS)
    with pytest.raises(ValueError, match="top_p is 0, must be in .*; seed is -1"):
        Sampling(temperature=1.0, top_p=0, seed=-1)
