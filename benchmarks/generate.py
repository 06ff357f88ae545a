"""How fast are answers, against transformers' Llama of the same size with the same weights?

    python -m benchmarks.generate                        # about 3 minutes on two idle cores
    python -m benchmarks.generate --batches 1 --threads 1 --output out/generate.json

Tokens a second of one stream and of batches, each as a ratio to `LlamaForCausalLM.generate` in
float32, which it also runs in bfloat16. Weights are random. Each round measures every variant
once, one after the other, so that a busy machine slows all alike; figures are medians over rounds,
with the CPU time beside the wall time: on a busy machine believe that.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cli import Flags, flag, launch, parse_flags
from model.config import LanguageModelConfig
from model.generate import DecodingBatch, generate
from model.inference import prepare
from model.minimind import MiniMind

NEVER = -1  # no token ends an answer here


@dataclass
class GenerateFlags(Flags):
    """Benchmark"""

    dim: int = flag(512, "width of the language model", at_least=64)
    n_layers: int = flag(8, "layers of the language model", at_least=1)
    batches: list[int] = flag([1, 4, 16], "rows that are decoded together")
    prompt: int = flag(80, "tokens of a prompt: a video and a question", at_least=1)
    tokens: int = flag(64, "tokens that each measured call decodes", at_least=1)
    rounds: int = flag(5, "measurements of each variant", at_least=1)
    threads: int = flag(2, "threads of torch", at_least=1)
    output: Path | None = flag(None, "JSON file for all figures")


def llama_of(model: MiniMind) -> LlamaForCausalLM:
    """transformers' model of the same shape with the same weights."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
    names += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    config = LlamaConfig(
        **{name: getattr(model.config, name) for name in names},
        rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    llama, state = LlamaForCausalLM(config), model.state_dict()
    llama.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return llama.eval()


def our_steps(model: MiniMind, ids_BL: Tensor, tokens: int) -> Callable:
    """Reads the prompts now; the call decodes `tokens` tokens of each."""
    batch = DecodingBatch(model)
    first = batch.prefill({"input_ids": ids_BL})

    def steps():
        logits = first
        for _ in range(tokens):
            logits = batch.decode(logits.argmax(-1).tolist())

    return steps


def their_steps(llama: LlamaForCausalLM, ids_BL: Tensor, tokens: int) -> Callable:
    """As `our_steps`."""
    with torch.inference_mode():
        cache = llama(ids_BL, use_cache=True).past_key_values
    ids = torch.cat([ids_BL, ids_BL[:, :1]], dim=1)
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
    return lambda: llama.generate(ids, past_key_values=cache, **how)


def main() -> None:
    flags = parse_flags(GenerateFlags, __doc__)
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    model = MiniMind(LanguageModelConfig(hidden_size=flags.dim, num_hidden_layers=flags.n_layers))
    llama = llama_of(model.eval())
    ids = torch.randint(100, 6400, (max(flags.batches), flags.prompt))
    same = llama.generate(
        ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=20, do_sample=False
    )
    assert generate(model, {"input_ids": ids[:1]}, 20, NEVER) == same[:, flags.prompt :].tolist()

    variants = {
        "transformers float32": (their_steps, llama),
        "transformers bfloat16": (their_steps, copy.deepcopy(llama).bfloat16()),
        "float32": (our_steps, prepare(copy.deepcopy(model), "float32")),
        "bfloat16": (our_steps, prepare(copy.deepcopy(model), "bfloat16")),
        "int8": (our_steps, prepare(copy.deepcopy(model), "float32", "int8")),
    }
    seconds: dict[tuple, list[tuple[float, float]]] = {}
    for round in range(-1, flags.rounds):  # the first one warms up
        for batch in flags.batches:
            for name, (steps, ready) in variants.items():
                call = steps(ready, ids[:batch], flags.tokens)
                wall, cpu = time.perf_counter(), time.process_time()
                call()
                taken = time.perf_counter() - wall, time.process_time() - cpu
                if round >= 0:
                    seconds.setdefault((name, batch), []).append(taken)

    print(f"torch {torch.__version__}, {flags.threads} threads, medians of {flags.rounds} rounds\n")
    print("| batch | | tokens/s | CPU-ms a step | x transformers (wall, CPU) |")
    print("|--:|---|--:|--:|--:|")
    medians = {k: [*map(statistics.median, zip(*v, strict=True))] for k, v in seconds.items()}
    rows = []
    for (name, batch), (wall, cpu) in medians.items():
        base = medians["transformers float32", batch]
        row = {"name": name, "batch": batch, "tokens_per_second": batch * flags.tokens / wall}
        row |= {"cpu_ms": 1e3 * cpu / flags.tokens}
        row |= {"ratio": base[0] / wall, "cpu_ratio": base[1] / cpu}
        rows.append(row)
        print(
            "| {batch} | {name} | {tokens_per_second:.1f} | {cpu_ms:.1f} | "
            "{ratio:.2f}, {cpu_ratio:.2f} |".format(**row)
        )
    if flags.output:
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    launch(main)
