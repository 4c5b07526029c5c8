"""The installed libraries still have what `compat.py` needs, and their deprecations fail our tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from hf_capgap.compat import attention_implementation, without_compile

pytest_plugins = ["pytester"]

REPOSITORY = Path(__file__).parent.parent


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_attention_that_was_set_is_the_one_that_is_read(
    make_model: Callable[..., PreTrainedModel], implementation: str
) -> None:
    model = make_model("llama")
    model.set_attn_implementation(implementation)
    assert attention_implementation(model.config) == implementation


def test_a_compiled_module_is_unwrapped() -> None:
    module = torch.nn.Linear(2, 2)
    compiled = torch.compile(module, backend="eager")
    assert compiled is not module
    assert without_compile(compiled) is module
    assert without_compile(module) is module


# Deprecations: pyproject.toml makes the warnings errors, tests/conftest.py watches the logs.

DEPRECATED_CALLS = """
import warnings

import pytest
from transformers import TrainingArguments
from transformers.utils import logging
from transformers.utils.deprecation import deprecate_kwarg


@deprecate_kwarg("old", new_name="new", version="999.0")
def renamed(new=None):
    return new


def log(message):
    logging.get_logger("transformers.some_module").warning_once(message)


def test_warned_in_the_name_of_the_library(tmp_path):
    TrainingArguments(output_dir=tmp_path, gradient_checkpointing=True)


def test_warned_in_the_name_of_the_caller():
    renamed(old=1)


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_warned(category):
    warnings.warn("will go", category)


def test_logged():
    log("`torch_dtype` is deprecated! Use `dtype` instead!")


def test_logged_a_second_time():
    log("`torch_dtype` is deprecated! Use `dtype` instead!")


def test_harmless(tmp_path):
    TrainingArguments(output_dir=tmp_path, activation_checkpointing=True)
    renamed(new=1)
    log("something else")
    warnings.warn("something else")
"""


def test_a_deprecated_call_fails_a_test_however_it_is_announced(
    pytester: pytest.Pytester, logged_deprecations: list[str]
) -> None:
    pytester.makepyprojecttoml((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    pytester.makeconftest((REPOSITORY / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile(DEPRECATED_CALLS)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    logged_deprecations.clear()  # this test heard them too
    failed = {report.nodeid.partition("::")[2] for report in result.reprec.getfailures()}
    assert failed == {
        "test_warned_in_the_name_of_the_library",
        "test_warned_in_the_name_of_the_caller",
        "test_warned[DeprecationWarning]",
        "test_warned[PendingDeprecationWarning]",
        "test_warned[FutureWarning]",
        "test_logged",
        "test_logged_a_second_time",
    }
    result.assert_outcomes(passed=3, failed=5, errors=2)  # those that log pass, and fail when they are torn down
