"""A model small enough to train in a test, its tokenizer, and a task it can learn."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastrl.model.load import load_model
from fastrl.rollout.collect import collect
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import (
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutConfig,
    TaskConfig,
    TrainConfig,
)
from fastrl.trainer.loop import Run
from fastrl.trainer.trainer import Trainer

WORDS = ["<eos>", "<unk>", *(f"w{i}" for i in range(30))]


def write_model(folder):
    """A random Llama of two layers with tied embeddings, and a tokenizer of 32 words; returns the folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        attention_dropout=0.5,
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)
    return folder


def write_task(path, rows=24):
    """Prompts of two words, of unequal length; returns the file."""
    lines = [{"prompt": " ".join([f"w{i}"] * (1 + i % 3)), "wanted": "w7"} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def wanted_words(completions, wanted, **_):
    """The share of words in a completion that are the wanted one."""
    words = [text.split() for text in completions]
    return [w.count(target) / max(1, len(w)) for w, target in zip(words, wanted, strict=True)]


def noisy_words(completions, wanted, **_):
    """The same, and a little from each of the global random number generators."""
    words = wanted_words(completions, wanted)
    return [w + 0.1 * (random.random() + np.random.random() + torch.rand(()).item()) for w in words]


def always_one(completions, **_):
    """Nothing to learn from."""
    return [1.0] * len(completions)


def short(completions, **_):
    """The shorter, the better."""
    return [1.0 / (1 + len(text.split())) for text in completions]


def raises_on_some(completions, **_):
    """Fails on every completion that starts with w1, w2, ..., w9."""
    for text in completions:
        if text[:3].strip() in {f"w{i}" for i in range(1, 10)}:
            raise RuntimeError("cannot judge this")
    return [float(len(text)) for text in completions]


def always_raises(completions, **_):
    """Fails."""
    raise RuntimeError("no judge at home")


def sampled(run, prompts, samples, *, seed):
    """Completions of a run's next prompts, which nobody has judged."""
    sampling = run.source.sampling
    params = replace(sampling.params, seed=seed)
    return collect(run.source.prompts.next(prompts), sampling.engine, run.tokenizer, samples, params)


def in_step(patch, number, arm):
    """Calls `arm` with the run when its step `number` begins, or goes on."""
    original = Run._step

    def step(run):
        if run.learner.steps + 1 == number:
            arm(run)
        return original(run)

    patch.setattr(Run, "_step", step)


def tiny_config(tmp_path, **changes):
    """A run on the tiny model and task, in float32."""
    model = tmp_path / "model"
    if not model.exists():
        write_model(model)
    fields = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "steps": 3,
        "run_dir": str(tmp_path / "run"),
        "max_tokens_per_microbatch": 64,
        "task": TaskConfig(source=str(write_task(tmp_path / "task.jsonl")), held_out=4, chat=False),
        "rewards": (RewardConfig("trainer.tiny:wanted_words"),),
        "rollout": RolloutConfig(prompts_per_step=4, group_size=4, max_new_tokens=6),
        "optimizer": OptimizerConfig(lr=1e-2),
        "eval": EvalConfig(samples=2),
    }
    return TrainConfig(**(fields | changes))


def write_answers(path, kind="pairs", rows=24):
    """Rows of a kind, of which the answers with many w7 are the better ones; returns the file.

    Pairs have a margin and a judge's probability besides.
    """
    lines = []
    for i in range(rows):
        good, bad = " ".join(["w7"] * (1 + i % 2)), " ".join([f"w{(i + 8) % 30}"] + ["w9"] * (i % 4))
        values = {
            "pairs": {"chosen": good, "rejected": bad, "by": 0.5 * (i % 3), "judge": 0.6 + 0.1 * (i % 4)},
            "ranked": {"responses": [f"{bad} w3", good, bad], "ranking": [2 + i % 2, 1, 2]},
            "labelled": {"completion": bad if i % 2 else good, "label": i % 2 == 0},
            "completions": {"completion": good},
        }[kind]
        lines.append({"prompt": " ".join([f"w{i}"] * (1 + i % 3))} | values)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def offline_config(tmp_path, algorithm="dpo", **changes):
    """A run on written answers with the tiny model, in float32."""
    model = tmp_path / "model"
    if not model.exists():
        write_model(model)
    kind = build_algorithm(TrainConfig(algorithm=algorithm)).kind
    fields = {
        "model": str(model),
        "algorithm": algorithm,
        "dtype": "float32",
        "device": "cpu",
        "steps": 4,
        "rows_per_step": 5,
        "run_dir": str(tmp_path / "run"),
        "max_tokens_per_microbatch": 64,
        "data": DataConfig(source=str(write_answers(tmp_path / f"{kind}.jsonl", kind)), held_out=6, chat=False),
        "optimizer": OptimizerConfig(lr=1e-2),
    }
    return TrainConfig(**(fields | changes))


def small_trainers(monkeypatch, tmp_path):
    """Every `Trainer` made from now on has a small model in the place of the one it names, and two steps; returns
    those that were made."""
    folder, original, load, made = write_model(tmp_path / "model"), Trainer.__init__, load_model, []

    def small(self, model, rows=None, **given):
        written = given.get("algorithm") == "dpo" and given.get("source") != "rollouts"
        if written:  # the answers are digits, of which this model knows none
            rows = [{"prompt": f"w{i}", "chosen": "w7", "rejected": "w9"} for i in range(30)]
        section = "data" if written else "task"
        less = {"chat": False} | ({} if written else {"held_out": 0})
        given |= {"dtype": "float32", "device": "cpu", "steps": 2, "run_dir": tmp_path / "run"}
        given |= {section: {**given.get(section, {}), **less}}
        given |= {} if written else {"rollout": {"prompts_per_step": 2, "group_size": 3, "max_new_tokens": 4}}
        original(self, str(folder), rows, **given)
        made.append(self)

    monkeypatch.setattr(Trainer, "__init__", small)
    monkeypatch.setattr("fastrl.model.load.load_model", lambda name, dtype, **more: load(folder, dtype, **more))
    return made
