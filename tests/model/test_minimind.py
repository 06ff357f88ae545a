"""MiniMind: its own code's logits, and the same ones from the cache, padding and shared rows."""

import pytest
import torch
import torch.nn.functional as F

from model.attention import make_mask
from model.config import CinegoConfig, LanguageModelConfig
from model.kv_cache import KVCache
from model.minimind import MiniMind

# Large weights, so that a wrong mask shows in the logits.
SMALL = LanguageModelConfig(97, 32, 3, 4, 2, initializer_range=0.2, embedding_std=0.5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MiniMind(SMALL).eval()


def test_loss_and_gradient_are_those_of_plain_cross_entropy(model):
    """Only supervised tokens pass the last MLP and the head, in parts: nothing may be lost."""
    ids = torch.randint(0, 97, (4, 400))  # some 800 are supervised: more than one part
    labels = torch.where(torch.rand(ids.shape) < 0.5, ids, -100)
    output = model(ids, labels=labels)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    expected = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("pieces", [[12], [5, 7], [5, 1, 1, 5], [1] * 12])
def test_the_cache_gives_what_one_pass_gives(model, pieces):
    ids, cache = torch.randint(0, 97, (2, 12)), KVCache()
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, atol=1e-5, rtol=1e-5)
    assert len(cache) == 12


def test_left_padding_changes_nothing(model):
    ids, mask = torch.randint(0, 97, (1, 9)), torch.arange(13)[None] >= 4
    padded = model(F.pad(ids, (4, 0), value=3), attention_mask=mask).logits
    assert padded.isfinite().all()  # a softmax over nothing is NaN on some devices, and spreads
    torch.testing.assert_close(padded[:, 4:], model(ids).logits, atol=1e-5, rtol=1e-5)
    assert make_mask(0, 13, None, mask, "cpu").any(-1).all()  # so even padding has a key


def shared_prefix_row(prefix, rests, length):
    """ids, segments, positions of a row: the prefix once, each conversation's rest, padding."""
    ids = torch.cat([prefix, *rests])
    segments = torch.cat([torch.full((len(r),), k) for k, r in enumerate([prefix, *rests])])
    places = [torch.arange(len(prefix)), *(len(prefix) + torch.arange(len(r)) for r in rests)]
    positions = torch.cat(places)
    parts = ((ids, 0), (segments, -1), (positions, 0))
    return [F.pad(part, (0, length - len(ids)), value=value) for part, value in parts]


def test_conversations_in_one_row_equal_the_conversations_alone(model):
    lengths = [(40, [30, 11, 55]), (70, [20]), (3, [1, 2, 90, 40, 7])]  # over several blocks
    prefixes = [torch.randint(0, 97, (prefix,)) for prefix, _ in lengths]
    rests = [[torch.randint(0, 97, (n,)) for n in rest] for _, rest in lengths]
    rows = [shared_prefix_row(*row, length=150) for row in zip(prefixes, rests, strict=True)]
    ids, segments, positions = (torch.stack(part) for part in zip(*rows, strict=True))

    logits = model(ids, segment_ids=segments, position_ids=positions).logits

    assert logits.isfinite().all()
    for row, (prefix, own_rests) in enumerate(zip(prefixes, rests, strict=True)):
        for k, rest in enumerate(own_rests, start=1):
            alone = model(torch.cat([prefix, rest])[None]).logits[0]
            places = (segments[row] == 0) | (segments[row] == k)
            torch.testing.assert_close(logits[row, places], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_layers_are_compiled_once_for_rows_of_any_length(model):
    from torch._dynamo.utils import counters

    compiled = MiniMind(SMALL).eval()
    compiled.load_state_dict(model.state_dict())
    compiled.compile_layers()
    graphs = []
    for length in (70, 100, 300, 640, 90, 500, 1000, 33, 1024, 800, 200):
        ids = torch.randint(0, 97, (2, length))
        positions = torch.arange(length).expand(2, -1)
        segments = (positions >= length // 2).long()
        inputs = {"segment_ids": segments, "position_ids": positions}
        expected = model(ids, labels=ids, **inputs).loss
        torch.testing.assert_close(compiled(ids, labels=ids, **inputs).loss, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[2] == graphs[-1]


def test_a_text_beyond_the_positions_is_refused():
    model = MiniMind(LanguageModelConfig(**SMALL.to_dict() | {"max_position_embeddings": 10}))
    with pytest.raises(ValueError, match="11 tokens are more than max_position_embeddings 10"):
        model(torch.zeros(1, 11, dtype=torch.long))


def test_a_config_names_everything_that_is_wrong_with_it():
    experts = {"num_experts": 4, "num_experts_per_tok": 5, "num_shared_experts": -1}
    language_model = LanguageModelConfig(6400, 100, 8, 8, 3, **experts)
    wrong = CinegoConfig(language_model, summary="median", image_ids=[30, 32])
    with pytest.raises(ValueError) as error:
        wrong.validate()
    for part in (
        *("hidden_size 100", "num_key_value_heads 3", "'median'", "image_ids has 2 ids"),
        *("num_experts_per_tok must be in 1..4", "num_shared_experts must not be negative"),
    ):
        assert part in str(error.value)
