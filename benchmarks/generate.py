"""How fast are answers, against transformers' Llama of the same size with the same weights?

    python benchmarks/generate.py                      # about 4 minutes on two idle cores
    python benchmarks/generate.py --compile --output out/generate.json

Tokens a second of one stream and of batches, each as a ratio to `LlamaForCausalLM.generate`, and
which share of the time goes into what no program can spare: reading every weight once a step, at
the speed at which this machine reads memory. Then the time from a video file to the first token of
an answer about 32 frames of it, against tower and prefill alone, with a tower of the size of CLIP
ViT-B/32. All weights are random. Each round measures every variant once, one after the other, so
that a busy machine slows all of them alike; figures are medians over rounds, with the CPU-seconds
beside the wall time: on a busy machine these are to be believed. Nothing is measured before a
warm-up.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import av
import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from inference import Answerer
from model.checkpoint import save_model
from model.cinego import Cinego
from model.config import CinegoConfig, LanguageModelConfig
from model.generate import Generation, Row, Sampling, generate
from model.inference import WEIGHTS, prepare
from model.minimind import MiniMind

NEVER = -1  # no token ends an answer here
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
PROMPT = 80  # tokens: a video and a question


def llama_of(model: MiniMind) -> LlamaForCausalLM:
    ours = model.config
    settings = {
        name: getattr(ours, name)
        for name in (
            *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
            "rms_norm_eps",
        )
    }
    config = LlamaConfig(
        **settings,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta},
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    llama, state = LlamaForCausalLM(config), model.state_dict()
    llama.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return llama.eval()


def cpu_seconds() -> float:
    """Of this process and its children, living (a video is decoded in one) or done (a compiler)."""
    living = psutil.Process().children(recursive=True)
    return sum(os.times()[:4]) + sum(sum(child.cpu_times()[:2]) for child in living)


class Clock:
    """Wall and CPU seconds of calls, by name."""

    def __init__(self):
        self.runs: dict[str, list[tuple[float, float]]] = {}

    def time(self, name: str, call: Callable, times: int = 1) -> None:
        """Notes the seconds of `call`, divided by `times`."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        call()
        seconds = time.perf_counter() - wall, cpu_seconds() - cpu
        self.runs.setdefault(name, []).append((seconds[0] / times, seconds[1] / times))

    def median(self, name: str) -> tuple[float, float]:
        return tuple(statistics.median(column) for column in zip(*self.runs[name], strict=True))

    def fastest(self, name: str) -> tuple[float, float]:
        """The one that was disturbed least."""
        return min(self.runs[name])


def ours(model: MiniMind, ids: Tensor, tokens: int) -> Callable:
    """Reads the prompts now; the call makes `tokens` more tokens of each."""
    generation = Generation(model, NEVER)
    generation.add({"input_ids": ids}, [Row(Sampling(tokens + 1)) for _ in ids])

    def steps():
        while generation.rows:
            generation.step()

    return steps


def theirs(llama: LlamaForCausalLM, ids: Tensor, tokens: int) -> Callable:
    """As `ours`, the prompt's own time taken out: transformers can't be stopped after it."""
    with torch.inference_mode():
        cache = llama(ids, use_cache=True).past_key_values
    one = torch.cat([ids, ids[:, :1]], dim=1)

    def steps():
        llama.generate(
            one,
            attention_mask=torch.ones_like(one),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
        )

    return steps


def decoding(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    model = MiniMind(LanguageModelConfig(hidden_size=args.dim, num_hidden_layers=args.n_layers))
    llama = llama_of(model.eval())
    ids = torch.randint(100, 6400, (max(args.batches), PROMPT))
    same = llama.generate(
        ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=20, do_sample=False
    )
    assert generate(model, {"input_ids": ids[:1]}, 20, NEVER) == same[:, PROMPT:].tolist()

    kinds = {weights: (weights, False) for weights in args.weights}
    if args.compile:
        kinds["float32 compiled"] = ("float32", True)
    models = {}
    for name, (weights, compile) in kinds.items():
        start = time.perf_counter(), cpu_seconds()
        models[name] = prepare(copy.deepcopy(model), weights, compile)
        if compile:
            wall, cpu = time.perf_counter() - start[0], cpu_seconds() - start[1]
            print(
                f"{name}: warm-up {wall:.0f} s, {cpu:.0f} CPU-s (less with a warm compiler cache)"
            )
    read = torch.ones(64 << 20)  # 256 MB, more than any cache
    clock = Clock()
    for round in range(args.rounds + 1):
        if round == 1:
            clock = Clock()
        clock.time("memory", lambda: torch.dot(read, read))
        for batch in args.batches:
            some = ids[:batch]
            clock.time(f"transformers {batch}", theirs(llama, some, args.tokens), args.tokens)
            for name, ready in models.items():
                clock.time(f"{name} {batch}", ours(ready, some, args.tokens), args.tokens)

    speed = read.numel() * read.element_size() / clock.median("memory")[0]
    num_weights = sum(p.numel() for p in model.parameters())
    limits = {name: num_weights * BYTES[name.split()[0]] / speed for name in models}
    limits["transformers"] = num_weights * 4 / speed
    print(
        f"\n{num_weights / 1e6:.1f} M weights; memory is read at {speed / 1e9:.1f} GB/s: at most "
        f"{1 / limits['float32']:.0f} tokens/s in float32\n"
    )
    print("| | batch | tokens/s | CPU-ms a step | x transformers (wall, CPU) | of the limit |")
    print("|---|--:|--:|--:|--:|--:|")
    rows = []
    for batch in args.batches:
        base = clock.median(f"transformers {batch}")
        for name in ("transformers", *models):
            wall, cpu = clock.median(f"{name} {batch}")
            row = {
                "name": name,
                "batch": batch,
                "tokens_per_second": batch / wall,
                "cpu_ms": 1e3 * cpu,
                "ratio": base[0] / wall,
                "cpu_ratio": base[1] / cpu,
                "share_of_limit": limits[name] / wall,
            }
            rows.append(row)
            print(
                f"| {name} | {batch} | {row['tokens_per_second']:.1f} | {row['cpu_ms']:.1f} | "
                f"{row['ratio']:.2f}, {row['cpu_ratio']:.2f} | {100 * limits[name] / wall:.0f} % |"
            )
    return {"memory_gb_per_second": speed / 1e9, "weights": num_weights, "rows": rows}


def write_video(path: Path, seconds: int = 10) -> None:
    """Moving noise, 640 × 360, 25 frames a second."""
    noise = np.random.default_rng(0).integers(0, 255, (45, 80, 3), np.uint8)
    noise = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for shift in range(25 * seconds):
            frame = av.VideoFrame.from_ndarray(np.roll(noise, shift, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def first_token(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_video(folder / "a.mp4")
        torch.manual_seed(0)
        tower = CLIPVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=224, patch_size=32,
        )  # fmt: skip
        CLIPVisionModel(tower).save_pretrained(folder / "tower")
        preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        preprocessor |= {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}}
        (folder / "tower/preprocessor_config.json").write_text(json.dumps(preprocessor))
        language_model = LanguageModelConfig(hidden_size=args.dim, num_hidden_layers=args.n_layers)
        save_model(folder / "m.pth", Cinego(CinegoConfig(language_model)), {})
        answerer = Answerer.load(folder / "m.pth", folder / "tower", device="cpu")

        def answer():
            chat = answerer.chat()
            chat.show(answerer.read(folder / "a.mp4", num_frames=32))
            pieces = chat.ask("What happens in this video?", Sampling(1))
            list(pieces)

        pixels = torch.randn(32, 3, 224, 224)
        visual = answerer.read(folder / "a.mp4", num_frames=32)
        prompt = answerer.encode(
            [{"role": "user", "content": "What happens in this video?"}], [visual]
        )

        def alone():
            visual.features = answerer.see(pixels)
            with torch.inference_mode():
                answerer.model(**answerer.inputs([prompt], [visual]), logits_to_keep=1)

        clock = Clock()
        for round in range(args.rounds + 1):
            if round == 1:
                clock = Clock()
            clock.time("alone", alone)
            clock.time("answer", answer)
    print("\nfirst token about 32 frames of a 640 x 360 mp4, against tower + prefill alone:")
    figures = {}
    for name, of in (("median", clock.median), ("fastest", clock.fastest)):
        (whole, whole_cpu), (least, least_cpu) = of("answer"), of("alone")
        print(
            f"{name}: {whole:.2f} s ({whole_cpu:.2f} CPU-s) against {least:.2f} s ({least_cpu:.2f} "
            f"CPU-s): x {whole / least:.2f} of wall, {whole_cpu / least_cpu:.2f} of CPU time"
        )
        figures[name] = {"seconds": whole, "tower_and_prefill": least, "ratio": whole / least}
        figures[name]["cpu_ratio"] = whole_cpu / least_cpu
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dim", type=int, default=512, help="width of the language model")
    add("--n_layers", type=int, default=8)
    add("--batches", type=int, nargs="+", default=[1, 4, 16])
    add("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    add("--tokens", type=int, default=64, help="made by each measured call")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=2)
    add("--compile", action="store_true", help="also with torch.compile, which warms up first")
    add("--only", choices=["tokens", "video"], help="one of the two tables")
    add("--output", type=Path, help="JSON file for all figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads, medians of {args.rounds} rounds")
    figures = {"command": sys.argv}
    if args.only != "video":
        figures["tokens"] = decoding(args)
    if args.only != "tokens":
        figures["first_token"] = first_token(args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
