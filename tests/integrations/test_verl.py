"""veRL's plug-in: losses, advantages and the fused head under veRL's own signatures.

Where verl is installed, the plug-in registers with the real one and is also compared with its functions. Elsewhere
a stand-in has the signatures of verl 0.9.1 that the plug-in calls, and formulas of this file are the comparison.
"""

import importlib
import importlib.util
import re
import sys
import types
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path

import gloo
import numpy as np
import pytest
import torch

from fastrl import presets
from fastrl.spec import KL, Clip, PolicyLoss

REAL = importlib.util.find_spec("verl") is not None
DOC = (Path(__file__).parents[2] / "docs/integrations/verl.md").read_text()
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
needs_verl = pytest.mark.skipif(not REAL, reason="compares with verl's own functions")


def aggregate(losses, mask, mode, dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None):
    """veRL's aggregation: sums over the global counts, times the ranks that gradients are averaged over."""
    rows, lengths = (losses * mask).sum(-1), mask.sum(-1)
    if mode in ("token-mean", "token-sum"):
        tokens = lengths.sum() if batch_num_tokens is None else batch_num_tokens
        return rows.sum() * dp_size / (tokens if mode == "token-mean" else 1)
    if mode == "seq-mean-token-mean":
        rows = rows / lengths.clamp(min=1)
    sequences = (lengths > 0).sum() if global_batch_size is None else global_batch_size
    scale = (loss_scale_factor or mask.shape[1]) if mode == "seq-mean-token-sum-norm" else 1
    return rows.sum() * dp_size / sequences / scale


def stand_in(monkeypatch):
    """Modules with veRL's names and signatures."""

    def module(name, **members):
        made = types.ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
        parent, _, own = name.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], own, made, raising=False)

    losses, estimators = {}, {}

    def agg_loss(loss_mat, loss_mask, loss_agg_mode, **counts):
        return aggregate(loss_mat, loss_mask, loss_agg_mode, **counts)

    class Engine:
        def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
            if micro_batch.get("calculate_sum_pi_squared"):
                raise NotImplementedError("not with fused kernels")
            made = {"log_probs": output.log_probs.squeeze(0)}
            return made | ({"entropy": output.entropy.squeeze(0)} if micro_batch["calculate_entropy"] else {})

    for name in ("verl", "verl.trainer", "verl.trainer.ppo", "verl.utils", "verl.utils.experimental"):
        module(name)
    for name in ("verl.utils.kernel", "verl.workers", "verl.workers.engine", "verl.workers.engine.fsdp"):
        module(name)
    module(
        "verl.trainer.ppo.core_algos",
        agg_loss=agg_loss,
        register_policy_loss=lambda name: lambda function: losses.setdefault(name, function),
        get_policy_loss_fn=losses.__getitem__,
        ADV_ESTIMATOR_REGISTRY=estimators,
        register_adv_est=lambda name: lambda function: estimators.setdefault(name, function),
        get_adv_estimator_fn=estimators.__getitem__,
    )
    module("verl.utils.experimental.torch_functional", FusedLinearForPPO=object())
    module("verl.utils.kernel.linear_cross_entropy", linear_cross_entropy=object())
    module("verl.workers.engine.fsdp.transformer_impl", FSDPEngineWithLMHead=Engine)
    module(
        "verl.utils.tensordict_utils",
        get_non_tensor_data=lambda data, key, default: data.get(key, default),
        assign_non_tensor=lambda data, **values: data.update(values),
    )
    true = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.9.1" if name == "verl" else true(name))


@pytest.fixture
def verl(monkeypatch):
    """The plug-in, freshly imported."""
    if not REAL:
        stand_in(monkeypatch)
    monkeypatch.delitem(sys.modules, "fastrl.integrations.verl", raising=False)
    yield importlib.import_module("fastrl.integrations.verl")
    sys.modules.pop("fastrl.integrations.verl", None)


@pytest.fixture
def core(verl):
    return sys.modules["verl.trainer.ppo.core_algos"]


@dataclass
class Config:
    """The fields of veRL's actor configuration that a loss reads, with their defaults."""

    clip_ratio: float = 0.2
    clip_ratio_low: float | None = 0.2
    clip_ratio_high: float | None = 0.2
    clip_ratio_c: float = 3.0
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    global_batch_info: dict = field(default_factory=dict)

    def get(self, name, default=None):
        return getattr(self, name, default)


def batch(rows=6, columns=9):
    lengths = torch.tensor([columns, 4, 7, 1, 0, 5])[:rows]
    mask = torch.arange(columns) < lengths[:, None]
    old = torch.randn(rows, columns) * 0.5 - 2
    new = (old + torch.randn(rows, columns) * 0.5).requires_grad_()
    advantages = torch.randn(rows, 1).expand(rows, columns) * mask
    return {"old_log_prob": old, "log_prob": new, "advantages": advantages, "response_mask": mask}


def loss_and_gradient(function, data, **options):
    log_prob = data["log_prob"].detach().requires_grad_()
    loss, metrics = function(**data | {"log_prob": log_prob}, **options)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    return loss.detach(), gradient, metrics


def token_ratio(data):
    return (data["log_prob"] - data["old_log_prob"]).exp()


def clipped(ratio, advantages, low, high):
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high))


def ppo(data):
    return clipped(token_ratio(data), data["advantages"], 0.2, 0.2)


def dapo(data):
    return clipped(token_ratio(data), data["advantages"], 0.2, 0.28)


def gspo(data):
    mask = data["response_mask"]
    log_ratio = ((data["log_prob"] - data["old_log_prob"]) * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    return clipped(log_ratio.exp()[:, None], data["advantages"], 3e-4, 4e-4)


def cispo(data):
    return -token_ratio(data).detach().clamp(max=5.0) * data["advantages"] * data["log_prob"]


def sapo(data):
    tau = torch.where(data["advantages"] > 0, 1.0, 1.05)
    return -4 / tau * torch.sigmoid(tau * (token_ratio(data) - 1)) * data["advantages"]


FORMULAS = {"fastrl_ppo": ppo, "fastrl_dapo": dapo, "fastrl_gspo": gspo, "fastrl_cispo": cispo, "fastrl_sapo": sapo}


def test_importing_registers_the_presets_and_a_second_time_changes_nothing(verl, core):
    names = {f"fastrl_{name.lower()}" for name in presets.PRESETS} - {"fastrl_scale_rl"}
    functions = {name: core.get_policy_loss_fn(name) for name in names}
    estimators = {name: core.get_adv_estimator_fn(name) for name in verl.ESTIMATORS}
    verl.register()
    assert all(core.get_policy_loss_fn(name) is function for name, function in functions.items())
    assert all(core.get_adv_estimator_fn(name) is function for name, function in estimators.items())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_is_its_formula_under_verls_aggregation(core, name, mode):
    data = batch()
    counts = {"dp_size": 2, "batch_num_tokens": 61, "global_batch_size": 11, "loss_scale_factor": 30}
    for info in ({}, counts):
        loss, gradient, _ = loss_and_gradient(
            core.get_policy_loss_fn(name), data, loss_agg_mode=mode, config=Config(global_batch_info=info)
        )
        expected = aggregate(FORMULAS[name](data), data["response_mask"], mode, **info)
        torch.testing.assert_close(loss, expected.detach(), rtol=2e-6, atol=1e-6)
        (wanted,) = torch.autograd.grad(expected, data["log_prob"])
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-7)
        assert gradient.abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
def test_ranks_that_average_their_gradients_get_the_gradient_of_one(core, mode):
    data, function = batch(), core.get_policy_loss_fn("fastrl_gspo_token")
    info = {"batch_num_tokens": 26, "global_batch_size": 5, "loss_scale_factor": 9}
    _, whole, _ = loss_and_gradient(function, data, loss_agg_mode=mode, config=Config(global_batch_info=info))
    parts = []
    for rows in (slice(0, 2), slice(2, 6)):
        part = {name: tensor[rows] for name, tensor in data.items()}
        config = Config(global_batch_info=info | {"dp_size": 2})
        parts.append(loss_and_gradient(function, part, loss_agg_mode=mode, config=config)[1] / 2)
    torch.testing.assert_close(torch.cat(parts), whole)


def test_weights_of_a_rollout_correction_multiply_each_tokens_loss(core):
    data, weights = batch(), torch.rand(6, 9)
    loss, gradient, _ = loss_and_gradient(
        core.get_policy_loss_fn("fastrl_ppo"), data, config=Config(), rollout_is_weights=weights
    )
    expected = aggregate(ppo(data) * weights, data["response_mask"], "token-mean")
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, data["log_prob"])[0])


def test_a_bound_at_verls_default_is_the_presets_and_any_other_is_verls(verl):
    clip = verl.configured(presets.DAPO, Config()).surrogate
    assert (clip.low, clip.high, clip.dual) == (0.2, 0.28, None)
    clip = verl.configured(presets.DAPO, Config(clip_ratio_high=0.3, clip_ratio_c=4.0)).surrogate
    assert (clip.low, clip.high, clip.dual) == (0.2, 0.3, 4.0)
    clip = verl.configured(presets.GSPO, Config(0.1, clip_ratio_low=None, clip_ratio_high=None)).surrogate
    assert (clip.low, clip.high) == (0.1, 0.1)
    cispo = verl.configured(presets.CISPO, Config(clip_ratio_low=1.5, clip_ratio_high=2.0)).surrogate
    assert (cispo.ratio_min, cispo.ratio_max) == (0.0, 3.0)
    assert verl.configured(presets.SAPO, Config(tau_neg=2.0)).surrogate == replace(presets.SAPO.surrogate, tau_neg=2.0)


def test_the_metrics_tell_the_bounds_from_the_dual_bound(verl, core):
    verl.register_loss("dual", PolicyLoss(surrogate=Clip(0.2, 0.2, dual=1.3)))
    data = batch()
    _, _, metrics = loss_and_gradient(core.get_policy_loss_fn("dual"), data, config=Config())
    mask, advantages, ratio = data["response_mask"], data["advantages"], token_ratio(data)
    up, down = (advantages > 0) & (ratio > 1.2), (advantages < 0) & (ratio < 0.8)
    beyond = (advantages < 0) & (ratio > 1.3)
    assert metrics["actor/pg_clipfrac"] == pytest.approx((up | down)[mask].float().mean().item())
    assert metrics["actor/pg_clipfrac_lower"] == pytest.approx(beyond[mask].float().mean().item())
    assert metrics["actor/ppo_kl"] == pytest.approx(-ratio.log()[mask].mean().item(), rel=1e-5)
    assert min(metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]) > 0


@pytest.mark.parametrize("change", [{"kl": KL("k3", 0.1)}, {"entropy_coef": 0.1}])
def test_a_loss_with_a_term_that_verl_adds_is_refused_by_name(verl, change):
    with pytest.raises(ValueError, match=f"mine: {next(iter(change))}: expected none"):
        verl.register_loss("mine", PolicyLoss(**change))


def rewards_of(scores, mask):
    """Each score at the last token of its response."""
    last = mask.long().cumsum(-1).argmax(-1)
    return torch.zeros(mask.shape).scatter(1, last[:, None], torch.tensor(scores)[:, None])


SCORES = [1.0, 0.0, 0.5, 2.0, 2.0, 3.0]
UIDS = np.array(["b", "a", "b", "a", "b", "a"], dtype=object)


def advantages_of(core, name, mask, config=None):
    return core.get_adv_estimator_fn(name)(
        token_level_rewards=rewards_of(SCORES, mask), response_mask=mask.long(), index=UIDS, config=config
    )


def per_group(function):
    scores, values = torch.tensor(SCORES), torch.zeros(6)
    for uid in "ab":
        rows = torch.from_numpy(uid == UIDS)
        values[rows] = function(scores[rows])
    return values


@pytest.mark.parametrize(
    ("name", "config", "of_group"),
    [
        ("fastrl_grpo", {}, lambda r: (r - r.mean()) / (r.std() + 1e-6)),
        ("fastrl_grpo", {"norm_adv_by_std_in_grpo": False}, lambda r: r - r.mean()),
        ("fastrl_dr_grpo", {}, lambda r: r - r.mean()),
        ("fastrl_rloo", {}, lambda r: r - (r.sum() - r) / 2),
        ("fastrl_max_rl", {}, lambda r: r / r.mean() - 1),
    ],
)
def test_an_estimator_compares_a_completion_with_those_of_the_same_uid(core, name, config, of_group):
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [5], [1], [4]])
    values, returns = advantages_of(core, name, mask, config)
    torch.testing.assert_close(values, per_group(of_group)[:, None] * mask)
    torch.testing.assert_close(returns, values)


def test_reinforce_pp_whitens_the_discounted_rewards_to_go(core):
    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [5], [1], [4]])
    values, returns = advantages_of(core, "fastrl_reinforce_pp", mask, {"gamma": 0.9})
    left = mask.sum(-1, keepdim=True) - 1 - torch.arange(5)
    expected = torch.tensor(SCORES)[:, None] * 0.9 ** left.clamp(min=0) * mask
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(values, (expected - expected[mask].mean()) / expected[mask].std() * mask)


def test_an_estimator_without_uids_is_refused(core):
    with pytest.raises(ValueError, match="fastrl_rloo: index: expected the uid of each prompt, got None"):
        core.get_adv_estimator_fn("fastrl_rloo")(torch.ones(2, 3), torch.ones(2, 3))


def head(dtype=torch.float32):
    hidden = torch.randn(2, 5, 8).to(dtype).requires_grad_()
    weight = torch.randn(31, 8).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(31, (2, 5))


def expected_head(hidden, weight, ids, temperature):
    logps = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    return logps.gather(-1, ids[..., None])[..., 0], -(logps.exp() * logps).sum(-1), logps


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.7, 1.3]), torch.rand(2, 5) + 0.5])
def test_the_fused_head_has_both_gradients_and_a_temperature_per_row(verl, temperature):
    with verl.serve_fused_kernels():
        functional = sys.modules["verl.utils.experimental.torch_functional"]
        fused = functional.FusedLinearForPPO(chunk_size=64, impl_backend="liger")
    hidden, weight, ids = head()
    out = fused.forward(hidden_states=hidden, vocab_weights=weight, input_ids=ids.int(), temperature=temperature)
    rows = temperature if isinstance(temperature, float) else temperature.view(2, -1, 1)
    wanted = expected_head(hidden, weight, ids, rows)[:2]
    grads = []
    for logps, entropy in (out, wanted):
        torch.testing.assert_close(logps.double(), wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), wanted[1], rtol=1e-5, atol=1e-5)
        total = (logps * torch.arange(10).view(2, 5)).sum() + 3 * entropy.sum()
        grads.append(torch.autograd.grad(total, (hidden, weight)))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def test_the_entropy_of_a_16_bit_head_is_float32(verl):
    hidden, weight, ids = head(torch.bfloat16)
    logps, entropy = verl.FusedLinear()(hidden, weight, ids)
    assert logps.dtype == entropy.dtype == torch.float32
    wanted = expected_head(hidden, weight, ids, 1.0)
    torch.testing.assert_close(entropy.double(), wanted[1], rtol=1e-5, atol=1e-5)


def test_undo_gives_verl_its_own_head_back(verl, monkeypatch):
    functional = importlib.import_module("verl.utils.experimental.torch_functional")
    kernel = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    importer = types.ModuleType(verl.HOLDERS[0])  # Megatron's forward, which has imported the function by its name
    importer.linear_cross_entropy = kernel.linear_cross_entropy
    monkeypatch.setitem(sys.modules, verl.HOLDERS[0], importer)
    before = functional.FusedLinearForPPO, kernel.linear_cross_entropy
    handle = verl.serve_fused_kernels()
    assert issubclass(functional.FusedLinearForPPO, verl.FusedLinear)
    assert kernel.linear_cross_entropy is importer.linear_cross_entropy is verl.linear_cross_entropy
    handle.undo()
    assert (functional.FusedLinearForPPO, kernel.linear_cross_entropy) == before
    assert importer.linear_cross_entropy is before[1]


def test_linear_cross_entropy_flattens_and_refuses_a_reduction(verl):
    hidden, weight, ids = head()
    logps, entropy = verl.linear_cross_entropy(hidden, weight, ids, 0.7, "none")
    wanted = expected_head(hidden, weight, ids, 0.7)
    torch.testing.assert_close(logps.double(), wanted[0].flatten(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), wanted[1].flatten(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="reduction: expected 'none', got 'sum'"):
        verl.linear_cross_entropy(hidden, weight, ids, 1.0, "sum")
    with pytest.raises(TypeError, match=r"dist_process_group: expected a torch.distributed.ProcessGroup, got object"):
        verl.linear_cross_entropy(hidden, weight, ids, 1.0, "none", object())


class _GatherFromSequenceParallelRegion(torch.autograd.Function):
    """As Megatron's of that name: all rows forward; backward a sum over ranks, or only this rank's rows."""

    @staticmethod
    def forward(ctx, rows, tensor_parallel_output_grad):
        ctx.tensor_parallel_output_grad, ctx.rows = tensor_parallel_output_grad, len(rows)
        every = [torch.empty_like(rows) for _ in range(2)]
        torch.distributed.all_gather(every, rows.contiguous())
        return torch.cat(every)

    @staticmethod
    def backward(ctx, grad):
        if ctx.tensor_parallel_output_grad:
            grad = grad.clone()
            torch.distributed.all_reduce(grad)
        return grad.split(ctx.rows)[torch.distributed.get_rank()], None


def split_head(rank, verl):
    """veRL's Megatron forward, with sequence parallelism and without, on this rank's half of the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, upstream = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 1, 8), (37, 8), (2, 12))
    )
    labels, mine = torch.randint(37, (1, 12), generator=generator), slice(19 * rank, 19 * (rank + 1))
    whole = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    torch.autograd.backward(verl.linear_cross_entropy(*whole, labels, 0.7), list(upstream))
    wanted = whole[0].grad, whole[1].grad[mine]
    for gathers in (None, True, False):
        rows = (hidden if gathers is None else hidden.split(6)[rank]).clone().requires_grad_()
        part = weight[mine].clone().requires_grad_()
        states = rows if gathers is None else _GatherFromSequenceParallelRegion.apply(rows, gathers)
        for view in (states, states.transpose(0, 1)):
            rows.grad = part.grad = None
            out = verl.linear_cross_entropy(view, part, labels, 0.7, "none", torch.distributed.group.WORLD)
            torch.autograd.backward(out, list(upstream), retain_graph=True)
            own = wanted[0] if gathers is None else wanted[0].split(6)[rank]
            torch.testing.assert_close(rows.grad, own, rtol=0, atol=1e-12)
            torch.testing.assert_close(part.grad, wanted[1], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="linear_cross_entropy: targets: expected the same on every rank"):
        verl.linear_cross_entropy(hidden, part, labels + rank, 0.7, "none", torch.distributed.group.WORLD)


def split_process(rank, folder):
    with gloo.process_group(rank, 2, folder), pytest.MonkeyPatch.context() as monkeypatch:
        if not REAL:
            stand_in(monkeypatch)
        split_head(rank, importlib.import_module("fastrl.integrations.verl"))


def test_linear_cross_entropy_over_a_split_vocabulary_has_the_gradient_of_one_rank(tmp_path):
    """veRL's own kernel leaves adding up the gradient of hidden to Megatron's sequence parallelism, and without it
    trains on one rank's part."""
    torch.multiprocessing.spawn(split_process, (tmp_path,), nprocs=2)


def micro_batch(ids, **settings):
    """What the engine reads of a micro-batch of one packed row of two sequences."""
    settings = {"use_fused_kernels": True, "calculate_entropy": True, "use_remove_padding": True} | settings
    if not REAL:
        return settings
    from tensordict import TensorDict
    from verl.utils import tensordict_utils

    nested = torch.nested.nested_tensor_from_jagged(ids[0], torch.tensor([0, 2, ids.shape[1]]))
    made = TensorDict({"input_ids": nested}, batch_size=[2])
    tensordict_utils.assign_non_tensor(made, **settings)
    return made


def values(tensor):
    return tensor.values() if tensor.is_nested else tensor


def test_the_engine_lays_out_sum_pi_squared_beside_the_log_probabilities(verl):
    with verl.serve_fused_kernels(sum_pi_squared=True):
        engine = importlib.import_module("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead
        fused = sys.modules["verl.utils.experimental.torch_functional"].FusedLinearForPPO()
        hidden, weight, ids = (part[:1] if part.dim() > 2 or part.shape[0] == 2 else part for part in head())
        with torch.no_grad():
            logps, entropy = fused(hidden, weight, ids)
        output = types.SimpleNamespace(log_probs=logps, entropy=entropy)
        self = types.SimpleNamespace(_gather_and_unpad_packed=lambda tensor, pad_size: tensor)
        args = {"input_ids_rmpad_rolled": ids[0], "temperature_rmpad": None, "pad_size": 0}
        asked = micro_batch(ids, calculate_sum_pi_squared=True)
        made = engine.prepare_model_outputs(self, output, args, asked, None)
        plain = engine.prepare_model_outputs(self, output, args, micro_batch(ids), None)
        bare = types.SimpleNamespace(log_probs=logps.clone(), entropy=entropy)
        with pytest.raises(ValueError, match="sum_pi_squared: expected a forward pass of fastrl's head"):
            engine.prepare_model_outputs(self, bare, args, asked, None)
    expected = expected_head(hidden, weight, ids, 1.0)[2].mul(2).exp().sum(-1)[0]
    torch.testing.assert_close(values(made["sum_pi_squared"]).double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for name in ("log_probs", "entropy"):
        assert torch.equal(values(made[name]), values(plain[name]))
    assert "sum_pi_squared" not in plain


def test_the_page_s_module_runs_and_its_command_names_what_is_registered(verl, core):
    (module,) = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
    (command,) = re.findall(r"```bash\n(.*?)```", DOC, flags=re.DOTALL)
    assert (module + command).count("\n") <= 15
    transformer_impl = importlib.import_module("verl.workers.engine.fsdp.transformer_impl")
    functional = importlib.import_module("verl.utils.experimental.torch_functional")
    handles, serve = [], verl.serve_fused_kernels
    verl.serve_fused_kernels = lambda **options: handles.append(serve(**options))
    exec(module, {})
    assert issubclass(functional.FusedLinearForPPO, verl.FusedLinear)
    handles[0].undo()
    assert transformer_impl.FSDPEngineWithLMHead.prepare_model_outputs.__module__ != "fastrl.integrations.verl"
    assert core.get_policy_loss_fn("my_loss").__name__ == "my_loss"
    settings = dict(re.findall(r"([\w.]+)=([\w-]+)", command))
    core.get_policy_loss_fn(settings["actor_rollout_ref.actor.policy_loss.loss_mode"])
    core.get_adv_estimator_fn(settings["algorithm.adv_estimator"])
    assert settings["actor_rollout_ref.actor.loss_agg_mode"] in MODES


# veRL's own functions.


def actor(**settings):
    from verl.workers.config import ActorConfig

    return ActorConfig(strategy="fsdp", rollout_n=2, use_dynamic_bsz=True, **settings)


@needs_verl
@pytest.mark.parametrize(
    ("theirs", "spec"),
    [
        ("vanilla", PolicyLoss(surrogate=Clip(0.2, 0.3, dual=3.0))),
        ("gspo", replace(presets.GSPO_TOKEN, surrogate=Clip(0.2, 0.3))),
        ("cispo", None),
        ("sapo", None),
        ("dppo_tv", None),
    ],
)
def test_a_loss_has_the_gradient_and_metrics_of_verls_own(verl, core, theirs, spec):
    data, config = batch(), actor(clip_ratio_high=0.3)
    ours = core.get_policy_loss_fn(f"fastrl_{theirs.removesuffix('_tv')}") if spec is None else None
    if ours is None:
        verl.register_loss("ours", spec)
        ours = core.get_policy_loss_fn("ours")
    if theirs == "cispo":  # veRL's distances from 1, both of them set
        config = actor(clip_ratio_low=0.3, clip_ratio_high=0.3)
    options = {"config": config, "loss_agg_mode": "seq-mean-token-mean"}
    loss, gradient, metrics = loss_and_gradient(core.get_policy_loss_fn(theirs), data, **options)
    mine, my_gradient, my_metrics = loss_and_gradient(ours, data, **options)
    torch.testing.assert_close(my_gradient, gradient, rtol=1e-5, atol=1e-7)
    assert my_metrics == pytest.approx(metrics, rel=1e-5)
    if theirs != "dppo_tv":  # whose value is another: -A sg(rho) log pi
        torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)


@needs_verl
def test_gmpo_is_verls_geo_mean_where_every_row_has_tokens(core):
    data = {name: tensor[:4] for name, tensor in batch().items()}
    config = actor(clip_ratio_low=0.4, clip_ratio_high=0.4)
    loss, gradient, _ = loss_and_gradient(core.get_policy_loss_fn("geo_mean"), data, config=config)
    mine, my_gradient, _ = loss_and_gradient(
        core.get_policy_loss_fn("fastrl_gmpo"), data, config=config, loss_agg_mode="seq-mean-token-mean"
    )
    torch.testing.assert_close(mine, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(my_gradient, gradient, rtol=1e-5, atol=1e-7)


@needs_verl
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("fastrl_grpo", "grpo"),
        ("fastrl_grpo", "grpo_vectorized"),
        ("fastrl_rloo", "rloo"),
        ("fastrl_opo", "opo"),
        ("fastrl_pass_at_k", "grpo_passk"),
        ("fastrl_reinforce_pp", "reinforce_plus_plus"),
        ("fastrl_reinforce_pp_baseline", "reinforce_plus_plus_baseline"),
    ],
)
def test_an_estimator_gives_the_advantages_of_verls_own(core, ours, theirs):
    from verl.trainer.config import AlgoConfig

    mask = torch.arange(5) < torch.tensor([[5], [2], [3], [5], [1], [4]])
    config = AlgoConfig(gamma=0.9)
    torch.testing.assert_close(
        advantages_of(core, ours, mask, config), advantages_of(core, theirs, mask, config), rtol=1e-5, atol=1e-5
    )


@needs_verl
def test_the_fused_head_is_verls_own_in_float32(verl):
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    hidden, weight, ids = head()
    results = []
    for fused in (FusedLinearForPPO(chunk_size=4), verl.FusedLinear()):
        logps, entropy = fused(hidden, weight, ids, 0.7)
        results.append((logps, entropy, *torch.autograd.grad(logps.sum() + entropy.sum(), (hidden, weight))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
