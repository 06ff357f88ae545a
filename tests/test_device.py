"""Device and precision when the user leaves them open."""

import time

import pytest
import torch

from device import choose_device, choose_dtype


def test_a_named_precision_is_taken_as_it_is():
    assert choose_dtype("bfloat16", torch.device("cpu")) == "bfloat16"


def test_auto_is_never_much_slower_than_float32():
    """bfloat16 on a CPU without its instructions is tens of times slower."""
    dtype = getattr(torch, choose_dtype("auto", torch.device("cpu")))
    assert dtype in (torch.float32, torch.bfloat16)

    def seconds(dtype):
        a, b = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        a @ b  # the first one prepares
        started = time.process_time()
        for _ in range(5):
            a @ b
        return time.process_time() - started

    # The ratio is 40 where this goes wrong and at most 1 where not: noise can't bridge that.
    assert seconds(dtype) < 8 * seconds(torch.float32) + 0.05


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_is_told_with_its_mend():
    assert choose_device() == torch.device("cpu")
    with pytest.raises(ValueError, match="use --device cpu"):
        choose_device("cuda:1")
