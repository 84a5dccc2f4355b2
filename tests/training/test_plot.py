import math

import matplotlib.image
import numpy as np
import pytest

from effattn_jax.training.metrics import FILE, MetricWriter
from effattn_jax.training.plot import plot_losses


def write_run(workdir, train=True, validation=True):
    rng = np.random.default_rng(0)
    with MetricWriter(str(workdir)) as writer:
        for step in range(1, 501):
            if train:
                noisy = 1.6 + 6 * math.exp(-step / 60) + 0.08 * rng.normal()
                writer.write(step, "train", {"loss_bits": math.nan if step == 250 else noisy})
            if validation and step % 50 == 0:
                writer.write(step, "validation", {"bits_per_byte": 1.65 + 6 * math.exp(-step / 60)})
    return str(workdir / FILE)


@pytest.mark.quick_cases(2)
@pytest.mark.parametrize(("train", "validation"), [(True, True), (True, False), (False, True)])
def test_a_picture_is_drawn_of_what_there_is(tmp_path, train, validation):
    output = tmp_path / "losses.png"
    path = write_run(tmp_path, train, validation)
    plot_losses(path, str(output), {"unigram": 4.6, "gzip -9": 2.1})
    with_lines = matplotlib.image.imread(output)
    plot_losses(path, str(output))
    without = matplotlib.image.imread(output)
    assert with_lines.shape == without.shape == (675, 1200, 4)
    assert np.any(with_lines != without)
    pixels = np.round(with_lines[..., :3] * 255)
    assert np.any(np.all(pixels == (158, 202, 225), axis=-1)) == train
    assert np.any(np.all(pixels == (8, 81, 156), axis=-1)) == validation


def test_a_file_without_the_metrics_is_an_error(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        writer.write(1, "train", {"other": 1.0})
    with pytest.raises(ValueError, match="got no finite loss_bits"):
        plot_losses(str(tmp_path / FILE), str(tmp_path / "losses.png"))
