"""A trained model, asked from the terminal, the page, the API and the scoring of test sets.

    chat_model = ChatModel.load("out/sft_videolm_512.pth")

    chat = Chat(chat_model)                                  # many turns; what was read stays read
    chat.attach(chat_model.encode_video("a.mp4"))            # decoded and encoded once
    for text in chat.ask("What happens?", Sampling(temperature=0.7, seed=1), stop=("\\n\\n",)):
        print(text, end="", flush=True)                      # close the loop: the answer ends there
    print(chat.last.finish_reason, chat.last.time_to_first_token, chat.last.tokens_per_second)

    messages = [{"role": "user", "content": "<video>\\nWhat moves?"}]
    request = chat_model.make_request(messages, [chat_model.encode_video("a.mp4")])
    print(chat_model.generate([request]))                    # many at once, each as if alone

A question's way: `ChatModel.make_request` (tokenised, once) → `Sequence` → `Engine`, which decodes
all sequences together → text. A terminal has an engine of its own; the users of page and server
share one, which a `Scheduler` runs in its thread. Imports go one way: request ← engine ← chat_model
← chat, scheduler ← terminal, page, server.
"""

from inference.chat import Chat
from inference.chat_model import ChatModel
from inference.request import Request, Sequence, Visual

__all__ = ["Chat", "ChatModel", "Request", "Sequence", "Visual"]
