"""What only the Swin UNETR has: blocks that withheld levels leave out, looked-up biases, size by formula."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch

from splitpeer.errors import ConfigError
from splitpeer.models import build_encoder, make_backbone
from splitpeer.models.registry import kept_values, passing_values
from splitpeer.settings.job import JobConfig
from splitpeer.training.machine import in_order
from splitpeer.training.optimiser import Schedule, make_optimiser
from splitpeer.training.split_step import ClientHalf

SMALL = {"feature_size": (12,), "depths": (2, 1, 1, 1), "num_heads": (3, 2, 4, 2), "window_size": (4,)}


def test_a_level_that_stays_has_no_block() -> None:
    """Its weights would never have a gradient."""
    encoder = build_encoder(make_backbone("swin-unetr", 2, SMALL, (2, 5)), seed=1)
    sent = encoder(torch.randn(2, 1, 64, 32, generator=torch.Generator().manual_seed(0)))
    torch.autograd.backward(list(sent.values()), [torch.randn_like(t) for t in sent.values()])
    assert list(sent) == ["x2", "x5"]
    assert all(p.grad is not None for p in encoder.parameters())


def test_all_windows_of_attention_share_one_index() -> None:
    encoder = build_encoder(make_backbone("swin-unetr", 2), seed=1)
    indices = [b for name, b in encoder.named_buffers(remove_duplicate=False) if name.endswith("index")]
    assert len(indices) == 8 and len({b.data_ptr() for b in indices}) == 1


def test_transformers_are_drawn_as_torch_and_monai_draw_them() -> None:
    """Kolmogorov's distance of a sample from its distribution: beyond 2/sqrt(n) with a chance below 1e-3."""
    encoder = build_encoder(make_backbone("swin-unetr", 2), seed=8)
    normal, drawn = NormalDist(0, 0.02).cdf, 0
    for name, parameter in encoder.named_parameters():
        values = np.sort(parameter.detach().numpy().ravel().astype(float))
        if "norm" in name:
            assert set(values) == {float(name.endswith("weight"))}
            continue
        if name.endswith("bias_table"):
            expected = np.array([normal(value) for value in values])
        else:
            owner = encoder.get_submodule(name.rpartition(".")[0])
            bound = 1 / np.sqrt(owner.weight[0].numel())
            expected = (values + bound) / (2 * bound)
        seen = (np.arange(values.size) + 0.5) / values.size
        assert abs(seen - expected).max() < 2 / np.sqrt(values.size), name
        drawn += 1
    assert drawn == 89


def test_sums_stay_in_order_until_the_last_thread_is_done() -> None:
    """The switch is the process's: two sites in one process overlap."""
    first, second = in_order(), in_order()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.are_deterministic_algorithms_enabled()
    second.__exit__(None, None, None)
    assert not torch.are_deterministic_algorithms_enabled()


def test_looked_up_biases_are_summed_in_order_on_several_threads() -> None:
    """On a CPU, torch's threads add to one entry of a table in the order in which they arrive."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        source = torch.Generator().manual_seed(0)
        table = torch.zeros(169, 48, requires_grad=True)
        looked_up = torch.randint(0, 169, (49 * 49,), generator=source)
        gradient = torch.randn(49 * 49, 48, generator=source)
        seen = set()
        for _ in range(100):
            with in_order():
                (summed,) = torch.autograd.grad(table[looked_up], table, gradient)
            seen.add(summed.numpy().tobytes())
        assert len(seen) == 1
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.set_num_threads(threads)


def test_a_site_goes_backward_in_order() -> None:
    encoder = build_encoder(make_backbone("swin-unetr", 2, SMALL), seed=1)
    seen = []
    encoder.swinViT.layers1[0].blocks[0].attn.relative_position_bias_table.register_hook(
        lambda _: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    optimiser = make_optimiser(encoder.parameters(), "sgd")
    half = ClientHalf(encoder, optimiser, Schedule(optimiser, "constant", 2))
    sent = half.forward(np.zeros((1, 1, 64, 32), np.float32))
    half.backward({name: np.zeros_like(tensor) for name, tensor in sent.items()})
    assert seen == [True]


@pytest.mark.parametrize(
    ("dimensions", "window", "side"), [(2, (96, 96), 7), (3, (64, 32, 32), 7), (3, (64, 64, 32), 4)]
)
def test_what_a_transformer_keeps_for_backward_is_estimated(
    dimensions: int, window: tuple[int, ...], side: int
) -> None:
    """Counted as torch counts: what its graph saves, each storage once, without the weights."""
    of = make_backbone("swin-unetr", dimensions, {"window_size": (side,)})
    encoder = build_encoder(of, seed=1)
    own = {parameter.data_ptr() for parameter in encoder.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = encoder.swinViT(torch.zeros(1, 1, *window))
    assert kept
    estimate = kept_values(of, window)
    assert 0.8 * sum(saved.values()) < estimate < 1.3 * sum(saved.values()), (estimate, sum(saved.values()))


def test_an_evaluation_holds_one_block_at_a_time() -> None:
    """Less than what is kept for backward, and never less than a block's comparisons."""
    of = make_backbone("swin-unetr", 3, {"window_size": (7,)})
    window = (96, 96, 96)
    assert 49**3 * 3 * 7**3 < passing_values(of, window) < kept_values(of, window)


SETTINGS = """
[job]
name = "try"
[sites]
north = "t1"
[model]
network = "swin-unetr"
feature_size = 36
window_size = [4, 8]
"""


def test_a_single_number_stands_without_brackets(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(SETTINGS)
    of = JobConfig.load(path).model.backbone()
    assert of.settings == {
        "feature_size": (36,), "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24), "window_size": (4, 8)
    }  # fmt: skip
    assert of.levels == (0, 1, 2, 3, 4, 5) and JobConfig.load(path).model.levels == of.levels
    path.write_text(SETTINGS.replace("36", "30"))
    with pytest.raises(ConfigError, match=r"\[model\]: feature_size must be one multiple of 12"):
        JobConfig.load(path)
