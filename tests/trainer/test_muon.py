"""Our Muon against torch's, and the iteration against the singular value decomposition."""

import pytest
import torch

from trainer.optim import Muon, orthogonalise

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8)]


def matrices(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 48, 16), (3, 16, 48)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    before = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    after = orthogonalise(before)
    values = torch.linalg.svdvals(after)
    assert values.min() > 0.3 and values.max() < 1.3  # the smallest of a square one rise slowest
    # U Vᵀ has the largest inner product with the matrix among all orthogonal ones.
    best = torch.linalg.svdvals(before).sum((-1,))
    assert ((after * before).sum((1, 2)) / best > 0.8).all()


def test_steps_equal_those_of_torch():
    ours, theirs = ([torch.nn.Parameter(matrix / 10) for matrix in matrices(0)] for _ in range(2))
    settings = {"lr": 0.02, "weight_decay": 0.1}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(4):
        for a, b, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            a.grad, b.grad = gradient.clone(), gradient.clone()
        ours[-1].grad = theirs[-1].grad = None if step == 2 else ours[-1].grad
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, matrices(0), strict=True):
        moved = (b - start / 10).abs().max()
        assert (a - b).abs().max() < 0.03 * moved  # theirs computes in bfloat16


def test_vectors_are_refused():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
