"""What the tests of terminal, page and server share."""

import pytest

from inference import TOKENIZER_PATH, ChatModel


@pytest.fixture(scope="session")
def chat_model(tiny_checkpoint, tiny_tower) -> ChatModel:
    """In float32: then a batch answers exactly as each request alone."""
    paths = (tiny_checkpoint, tiny_tower, TOKENIZER_PATH)
    return ChatModel.load(*paths, device="cpu", dtype="float32")
