"""The kernels that multiply matrices: ``fast`` is exact or the default."""

from __future__ import annotations

import pytest
import torch

from omrl.behavior.base import BehaviorConfig
from omrl.core import precision
from omrl.core.config import parse
from omrl.core.errors import UserError
from omrl.learning.train import MetaTrainConfig


@pytest.fixture(autouse=True)
def _restored():
    yield
    torch.set_float32_matmul_precision("highest")


def test_the_default_kernels_have_the_error_of_float32():
    assert 0 < precision.product_error("highest") < 2e-6


def test_asking_for_an_error_changes_no_setting():
    torch.set_float32_matmul_precision("high")
    precision.product_error("medium")
    assert torch.get_float32_matmul_precision() == "high"


def test_fast_is_as_exact_as_float32_on_this_processor():
    chosen = precision.set_kernels("fast")
    assert torch.get_float32_matmul_precision() == chosen
    assert precision.product_error(chosen) < 1e-5


@pytest.mark.parametrize(("error", "chosen"), [(2.5e-3, "highest"), (6e-7, "medium")])
def test_kernels_that_round_are_not_taken(monkeypatch, error, chosen):
    monkeypatch.setattr(precision, "product_error", lambda *_: error)
    assert precision.set_kernels("fast") == chosen
    assert precision.set_kernels("float32") == "highest"


def test_kernels_are_tried_where_they_compute(monkeypatch):
    tried = []
    monkeypatch.setattr(precision, "product_error", lambda _, device: tried.append(device) or 1.0)
    assert precision.set_kernels("fast", "cuda") == "highest"
    assert tried == ["cuda"]


@pytest.mark.parametrize(("section", "config"), [("meta_train", MetaTrainConfig), ("behavior", BehaviorConfig)])
@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
def test_another_kind_is_refused(section, config, kind):
    with pytest.raises(UserError, match=rf"{section}\.matmul = '{kind}': expected 'float32' or 'fast'"):
        parse(config, {"matmul": kind}, f"params.yaml: {section}")


@pytest.mark.parametrize(
    ("values", "message"), [({"device": "cuda"}, "with device = cuda"), ({"engine": "sb3"}, "with engine = sb3")]
)
def test_only_the_batched_engine_on_the_cpu_chooses_kernels_for_behavior(values, message):
    with pytest.raises(UserError, match=f"matmul = fast.* {message}: expected float32"):
        parse(BehaviorConfig, {"matmul": "fast", **values}, "params.yaml: behavior")
