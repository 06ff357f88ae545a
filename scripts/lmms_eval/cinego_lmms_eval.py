"""Cinego as a model of lmms-eval (github.com/EvolvingLMMs-Lab/lmms-eval), without a server.

    pip install --no-deps -e scripts/lmms_eval         # once: lmms-eval then knows `cinego`
    PYTHONPATH=. python -m lmms_eval --model cinego \\
        --model_args load_from=out/sft_videolm_512.pth --batch_size 16 \\
        --include_path scripts/lmms_eval/tasks --tasks cinego_questions

Lives in lmms-eval's environment, where Cinego's own modules are found by PYTHONPATH; how to make
that environment, and the same through the server, stands in docs/lmms_eval.md.
"""

from collections.abc import Iterator
from functools import lru_cache

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from inference import ChatModel, Request
from inference.likelihood import log_likelihoods
from model.generate import MAX_NEW_TOKENS, Sampling

MANIFEST = ModelManifest(
    "cinego",
    simple_class_path="cinego_lmms_eval.CinegoRanker",  # --force_simple
    chat_class_path="cinego_lmms_eval.CinegoModel",
)


class CinegoModel(lmms):
    """Answers tasks of output_type `generate_until` that have `doc_to_messages`."""

    is_simple = False  # takes whole conversations, with media where they stand

    def __init__(self, load_from: str, batch_size: int = 16, device: str | None = None, **flags):
        """flags: vision_path, tokenizer_path, num_frames, dtype and quantize, as eval.py's, from
        `--model_args name=value,name=value`."""
        super().__init__()
        self.chat_model = ChatModel.load(load_from, device=device or "auto", **flags)
        self.batch_size = int(batch_size)
        # Questions about one clip mostly stand side by side.
        self.encode_video = lru_cache(maxsize=16)(self.chat_model.encode_video)

    def batches(self, requests: list[Instance]) -> Iterator[list[Instance]]:
        for start in tqdm(range(0, len(requests), self.batch_size)):
            yield requests[start : start + self.batch_size]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [
            answer
            for batch in self.batches(requests)
            for answer in self.chat_model.generate(list(map(self._request, batch)))
        ]

    def _request(self, instance: Instance) -> Request:
        _, doc_to_messages, how, doc_id, task, split = instance.args
        conversation = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
        messages, visuals = [], []
        for message in conversation.messages:
            media = [part.url for part in message.content if part.type in ("video", "image")]
            visuals += (seen := list(map(self.encode_video, media)))
            text = "\n".join(part.text for part in message.content if part.type == "text")
            tags = "".join(f"{visual.tag}\n" for visual in seen)
            messages.append({"role": message.role, "content": tags + text})
        sampling = Sampling(
            how.get("max_new_tokens", MAX_NEW_TOKENS),
            how.get("temperature") or 0.0,
            top_p=how.get("top_p") or 1.0,
        )
        stop = how.get("until") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        return self.chat_model.make_request(messages, visuals, sampling, stop)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Cinego takes no tasks of output_type generate_until_multi_round")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("Cinego ranks options with --force_simple")


class CinegoRanker(CinegoModel):
    """Answers tasks of output_type `multiple_choice` and `loglikelihood` whose `doc_to_visual`
    names files: lmms-eval hands those to models that take no conversations."""

    is_simple = True

    def generate_until(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "Cinego takes tasks of output_type generate_until as a chat model"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(loss, whether the model would say just that) of each continuation of its context.

        The loss is summed over tokens, and *smaller is better*: lmms-eval takes the argmin for its
        tasks of output_type `multiple_choice`, whatever the name of this method says.
        """
        results = []
        for batch in self.batches(requests):
            asked, texts, is_single = [], [], []
            for instance in batch:
                context, target, *about = instance.args  # without a video: unconditional likelihood
                visuals, is_function = [], callable(target)
                if about:
                    doc_to_visual, doc_id, task, split = about
                    doc = self.task_dict[task][split][doc_id]
                    target = target(doc) if is_function else target
                    visuals = list(map(self.encode_video, doc_to_visual(doc)))
                tags = "".join(f"{visual.tag}\n" for visual in visuals)
                messages = [{"role": "user", "content": tags + (context or "?")}]
                asked.append(self.chat_model.make_request(messages, visuals))
                texts.append([target.strip()])
                is_single.append(is_function)
            scores = log_likelihoods(self.chat_model, asked, texts)
            # Only tasks of output_type `loglikelihood` read it, and they hand over a function.
            said = self.chat_model.generate(asked) if any(is_single) else [""] * len(asked)
            results += [
                (-score, text == answer)
                for ((score, _),), text, (answer,) in zip(scores, said, texts, strict=True)
            ]
        return results
