"""A fused head under DeepSpeed's ZeRO-3, two processes on a CPU: its gradients are those of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")  # in no extra; test_fused_lm_head_sharded.py has a stand-in for its partitions

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    # Every parameter is partitioned, and no longer whole than its module runs.
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
    },
}


def single(value):
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def loss_of(module, rows, share):
    from model.test_fused_lm_head_sharded import arguments

    args, named = arguments("policy_loss", rows, share)
    return module(*map(single, args), **{name: single(value) for name, value in named.items()})


def compare():
    import deepspeed
    from model.test_fused_lm_head_sharded import WORLD, Net, mine

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # it would call a compiler for minutes
    deepspeed.init_distributed(dist_backend="gloo")
    rank = torch.distributed.get_rank()
    net, whole = Net(torch.float32), Net(torch.float32)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=CONFIG, optimizer=sgd)
    assert net.lm_head.weight.numel() == 0
    loss_of(whole, slice(None), 1.0).backward()
    engine.backward(loss_of(engine, mine(rank), 1 / WORLD))
    found = dict(net.named_parameters())
    for name, one in whole.named_parameters():
        assert one.grad.any()
        got = deepspeed.utils.safe_get_full_grad(found[name])
        torch.testing.assert_close(got, one.grad, rtol=0, atol=1e-6 * one.grad.abs().max().item())


def test_a_head_that_zero3_partitions_has_the_gradient_of_one_process():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = str(Path(__file__).parents[1])
    shared = {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    code = "from model.test_fused_lm_head_zero3 import compare; compare()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    said = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)[-4000:]
