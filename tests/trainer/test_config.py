from __future__ import annotations

import ast
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from fastrl.advantages import GroupAdvantage
from fastrl.algorithms import ALGORITHMS, OFFLINE, TokenMasks
from fastrl.spec import KL, Cispo, Clip, Correction, Sapo
from fastrl.trainer import config as config_module
from fastrl.trainer.build import build_algorithm
from fastrl.trainer.config import OptimizerConfig, RewardConfig, RolloutConfig, TrainConfig
from fastrl.trainer.recipe import load_recipe, shown, with_flags
from fastrl.typed import ConfigError, changed, nested


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_recipe_values_arrive_typed_and_the_rest_are_defaults(tmp_path):
    config = load_recipe(
        recipe(
            tmp_path,
            "steps: 7\nalgorithm: dapo\noptimizer: {lr: 1e-5, betas: [0.9, 0.99]}\n"
            "rewards:\n  - {name: format, weight: 2}\nmasks: {clip_cov: 2e-4, cov_low: 0}\n",
        )
    )
    assert config.steps == 7
    assert config.optimizer == OptimizerConfig(lr=1e-5, betas=(0.9, 0.99))
    assert isinstance(config.optimizer.lr, float)
    assert config.rewards == (RewardConfig("format", 2.0),)
    assert config.masks == TokenMasks(clip_cov=2e-4, cov_low=0.0)
    assert config.rollout == TrainConfig().rollout


def test_a_recipe_that_says_nothing_new_is_the_defaults(tmp_path):
    assert load_recipe(recipe(tmp_path, "algorithm: grpo")) == TrainConfig()


def test_the_printed_recipe_is_the_recipe(tmp_path):
    text = (
        "algorithm: dapo\nrewards: [{name: format, weight: 2.0}]\ntask: {options: {a: [1, 2]}}\n"
        "loss: {correction: {kind: truncate, level: token, high: 2.0}}\nrollout: {stop: ['<a>']}\n"
    )
    config = load_recipe(recipe(tmp_path, text))
    assert load_recipe(recipe(tmp_path, shown(config))) == config


def test_every_field_entry_and_item_is_a_flag(tmp_path):
    config = load_recipe(recipe(tmp_path, "algorithm: grpo\nrewards: [{name: format}]\n"))
    flags = (
        "--steps 7 --rollout.group-size=3 --rollout.group_size 4 --task.options.min_terms 2 "
        "--task.options.more.deep 1e-3 --rewards.0.weight 0.5 --rewards.1.name mine:f --rewards.1.options.k v "
        "--optimizer.betas 0.9 0.99 --model 123 --loss.kl.coef 1e-3 "
        "--gradient-checkpointing --task.chat False --rollout.stop <a> <b> --loss.correction.kind mask "
        "--loss.correction.level token --loss.correction.high 2 --log-to tensorboard "
        "--advantages.baseline leave_one_out"
    )
    got = with_flags(config, flags.split())
    assert (got.steps, got.rollout.group_size, got.model, got.gradient_checkpointing) == (7, 4, "123", True)
    assert got.task.options == {"min_terms": 2, "more": {"deep": "1e-3"}}
    assert got.rewards == (RewardConfig("format", 0.5), RewardConfig("mine:f", options={"k": "v"}))
    assert (got.optimizer.betas, got.rollout.stop, got.task.chat) == ((0.9, 0.99), ("<a>", "<b>"), False)
    assert got.log_to == ("tensorboard",)
    algorithm = build_algorithm(got)
    assert (algorithm.spec.correction, algorithm.spec.kl) == (Correction("mask", "token", 2.0), KL("k3", 0.001))
    assert algorithm.estimator == GroupAdvantage("leave_one_out", "group")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rollout.temperatur 1", r"--rollout.temperatur: no such flag. Did you mean --rollout.temperature\?"),
        ("--steps many", "steps: expected int, got 'many'"),
        ("--rollout..group_size 3", "--rollout..group_size: no such flag"),
        ("--steps", "--steps: expected a value"),
        ("--steps 1 2", "--steps: expected one value, got 1 2"),
        ("--steps 010", "expected a whole number in digits that do not begin with 0"),
        ("--steps.more 1", "what is before .more is a single value"),
        ("--loss.surrogate cispo --loss.surrogate.ratio_max 4", "what is before .ratio_max is a single value"),
        ("--rewards.5.name format", "--rewards.5.name: expected a number up to 1 in the place of 5"),
        ("steps 3", "steps: expected a flag, as in --steps 10"),
    ],
)
def test_a_flag_that_is_none_is_refused_in_one_sentence(flags, message):
    with pytest.raises(ConfigError, match=message):
        with_flags(TrainConfig(), flags.split())


@pytest.mark.parametrize("name", ["grpo", "dapo", "rloo", "gdpo", "max_rl"])
def test_one_completion_a_prompt_is_refused_where_it_would_be_compared_with_none(name):
    with pytest.raises(ValueError, match=r"rollout\.group_size: expected 2 or more"):
        build_algorithm(TrainConfig(algorithm=name, rollout=RolloutConfig(group_size=1)))
    build_algorithm(TrainConfig(algorithm="remax", rollout=RolloutConfig(group_size=1)))
    build_algorithm(TrainConfig(algorithm="ppo", rollout=RolloutConfig(group_size=1)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollout: {samples: 8}", "rollout: samples: it is called 'group_size' now."),
        ("tokens_per_batch: 8", "tokens_per_batch: it is called 'max_tokens_per_microbatch' now."),
        ("", "the recipe is empty"),
        ("steps: 4\nmodel: x\nsteps: 1", "recipe.yaml, line 3: steps: a second time, after line 1"),
        ("rollout:\n  top_k: 1\n  top_k: 2", "line 3: top_k: a second time, after line 2"),
        ("steps: 010", "recipe.yaml, line 1: 010: expected a whole number in digits that do not begin with 0"),
        ("steps: 1:30", "line 1: 1:30: expected a whole number"),
        ("a:\n\t- b", "not valid YAML: .* line 2"),
        ("loss: {surrogate.low: 5}", "loss.surrogate.low: expected at most 1"),
        ("loss: {clip_low: 0.1}", "loss.clip_low: it is called 'loss.surrogate.low' now"),
        ("loss: {old_policy: sampler}", "loss.old_policy: it is called 'policy_gradient.ratio_to_sampler' now"),
        ("loss: {kl: k3}", r"loss.kl: expected a mapping, of kl \(kind, coef\), got 'k3'"),
        ("loss: {surrogate.lo: 0.1}", r"loss.surrogate.lo: unknown key. Did you mean 'low'\?"),
        ("loss: {surrogate: {low: 0.1}, surrogate.low: 0.2}", "loss.surrogate.low: a second time"),
        ("loss: {surrogate: clipp}", "loss.surrogate.name: expected one of clip, cispo, sapo, .* got 'clipp'"),
        ("loss: {surrogate: cispo}", "loss.surrogate: ratio_max: missing"),
        ("loss: {entropy_coef: high}", "loss.entropy_coef: expected float, got 'high'"),
        ("loss: {code: x}", "loss.code: expected nothing for grpo, which has ratio, surrogate"),
        ("stepz: 3", r"stepz: unknown key. Did you mean 'steps'\?"),
        ("rollout: {temperatur: 1}", r"rollout: temperatur: unknown key. Did you mean 'temperature'\?"),
        ("rewards:\n  - {nam: format}", r"rewards\[0\]: nam: unknown key. Did you mean 'name'\?"),
        ("steps: many", "steps: expected int, got 'many'"),
        ("steps: true", "steps: expected int, got True"),
        ("steps: 0", "steps: expected at least 1, got 0"),
        ("algorithm: grpoo", "algorithm: expected one of grpo"),
        ("optimizer: {betas: [0.9]}", "betas: expected 2 values, got 1"),
        ("rewards: format", "rewards: expected a list, got 'format'"),
        ("rewards: []", "rewards: expected at least one reward"),
        ("rollout: {temperature: 0}", "rollout.temperature: expected more than 0"),
        ("- 1", "expected a mapping of settings, got list"),
        ("a: [1", "not valid YAML"),
        ("loss: {correction: {kind: truncate, level: token, high: -1}}", "Correction.high"),
        (
            "algorithm: cispo\nloss: {surrogate.low: 0.1}",
            "loss.surrogate.low: unknown key. Known: ratio_max, ratio_min",
        ),
        ("algorithm: opo\nadvantages: {scale: none}", "advantages: expected nothing with opo, which has its own"),
        ("algorithm: vespo\nloss: {ratio: token}", "PolicyLoss.ratio: expected 'sequence' with Vespo, got 'token'"),
        ("masks: {top_entropi: 0.2}", r"masks: top_entropi: unknown key. Did you mean 'top_entropy'\?"),
        (
            "masks: {top_entropy: 2}",
            "masks: TokenMasks: top_entropy: expected a share between 0 and 1, or null, got 2.0",
        ),
        ("optimizer: {lr: .inf}", "optimizer.lr: expected 0 or more, and finite, got inf"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas: expected two numbers from 0 to below 1"),
        ("optimizer: {betas: [-0.1, 0.9]}", "optimizer.betas: expected two numbers from 0 to below 1"),
        ("optimizer: {eps: -1}", "optimizer.eps: expected 0 or more"),
        ("optimizer: {weight_decay: -1}", "optimizer.weight_decay: expected 0 or more"),
        ("optimizer: {max_grad_norm: .nan}", "optimizer.max_grad_norm: expected 0 or more"),
        ("optimizer: {warmup_steps: -3}", "optimizer.warmup_steps: expected 0 or more, got -3"),
        ("algorithm: dpo\noptimizer: {eps: -1}", "TrainConfig: optimizer.eps: expected 0 or more"),
        ("algorithm: ppo\nppo: {critic_lr: .inf}", "ppo.critic_lr: expected 0 or more, and finite"),
        ("algorithm: reward_model\nloss: {center_coef: -1}", "center_coef: expected a finite number of at least 0"),
        ("threads: -1", "threads: expected 0 or more, got -1"),
        ("save_every: -1", "save_every: expected 0 or more, got -1"),
        ("keep_every: -1", "keep_every: expected 0 or more, got -1"),
        ("eval: {every: -1}", r"eval.every: expected 0 \(only before and after\) or more, got -1"),
        ("algorithm: dpo\neval: {every: -1}", r"eval.every: expected 0 \(only before and after\) or more, got -1"),
        ("seed: -1", r"seed: expected a number from 0 to 2\*\*32 - 1"),
        ("run_dir: 'runs/{name}'", "run_dir: expected a folder's name, in which {algorithm} and {seed} may stand"),
        ("run_dir: ''", "run_dir: expected a folder's name"),
        ("max_failure_fraction: 2", "max_failure_fraction: expected a share from 0 to 1, got 2.0"),
        ("algorithm: [dpo]", r"algorithm: expected one of grpo, .* got \['dpo'\]"),
        ("rollout: {dynamic_sampling: -1}", r"rollout.dynamic_sampling: expected 0 \(off\) or more, got -1"),
    ],
)
def test_bad_recipe_is_one_sentence_that_names_file_and_key(tmp_path, text, message):
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("steps: 3\nstepz: 3", 2),
        ("steps: many", 1),
        ("rollout:\n  top_k: 1\n  temperatur: 1", 3),
        ("rollout:\n  top_k: 1\n  temperature: -1", 3),
        ("rewards:\n  - name: format\n  - nam: format", 3),
        ("steps: 3\noptimizer: {lr: 1e-5,\n  betas: [0.9]}", 3),
        ("algorithm: grpo\nloss:\n  aggregate: token_mean\n  surrogate.lo: 0.1", 4),
        ("algorithm: dpo\n\nloss: {beta: -1}", 3),
        ("algorithm: grpoo", 1),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_its_line(tmp_path, text, line):
    path = recipe(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}, line {line}: ")


def test_missing_recipe_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such recipe"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_recipe_in_another_encoding_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"model: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"recipe\.yaml: expected text in UTF-8, got 'utf-8' codec"):
        load_recipe(path)


def test_recipe_cannot_construct_python_objects(tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(recipe(tmp_path, "steps: !!python/object/apply:os.getpid []"))


def test_algorithm_is_its_preset_without_a_reference_model_unless_asked():
    assert build_algorithm(TrainConfig()).spec.kl is None
    assert build_algorithm(TrainConfig(loss={"kl.coef": 0.1})).spec.kl == KL("k3", 0.1)
    assert build_algorithm(TrainConfig(loss={"kl.kind": "k2"})).spec.kl == KL("k2", 0.04)
    assert build_algorithm(TrainConfig(algorithm="dapo", loss={"kl": {}})).spec.kl == KL("k3", 0.04)
    assert build_algorithm(TrainConfig(loss={"kl": None})).spec.kl is None


def test_overrides_replace_single_factors():
    loss = {
        "ratio": "sequence",
        "surrogate.high": 0.3,
        "aggregate": "token_mean",
        "entropy_coef": 0.01,
        "correction": {"kind": "truncate", "level": "token", "high": 2},
    }
    algorithm = build_algorithm(TrainConfig(loss=loss, advantages={"scale": "none"}))
    assert algorithm.spec.ratio == "sequence"
    assert algorithm.spec.surrogate == Clip(low=0.2, high=0.3)
    assert algorithm.spec.aggregate == "token_mean"
    assert algorithm.spec.entropy_coef == 0.01
    assert algorithm.spec.correction == Correction("truncate", "token", high=2.0)
    assert algorithm.estimator == GroupAdvantage("mean", "none")


def test_a_surrogate_of_another_kind_is_chosen_by_its_name():
    def surrogate(algorithm, **loss):
        return build_algorithm(TrainConfig(algorithm=algorithm, loss=loss)).spec.surrogate

    assert surrogate("grpo", surrogate={"name": "cispo", "ratio_max": 4}) == Cispo(ratio_max=4.0)
    assert surrogate("grpo", surrogate="sapo") == Sapo()
    assert surrogate("cispo", **{"surrogate.ratio_max": 8}) == Cispo(ratio_max=8.0)
    assert surrogate("intellect2", **{"surrogate.dual": None}) == Clip(0.2, 0.2)


def test_dotted_and_nested_names_are_the_same_change():
    assert nested({"a.b": 1, "a": {"c.d": 2}, "e": 3}, "x") == {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    dotted, written = TrainConfig(loss={"kl.coef": 0.1}), TrainConfig(loss={"kl": {"coef": 0.1}})
    assert dotted == written
    for twice in ({"a": 1, "a.b": 2}, {"a.b": 2, "a": 1}):
        with pytest.raises(ValueError, match=r"x\.a"):
            nested(twice, "x")


def test_what_a_field_of_a_spec_is_called_is_what_a_recipe_calls_it():
    assert changed(KL("k1", 0.1), {"kind": "k3", "coef": "1e-3"}, "kl") == KL("k3", 0.001)


def test_scale_rl_is_cispo_per_prompt_with_batch_scaled_advantages():
    algorithm = build_algorithm(TrainConfig(algorithm="scale_rl"))
    assert isinstance(algorithm.spec.surrogate, Cispo)
    assert algorithm.spec.aggregate == "prompt_mean"
    assert algorithm.estimator.scale == "batch"


def test_every_algorithm_can_be_selected_and_is_in_the_help():
    for name in ALGORITHMS:
        spec = getattr(build_algorithm(TrainConfig(algorithm=name)), "spec", None)
        entry = ALGORITHMS[name]
        assert spec == (
            None if name in ("sft", "reward_model") else entry.spec if name in OFFLINE else entry.without_kl()
        )
    assert get_args(get_type_hints(TrainConfig)["algorithm"]) == tuple(ALGORITHMS)


def test_every_setting_says_what_it_is():
    module = ast.parse(Path(config_module.__file__).read_text())
    silent = []
    for cls in (node for node in module.body if isinstance(node, ast.ClassDef)):
        for node, after in zip(cls.body, [*cls.body[1:], None], strict=True):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            if isinstance(node, ast.AnnAssign) and not told:
                silent.append(f"{cls.name}.{node.target.id}")
    assert silent == []
