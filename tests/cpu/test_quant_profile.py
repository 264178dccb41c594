"""A profile is what was written, or an error with a remedy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quant_layers import ProfileError, ProfileLevel, base_fingerprint, read_profile, write_profile
from quant_layers.sources import profile as module

pytestmark = pytest.mark.cpu

SCALES = {
    0: {"mlp.down_proj": torch.rand(8)},
    11: {"mlp.down_proj": torch.rand(8), "self_attn.qkv_proj": torch.rand(4)},
}


ORDER = (11, 2, *(layer for layer in range(12) if layer not in (11, 2)))
LADDER = (
    ProfileLevel({}, 0.0, 0.0, 0, 1.0),
    ProfileLevel({11: "w8"}, 0.01),
    ProfileLevel({11: "w4", 2: "w8"}, 0.02, 0.03, 12, 0.75),
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    directory = tmp_path / "profile"
    write_profile(directory, "f" * 64, SCALES, LADDER, ORDER, {"model": "m"}, {"seconds": 1})
    return directory


def test_what_was_written_comes_back(written: Path) -> None:
    """Guards: layers or linears mixed up on the way through the file."""
    profile = read_profile(written)
    assert {layer: set(row) for layer, row in profile.scales.items()} == {k: set(v) for k, v in SCALES.items()}
    for layer, row in SCALES.items():
        for name, scale in row.items():
            assert torch.equal(profile.scales[layer][name], scale)
    assert profile.made == {"model": "m"} and profile.figures == {"seconds": 1}
    assert profile.ladder == LADDER and profile.order == ORDER and profile.num_layers == 12
    assert profile.formats == ("w8", "w4")
    assert [level.kl for level in profile.ladder] == [0.0, 0.01, 0.03], "what was measured counts"
    assert read_profile(written, with_scales=False).scales == {}
    profile.check_base("f" * 64, "m")
    with pytest.raises(ProfileError, match="made for other weights"):
        profile.check_base("0" * 64, "m")


def damage(directory: Path, how: str) -> str:
    """Do it, and what the error must say."""
    file, manifest = directory / "smoothing.safetensors", directory / "manifest.json"
    if how == "flipped":
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return "sha256"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-4])
        return "expected"
    if how == "no shard":
        file.unlink()
        return "No such file"
    if how == "no manifest":
        manifest.unlink()
        return "No such file"
    if how == "no json":
        manifest.write_text("{")
        return "no JSON"
    if how == "no object":
        manifest.write_text("[]")
        return "holds a list, expected an object"
    document = json.loads(manifest.read_text())
    if how == "schema":
        document["schema"] = 99
    elif how == "edited":
        document["ladder"][1]["expected_kl"] = 0.0
    else:
        del document["files"], document["sha256"]
        document["sha256"] = module._sha256_of_document(document)
    manifest.write_text(json.dumps(document))
    return {"schema": "schema 99, known is 2", "edited": "was changed"}.get(how, "lacks 'files'")


@pytest.mark.parametrize(
    "how", ["flipped", "truncated", "no shard", "no manifest", "no json", "no object", "schema", "keys", "edited"]
)
def test_damage_is_refused_with_a_remedy(written: Path, how: str) -> None:
    """Guards: a server that starts on half a profile."""
    words = damage(written, how)
    with pytest.raises(ProfileError, match="morphserve profile") as caught:
        read_profile(written)
    assert words in str(caught.value)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards: disk full, and a directory that looks like a profile."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_file", full)
    with pytest.raises(ProfileError, match="No space left"):
        write_profile(tmp_path / "profile", "f", SCALES, LADDER, ORDER, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(written: Path) -> None:
    """Guards: a second run takes the place of the profile that a server was started with."""
    with pytest.raises(ProfileError, match="exists"):
        write_profile(written, "f", {}, LADDER, ORDER, {}, {})
    assert read_profile(written).scales


def test_fingerprint_depends_on_values_and_names_alone() -> None:
    """Guards: a profile refused because of the order or the dtype in which the weights were loaded."""
    norms = {"0.a": torch.rand(4).bfloat16(), "1.a": torch.rand(4).bfloat16()}
    mark = base_fingerprint(norms)
    assert mark == base_fingerprint({name: norms[name].float() for name in reversed(norms)})
    assert mark != base_fingerprint({"0.a": norms["1.a"], "1.a": norms["0.a"]})
