"""Does a clip look like what a model was trained on? For the small model that ships in demo/model.

A frame is described by the mean of its tower tokens, and compared with the training clips' frames:
the Mahalanobis distance to their mean under their covariance, after Lee et al. 2018
(arXiv 1807.03888). A clip's distance is the mean over its frames; 1 is usual.
"""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import read_about


def fit_known_frames(clips: Iterable[Tensor]) -> dict[str, Tensor]:
    """clips: features (F, P, D) of training clips → mean (D,) and whitening (D, D), float16."""
    frames_ND = torch.cat([clip.float().mean(1) for clip in clips]).double()
    width = frames_ND.shape[1]
    covariance = frames_ND.T.cov() if len(frames_ND) > 1 else torch.zeros(width, width).double()
    # A little in every direction: those in which training frames never differed count, not rule.
    covariance += torch.eye(width) * (1e-4 * covariance.trace() / width + 1e-6)
    whitening = torch.linalg.cholesky(torch.linalg.inv(covariance))
    return {"mean": frames_ND.mean(0).half(), "whitening": whitening.half().contiguous()}


def distance(features_FPD: Tensor, known: dict[str, Tensor]) -> float:
    """Squared distance over width of a clip from the known frames, averaged over its frames."""
    frames_FD = features_FPD.float().cpu().mean(1) - known["mean"].float()
    return (frames_FD @ known["whitening"].float()).square().mean().item()


def warn_unlike_training(checkpoint: str | Path, features_FPD: Tensor) -> str | None:
    """A sentence for the user where the frames look nothing like what the model was trained on;
    None where they do, and for a model that has no such statistics beside it (all but the small one
    that ships). features_FPD: what the model's own tower gives."""
    measured = read_about(checkpoint).get("known_frames")
    if not measured or distance(features_FPD, _read_known(checkpoint)) <= measured["threshold"]:
        return None
    return (
        "These frames look nothing like those that this model was trained on; its answer means "
        f"nothing. {measured['note']}"
    )


def statistics_of(checkpoint: str | Path) -> Path:
    return Path(checkpoint).with_suffix(".known_frames.safetensors")


@lru_cache(4)
def _read_known(checkpoint: str | Path) -> dict[str, Tensor]:
    return load_file(statistics_of(checkpoint))
