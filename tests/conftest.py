"""Shared by every test file: flat modules on sys.path, one thread, one small demo world."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch

import data

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world():
    """The small demo world, built once."""
    return data.load("demo", seed=0, small=True)
