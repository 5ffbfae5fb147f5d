"""What a run needs on each GPU, from formulas: `fastrl plan MODEL --gpus 8`.

Per process, with P trained parameters of b bytes, and of a layer the hidden size H, inner size I, query size Q, key
size K and number of heads n:

    weights       b P
    masters       2 P for 16-bit weights (the low halves of float32 masters, `MasterOptimizer`), else none
    gradients     4 P
    moments       8 P
    activations   T layers (2 (8 H + 2 Q + 2 K + 4 I) + 4 (n + 2)) for a micro-batch of T tokens in 16 bits,
                  T layers (4 (6 H + 2 Q + 2 K + 4 I) + 4 (n + 2)) in float32; with checkpointing b T H layers, and
                  what one layer keeps
    logits        min(budget, 4 T V), of the head at a time
    cache         2 b K layers (prompt + completion) of the rows that are sampled at a time
    reference     b P of a frozen copy

    exchanged     2 (N - 1) / N * 4 P bytes a step and optimizer, the ring's all-reduce of float32 gradients
    arithmetic    2 P per sampled or referenced token, 6 P per trained token; attention is left out

Tests compare weights, masters, gradients, moments, cache, and what a layer keeps without checkpointing, with what is
allocated at toy size; the rest is arithmetic. Fragmentation, the allocator's caches and the runtime's own memory
come on top: 2 GiB are added, a guess.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fastrl.check import choice, require

OP = "plan"
GIB = 2**30
RUNTIME = 2 * GIB
BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind."""

    hidden: int
    layers: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    tied: bool = False

    @property
    def queries(self) -> int:
        """Q."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K."""
        return self.key_heads * self.head_size

    @property
    def parameters(self) -> int:
        """P: embeddings, the layers' products and norms, the last norm, and a head of its own where it is not tied."""
        attention = self.hidden * (2 * self.queries + 2 * self.keys)
        layer = attention + 3 * self.hidden * self.inner + 2 * self.hidden
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer + self.hidden


SHAPES = {
    "smollm2-135m": Shape(576, 30, 1536, 9, 3, 64, 49152, tied=True),
    "qwen3-0.6b": Shape(1024, 28, 3072, 16, 8, 128, 151936, tied=True),
    "qwen3-8b": Shape(4096, 36, 12288, 32, 8, 128, 151936),
    "llama-3.1-8b": Shape(4096, 32, 14336, 32, 8, 128, 128256),
    "llama-3.1-70b": Shape(8192, 80, 28672, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Work:
    """What one step does."""

    prompts: int = 64
    samples: int = 8
    prompt_tokens: int = 512
    completion_tokens: int = 2048
    microbatch_tokens: int = 16384
    at_once: int = 64  # rows that a process samples at a time
    reference: bool = False
    checkpointing: bool = True
    dtype: str = "bfloat16"
    logit_budget: int = 4 * GIB

    @property
    def sampled(self) -> int:
        """Completion tokens of a step."""
        return self.prompts * self.samples * self.completion_tokens

    @property
    def trained(self) -> int:
        """Tokens that the forward pass of training sees, each prompt once per completion."""
        return self.prompts * self.samples * (self.prompt_tokens + self.completion_tokens)


def layer_bytes(shape: Shape, dtype: str) -> int:
    """Bytes that a layer keeps for the backward pass, per token."""
    wide = 8 if dtype == "bfloat16" else 6  # in 16 bits the norms keep their float32 inputs too
    elements = wide * shape.hidden + 2 * shape.queries + 2 * shape.keys + 4 * shape.inner
    return BYTES[dtype] * elements + 4 * (shape.heads + 2)


def memory(shape: Shape, work: Work) -> dict[str, int]:
    """Bytes of each part, in one process."""
    size, count, tokens = BYTES[work.dtype], shape.parameters, work.microbatch_tokens
    layer = layer_bytes(shape, work.dtype) * tokens
    kept = shape.layers * tokens * size * shape.hidden + layer if work.checkpointing else shape.layers * layer
    length = work.prompt_tokens + work.completion_tokens
    return {
        "weights": size * count,
        "masters": 2 * count if size == 2 else 0,
        "gradients": 4 * count,
        "moments": 8 * count,
        "reference": size * count if work.reference else 0,
        "activations": kept,
        "logits": min(work.logit_budget, 4 * tokens * shape.vocabulary),
        "cache": 2 * size * shape.keys * shape.layers * length * work.at_once,
    }


def peak(parts: dict[str, int]) -> int:
    """The most at a time: sampling holds the cache, training the activations and logits."""
    always = sum(value for name, value in parts.items() if name not in ("activations", "logits", "cache"))
    return always + max(parts["cache"], parts["activations"] + parts["logits"]) + RUNTIME


def exchanged(shape: Shape, gpus: int) -> int:
    """Bytes that a process sends for the gradients of a step."""
    return round(2 * (gpus - 1) / gpus * 4 * shape.parameters)


def arithmetic(shape: Shape, work: Work) -> dict[str, float]:
    """Floating-point operations of a step, over all processes."""
    count = shape.parameters - (0 if shape.tied else shape.vocabulary * shape.hidden)  # looking up is no product
    sampling = 2.0 * count * (work.sampled + work.prompts * work.prompt_tokens)
    scoring = 2.0 * count * work.trained if work.reference else 0.0
    return {"sampling": sampling, "reference": scoring, "training": 6.0 * count * work.trained}


def shape_of(name: str) -> Shape:
    """A known shape, or that of a model's folder.

    Raises:
        ValueError: there is none, or it is no decoder of Llama's kind.
    """
    if name in SHAPES:
        return SHAPES[name]
    path = Path(name) / "config.json"
    if not path.is_file():
        choice(OP, "MODEL", name, (*SHAPES, "a model's folder"))
    values = json.loads(path.read_text(encoding="utf-8"))
    needed = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
    lacking = [field for field in needed if not isinstance(values.get(field), int)]
    require(not lacking and "num_experts" not in values, OP, str(path), "a dense decoder's configuration", lacking)
    heads = values["num_attention_heads"]
    return Shape(
        values["hidden_size"],
        values["num_hidden_layers"],
        values["intermediate_size"],
        heads,
        values.get("num_key_value_heads") or heads,
        values.get("head_dim") or values["hidden_size"] // heads,
        values["vocab_size"],
        bool(values.get("tie_word_embeddings", False)),
    )


def main(args: Sequence[str]) -> int:
    """`fastrl plan`: prints the plan and returns the exit status.

    Raises:
        ValueError: there is no such model, or a number is out of range.
    """
    found = _parser().parse_args(args)
    shape = shape_of(found.model)
    fields = {name: getattr(found, name) for name in Work.__dataclass_fields__ if hasattr(found, name)}
    for name in ("gpus", "memory", *(name for name, value in fields.items() if type(value) is int)):
        require(getattr(found, name) >= 1, OP, name, "at least 1", getattr(found, name))
    print("\n".join(lines(found.model, shape, Work(**fields), found.gpus, found.memory * GIB)))
    return 0


def lines(name: str, shape: Shape, work: Work, gpus: int, room: int) -> list[str]:
    """The plan in words."""
    parts, steps = memory(shape, work), arithmetic(shape, work)
    most, fits = peak(parts), "fits" if peak(parts) <= room else "does not fit"
    rows = [f"{name}: {shape.parameters / 1e9:.2f} B parameters, {work.dtype}", ""]
    rows += [f"  {part:<12} {size / GIB:9.2f} GiB" for part, size in parts.items() if size]
    rows += [f"  {'peak':<12} {most / GIB:9.2f} GiB a GPU, {fits} in {room / GIB:.0f} GiB", ""]
    rows.append(f"a step: {work.prompts} prompts x {work.samples} completions, {work.sampled:,} tokens sampled, "
                f"{work.trained:,} trained")  # fmt: skip
    rows += [f"  {part:<12} {flops / gpus / 1e15:9.1f} PFLOP a GPU" for part, flops in steps.items() if flops]
    rows.append(f"  {'gradients':<12} {exchanged(shape, gpus) / GIB:9.2f} GiB sent by each of {gpus}")
    if most > room:
        rows += ["", *_advice(shape, work, room)]
    return rows


def _advice(shape: Shape, work: Work, room: int) -> list[str]:
    """What would fit, of what a recipe can change; the whole model is in every process."""
    half = replace(work, microbatch_tokens=work.microbatch_tokens // 4, at_once=max(1, work.at_once // 4))
    if peak(memory(shape, half)) <= room:
        return ["It fits with a quarter of microbatch_tokens and at_once."]
    frozen = BYTES[work.dtype] * shape.parameters
    if frozen + RUNTIME <= 0.8 * room:
        return [f"An adapter would leave {frozen / GIB:.1f} GiB of frozen weights: adapter: {{rank: 16}}."]
    return ["Its weights alone need several GPUs, and no process can hold a part of a model yet."]


def _parser() -> ArgumentParser:
    parser = ArgumentParser("fastrl plan", description="What a run needs on each GPU, from formulas.")
    parser.add_argument("model", help=f"{', '.join(SHAPES)}, or a model's folder")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--memory", type=int, default=80, help="GiB of a GPU")
    parser.add_argument("--dtype", choices=tuple(BYTES), default=Work.dtype)
    for name in ("prompts", "samples", "prompt_tokens", "completion_tokens", "microbatch_tokens", "at_once"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Work, name))
    parser.add_argument("--reference", action="store_true", help="a frozen reference model, as for a KL")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    return parser


def table(gpus: Sequence[int] = (1, 8, 64)) -> str:
    """The table of docs/scale.md: GiB of each shape at the default work."""
    rows = ["| model | parameters | states | training | sampling | peak | sent a step, by number of GPUs |"]
    rows.append("|" + "---|" * 7)
    for name, shape in SHAPES.items():
        parts = memory(shape, Work())
        states = sum(parts[part] for part in ("weights", "masters", "gradients", "moments"))
        sent = ", ".join(f"{count}: {exchanged(shape, count) / GIB:.1f}" for count in gpus)
        cells = (states, parts["activations"] + parts["logits"], parts["cache"], peak(parts))
        rows.append(
            f"| {name} | {shape.parameters / 1e9:.2f} B | "
            + " | ".join(f"{one / GIB:.1f}" for one in cells)
            + f" | {sent} |"
        )
    return "\n".join(rows)
