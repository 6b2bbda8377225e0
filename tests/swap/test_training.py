"""A swapped Hugging Face GPT-2 under what trains it: transformers' Trainer, and two processes."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from gpt2fast.swap import LazyLogits, apply_gpt2fast_to_gpt2
from tests.swap.test_hf_gpt2 import VOCAB, ids, make
from tests.training.two_processes import Two

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

STEPS = 6


def trained(model: Any, folder: Path, resume: bool = False, **options: Any) -> Any:
    """The Trainer after six steps of two micro-batches each."""
    rows = torch.randint(VOCAB, (40, 17), generator=torch.Generator().manual_seed(5))
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        logging_steps=1,
        save_steps=STEPS // 2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(
        model=model, args=settings, train_dataset=data, eval_dataset=data
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def curve(trainer: Any) -> Tensor:
    return torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e]).double()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"label_smoothing_factor": 0.1}],
    ids=["plain", "checkpointing", "bf16", "smoothing"],
)
def test_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    plain = make()
    fast, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    report = apply_gpt2fast_to_gpt2(fast)
    seen: list[bool] = []

    def watch(module: Any, args: Any, output: Any) -> None:
        if module.training:
            seen.append(isinstance(output.logits, LazyLogits) and not output.logits.is_computed())

    theirs = trained(plain, tmp_path / "plain", **options)
    hook = fast.register_forward_hook(watch)
    ours = trained(fast, tmp_path / "fast", **options)
    hook.remove()
    assert len(seen) == 2 * STEPS
    if "label_smoothing_factor" not in options:  # which reads logits of its own accord
        assert all(seen)
    wide = {name: value for name, value in options.items() if name != "bf16"}
    truth = curve(trained(exact, tmp_path / "exact", **wide))
    far = [(curve(trainer) - truth).norm() for trainer in (ours, theirs)]
    # as for a kernel: twice plain PyTorch's distance from fp64, and three units of fp32 each step
    assert far[0] <= 2 * far[1] + 3 * 2**-23 * truth.norm(), far
    assert abs(ours.evaluate()["eval_loss"] - theirs.evaluate()["eval_loss"]) < 1e-2
    if options:
        return
    # its checkpoints are theirs, and go on where they were
    loaded = type(plain).from_pretrained(tmp_path / "fast" / f"checkpoint-{STEPS}")
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.parameters(), fast.parameters(), strict=True)
    )
    halfway = str(tmp_path / "fast" / f"checkpoint-{STEPS // 2}")
    again = make()
    apply_gpt2fast_to_gpt2(again)
    trained(again, tmp_path / "again", resume=halfway)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), fast.parameters(), strict=True)
    )
    assert report.revert() > 0
    torch.testing.assert_close(fast(ids()).logits, loaded.eval()(ids()).logits)


# Called in the two processes.


def gradients_of_two(kind: str, checkpointing: bool) -> dict[str, Tensor]:
    """After two steps on this process's half of a batch: what all of it together gives."""
    from torch.distributed.fsdp import fully_shard

    model = make()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    apply_gpt2fast_to_gpt2(model)
    model.train()
    if kind == "ddp":
        wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        wrapped = fully_shard(model, mesh=mesh)
    half = ids(4).chunk(2)[dist.get_rank()]
    for _ in range(2):  # DDP complains in the step after one that went wrong
        model.zero_grad()
        wrapped(half, labels=half).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if kind == "fsdp" else g for name, g in grads.items()}


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    pair = Two()
    yield pair
    pair.close()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_processes_give_the_gradients_of_one(two: Two, kind: str, checkpointing: bool) -> None:
    plain = make().train()
    plain(ids(4), labels=ids(4)).loss.backward()
    for found in two(gradients_of_two, kind, checkpointing):
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, msg=name)
