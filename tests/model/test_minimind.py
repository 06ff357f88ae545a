"""MiniMind: the published numbers, the loss, the cache and rows that share a prefix."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model.checkpoint import load_language_model
from model.config import CinegoConfig, LanguageModelConfig
from model.kv_cache import KVCache
from model.minimind import MiniMind, attend, attend_repeated, make_block_mask

SMALL = LanguageModelConfig(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,  # large, so that a wrong mask shows in the logits
    embedding_std=0.5,
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return MiniMind(SMALL).eval()


def test_minimind3_gives_the_logits_of_its_own_code(tmp_path):
    golden = Path(__file__).resolve().parents[1] / "data/golden/minimind3_lm.safetensors"
    from safetensors.torch import load_file

    tensors = load_file(golden)
    state = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    torch.save(state, tmp_path / "minimind3.pth")

    lm = load_language_model(tmp_path / "minimind3.pth")

    assert lm.config.qk_norm and lm.config.num_key_value_heads == 4
    logits = lm(tensors["io.input_ids"]).logits
    torch.testing.assert_close(logits, tensors["io.logits"], atol=1e-4, rtol=0)


def test_the_loss_is_the_sum_over_supervised_tokens(model):
    ids = torch.randint(0, 97, (3, 20))
    labels = torch.where(torch.rand(3, 20) < 0.3, ids, -100)
    output = model(ids, labels=labels)
    logits = model(ids).logits
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    torch.testing.assert_close(output.loss, expected)
    assert output.logits is None


def test_the_gradient_is_that_of_the_plain_loss(model):
    """Only supervised tokens pass the last MLP and the head: nothing may be lost on the way."""
    ids = torch.randint(0, 97, (2, 30))
    labels = torch.where(torch.rand(2, 30) < 0.3, ids, -100)
    model(ids, labels=labels).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-4, msg=name)


def test_a_batch_without_supervised_tokens_has_no_loss(model):
    loss = model(torch.zeros(1, 5, dtype=torch.long), labels=torch.full((1, 5), -100)).loss
    loss.backward()
    assert loss == 0


def test_many_supervised_tokens_go_through_the_head_in_parts(model, monkeypatch):
    ids = torch.randint(0, 97, (2, 25))
    whole = model(ids, labels=ids).loss
    monkeypatch.setattr("model.minimind.LOSS_CHUNK", 7)
    torch.testing.assert_close(model(ids, labels=ids).loss, whole)


def test_a_later_token_changes_no_earlier_logits(model):
    ids = torch.randint(0, 97, (1, 12))
    changed = ids.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 97
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert not torch.allclose(before[:, 8:], after[:, 8:])


@pytest.mark.parametrize("pieces", [[12], [5, 7], [5, 1, 1, 5], [1] * 12])
def test_the_cache_gives_what_one_pass_gives(model, pieces):
    ids = torch.randint(0, 97, (2, 12))
    cache = KVCache()
    logits = torch.cat(
        [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)], dim=1
    )
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert len(cache) == 12


def test_left_padding_changes_nothing(model):
    ids = torch.randint(0, 97, (1, 9))
    padded = F.pad(ids, (4, 0), value=3)
    mask = torch.arange(13)[None] >= 4
    logits = model(padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_even_padding_has_a_key_to_look_at():
    """A softmax over nothing is NaN on some devices, and NaN spreads."""
    padding = torch.arange(13)[None] >= 4
    mask = make_block_mask(0, 13, segment_ids=None, attention_mask=padding, device="cpu")
    assert mask.mask_B1LT.any(-1).all()


@pytest.mark.parametrize("masked", [True, False])
def test_a_gpu_s_way_to_attend_gives_what_a_cpu_s_gives(masked):
    q = torch.randn(3, 8, 150, 16)
    k, v = torch.randn(2, 3, 2, 150, 16)
    segments = torch.stack([torch.arange(150) // n for n in (40, 60, 150)])
    mask = make_block_mask(0, 150, segments, None, "cpu") if masked else None
    expected = attend(q, k, v, mask)
    torch.testing.assert_close(attend_repeated(q, k, v, mask), expected, atol=1e-5, rtol=0)


def shared_prefix_row(prefix, rests, length):
    """One row as the data path builds it: the prefix once, then each conversation's rest."""
    ids = torch.cat([prefix, *rests])
    segments = torch.cat([torch.full((len(r),), k) for k, r in enumerate([prefix, *rests])])
    positions = torch.cat(
        [torch.arange(len(prefix))] + [len(prefix) + torch.arange(len(rest)) for rest in rests]
    )
    pad = length - len(ids)
    return (
        F.pad(ids, (0, pad)),
        F.pad(segments, (0, pad), value=-1),
        F.pad(positions, (0, pad)),
    )


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


def test_bfloat16_autocast_stays_close(model):
    ids = torch.randint(0, 97, (2, 30))
    full = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.layers[0].mlp(model.embed(ids)).dtype == torch.bfloat16
        half = model(ids, labels=ids).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.02, atol=0)


def test_a_text_beyond_the_positions_is_refused():
    model = MiniMind(LanguageModelConfig(**{**SMALL.to_dict(), "max_position_embeddings": 10}))
    with pytest.raises(ValueError, match="11 tokens are more than max_position_embeddings 10"):
        model(torch.zeros(1, 11, dtype=torch.long))


def test_a_config_names_everything_that_is_wrong_with_it():
    wrong = CinegoConfig(
        LanguageModelConfig(hidden_size=100, num_attention_heads=8, num_key_value_heads=3),
        summary="median",
        image_ids=[30, 32],
    )
    with pytest.raises(ValueError) as error:
        wrong.validate()
    for part in ("hidden_size 100", "num_key_value_heads 3", "'median'", "image_ids has 2 ids"):
        assert part in str(error.value)


def test_a_config_survives_json_and_refuses_unknown_keys():
    config = CinegoConfig(SMALL, summary="mean", image_ids=[1] * 50)
    assert CinegoConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="sumary"):
        CinegoConfig.from_dict({"sumary": "mean"})
    with pytest.raises(ValueError, match="n_layers"):
        CinegoConfig.from_dict({"language_model": {"n_layers": 8}})
