"""TRL's fused head under two processes: with fastrl its gradients are those of one process on the joined batch."""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from contextlib import nullcontext
from functools import partial

import gloo
import pytest
import torch
from datasets import Dataset
from integrations.hosts import model, saved, texts
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import PhiConfig, PhiForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

trl = pytest.importorskip("trl")

from fastrl.integrations import trl as integration  # noqa: E402

UTILS = importlib.import_module("trl.trainer.utils")
WORLD, ROWS, LENGTH = 2, 6, 9


def net(adapter=False, **options):
    made = model(**options)
    UTILS.add_fused_lm_head(made, outputs=("log_probs", "entropy"))
    if not adapter:
        return made
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    return get_peft_model(made, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def loss_of(module, rows=slice(None), silent=()):
    """A sum over rows, so that a mean over processes is half of it; `silent` rows have no label."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (ROWS, LENGTH), generator=g)
    labels = ids.masked_fill(torch.rand(ROWS, LENGTH, generator=g) < 0.4, -100)
    labels[list(silent)] = -100
    out = module(input_ids=ids[rows], labels=labels[rows], fused_lm_head=True)
    weights = torch.linspace(0.5, 2.0, ROWS)[rows, None]
    return (weights * (out.log_probs.square() + 0.1 * out.entropy)).sum()


def mine(rank):
    return slice(rank, None, WORLD)


def gradients(module):
    whole = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            whole[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return whole


def expected(rows=slice(None), share=1 / WORLD, silent=(), **options):
    one = net(**options)
    (share * loss_of(one, rows, silent)).backward()
    return gradients(one)


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert grad.any(), name
        scale = grad.abs().max()
        torch.testing.assert_close(
            found[name] / scale, grad / scale, rtol=0, atol=1e-5, msg=lambda text, n=name: n + text
        )


def layers_and_root(made, **options):
    causal = made.get_base_model() if hasattr(made, "get_base_model") else made
    for layer in causal.model.layers:
        fully_shard(layer, **options)
    return fully_shard(made, **options)


def head_by_itself(made, **options):
    fully_shard(made.get_output_embeddings(), **options)
    return layers_and_root(made, **options)


def tied_group(made):
    fully_shard([made.get_input_embeddings(), made.get_output_embeddings()])
    return layers_and_root(made)


def copies_and_shards(made, shape):
    return head_by_itself(made, mesh=distributed.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")))


def equal_one_process(rank, wrap, silent=(), **options):
    wanted = expected(silent=silent, **options)
    with integration.accelerate():
        module = wrap(net(**options))
        loss_of(module, mine(rank), silent).backward()
        assert_close(gradients(module), wanted)
        loss_of(module, mine(rank), silent).backward()  # accumulates
    assert_close(gradients(module), {name: 2 * grad for name, grad in wanted.items()})


def mixed_precision(rank):
    """A head that is gathered here, in float32, has the gradient of one that FSDP gathers in bf16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for wrap in (head_by_itself, layers_and_root):
        module = wrap(net(), mp_policy=policy)
        with integration.accelerate():
            loss_of(module, mine(rank)).backward()
        found.append(gradients(module))
    assert_close(*found)


def flat_shards(rank, **options):
    """FSDP 1."""
    wrap = {"use_orig_params": True, "auto_wrap_policy": ModuleWrapPolicy({LlamaDecoderLayer})}
    module = FullyShardedDataParallel(net(**options), device_id=torch.device("cpu"), **wrap)
    with integration.accelerate(module):
        loss_of(module, mine(rank)).backward()
    with FullyShardedDataParallel.summon_full_params(module, with_grads=True):
        found = {name.replace("_fsdp_wrapped_module.", ""): grad for name, grad in gradients(module).items()}
        assert_close(found, expected(**options))


def trl_s_own_head(rank):
    """Why the gathered head is told that its gradient is a mean: TRL's own rows learn from one process' tokens each."""
    module = head_by_itself(net())
    loss_of(module, mine(rank)).backward()
    found = gradients(module)
    parts = [expected(mine(one), 1.0)["lm_head.weight"].chunk(WORLD)[one] for one in range(WORLD)]
    assert_close({"lm_head.weight": found.pop("lm_head.weight")}, {"lm_head.weight": torch.cat(parts)})
    wanted = expected()
    del wanted["lm_head.weight"]
    assert_close(found, wanted)


CASES = {
    "data_parallel": partial(equal_one_process, wrap=DistributedDataParallel),
    "data_parallel_tied": partial(equal_one_process, wrap=DistributedDataParallel, tie_word_embeddings=True),
    "data_parallel_that_looks_for_unused_parameters": partial(
        equal_one_process, wrap=partial(DistributedDataParallel, find_unused_parameters=True)
    ),
    "data_parallel_where_one_process_has_no_label": partial(
        equal_one_process, wrap=DistributedDataParallel, silent=(1, 3, 5)
    ),
    "layers_and_root": partial(equal_one_process, wrap=layers_and_root),
    "layers_and_root_tied": partial(equal_one_process, wrap=layers_and_root, tie_word_embeddings=True),
    "layers_and_root_with_an_adapter": partial(equal_one_process, wrap=layers_and_root, adapter=True),
    "head_by_itself": partial(equal_one_process, wrap=head_by_itself),
    "head_by_itself_with_an_adapter": partial(equal_one_process, wrap=head_by_itself, adapter=True),
    "head_by_itself_with_a_bias": partial(
        equal_one_process, wrap=head_by_itself, kind=PhiForCausalLM, config=PhiConfig
    ),
    "head_by_itself_where_one_process_has_no_label": partial(equal_one_process, wrap=head_by_itself, silent=(1, 3, 5)),
    "head_and_embedding_tied_in_one_group": partial(equal_one_process, wrap=tied_group, tie_word_embeddings=True),
    "two_copies": partial(equal_one_process, wrap=partial(copies_and_shards, shape=(WORLD, 1))),
    "one_copy_in_two_shards": partial(equal_one_process, wrap=partial(copies_and_shards, shape=(1, WORLD))),
    "flat_shards": flat_shards,
    "flat_shards_tied": partial(flat_shards, tie_word_embeddings=True),
    "mixed_precision": mixed_precision,
    "trl_s_own_head": trl_s_own_head,
}


def process(rank, folder):
    with gloo.process_group(rank, WORLD, folder):
        gloo.run(CASES, rank, folder)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(process, (folder,), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(outcomes, case):
    assert [(outcomes / f"{case}.{rank}").read_text() for rank in range(WORLD)] == ["", ""]


# GRPO with its gradient formed in the forward pass, by TRL's own trainer on two processes.


def reward(completion_ids, **_):
    return [float(sum(ids) % 3) for ids in completion_ids]


def trainer(folder, **options):
    common = {
        "output_dir": f"{folder}/out", "max_steps": 3, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "seed": 1, "bf16": False,
        "per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8,
        "gradient_checkpointing": False,
    }  # fmt: skip
    rows = Dataset.from_list([{"prompt": text} for text in texts()])
    return trl.GRPOTrainer(
        str(folder), reward_funcs=reward, args=trl.GRPOConfig(**common | options), train_dataset=rows
    )


def trained(folder, accelerated, **options):
    """(losses, gradient norms, weights) of a run."""
    made = trainer(folder, **options)
    assert made.accelerator.num_processes == WORLD
    with integration.accelerate(made, loss=True) if accelerated else nullcontext():
        made.train()
    logged = [row for row in made.state.log_history if "loss" in row]
    assert len(logged) == 3
    return [row["loss"] for row in logged], [row["grad_norm"] for row in logged], made.model.state_dict()


def train_as_trl(rank, folder, **options):
    (losses, norms, weights), wanted = (trained(folder, used, **options) for used in (True, False))
    assert losses == pytest.approx(wanted[0], abs=2e-5)
    assert norms == pytest.approx(wanted[1], rel=2e-5)
    assert max(norms) > 0.1
    for name, weight in wanted[2].items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=5e-4)


def one_pass_under_fsdp(rank, folder):
    """The gradient of a batch with the head sharded by itself, where TRL's own is right: without sharding it so."""
    g = torch.Generator().manual_seed(rank)
    made, mask = trainer(folder, loss_type="grpo"), torch.ones(4, 5, dtype=torch.long)
    mask[0, 3:] = 0
    batch = {
        "prompt_ids": torch.randint(3, 64, (4, 3), generator=g),
        "prompt_mask": torch.ones(4, 3, dtype=torch.long),
        "completion_ids": torch.randint(3, 64, (4, 5), generator=g),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1.0, 0.5, 0.0]),
        "num_items_in_batch": torch.tensor(2 * mask.sum().item()),
    }
    made.current_gradient_accumulation_steps = 1
    found = []
    for wrap, accelerated in ((head_by_itself, True), (layers_and_root, False)):
        module = wrap(net())
        made.model = module
        module.train()
        with integration.accelerate(made, loss=True) if accelerated else nullcontext():
            made._compute_loss(module, batch).backward()
        found.append(gradients(module))
    assert_close(*found)


TRAINERS = {
    "defaults": train_as_trl,
    "unused_parameters_looked_for": partial(train_as_trl, ddp_find_unused_parameters=True),
    "reference_and_two_updates": partial(train_as_trl, beta=0.1, num_iterations=2, loss_type="dr_grpo"),
    "one_pass_under_fsdp": one_pass_under_fsdp,
}


def trainers(rank, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    warnings.simplefilter("ignore", FutureWarning)
    gloo.run({name: partial(case, folder=folder) for name, case in TRAINERS.items()}, rank, folder)
    gloo.end()


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainers")
    saved(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(trainers, (folder, port), nprocs=WORLD)
    return folder


@pytest.mark.parametrize("case", TRAINERS)
def test_the_one_pass_loss_on_two_processes_is_trl_s(trainings, case):
    assert [(trainings / f"{case}.{rank}").read_text() for rank in range(WORLD)] == ["", ""]
