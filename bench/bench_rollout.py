"""Tokens per second of the transformers sampler against `model.generate` on the same model, prompts and lengths.

python -m bench.run rollout
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from bench.workload import model_folder
from fastrl.env import reuse_freed_memory
from fastrl.rollout.base import SamplingParams
from fastrl.rollout.transformers_sampler import TransformersSampler

QUESTION = "What is {a} + {b}? Answer with the number only."


def render_prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[int]]:
    """Chat prompts of unequal lengths, with the generation prompt."""
    questions = (QUESTION.format(a=7 + 131 * i % 900, b=5 + i) for i in range(count))
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in questions
    ]


def count_to_stop(rows: list[list[int]], stop: set[int]) -> int:
    """Completion tokens, up to and including the first stop token of each row."""
    return sum(next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in rows)


def generate_tokens(model: PreTrainedModel, prompts: list[list[int]], num_samples: int, params: SamplingParams) -> int:
    """`model.generate` on all rows at once, left-padded; the completion tokens it produced."""
    longest = max(map(len, prompts))
    padded = [[params.stop_token_ids[0]] * (longest - len(p)) + p for p in prompts for _ in range(num_samples)]
    mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts for _ in range(num_samples)]
    torch.manual_seed(params.seed)
    with torch.inference_mode():
        out = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            do_sample=True,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            max_new_tokens=params.max_new_tokens,
            eos_token_id=list(params.stop_token_ids),
            pad_token_id=params.stop_token_ids[0],
        )
    return count_to_stop(out[:, longest:].tolist(), set(params.stop_token_ids))


def sampler_tokens(
    sampler: TransformersSampler, prompts: list[list[int]], num_samples: int, params: SamplingParams
) -> int:
    """The sampler on the same prompts; the completion tokens it produced."""
    groups = sampler.sample(prompts, num_samples, params)
    return sum(len(sample.token_ids) for group in groups for sample in group)


def tokens_per_second(produce: Callable[[], int], device: torch.device) -> tuple[float, int, float]:
    """Rate, tokens and seconds of one run."""
    start = time.perf_counter()
    tokens = produce()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return tokens / seconds, tokens, seconds


def main() -> None:
    """Print both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a packaged model's name, or a folder")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-stop", action="store_true", help="never stop early: every row runs to the limit")
    args = parser.parse_args()

    reuse_freed_memory()
    folder = model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).to(args.device).eval()
    prompts = render_prompts(tokenizer, args.prompts)
    stop = tokenizer.eos_token_id if not args.no_stop else model.config.vocab_size
    sampler = TransformersSampler(model)

    rates: dict[str, list[float]] = {"generate": [], "fastrl": []}
    for round_index in range(-1, args.rounds):
        params = SamplingParams(args.max_new_tokens, args.temperature, stop_token_ids=(stop,), seed=1000 + round_index)
        runs = {
            "generate": lambda params=params: generate_tokens(model, prompts, args.samples, params),
            "fastrl": lambda params=params: sampler_tokens(sampler, prompts, args.samples, params),
        }
        for name, run in runs.items():
            rate, tokens, seconds = tokens_per_second(run, model.device)
            if round_index >= 0:  # the first round warms up
                rates[name].append(rate)
                print(f"{name:>9}  round {round_index}  {tokens:6d} tokens  {seconds:7.2f} s  {rate:8.1f} tokens/s")
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, value in medians.items():
        print(f"{name:>9}  median {value:.1f} tokens/s")
    print(f"ratio {medians['fastrl'] / medians['generate']:.2f}")


if __name__ == "__main__":
    main()
