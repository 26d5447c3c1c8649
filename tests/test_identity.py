"""The fingerprint of a checkpoint without loading it: that of the loaded one, and another one for other weights."""

import dataclasses

import jax
import pytest
import tiny

from mpt_jax.checkpoint.backbone import load_backbone
from mpt_jax.checkpoint.identity import fingerprint_of, remember
from mpt_jax.config import BackboneConfig, DataConfig
from mpt_jax.convert import run_import

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("identity"))


def configs(folder, checkpoint: str) -> tuple[BackboneConfig, DataConfig]:
    base = tiny.experiment(folder, "run", checkpoint=checkpoint)
    return base.backbone, dataclasses.replace(base.data, cache_dir=str(folder / "notes"))


def test_it_is_that_of_the_loaded_backbone(folder):
    run_import(str(folder / "model"), str(folder / "imported"))
    for checkpoint in (str(folder / "model"), str(folder / "imported"), "scratch"):
        backbone, data = configs(folder, checkpoint)
        narrow = dataclasses.replace(backbone, architecture=dataclasses.replace(tiny.CONFIG, param_dtype="bfloat16"))
        expected = load_backbone(backbone, KEY).fingerprint
        assert fingerprint_of(backbone, data, KEY) == fingerprint_of(narrow, data, KEY) == expected


def test_weights_are_read_once_and_again_when_they_are_others(folder, capsys):
    backbone, data = configs(folder, str(folder / "model"))
    found = []
    for make in (tiny.make, tiny.make_attentive):
        make(folder)
        capsys.readouterr()
        found += [fingerprint_of(backbone, data, KEY) for _ in range(2)]
        assert capsys.readouterr().err.count("reading the weights in ") == 1
    assert found[0] == found[1] != found[2] == found[3] == load_backbone(backbone).fingerprint
    tiny.make(folder)
    remember(backbone, data, found[0])
    capsys.readouterr()
    assert fingerprint_of(backbone, data, KEY) == found[0]
    assert capsys.readouterr().err == ""
