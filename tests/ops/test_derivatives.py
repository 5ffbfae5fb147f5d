"""What the ops refuse of autograd, and what they give where there are only shapes."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import fastrl
from fastrl.ops.group_advantages import GroupAdvantage
from fastrl.spec import PolicyLoss

H, W, Y = torch.randn(5, 8), torch.randn(11, 8), torch.randint(0, 11, (5,))
MASK, ADVANTAGES = torch.ones(5, dtype=torch.bool), torch.randn(5)

CALLS = {
    "linear_logprob": lambda x: fastrl.linear_logprob(x, W.to(x), Y.to(x.device)).logps,
    "linear_policy_loss": lambda x: (
        fastrl.linear_policy_loss(
            x, W.to(x), Y.to(x.device), ADVANTAGES.to(x), PolicyLoss(aggregate="token_mean"), mask=MASK.to(x.device)
        ).loss
    ),
    "linear_token_loss": lambda x: (
        fastrl.linear_token_loss(x, W.to(x), Y.to(x.device), torch.neg, weights=ADVANTAGES.to(x)).loss
    ),
    "logprob": lambda x: fastrl.logprob(x, Y.to(x.device) % 8).logps,
    "policy_loss": lambda x: (
        fastrl.policy_loss(
            x[:, 0].contiguous(), ADVANTAGES.to(x), PolicyLoss(aggregate="token_mean"), mask=MASK.to(x.device)
        ).loss
    ),
    "group_policy_loss": lambda x: (
        fastrl.group_policy_loss(
            x[:4],
            ADVANTAGES[:4].to(x),
            GroupAdvantage(),
            PolicyLoss(),
            mask=torch.ones(4, 8, device=x.device).bool(),
            group_size=2,
        ).loss
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused_instead_of_a_zero_tangent(op):
    with pytest.raises(NotImplementedError, match=f"^{op}: .* There is no forward-mode derivative"):
        torch.func.jvp(CALLS[op], (H,), (torch.ones_like(H),))
    with forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match=f"^{op}: "):
            CALLS[op](forward_ad.make_dual(H, torch.ones_like(H)))
        CALLS[op](H)  # a tensor without a tangent is as good as ever


@pytest.mark.parametrize("op", CALLS)
def test_on_the_meta_device_there_are_the_shapes_of_values_and_gradients(op):
    x = H.to("meta").requires_grad_()
    out, real = CALLS[op](x), CALLS[op](H)
    assert (out.shape, out.dtype, out.device.type) == (real.shape, real.dtype, "meta")
    out.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("op", CALLS)
def test_a_gradient_of_a_gradient_is_an_error(op):
    x = H.clone().requires_grad_()
    (grad,) = torch.autograd.grad(CALLS[op](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative|does not require grad"):
        grad.square().sum().backward()


@pytest.fixture
def mesh(request):
    """A mesh of so many ranks, of which this process is the first; what the others have is made up."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (request.param,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("mesh", [2], indirect=True)
def test_a_head_whose_gradient_would_be_this_ranks_alone_is_refused(mesh):
    """FSDP's shards gathered by a plain full_tensor() gave a head gradient of one rank's tokens, in silence."""
    sharded = torch.nn.Parameter(distribute_tensor(torch.randn(12, 8), mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"linear_logprob: weight: .* got the result of full_tensor\(\)"):
        fastrl.linear_logprob(H, sharded.full_tensor(), Y)
    for placement in (Partial("avg"), Replicate()):
        fastrl.linear_logprob(H, sharded.full_tensor(grad_placements=[placement]), Y)
    with torch.no_grad():
        fastrl.linear_logprob(H, sharded.full_tensor(), Y)  # nothing to be wrong about


@pytest.mark.parametrize("mesh", [1], indirect=True)
def test_a_head_of_one_rank_is_gathered_as_ever(mesh):
    sharded = torch.nn.Parameter(distribute_tensor(torch.randn(12, 8), mesh, [Shard(0)]))
    fastrl.linear_logprob(H, sharded.full_tensor(), Y)
