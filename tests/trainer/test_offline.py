"""Training on answers written before: the same gradient under any split, every algorithm, resume, and bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from trainer.test_resume import Crash, everything, lines
from trainer.tiny import in_step, offline_config, tiny_config, write_answers, write_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fastrl.algorithms import ALGORITHMS, OFFLINE
from fastrl.algorithms.offline import Answers, objective_of
from fastrl.cli import main
from fastrl.data import load_preferences
from fastrl.data.pack import pack
from fastrl.data.preferences import answered, mismatched, with_end
from fastrl.losses.answer_rows import split_pairs
from fastrl.losses.preference import preference_loss
from fastrl.losses.presets import DPO, IPO, SIMPO, WPO
from fastrl.model.load import load_model
from fastrl.model.policy import Policy
from fastrl.model.scalar import ScalarModel, about_padding, load_scalar_model, padding
from fastrl.monitor.records import read_run
from fastrl.monitor.report import judged
from fastrl.preference_spec import (
    JensenShannon,
    LogOdds,
    Power,
    PreferenceLoss,
    PreferenceMix,
    Sft,
    UnpairedPreferenceLoss,
)
from fastrl.rewards import resolve_reward
from fastrl.trainer import evaluate, loop, reference, setup
from fastrl.trainer import models as run_models
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import (
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RewardConfig,
    TrainConfig,
)
from fastrl.trainer.optimizer import MasterOptimizer
from fastrl.trainer.recipe import load_recipe
from fastrl.trainer.setup import prepare, train
from fastrl.trainer.stages import is_staged, load_stages
from fastrl.types import Group

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _report_without_pictures(monkeypatch):
    """They would take half of the time."""
    monkeypatch.setattr("fastrl.monitor.report.charts", lambda run: [])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    write_model(folder / "model")
    for kind in ("pairs", "ranked", "labelled", "completions"):
        write_answers(folder / f"{kind}.jsonl", kind, rows=8)
    return folder


def groups_of(folder, objective, kind=None, **columns):
    """Eight groups with reference log-probabilities that are not the policy's; (groups, their mismatched ones)."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    kind = kind or objective.kind
    groups = load_preferences(folder / f"{kind}.jsonl", tokenizer, kind=kind, chat=False, **columns)
    if not hasattr(objective, "spec") and objective.kind == "pairs":
        groups = with_end(groups, 0)
    others = [Group(g.prompt, [replace(s) for s in g.samples]) for g in mismatched(groups)]
    noise = torch.Generator().manual_seed(1)
    for sample in (sample for group in (*groups, *others) for sample in group.samples):
        sample.ref_logps = (-3 - torch.rand(len(sample.token_ids), generator=noise)).tolist()
    return groups, others


def answers(groups, others, sizes=(8,), layout="padded"):
    """The groups in micro-batches of these sizes."""

    def packed(groups):
        batches = []
        for part in torch.arange(len(groups)).split(list(sizes)):
            some = pack([groups[i] for i in part], layout=layout, max_tokens=400, whole_groups=True)
            batches += [replace(batch, group_ids=part[batch.group_ids]) for batch in some]
        return batches

    tokens = sum(len(group.samples[0].token_ids) for group in groups)
    said = {"margins": [group.margin for group in groups], "soft_labels": [group.soft_label for group in groups]}
    known = {name: torch.tensor(values) for name, values in said.items() if None not in values}
    return Answers(packed(groups), len(groups), tokens, packed(others) if others else [], **known)


def trained_model(folder, objective, dtype=torch.float32):
    """The model that an objective trains; a scalar head of zeros has no gradient to compare."""
    if hasattr(objective, "spec") or objective.kind == "completions":
        return Policy(load_model(folder / "model", dtype)[0])
    model = ScalarModel(load_scalar_model(folder / "model", dtype)[0])
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def gradient(folder, objective, *args, **data):
    model = trained_model(folder, objective)
    optimizer = MasterOptimizer(model.model.parameters(), OptimizerConfig(), 1)
    loss, _ = objective.accumulate(SimpleNamespace(policy=model), answers(*groups_of(folder, objective, **data), *args))
    return float(loss), optimizer.grad.clone()


BY_JUDGE = {"margin_column": "by", "soft_label_column": "judge"}


@pytest.mark.parametrize(
    ("name", "data"),
    [(name, {}) for name in ("dpo", "aot", "orpo", "wpo", "kto", "sft", "reward_model")]
    + [("dpo", BY_JUDGE), ("reward_model", BY_JUDGE), ("reward_model", {"kind": "ranked"})],
    ids=lambda value: value if isinstance(value, str) else "".join(value),
)
def test_any_split_and_layout_gives_the_same_loss_and_gradient(folder, name, data):
    objective = objective_of(ALGORITHMS[name].spec)
    loss, whole = gradient(folder, objective, **data)
    assert whole.abs().max() > 1e-3
    if data:
        assert (whole - gradient(folder, objective)[1]).abs().max() > 1e-3
    for sizes, layout in [((4, 4), "padded"), ((2, 2, 2, 2), "padded"), ((1, 5, 2), "shared"), ((8,), "shared")]:
        other_loss, other = gradient(folder, objective, sizes, layout, **data)
        assert other_loss == pytest.approx(loss, abs=1e-6), (sizes, layout)
        assert (other - whole).abs().max() <= 1e-6, (sizes, layout)


def test_ranked_answers_of_a_prompt_are_compared_pair_by_pair_and_weigh_one_together(folder):
    """Bradley-Terry over every pair of unequal rank, written out; a tie is no pair."""
    objective = ALGORITHMS["reward_model"].spec
    model = trained_model(folder, objective)
    groups, _ = groups_of(folder, objective, "ranked")
    given = answers(groups, [], (3, 5))
    loss, _ = objective.accumulate(SimpleNamespace(policy=model), given)
    expected, pairs, right, gap = 0.0, 0, 0, 0.0
    for place, group in enumerate(groups):
        scores = model.scores(answers([group], [], (1,)).batches[0]).tolist()
        ranks = [2 + place % 2, 1, 2]
        differences = [scores[i] - scores[j] for i in range(3) for j in range(3) if ranks[i] < ranks[j]]
        assert len(differences) == 2 + place % 2
        expected += sum(math.log1p(math.exp(-d)) for d in differences) / len(differences) / len(groups)
        pairs, gap = pairs + len(differences), gap + sum(differences)
        right += sum(d > 0 for d in differences)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    measured = objective.measure(model, given)
    assert measured == pytest.approx({"accuracy": right / pairs, "margin": gap / pairs, "loss": expected}, rel=1e-5)


@pytest.mark.parametrize("name", ["dpo", "reward_model"])
def test_margins_and_soft_labels_of_the_rows_are_those_of_the_loss(folder, name):
    """l = p softplus(m - d) + (1 - p) softplus(d - m), d being the difference of the two rewards."""
    objective = objective_of(ALGORITHMS[name].spec)
    model = trained_model(folder, objective)
    groups, others = groups_of(folder, objective, **BY_JUDGE)
    loss, _ = objective.accumulate(SimpleNamespace(policy=model), answers(groups, others, (3, 5)))
    alone = []
    for group in groups:
        d = objective.measure(model, answers([group], [], (1,)))["margin"] - group.margin
        p = group.soft_label
        alone.append(p * math.log1p(math.exp(-d)) + (1 - p) * math.log1p(math.exp(d)))
    assert float(loss) == pytest.approx(sum(alone) / len(alone), rel=1e-5)


@pytest.mark.parametrize("spec", [DPO, replace(DPO, match="aot"), WPO], ids=["dpo", "aot", "wpo"])
def test_the_gradient_is_that_of_autograd_through_the_models_own_logits(folder, spec):
    """In float64, with log-probabilities and log sum p^2 from a softmax over stored logits."""
    objective = objective_of(spec)
    policy = trained_model(folder, objective, torch.float64)
    given = answers(*groups_of(folder, objective), (4, 4))
    loss, _ = objective.accumulate(SimpleNamespace(policy=policy), given)
    got = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    policy.model.zero_grad()
    (whole,) = answers(*groups_of(folder, objective)).batches
    full = policy.head.logits(policy.hidden(whole)).log_softmax(-1)
    arguments = split_pairs(
        whole.cu_seqlens,
        logps=full.gather(-1, whole.targets[:, None]).squeeze(-1),
        ref_logps=whole.ref_logps.double(),
        log_sum_sq_probs=full.detach().mul(2).logsumexp(-1) if spec == WPO else None,
    )
    expected = preference_loss(**arguments, spec=spec).loss
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-12, rtol=0)
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, atol=1e-12, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


CHANGED = [  # divergences and mixtures that have no name of their own
    ("dpo", {"transform": "jensen_shannon"}),
    ("dpo", {"transform.exponent": -1.0}),
    ("rpo", {"link": "hinge", "weights": [1.0, 0.2], "aggregate": "token_mean"}),
    ("ipo", {"weighting": "wpo", "ld_alpha": 0.5}),
]


@pytest.mark.parametrize(
    ("name", "loss"),
    [*((name, {}) for name in OFFLINE), *CHANGED],
    ids=[*OFFLINE, "jensen_shannon", "forward_kl", "hinge_and_nll", "ipo_with_wpo"],
)
def test_every_algorithm_takes_two_steps_that_lower_its_loss(folder, name, loss):
    objective = build_algorithm(TrainConfig(algorithm=name, loss=loss))
    model = trained_model(folder, objective)
    given = answers(*groups_of(folder, objective), (3, 5))
    optimizer = MasterOptimizer(model.model.parameters(), OptimizerConfig(lr=3e-4), 2)
    before = objective.measure(model, given)
    losses = []
    for _ in range(2):
        loss, _ = objective.accumulate(SimpleNamespace(policy=model), given)
        assert optimizer.step() > 0
        losses.append(float(loss))
    after = objective.measure(model, given)
    assert losses[0] == pytest.approx(before["loss"], rel=1e-4)
    assert after["loss"] < losses[1] < losses[0]
    assert (
        set(after)
        == {
            "pairs": {"accuracy", "margin", "loss"},
            "labelled": {"margin", "loss"},
            "completions": {"loss", "token_accuracy"},
        }[objective.kind]
    )


CHANGES = {  # of every factor of every loss: the recipe that has it otherwise, and what it becomes
    "link": ("dpo", {"link": "hinge"}, "hinge"),
    "beta": ("dpo", {"beta": 0.3}, 0.3),
    "reference": ("dpo", {"reference": False}, False),
    "length": ("dpo", {"length": "mean"}, "mean"),
    "transform": ("dpo", {"transform": "jensen_shannon"}, JensenShannon()),
    "margin": ("dpo", {"margin": 1}, 1.0),
    "label_smoothing": ("dpo", {"label_smoothing": 0.2}, 0.2),
    "debias": ("cdpo", {"debias": True}, True),
    "match": ("dpo", {"match": "aot"}, "aot"),
    "ld_alpha": ("dpo", {"ld_alpha": 0.5}, 0.5),
    "weighting": ("ipo", {"weighting": "wpo"}, "wpo"),
    "tau": ("discopop", {"tau": 0.1}, 0.1),
    "baseline": ("kto", {"baseline": "zero"}, "zero"),
    "desirable_weight": ("kto", {"desirable_weight": 1.3}, 1.3),
    "undesirable_weight": ("kto", {"undesirable_weight": 1.3}, 1.3),
}


def spec_of(tmp_path, algorithm, loss):
    """What a recipe with these lines trains with."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"algorithm": algorithm, "loss": loss}))
    return build_algorithm(load_recipe(path)).spec


@pytest.mark.parametrize("factor", [f.name for spec in (PreferenceLoss, UnpairedPreferenceLoss) for f in fields(spec)])
def test_a_recipe_can_change_every_factor_of_a_loss_and_no_other(tmp_path, factor):
    algorithm, loss, value = CHANGES[factor]
    assert spec_of(tmp_path, algorithm, loss) == replace(ALGORITHMS[algorithm].spec, **{factor: value})
    assert getattr(ALGORITHMS[algorithm].spec, factor) != value


@pytest.mark.parametrize(
    ("algorithm", "loss", "spec"),
    [
        ("dpo", {"transform": {"name": "power", "exponent": -1.0}}, replace(DPO, transform=Power(-1.0))),
        ("ipo", {"transform.exponent": -0.5}, replace(IPO, transform=Power(-0.5))),
        ("simpo", {"transform": "log_odds", "margin": 0.0}, replace(SIMPO, transform=LogOdds(), margin=0.0)),
        ("rpo", {"weights": [1.0, 0.2], "aggregate": "token_mean", "link": "hinge"},
         PreferenceMix(((1.0, replace(DPO, link="hinge")), (0.2, Sft("token_mean"))))),
        ("rpo", {"weighting": "wpo", "tau": 0.05}, PreferenceMix(((1.0, WPO), (1.0, Sft())))),
    ],
)  # fmt: skip
def test_a_recipe_selects_divergences_and_mixtures(tmp_path, algorithm, loss, spec):
    assert spec_of(tmp_path, algorithm, loss) == spec


def test_flags_select_factors_as_a_recipe_does(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        setup, "train", lambda config: seen.append(config) or loop.Outcome("finished", 0, {}, {}, tmp_path)
    )
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("algorithm: dpo")
    flags = [
        "--loss.link",
        "hinge",
        "--loss.debias",
        "False",
        "--loss.transform.exponent",
        "-1",
        "--data.margin-column",
        "by",
    ]
    assert main(["train", str(recipe), *flags]) == 0
    (config,) = seen
    assert build_algorithm(config).spec == replace(DPO, link="hinge", transform=Power(-1.0))
    assert config.data.margin_column == "by"


def test_kto_takes_its_baseline_from_answers_to_other_prompts(folder):
    objective = build_algorithm(TrainConfig(algorithm="kto"))
    policy = trained_model(folder, objective)
    given = answers(*groups_of(folder, objective))
    _, metrics = objective.accumulate(SimpleNamespace(policy=policy), given)
    logps = torch.cat([policy.score(b, temperature=1.0) - b.ref_logps for b in given.mismatched])
    assert float(metrics[0]["kl"][0]) == pytest.approx(max(0.0, float(logps.sum()) / 8), rel=1e-5)
    assert float(logps.sum()) > 0  # else the baseline is 0 whatever it was taken from


@pytest.mark.parametrize(
    ("algorithm", "measure", "least"),
    [
        ("dpo", "accuracy", 0.9),
        ("kto", "margin", 0.05),
        ("sft", "token_accuracy", 0.6),
        ("reward_model", "accuracy", 0.9),
    ],
)
def test_a_run_improves_what_it_measures_on_held_out_rows(tmp_path, algorithm, measure, least):
    config = offline_config(tmp_path, algorithm, steps=12, eval=EvalConfig(every=5))
    outcome = train(config)
    assert (outcome.status, outcome.steps) == ("finished", 12)
    assert outcome.after[measure] >= least > outcome.before[measure]
    assert outcome.after["loss"] < outcome.before["loss"]
    run_dir = outcome.report.parent
    assert [line["step"] for line in lines(run_dir / "evaluations.jsonl")] == [0, 5, 10, 12]
    assert [line["step"] for line in lines(run_dir / "metrics.jsonl")] == list(range(1, 13))
    name = measure.replace("_", " ")
    assert f"Held-out {name}" in outcome.report.read_text() or f", {name} " in outcome.report.read_text()


def crash(run):
    raise Crash


def interrupt(run):
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("algorithm", "dtype"), [("dpo", "float32"), ("kto", "bfloat16"), ("sft", "float32"), ("reward_model", "bfloat16")]
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(tmp_path, monkeypatch, algorithm, dtype):
    """Three and a half steps are an epoch, so it also goes on in the middle of one."""
    optimizer = OptimizerConfig(lr=1e-2, warmup_steps=3, schedule="cosine", weight_decay=0.01)
    changes = {"dtype": dtype, "steps": 7, "save_every": 5, "optimizer": optimizer, "eval": EvalConfig(every=2)}
    config = offline_config(tmp_path, algorithm, run_dir=str(tmp_path / "whole"), **changes)
    train(config)
    stopped = replace(config, run_dir=str(tmp_path / "stopped"))
    with monkeypatch.context() as patch:
        in_step(patch, 7, crash)
        with pytest.raises(Crash):
            train(stopped)
    assert [line["step"] for line in lines(tmp_path / "stopped" / "metrics.jsonl")] == list(range(1, 7))
    with monkeypatch.context() as patch:  # what the reference said is on the disk
        patch.setattr(
            "fastrl.trainer.reference.AskedOnce._ask", lambda *_: pytest.fail("the reference was asked again")
        )
        assert train(replace(stopped, resume=stopped.run_dir)).status == "finished"
    assert everything(tmp_path / "stopped") == everything(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["pairs", "ranked"])
def test_a_reward_model_learns_from_rankings_and_from_judged_pairs(tmp_path, kind):
    source = str(write_answers(tmp_path / f"{kind}.jsonl", kind))
    columns = {"ranked": True} if kind == "ranked" else BY_JUDGE
    data = DataConfig(source=source, held_out=6, chat=False, **columns)
    outcome = train(offline_config(tmp_path, "reward_model", steps=12, data=data))
    assert outcome.after["accuracy"] >= 0.8 > outcome.before["accuracy"]
    assert outcome.after["loss"] < outcome.before["loss"]


@pytest.mark.parametrize(
    ("algorithm", "roles"),
    [
        ("dpo", ["chosen", "rejected"]),
        ("kto", ["desirable", "undesirable"]),
        ("sft", ["demonstration"]),
        ("reward_model", ["rank 1", "rank 2", "rank 3"]),
    ],
)
def test_the_report_shows_held_out_rows_with_what_was_measured_on_each_before_and_after(tmp_path, algorithm, roles):
    config = offline_config(tmp_path, algorithm, steps=6)
    if algorithm == "reward_model":
        source = str(write_answers(tmp_path / "ranked.jsonl", "ranked"))
        config = replace(config, data=replace(config.data, source=source, ranked=True, held_out=8))
    outcome = train(config)
    run_dir = outcome.report.parent
    found = judged(read_run(run_dir))
    run = prepare(config)
    assert (found.steps, found.total, len(found.rows)) == ((0, 6), len(run.evaluations[0].rows), evaluate.SHOWN_ROWS)
    assert sorted({role for row in found.rows for role, _, _ in row.answers}) == roles
    for row, group in zip(found.rows, run.evaluations[0].rows, strict=False):
        assert row.prompt == group.prompt.content
        assert [text for _, _, text in row.answers] == [sample.text for sample in group.samples]
    saved = [line for line in lines(run_dir / "evaluation_completions.jsonl") if line["step"] == 6]
    assert len(saved) == sum(len(group.samples) for group in run.evaluations[0].rows[: evaluate.SHOWN_ROWS])
    if not run.algorithm.needs_ref:
        again = prepare(replace(config, model=str(run_dir / "model")), trains=False)
        answers = Answers.of(again.learner, again.evaluations[0].rows[:1])
        alone = again.algorithm.measure(again.learner.policy, answers)
        assert saved[0]["rewards"] == pytest.approx({n: alone[n] for n in alone if n != "accuracy"}, rel=1e-4)
    page = outcome.report.read_text()
    assert f"The first 6 of {found.total}, each measured by itself" in page
    assert "Held-out answers" not in page
    before, after = (float(v) for v in dict(found.rows[0].numbers)["loss"].split(" → "))
    assert after < before
    assert f"loss {dict(found.rows[0].numbers)['loss']}".replace(" → ", "\u00a0→\u00a0") in page


def test_what_a_row_holds_is_escaped_in_the_report(tmp_path):
    config = offline_config(tmp_path, steps=1)
    rows = [row | {"chosen": row["chosen"] + " <script>alert(1)</script>"} for row in lines(Path(config.data.source))]
    Path(config.data.source).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = train(config).report.read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script>" not in page


def test_ctrl_c_saves_and_the_command_it_prints_goes_on(tmp_path, monkeypatch, capsys):
    config = offline_config(tmp_path, run_dir=str(tmp_path / "whole"))
    train(config)
    with monkeypatch.context() as patch:
        in_step(patch, 2, interrupt)
        outcome = train(replace(config, run_dir=str(tmp_path / "stopped")))
    assert (outcome.status, outcome.steps) == ("interrupted", 1)
    stopped = tmp_path / "stopped"
    assert f"fastrl train {stopped / 'config.yaml'} --resume {stopped}" in capsys.readouterr().out
    assert main(["train", str(stopped / "config.yaml"), "--resume", str(stopped)]) == 0
    saved = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert saved[0] == saved[1]


def test_what_the_reference_said_of_other_weights_or_answers_is_asked_again(tmp_path, monkeypatch):
    config = offline_config(tmp_path, steps=2, save_every=1)
    train(config)
    kept = tmp_path / "run" / "reference" / "logps.safetensors"
    whole = load_file(kept)["logps"].clone()  # the file is about to change under it
    kept.write_bytes(kept.read_bytes()[:-100])
    asked = []
    original = reference.AskedOnce._ask
    monkeypatch.setattr(reference.AskedOnce, "_ask", lambda *a: asked.append(1) or original(*a))
    assert train(replace(config, resume=str(tmp_path / "run"))).status == "finished"
    assert asked
    assert torch.equal(load_file(kept)["logps"], whole)


def test_a_reference_of_its_own_is_what_answers_are_compared_with(tmp_path):
    train(offline_config(tmp_path, "sft", steps=3, run_dir=str(tmp_path / "sft")))
    outcome = train(offline_config(tmp_path, steps=1, reference=str(tmp_path / "sft" / "model")))
    assert outcome.before["margin"] != 0.0


def test_no_step_pays_for_the_reference_or_the_optimizers_buffers(tmp_path, monkeypatch):
    def slow(function):
        return lambda *args, **named: time.sleep(1) or function(*args, **named)

    for owner, name in ((reference.AskedOnce, "fill_in"), (run_models, "MasterOptimizer")):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    train(offline_config(tmp_path, steps=1))
    (step,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert step["time"] - step["step_time"] >= 2


def test_the_command_line_trains_and_judges_from_a_recipe(tmp_path, capsys):
    config = offline_config(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    data = {"source": config.data.source, "held_out": 6, "chat": False}
    values = {
        name: getattr(config, name) for name in ("model", "algorithm", "dtype", "device", "run_dir", "rows_per_step")
    }
    recipe.write_text(yaml.safe_dump(values | {"data": data, "steps": 50}))
    assert main(["train", str(recipe), "--steps", "3", "--optimizer.lr", "0.01", "--loss.beta", "0.2"]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["steps"], saved["optimizer"]["lr"], saved["loss"]["beta"]) == (3, 0.01, 0.2)
    after = lines(tmp_path / "run" / "evaluations.jsonl")[-1]
    header = " ".join(capsys.readouterr().out.split())  # the screen folds long lines
    assert "6 rows held out" in header
    assert f"3 steps of {config.rows_per_step} rows" in header
    assert main(["eval", str(tmp_path / "run" / "model"), str(recipe), "--loss.beta", "0.2"]) == 0
    assert f"margin {after['margin']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_read(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    algorithms = [c.algorithm for c in (load_stages(path).each.values() if is_staged(path) else [load_recipe(path)])]
    assert algorithms == [path.stem] or path.stem not in ALGORITHMS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("algorithm: dpoo", r"algorithm: expected one of .*Did you mean 'dpo'\?"),
        ("algorithm: dpo\nrows_per_stp: 3", r"rows_per_stp: unknown key. Did you mean 'rows_per_step'\?"),
        ("algorithm: grpo\ndata: {size: 3}", "data: expected nothing, as grpo learns from completions that it samples"),
        ("algorithm: dpo\nrows_per_step: 0", "rows_per_step: expected at least 1, got 0"),
        ("algorithm: dpo\nloss: {beta: -1}", "PreferenceLoss: beta"),
        ("algorithm: bco\nloss: {margin: 1.0}", "margin: expected 0 for bco_pair"),
        ("algorithm: sft\nloss: {beta: 0.1}", "loss.beta: expected nothing for sft, which has no factors"),
        ("algorithm: kto\nloss: {margin: 1.0}", "loss.margin: expected nothing for kto, which has beta, baseline"),
        ("algorithm: orpo\nloss: {weights: [1.0]}", "loss.weights: expected a list of 2 weights"),
        ("algorithm: orpo\nloss: {weights: 0.5}", "loss.weights: expected a list of 2 weights, got 0.5"),
        ("algorithm: orpo\nreference: other", "reference: expected nothing for orpo"),
        ("algorithm: dpo\ndata: {unpair: true}", "data.unpair: expected false for dpo"),
        ("algorithm: dpo\nloss: {link: sigmoidd}", "loss.link: expected one of sigmoid, hinge, ipo, .*'sigmoidd'"),
        ("algorithm: dpo\nloss: {transform.exponent: .inf}", "Power: exponent: expected a finite number"),
        (
            "algorithm: dpo\nloss: {transform: {name: jensen_shannon, exponent: 1}}",
            "loss.transform: exponent: unknown key",
        ),
        ("algorithm: dpo\nloss: {transform: log_odds}", "reference: expected False for LogOdds"),
        ("algorithm: dpo\nloss: {aggregate: token_mean}", "loss.aggregate: expected nothing for dpo, which has link"),
        ("algorithm: dpo\ndata: {ranked: true}", "data.ranked: expected false for dpo; only reward_model compares"),
        ("algorithm: bco\ndata: {margin_column: by}", "data.margin_column: expected nothing for bco with this loss"),
        ("algorithm: sft\ndata: {soft_label_column: p}", "data.soft_label_column: expected nothing for sft"),
        ("algorithm: cdpo\ndata: {soft_label_column: p}", "data.soft_label_column: expected nothing for cdpo"),
        ("algorithm: reward_model\ndata: {ranked: true, margin_column: by}", "expected nothing for ranked rows"),
        ("algorithm: dpo\noptimizer: {steps_per_rollout: 2}", "optimizer.steps_per_rollout: expected 1"),
    ],
)
def test_a_bad_recipe_is_one_sentence_that_names_file_and_key(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    config = offline_config(tmp_path)
    other = write_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(other)

    def with_rows(name, rows):
        folder = write_model(tmp_path / name)
        LlamaForCausalLM(LlamaConfig.from_pretrained(folder, vocab_size=rows)).save_pretrained(folder)
        return str(folder)

    for changes, message in [
        ({"reference": str(other)}, "reference: expected a model with the vocabulary of"),
        (
            {"max_tokens_per_microbatch": 6},
            r"max_tokens_per_microbatch: expected at least \d+, the tokens of the longest row, got 6",
        ),
        (
            {"data": replace(config.data, held_out=24)},
            "at least 0, and fewer than the 24 distinct rows",
        ),
        ({"data": replace(config.data, source=str(tmp_path / "nowhere.jsonl"))}, "a file that exists"),
        ({"algorithm": "kto"}, "columns of kind='labelled': expected 'prompt', 'label', 'completion'"),
        ({"device": "gpu"}, "device: expected auto, cpu or another that torch has here, got 'gpu': "),
        ({"backend": "fast"}, "backend: expected one of auto, .* got 'fast'"),
        ({"reference": with_rows("reference", 20)}, "reference: expected embeddings of the policy's 32 tokens"),
        ({"model": with_rows("model20", 20)}, r"model: expected token ids below 20, .* got \d+ from the tokenizer"),
        ({"model": str(tmp_path / "none")}, "got '.*none'. transformers: .*none"),
    ]:
        with pytest.raises((ValueError, OSError), match=message) as caught:
            train(replace(config, **changes))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_rows_that_were_left_out_are_counted_in_the_log(tmp_path):
    config = offline_config(tmp_path, steps=1)
    path = Path(config.data.source)
    path.write_text(path.read_text() + json.dumps({"prompt": "w1", "chosen": "", "rejected": "w2"}) + "\n")
    train(config)
    (warning,) = lines(tmp_path / "run" / "warnings.jsonl")
    assert "left out 1 of 25 rows: 1 with an empty 'chosen'" in warning["message"]


def test_rows_longer_than_the_model_has_positions_for_are_left_out_and_counted(tmp_path):
    config = offline_config(tmp_path, steps=1, rows_per_step=25, max_tokens_per_microbatch=512)
    path = Path(config.data.source)
    path.write_text(path.read_text() + json.dumps({"prompt": "w1 " * 70, "chosen": "w1", "rejected": "w2"}) + "\n")
    train(config)
    (warning,) = lines(tmp_path / "run" / "warnings.jsonl")
    assert "left out 1 of 25 rows: 1 longer than 64 tokens" in warning["message"]


def test_a_run_is_resumed_only_by_its_own_recipe_model_and_rows(tmp_path):
    config = offline_config(tmp_path, steps=2, save_every=1)
    train(config)
    run_dir = str(tmp_path / "run")
    more = write_answers(tmp_path / "more.jsonl", rows=30)
    longer = json.loads(more.read_text().splitlines()[0]) | {"chosen": "w7 w7 w7"}
    for changes, message in [
        ({"algorithm": "ipo"}, "resume: algorithm: expected 'dpo'"),
        ({"rows_per_step": 4}, "resume: rows_per_step: expected 5"),
        ({"loss": {"beta": 0.3}}, "resume: loss.beta"),
        ({"steps": 1}, "resume: steps: expected at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(replace(config, resume=run_dir, **changes))
    with pytest.raises(ValueError, match=r"resume: algorithm: expected 'dpo' as in .*, got 'grpo'"):
        train(tiny_config(tmp_path, resume=run_dir))
    path = Path(config.data.source)
    path.write_text(json.dumps(longer) + "\n" + path.read_text())
    with pytest.raises(ValueError, match="expected the state of the same prompts"):
        train(replace(config, resume=run_dir))


def test_pairs_train_kto_as_single_answers(tmp_path):
    path = str(write_answers(tmp_path / "pairs.jsonl"))
    data = DataConfig(source=path, held_out=4, chat=False, unpair=True)
    outcome = train(offline_config(tmp_path, "kto", steps=2, data=data))
    evaluation = lines(outcome.report.parent / "evaluations.jsonl")[0]
    assert evaluation["rows"] == 4
    assert outcome.status == "finished"


def test_a_gradient_that_is_not_finite_stops_the_run_and_updates_nothing(tmp_path, monkeypatch):
    config = offline_config(tmp_path)
    config = replace(config, data=replace(config.data, held_out=0))  # whose loss would stop it before the first step
    original = setup.prepare

    def broken(config):
        run = original(config)
        with torch.no_grad():
            run.learner.policy.model.model.norm.weight[0] = float("nan")
        return run

    monkeypatch.setattr(setup, "prepare", broken)
    outcome = train(config)
    assert (outcome.status, outcome.steps) == ("diverged", 0)
    assert (tmp_path / "run" / "non_finite_batch.safetensors").is_file()


def test_a_trained_reward_model_scores_completions_as_it_did_in_training(tmp_path):
    config = offline_config(tmp_path, "reward_model", steps=8)
    path = train(config).report.parent / "model"
    rows = lines(Path(config.data.source))
    reward = resolve_reward("model", path=str(path), label="judge", dtype="float32", max_tokens_per_microbatch=16)
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    scores = reward(prompts=prompts, completions=[row[side] for row in rows for side in ("chosen", "rejected")])
    model, tokenizer = load_scalar_model(path)
    groups = with_end(load_preferences(rows, tokenizer, chat=False), 0)
    batches = [pack([group], layout="padded", max_tokens=64, whole_groups=True)[0] for group in groups]
    expected = torch.cat([ScalarModel(model).scores(batch) for batch in batches])
    torch.testing.assert_close(torch.tensor(scores), expected.detach(), atol=1e-5, rtol=0)
    right = sum(a > b for a, b in zip(scores[::2], scores[1::2], strict=True))
    assert right >= 0.9 * len(rows)


def padded_tokenizer(folder, special):
    """The tiny model's tokenizer with further special tokens; its end of sequence is its padding too."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token == tokenizer.eos_token
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.save_pretrained(folder)


def test_transformers_scores_a_saved_reward_model_at_the_token_that_it_was_trained_at(tmp_path):
    """It looks for the last token that is no padding: where that is the end of sequence, for the one before.

    https://github.com/huggingface/transformers/issues/35352
    """
    config = offline_config(tmp_path, "reward_model", steps=8)
    padded_tokenizer(config.model, ["w28"])  # a word that it has, and no text here
    path = train(config).report.parent / "model"
    model = AutoModelForSequenceClassification.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.pad_token == "w28"
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    judge = resolve_reward("model", path=str(path), label="judge", dtype="float32")
    prompts, answers = ["w3 w4", "w5"], ["w7", "w7 w9 w7"]
    ours = judge(prompts=prompts, completions=answers)
    texts = [answered(prompt, answer, tokenizer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = [[*group.prompt.token_ids, *group.samples[0].token_ids] for group in texts]
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    together = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**together).logits[:, 0].tolist()
        alone = [model(input_ids=torch.tensor([row])).logits.item() for row in ids]
    assert theirs == pytest.approx(ours, abs=1e-5)
    assert alone == pytest.approx(ours, abs=1e-5)


def test_a_scalar_model_pads_with_a_token_that_ends_nothing_or_says_that_there_is_none(tmp_path):
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "<reserved_7>": 2, "a": 3}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    assert padding(tokenizer, 4) is None
    assert "pads with '<eos>', which also ends texts, and has no other" in about_padding(tokenizer)
    for name, special in (("<unk>", "unk_token"), ("<reserved_7>", None)):  # each better than what was there
        tokenizer.add_special_tokens({special: name} if special else {"additional_special_tokens": [name]})
        assert padding(tokenizer, 4) == name
    assert padding(tokenizer, 2) == "<unk>"  # the model has no row for the other
    tokenizer.pad_token = "<reserved_7>"
    assert padding(tokenizer, 4) == "<reserved_7>"
    assert about_padding(tokenizer) == ""


def test_two_reward_models_score_together_in_a_rollout_run(tmp_path):
    path = str(train(offline_config(tmp_path, "reward_model", steps=2)).report.parent / "model")
    judges = [
        RewardConfig("model", weight, {"path": path, "dtype": "float32", "label": f"judge{weight}"})
        for weight in (1.0, 0.5)
    ]
    outcome = train(tiny_config(tmp_path, steps=1, rewards=tuple(judges), run_dir=str(tmp_path / "grpo")))
    (step,) = lines(outcome.report.parent / "metrics.jsonl")
    means = [step[f"rewards/judge{weight}/mean"] for weight in (1.0, 0.5)]
    assert means[0] == means[1] != 0.0
    assert step["reward"] == pytest.approx(1.5 * means[0])


def test_a_model_without_a_trained_scalar_head_is_no_reward(folder):
    with pytest.raises(ValueError, match=r"model: path: expected a reward model, got .*, whose scalar head is all zer"):
        resolve_reward("model", path=str(folder / "model"))
