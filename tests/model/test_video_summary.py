"""VideoSummary: it knows time. That no video depends on the rest of a batch: test_cinego.py."""

import pytest
import torch

from model.video_summary import VideoSummary, mean_change, temporal_filters

D, P = 32, 10


def make(kind, tokens=P):
    torch.manual_seed(0)
    return VideoSummary(kind, hidden_size=D, tokens_per_frame=tokens).eval()


def test_dct_tells_a_video_from_its_reverse_and_cinego_2025_does_not():
    video = torch.randn(8, P, D)

    def difference(kind):
        summary = make(kind)
        forward, backward = summary(video, [8]), summary(video.flip(0), [8])
        return ((forward - backward).abs().max() / forward.abs().max()).item()

    assert difference("dct") > 0.05
    assert difference("gpt4video") < 1e-5  # why `dct` exists
    assert difference("mean") < 1e-5


def test_what_little_changes_shows_before_any_training_whatever_the_tower_s_scale():
    """A tower's raw features may be of any size, and most of a frame stays as it is."""
    frame, drift = torch.randn(1, P, D), 0.1 * torch.randn(1, P, D)
    video = frame + drift * torch.linspace(-1, 1, 8)[:, None, None]
    summary = make("dct")
    forward, backward = summary(video, [8]), summary(video.flip(0), [8])
    assert (forward - backward).norm() > 0.05 * forward.norm()
    torch.testing.assert_close(summary(20 * video, [8]), forward, atol=1e-4, rtol=1e-4)


def change_where_one_token_is_reversed(summary, video, token):
    """(P): by how much each token of the summary changes, if one runs backwards through time."""
    swapped, frames = video.clone(), [len(video)]
    swapped[:, token] = video[:, token].flip(0)
    return (summary(swapped, frames) - summary(video, frames)).abs().amax(-1)[0]


def test_a_place_s_coefficients_reach_its_token_and_the_cls_s_reach_all():
    summary, video = make("dct"), torch.randn(6, P, D)
    change = change_where_one_token_is_reversed(summary, video, 4)
    assert change[4] > 1e-2 and change[torch.arange(P) != 4].max() == 0
    assert (change_where_one_token_is_reversed(summary, video, 0) > 1e-3).all()


def test_without_a_cls_the_mean_of_the_places_stands_in_for_it():
    """16 tokens are 4 x 4 places of SigLIP, and none of them is left out or special."""
    summary, video = make("dct", 16), torch.randn(6, 16, D)
    out = summary(video, [6])
    assert out.shape == (1, 16, D)
    order = torch.randperm(16)
    with torch.no_grad():
        summary.queries.zero_()  # these alone tell place from place
    torch.testing.assert_close(summary(video[:, order], [6]), summary(video, [6])[:, order])
    change = change_where_one_token_is_reversed(summary, video, 0)  # any place's reach every token
    assert (change > 1e-4).all() and change[0] > 1e-2


def test_change_is_the_mean_step_between_a_video_s_own_frames():
    frames = torch.tensor([[0.0, 1.0, -1.0, 0.0], [5.0, 7.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    change = mean_change(frames[..., None, None], torch.tensor([4, 2, 1]))
    torch.testing.assert_close(change.flatten(), torch.tensor([4 / 3, 2.0, 0.0]))


def test_dct_tells_what_stays_from_what_flickers():
    """Signed filters average back and forth away: here they are cut off, and it still shows."""
    summary = make("dct")
    with torch.no_grad():
        summary.spatial.weight[:, : 8 * D] = 0
        summary.temporal[0].weight[:, : 8 * D] = 0
    still = torch.randn(1, P, D).expand(32, -1, -1)
    flicker = still + 0.5 * torch.randn(1, P, D) * (-1.0) ** torch.arange(32)[:, None, None]
    torch.testing.assert_close(flicker.mean(0), still.mean(0), atol=1e-5, rtol=0)
    assert (summary(flicker, [32]) - summary(still, [32])).abs().max() > 0.02


def test_the_filters_are_orthogonal_and_blind_to_padding():
    filters = temporal_filters(torch.tensor([8, 5, 1]), num_filters=8, max_frames=11)
    gram = filters[0] @ filters[0].T * 8
    torch.testing.assert_close(gram, torch.eye(8), atol=1e-5, rtol=0)
    assert (filters[1, :, 5:] == 0).all() and (filters[1, 5:] == 0).all()
    assert filters[2].tolist() == [[1.0] + [0.0] * 10] + [[0.0] * 11] * 7  # one frame: itself
    torch.testing.assert_close(filters[:, 0].sum(-1), torch.ones(3))  # the first takes the mean


def test_mean_of_one_frame_is_the_frame_and_concat_leaves_all():
    frames = torch.randn(3, P, D)
    torch.testing.assert_close(make("mean")(frames, [1, 1, 1]), frames)
    torch.testing.assert_close(make("concat")(frames, [2, 1]), frames)


@pytest.mark.parametrize("kind", ["dct", "gpt4video"])
def test_every_parameter_learns(kind):
    summary = make(kind)
    summary(torch.randn(9, P, D), [8, 1]).square().sum().backward()
    for name, parameter in summary.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
