"""TRL's fused head under DeepSpeed's ZeRO-3, two processes on a CPU: the gradients are the same with and without."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed")  # in no extra; tests/integrations/test_trl.py has a stand-in for its partitions
pytest.importorskip("trl")  # an extra

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


def gradients(accelerated, tied):
    """(log-probabilities, gradients by name) of one step."""
    import deepspeed
    from integrations.hosts import model

    from fastrl.integrations import trl as integration

    net = model(tie_word_embeddings=tied)
    importlib.import_module("trl.trainer.utils").add_fused_lm_head(net, outputs=("log_probs", "entropy"))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=CONFIG, optimizer=sgd)
    assert net.lm_head.weight.numel() == 0
    g = torch.Generator().manual_seed(torch.distributed.get_rank())
    ids = torch.randint(3, 64, (2, 9), generator=g)
    labels = ids.masked_fill(torch.arange(9) < 4, -100)
    handle = integration.accelerate(net) if accelerated else None
    out = engine(input_ids=ids, labels=labels, fused_lm_head=True)
    engine.backward((out.log_probs.square() + 0.1 * out.entropy).sum())
    found = {name: deepspeed.utils.safe_get_full_grad(one) for name, one in net.named_parameters()}
    engine.step()
    if handle is not None:
        handle.undo()
    return out.log_probs.detach(), found


def compare():
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    deepspeed.init_distributed(dist_backend="gloo")
    keep = HfDeepSpeedConfig(CONFIG | {"train_batch_size": 4})  # noqa: F841  transformers looks whether it lives
    for tied in (False, True):
        (logps, wanted), (got, found) = (gradients(accelerated, tied) for accelerated in (False, True))
        # float32: TRL adds up a vocabulary in tiles, and processes add up gradients.
        torch.testing.assert_close(got, logps, rtol=0, atol=1e-5)
        for name, grad in wanted.items():
            assert grad.any(), name
            torch.testing.assert_close(found[name] / grad.norm(), grad / grad.norm(), rtol=0, atol=1e-5)


def test_a_head_that_zero3_partitions_has_trl_s_gradient():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = str(Path(__file__).parents[1])
    shared = {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    code = "from integrations.test_trl_zero3 import compare; compare()"
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
