"""Joins the rooms for whoever asks a trained model: terminal, page, server, scoring.

    answerer = Answerer.load("out/sft_videolm_512.pth", vision_path, tokenizer_path)

    chat = answerer.chat()                          # many turns; what was read stays read
    chat.show(answerer.read("a.mp4"))               # decoded, and seen by the tower, once
    for piece in chat.ask("What happens?", Sampling(temperature=0.7, seed=1), stop=("\n\n",)):
        print(piece, end="", flush=True)            # close the loop and the answer is cut there
    print(chat.last.finish_reason, chat.last.time_to_first_token, chat.last.tokens_per_second)

    batch = answerer.batch()                        # many askers at once: join, leave, any time
    answers = batch.add([Question(messages, visuals, Sampling(), stop=()), …])
    while batch:
        for answer in batch.step():                 # one token for each answer in the making
            send(answer.take())                     # its new text, always whole characters
    batch.cancel(answer)                            # its asker left

One `Answerer` may serve several threads: nothing in it changes. A `Chat` or a `Batch` is to be used
by one thread at a time. Training's counterpart of this folder is `stage.py`.
"""

from inference.batch import Answer, Batch, Question, Visual
from inference.chat import Chat
from inference.chat_model import Answerer
from inference.parts import TOKENIZER_PATH, VISION_PATH, find_models, parts_of

__all__ = [
    "TOKENIZER_PATH",
    "VISION_PATH",
    "Answer",
    "Answerer",
    "Batch",
    "Chat",
    "Question",
    "Visual",
    "find_models",
    "parts_of",
]
