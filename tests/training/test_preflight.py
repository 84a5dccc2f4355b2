import jax
import jax.numpy as jnp
import pytest

from effattn_jax.training.preflight import check_batch, check_workdir, checkpoint_bytes, human_bytes


def test_a_good_directory_is_made_and_left_empty(tmp_path):
    check_workdir(str(tmp_path / "a" / "b"), bytes_needed=1024)
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"^workdir: got .*file.* \((File exists|Not a directory)\); needs"):
            check_workdir(str(path))


@pytest.mark.parametrize("path", ["/proc", "/proc/run"])
def test_a_directory_that_takes_no_files_is_refused(path):
    with pytest.raises(
        ValueError, match=r"^workdir: got /proc.* \(.+\); needs a directory that can be made and written"
    ):
        check_workdir(path)


def test_too_little_room_names_needed_and_free(tmp_path):
    with pytest.raises(
        ValueError, match=r"^workdir: got .* with .* [KMGT]iB free; needs 1\.049e\+06 TiB for checkpoints"
    ):
        check_workdir(str(tmp_path), bytes_needed=2**60)


def test_checkpoint_bytes_counts_every_array():
    state = {"a": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16), "b": [jnp.zeros((), jnp.int32), jnp.zeros((7,))]}
    assert checkpoint_bytes(state) == 30 + 4 + 28


@pytest.mark.parametrize("case", [(8, 4, 2, 1), (8, 1, 1, 8), (12, 2, 3, 4), (1, 1, 1, 1)])
def test_batches_that_divide_pass(case):
    check_batch(*case)


@pytest.mark.parametrize(
    ("case", "unit"), [((8, 3, 1, 1), 3), ((8, 4, 4, 1), 16), ((6, 2, 1, 4), 4), ((4, 8, 1, 1), 8)]
)
def test_batches_that_do_not_divide_are_refused(case, unit):
    with pytest.raises(ValueError, match=f"^batch_size: got {case[0]}; needs a multiple of {unit} "):
        check_batch(*case)


@pytest.mark.parametrize("name", ["batch_size", "data_shards", "accumulation", "process_count"])
def test_counts_below_one_are_refused(name):
    counts = {"batch_size": 8, "data_shards": 1, "accumulation": 1, "process_count": 1, name: 0}
    with pytest.raises(ValueError, match=f"^{name}: got 0; needs at least 1"):
        check_batch(**counts)


def test_human_bytes():
    assert [human_bytes(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5 MiB",
        "3 TiB",
    ]
