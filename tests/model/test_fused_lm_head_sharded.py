"""A fused head under two processes: its losses and gradients are those of one process."""

from __future__ import annotations

from functools import partial

import gloo
import peft
import pytest
import torch
from tolerance import assert_exact
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

from fastrl import FusedLMHead, linear_policy_loss, presets

WORLD, ROWS, LENGTH, WIDTH, VOCAB = 2, 6, 5, 8, 38
TOKENS = ROWS * LENGTH


class Net(nn.Module):
    """A backbone and a head, with the loss in its forward."""

    def __init__(self, dtype=torch.float64, adapter=False):
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.layer = nn.Linear(WIDTH, WIDTH, dtype=dtype), nn.Linear(WIDTH, VOCAB, dtype=dtype)
        if adapter:
            config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
            peft.inject_adapter_in_model(config, self)
            self.backbone.requires_grad_(True)
            self.to(dtype)
        self.lm_head = FusedLMHead(self.layer, softcap=4.0, logit_scale=0.5)
        del self.layer

    def forward(self, x, *args, kind, **named):
        return getattr(self.lm_head, kind)(torch.tanh(self.backbone(x)), *args, **named).loss


def data(rows=slice(None), dtype=torch.float64):
    """x, targets, and what the loss reads of each token, (B, T)."""
    torch.manual_seed(1)
    x = torch.randn(ROWS, LENGTH, WIDTH, dtype=dtype)
    targets = torch.randint(VOCAB, (ROWS, LENGTH))
    mask = torch.rand(ROWS, LENGTH) < 0.8
    advantages, old = torch.randn(ROWS, dtype=dtype), -torch.rand(ROWS, LENGTH, dtype=dtype)
    return tuple(one[rows] for one in (x, targets, mask, advantages, old))


def mine(rank):
    return slice(rank, None, WORLD)


def arguments(kind, rows=slice(None), share=1.0):
    """Of `Net` for some rows; `share` is what one process' loss counts in the mean that the wrapper takes."""
    x, targets, mask, advantages, old = data(rows)
    if kind == "policy_loss":
        named = {"mask": mask, "old_logps": old, "normalizer": TOKENS * share}
        return (x, targets, advantages, presets.DAPO), {"kind": kind, **named}
    weights = mask / (TOKENS * share)
    return (x, targets, squared), {"kind": kind, "weights": weights, "context": (old,)}


def squared(logps, old):
    return (logps - old).square()


def gradients(module):
    whole = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        grad = parameter.grad
        whole[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole


def expected(kind, adapter=False):
    net = Net(adapter=adapter)
    args, named = arguments(kind)
    loss = net(*args, **named)
    loss.backward()
    return loss.detach(), gradients(net)


def assert_equals_one_process(module, kind, rank, adapter=False):
    args, named = arguments(kind, mine(rank), 1 / WORLD)
    loss = module(*args, **named)
    loss.backward()
    total, one = loss.detach() / WORLD, expected(kind, adapter)
    distributed.all_reduce(total)
    assert_exact(total, one[0])
    found = gradients(module)
    assert len(found) == len(one[1]) == 4
    for name, grad in one[1].items():
        assert_exact(found[name], grad)
        assert grad.any()


def data_parallel(rank, kind):
    net = DistributedDataParallel(Net())
    args, named = arguments(kind, mine(rank), 1 / WORLD)
    net(*args, **named).backward()
    for name, grad in expected(kind)[1].items():
        assert_exact(gradients(net)[f"module.{name}"], grad)
        assert grad.any()


def data_parallel_head_alone(rank):
    head = DistributedDataParallel(Net().lm_head)
    whole = Net().lm_head
    for module, rows, share in ((whole, slice(None), 1.0), (head, mine(rank), 1 / WORLD)):
        x, targets, mask, advantages, old = data(rows)
        named = {"advantages": advantages, "mask": mask, "old_logps": old, "normalizer": TOKENS * share}
        module(x, targets, op=partial(linear_policy_loss, spec=presets.DAPO, **named)).loss.backward()
    assert_exact(head.module.weight.grad, whole.weight.grad)
    assert whole.weight.grad.any()


def sharded(rank, kind):
    net = Net()
    fully_shard(net.lm_head)
    fully_shard(net)
    assert_equals_one_process(net, kind, rank)


def sharded_with_the_whole_model(rank):
    assert_equals_one_process(fully_shard(Net()), "policy_loss", rank)


def sharded_with_an_adapter(rank):
    net = Net(adapter=True)
    fully_shard(net.lm_head)
    assert_equals_one_process(fully_shard(net), "policy_loss", rank, adapter=True)


def flat_shards(rank, kind, original):
    """FSDP 1 of the whole model, whose forward has the head's in it."""
    net = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=original)
    args, named = arguments(kind, mine(rank), 1 / WORLD)
    loss = net(*args, **named)
    loss.backward()
    total, one = loss.detach() / WORLD, expected(kind)
    distributed.all_reduce(total)
    assert_exact(total, one[0])
    if not original:
        return  # FSDP gives no gradients by name then
    with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
        assert_grads(gradients(net), one[1])


def assert_grads(found, wanted):
    for name, grad in wanted.items():
        assert_exact(found[name], grad)
        assert grad.any()


def flat_shards_of_the_head(rank):
    """FSDP 1 of the head alone: called as the wrapper it is exact; its methods would run without what gathers."""
    whole, head = Net().lm_head, FullyShardedDataParallel(
        Net().lm_head, device_id=torch.device("cpu"), use_orig_params=True
    )  # fmt: skip
    for module, rows, share in ((whole, slice(None), 1.0), (head, mine(rank), 1 / WORLD)):
        x, targets, mask, advantages, old = data(rows)
        named = {"advantages": advantages, "mask": mask, "old_logps": old, "normalizer": TOKENS * share}
        module(x, targets, op=partial(linear_policy_loss, spec=presets.DAPO, **named)).loss.backward()
    with FullyShardedDataParallel.summon_full_params(head, with_grads=True):
        assert_grads(gradients(head), gradients(whole))
    for original in (True, False):
        head = FullyShardedDataParallel(Net().lm_head, device_id=torch.device("cpu"), use_orig_params=original)
        with pytest.raises(
            ValueError, match=r"^FusedLMHead: lm_head.weight: .* got a piece of it, .* call the wrapper"
        ):
            head.policy_loss(x, targets, advantages, presets.DAPO, mask=mask)


def flat_shards_inside(rank):
    """FSDP 1 around the layer, whose forward does not run: its weight is not there."""
    policy = ModuleWrapPolicy({nn.Linear})
    for original in (True, False):
        net = FullyShardedDataParallel(
            Net(), device_id=torch.device("cpu"), use_orig_params=original, auto_wrap_policy=policy
        )
        args, named = arguments("policy_loss", mine(rank), 1 / WORLD)
        with pytest.raises(ValueError, match=r"^FusedLMHead: lm_head.weight: .* Shard the FusedLMHead instead"):
            net(*args, **named)


def mixed_precision(rank):
    """FSDP rounds what it sees; advantages and old log-probabilities it must not see."""
    head = Net(torch.float32).lm_head
    weight, bias = (one.detach().bfloat16() for one in (head.weight, head.bias))
    x, targets, mask, advantages, old = data(mine(rank), torch.float32)
    named = {"mask": mask, "old_logps": old}
    fully_shard(head, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    ours = head.policy_loss(x, targets, advantages, presets.DAPO, **named).loss
    constants = {"bias": bias, "softcap": 4.0, "logit_scale": 0.5}
    alone = linear_policy_loss(x.bfloat16(), weight, targets, advantages, presets.DAPO, **named, **constants).loss
    rounded = {"mask": mask, "old_logps": old.bfloat16()}
    wrong = linear_policy_loss(
        x.bfloat16(), weight, targets, advantages.bfloat16(), presets.DAPO, **rounded, **constants
    ).loss
    torch.testing.assert_close(ours, alone, rtol=1e-6, atol=1e-7)
    assert (wrong - alone).abs() > 1e-5
    with pytest.raises(ValueError, match=r"FusedLMHead: temperature: expected a tensor of at least 32 bits, got .*bfl"):
        head(x, targets, temperature=torch.full(targets.shape, 0.7))


def layer_sharded_inside(rank):
    head = Net().lm_head
    fully_shard(head.lm_head)
    x, targets, *_ = data()
    with pytest.raises(ValueError, match=r"^FusedLMHead: lm_head.weight: .* Shard the FusedLMHead instead"):
        head(x, targets)


def sharded_by_a_module_that_does_not_run(rank):
    net = Net()
    head = FusedLMHead(net.lm_head.lm_head)
    fully_shard(net)
    x, targets, *_ = data()
    with pytest.raises(ValueError, match=r"^FusedLMHead: lm_head.weight: .* put the FusedLMHead into that module"):
        head(x, targets)


CASES = {
    "data_parallel_policy_loss": partial(data_parallel, kind="policy_loss"),
    "data_parallel_token_loss": partial(data_parallel, kind="token_loss"),
    "data_parallel_head_alone": data_parallel_head_alone,
    "sharded_policy_loss": partial(sharded, kind="policy_loss"),
    "sharded_token_loss": partial(sharded, kind="token_loss"),
    "sharded_with_the_whole_model": sharded_with_the_whole_model,
    "sharded_with_an_adapter": sharded_with_an_adapter,
    "flat_shards_policy_loss": partial(flat_shards, kind="policy_loss", original=True),
    "flat_shards_token_loss": partial(flat_shards, kind="token_loss", original=False),
    "flat_shards_of_the_head": flat_shards_of_the_head,
    "flat_shards_inside": flat_shards_inside,
    "mixed_precision": mixed_precision,
    "layer_sharded_inside": layer_sharded_inside,
    "sharded_by_a_module_that_does_not_run": sharded_by_a_module_that_does_not_run,
}


def process(rank, folder):
    with gloo.process_group(rank, WORLD, folder):
        distributed.device_mesh.init_device_mesh("cpu", (WORLD,))
        gloo.run(CASES, rank, folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (folder,), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one_or_are_told_what_to_do(outcomes, case):
    assert [(outcomes / f"{case}.{rank}").read_text() for rank in range(WORLD)] == ["", ""]


def test_a_head_that_zero3_left_in_pieces_is_told_what_to_do():
    """Outside the forward of its module, ZeRO-3 leaves a parameter without elements."""
    head = Net().lm_head
    head.lm_head.weight.data = torch.empty(0, dtype=torch.float64)
    x, targets, *_ = data()
    with pytest.raises(
        ValueError, match=r"^FusedLMHead: lm_head.weight: expected a whole tensor, .* the forward of the eng"
    ):
        head(x, targets)
