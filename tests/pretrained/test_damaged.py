"""Files that are not what they say: one clear line each, and nothing is loaded."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from effattn_jax.pretrained import load, save
from tests.pretrained.fixture import fixture

INDEX = "model.safetensors.index.json"


@pytest.fixture
def one(tmp_path):
    """A checkpoint of one file."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(fixture("mistral_swa").path / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def several_files(tmp_path_factory):
    path = tmp_path_factory.mktemp("several") / "model"
    save(load(fixture("mistral_swa").path), path, shard_bytes=40_000)
    return path


@pytest.fixture
def several(several_files, tmp_path):
    """A checkpoint of several files."""
    return shutil.copytree(several_files, tmp_path / "model")


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def change(path, change_tensors):
    tensors = load_file(path / "model.safetensors")
    change_tensors(tensors)
    save_file(tensors, path / "model.safetensors")


def change_index(path, change_map):
    index = json.loads((path / INDEX).read_text())
    change_map(index["weight_map"])
    (path / INDEX).write_text(json.dumps(index))


def test_truncated_file(one):
    data = (one / "model.safetensors").read_bytes()
    (one / "model.safetensors").write_bytes(data[:-100])
    refused(one, r"^model\.safetensors: got SafetensorError.*; needs an undamaged")


def test_header_that_is_longer_than_the_file(one):
    data = (one / "model.safetensors").read_bytes()
    (one / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + data[8:])
    refused(one, r"^model\.safetensors: got SafetensorError.*; needs an undamaged")


def test_header_that_is_no_json(one):
    data = bytearray((one / "model.safetensors").read_bytes())
    data[8:12] = b"oops"
    (one / "model.safetensors").write_bytes(bytes(data))
    refused(one, r"^model\.safetensors: got SafetensorError.*; needs an undamaged")


def test_overlapping_tensors(one):
    """Offsets that point two names at the same bytes."""
    data = (one / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    names = [n for n in entries if n.endswith("layernorm.weight")]
    entries[names[1]]["data_offsets"] = entries[names[0]]["data_offsets"]
    text = json.dumps(entries).encode()
    (one / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    refused(one, r"^model\.safetensors: got SafetensorError.*; needs an undamaged")


def test_integers_where_weights_belong(one):
    def integers(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int32)

    change(one, integers)
    refused(one, r"^tensors: got dtypes model\.norm\.weight I32; needs one of BF16, F16, F32, F64")


def test_all_that_does_not_fit_is_told_at_once(one):
    def three(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.7.extra"] = np.zeros(3, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:5]

    change(one, three)
    refused(
        one,
        r"^tensors: got 1 missing: model\.norm\.weight; 1 unknown: model\.layers\.7\.extra; "
        r"1 misshapen: lm_head\.weight \(5, 32\) not \(64, 32\); needs those of model_type 'mistral'",
    )


def test_nothing_there(one):
    (one / "model.safetensors").unlink()
    refused(one, rf"^path: got no model\.safetensors in .*; needs that file, or {INDEX}")


def test_no_config(one):
    (one / "config.json").unlink()
    refused(one, r"^path: got no config\.json in")


@pytest.mark.parametrize("text", ["{", "[1, 2]"])
def test_config_that_is_no_object(one, text):
    (one / "config.json").write_text(text)
    refused(one, r"^config\.json: got .*; needs .*JSON")


def test_unknown_family(one):
    (one / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(one, r"^model_type: got 'bert'; needs one of ")


def test_index_names_a_file_that_is_not_there(several):
    (several / sorted(p.name for p in several.glob("*.safetensors"))[1]).unlink()
    refused(several, rf"^{INDEX}: got files that are not there: model-00002-of")


@pytest.mark.parametrize(
    "path", ["../outside.safetensors", "/tmp/outside.safetensors", "a/../../b.safetensors", "x.bin"]
)
def test_index_leads_out_of_the_directory(several, path):
    change_index(several, lambda places: places.update({next(iter(places)): path}))
    refused(several, rf"^{INDEX}: got the file .*; needs names of \.safetensors files beside it, no paths")


def test_index_is_no_json(several):
    (several / INDEX).write_text("{")
    refused(several, rf"^{INDEX}: got JSONDecodeError.*; needs JSON with a weight_map")


def test_index_without_a_map(several):
    (several / INDEX).write_text("{}")
    refused(several, rf"^{INDEX}: got KeyError.*; needs JSON with a weight_map")


def test_index_and_file_disagree(several):
    """A tensor promised in another file than the one that holds it."""
    names = sorted(p.name for p in several.glob("*.safetensors"))
    change_index(several, lambda places: places.update({next(t for t, n in places.items() if n == names[0]): names[1]}))
    refused(several, rf"^{INDEX}: got other tensors than in {names[0]}")


def test_a_damaged_shard(several):
    path = sorted(several.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-8])
    refused(several, rf"^{path.name}: got SafetensorError")


def test_no_such_place(tmp_path):
    refused(tmp_path / "nowhere" / "deep", r"^path_or_repo: got .*; needs a directory that is there, or a repository")
