"""How probable a model finds each of several given answers: options ranked by likelihood.

A small model knows more than it can say: it can't follow "answer with the letter", and reading
letters out of its words measures the reader. The likelihood of each option's own text needs no
reading, and no answer is lost.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from dataset.conversation import IGNORED, encode
from inference.chat_model import ChatModel
from inference.request import Request, Sequence
from model.generate import DecodingBatch

# Logits in memory at a time, in numbers: 64 MB in float32.
MAX_LOGITS = 1 << 24
ROWS = 32  # options read together


def answer_ids(tokenizer, text: str) -> list[int]:
    """The tokens of an answer as training supervises them, its end token included."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
    return [label for label in encode(tokenizer, messages, []).labels if label != IGNORED]


@torch.inference_mode()
def log_likelihoods(
    chat_model: ChatModel, requests: SequenceOf[Request], options: SequenceOf[SequenceOf[str]]
) -> list[list[tuple[float, int]]]:
    """(natural logarithm of the probability, number of tokens) of each option as the whole answer
    to its request; options[i] are those of requests[i].

    Each prompt is read once, and what several start with (a video, mostly) once for all: the
    options then continue copies of its keys and values. The end of the answer counts as a token, or
    "left" would be as good an answer as "left, then up". Raises ValueError where a prompt and an
    option are longer together than the model has positions for.
    """
    tokens = [[answer_ids(chat_model.tokenizer, text) for text in texts] for texts in options]
    engine = chat_model.engine()
    first_BV = engine.prefill([Sequence(request) for request in requests]).log_softmax(-1)
    found: list[list] = [[None] * len(answers) for answers in tokens]
    # Options of like length stand together: little is padded.
    places = [(row, place) for row, answers in enumerate(tokens) for place in range(len(answers))]
    places.sort(key=lambda at: len(tokens[at[0]][at[1]]))
    width = max(len(ids) for answers in tokens for ids in answers)
    at_once = max(1, min(ROWS, MAX_LOGITS // (first_BV.shape[1] * width)))
    for start in range(0, len(places), at_once):
        some = places[start : start + at_once]
        rows = [(row, tokens[row][place]) for row, place in some]
        for (row, place), value in zip(some, _continue(engine.batch, first_BV, rows), strict=True):
            found[row][place] = (value, len(tokens[row][place]))
    return found


def _continue(
    batch: DecodingBatch, first_BV: Tensor, rows: list[tuple[int, list[int]]]
) -> list[float]:
    """Log-likelihoods of answers (row of the prompt, tokens), all in one pass after the prompts."""
    device = first_BV.device
    of_R = torch.tensor([row for row, _ in rows], device=device)
    ids_RL = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(ids, device=device) for _, ids in rows], batch_first=True, padding_value=-1
    )
    is_token_RL, ids_RL = ids_RL >= 0, ids_RL.clamp(min=0)
    total_R = first_BV[of_R].gather(1, ids_RL[:, :1])[:, 0]
    if ids_RL.shape[1] > 1:
        mask = batch.mask
        if mask is None:
            mask = torch.ones(len(first_BV), len(batch.cache), dtype=torch.bool, device=device)
        logits_RLV = batch.model(
            input_ids=ids_RL[:, :-1],
            attention_mask=torch.cat([mask[of_R], is_token_RL[:, :-1]], dim=1),
            past_key_values=batch.cache.keep_rows(of_R),
        ).logits.float()
        chosen_RL = logits_RLV.gather(2, ids_RL[:, 1:, None])[..., 0] - logits_RLV.logsumexp(-1)
        total_R = total_R + (chosen_RL * is_token_RL[:, 1:]).sum(1)
    return total_R.tolist()
