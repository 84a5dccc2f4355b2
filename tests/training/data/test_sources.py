"""Folders and TFDS datasets by name."""

import pytest
import tensorflow_datasets as tfds

from effattn_jax.training.data.sources import open_source
from effattn_jax.training.data.split import split_of


class TinyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "title": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(100), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for index in range(count):
            yield index, {"text": f"text {index} of {count}", "title": f"title {index}"}


class Unreachable(TinyText):
    def _split_generators(self, dl_manager):
        raise ConnectionError("no route\nto the host")


@pytest.fixture
def folder(tmp_path):
    for index in range(100):
        path = tmp_path / f"{index % 3}" / f"file{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"%d" % index)
    (tmp_path / "note.md").write_bytes(b"md")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "file.txt").write_bytes(b"hidden")
    return tmp_path


def read(source):
    return [source[index] for index in range(len(source))]


def test_a_folder_is_its_text_files_in_order(folder):
    everything = read(open_source(f"folder:{folder}", "all"))
    names = sorted(f"{index % 3}/file{index}.txt" for index in range(100))
    texts = [name.split("file")[1].removesuffix(".txt").encode() for name in names]
    assert everything == [*texts, b"md"]
    assert read(open_source(f"folder:{folder}", "all", suffix=".txt")) == texts
    for split in ("train", "validation"):
        wanted = [text for name, text in zip(names, texts, strict=True) if split_of(name) == split]
        assert read(open_source(f"folder:{folder}", split, suffix=".txt")) == wanted


def test_the_fingerprint_of_a_folder_changes_with_its_files(folder):
    before = open_source(f"folder:{folder}", "all").fingerprint
    assert open_source(f"folder:{folder}", "all").fingerprint == before
    (folder / "note.md").write_bytes(b"longer")
    assert open_source(f"folder:{folder}", "all").fingerprint != before


def test_about_four_percent_are_held_out():
    held_out = sum(split_of(f"name{index}") == "validation" for index in range(10_000))
    assert 330 < held_out < 470


def test_errors_of_folders(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(FileNotFoundError, match=r"^folder:.*: no text files below"):
        open_source(f"folder:{empty}", "train")
    with pytest.raises(FileNotFoundError, match=r"^folder:.*: no \*\.rs files below"):
        open_source(f"folder:{folder}", "train", suffix=".rs")
    with pytest.raises(FileNotFoundError, match=r"^folder:.*missing: no such folder$"):
        open_source(f"folder:{empty}/missing", "train")
    with pytest.raises(ValueError, match=r"^split: got 'test'; needs train, validation or all"):
        open_source(f"folder:{folder}", "test")
    (empty / "one.txt").write_bytes(b"1")
    other = "validation" if split_of("one.txt") == "train" else "train"
    with pytest.raises(ValueError, match=r"^split: got '.*', where none of 1 files"):
        open_source(f"folder:{empty}", other)


def test_a_tfds_dataset_by_name(tmp_path, capsys):
    train = open_source("tiny_text", "train", str(tmp_path))
    assert read(train) == [f"text {index} of 100".encode() for index in range(100)]
    assert len(open_source("tiny_text", "train[:7%]", str(tmp_path))) == 7
    assert read(open_source("tiny_text", "validation", str(tmp_path)))[0] == b"text 0 of 3"
    assert open_source("tiny_text", "test", str(tmp_path), text_key="title")[2] == b"title 2"
    with pytest.raises(ValueError, match=r"^text_key: got 'body'; needs a feature of tiny_text: text, title"):
        open_source("tiny_text", "train", str(tmp_path), text_key="body")
    for split in ("dev", "train[:x%]", "train[oops"):
        with pytest.raises(ValueError, match=r"^split: got '.*'; needs one of train, test of tiny_text"):
            open_source("tiny_text", split, str(tmp_path))


def test_errors_of_tfds_names(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^source: got 'no_such_text'; needs python_stdlib, folder:/path, or"):
        open_source("no_such_text", "train", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        open_source("unreachable", "train", str(tmp_path))
    message = str(caught.value)
    assert message.startswith(f"unreachable: is not prepared in {tmp_path} and cannot be (ConnectionError: no route);")
    assert "tfds build unreachable" in message
    assert "\n" not in message
    assert not list(tmp_path.rglob("dataset_info.json"))


def test_a_dataset_in_another_format_is_an_error(tmp_path, capsys):
    open_source("tiny_text", "train", str(tmp_path))
    info = tmp_path / "tiny_text" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(FileNotFoundError, match=r"^tiny_text: is prepared in a format without random access"):
        open_source("tiny_text", "train", str(tmp_path))


def test_the_data_dir_may_lie_in_the_home_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_source("tiny_text", "train", "~/datasets")) == 100
    assert (tmp_path / "datasets" / "tiny_text" / "1.0.0" / "dataset_info.json").exists()
