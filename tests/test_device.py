"""Device and precision when the user leaves them open."""

import pytest
import torch

from device import choose_device, choose_dtype


def test_a_named_precision_is_taken_as_it_is():
    assert choose_dtype("bfloat16", torch.device("cpu")) == "bfloat16"
    assert choose_dtype("auto", torch.device("mps")) == "float32"


def test_auto_is_what_is_there():
    assert torch.ones(1, device=choose_device()).sum() == 1
    assert choose_dtype("auto", torch.device("cpu")) in ("float32", "bfloat16")


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_a_missing_device_is_refused_with_the_fix(device):
    module = torch.cuda if "cuda" in device else torch.backends.mps
    if module.is_available():
        pytest.skip("it is here")
    with pytest.raises(ValueError, match=f"--device {device}: .*; use --device cpu"):
        choose_device(device)
