"""Wrong options and arguments are named, with the rule and the nearest valid choice."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import convselect
from convselect.options import Options

X = torch.zeros(2, 8, 16, 16)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 16, 3, padding=1)).eval()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accuracy": "defualt"}, ["defualt", "'default'"]),
        ({"select": "fast"}, ["fast", "measure"]),
        ({"calibrate": True}, ["True", "always"]),
        ({"budget_s": -1}, ["-1", "0 or more"]),
        ({"memory_mb": "much"}, ["much", "MiB"]),
        ({"remainder": "jit"}, ["jit", "inductor"]),
        ({"cuda_graphs": "always"}, ["always", "never"]),
        ({"strict": "yes"}, ["yes", "True or False"]),
    ],
)
def test_bad_options_are_named(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        convselect.compile(block(), **options)


def test_an_unknown_option_names_the_nearest() -> None:
    torch._dynamo.reset()
    fast = torch.compile(block(), backend="convselect", options={"acuracy": "fast"})
    with (
        torch.inference_mode(),
        pytest.raises(BackendCompilerFailed, match=r"unknown option 'acuracy'.*'accuracy'") as failed,
    ):
        fast(X)
    assert isinstance(failed.value.inner_exception, ValueError)


def test_dynamic_is_torch_compiles_own() -> None:
    with pytest.raises(ValueError, match=r"dynamic is an argument of torch\.compile itself"):
        Options.of({"dynamic": True})


@pytest.mark.parametrize("thing", [3, "resnet18", torch.relu, nn.Conv2d])
def test_what_is_no_module_is_refused(thing: object) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        convselect.compile(thing)
