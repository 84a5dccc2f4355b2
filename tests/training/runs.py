"""Whole runs through the command line a user types, in processes of their own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from effattn_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CACHE = tempfile.TemporaryDirectory(prefix="compiled-")  # the runs of a test session compile the same programs


def start(workdir: Path, *overrides: str, devices: int = 1, experiment: str = "train", **environment: str):
    """`python -m experiments.<experiment>` with the tiny config; overrides are `field=value` or whole flags."""
    flags = [text if text.startswith("--") else f"--config.{text}" for text in overrides]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            f"experiments.{experiment}",
            "--config=tests/training/tiny.py",
            f"--workdir={workdir}",
            *flags,
        ],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": CACHE.name,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> tuple[str, str]:
    """Standard output and error of a process that must end with `code`."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}, expected {code}\n{out}\n{err}"
    return out, err


def run(workdir: Path, *overrides: str, code: int = 0, **options) -> tuple[str, str]:
    return finish(start(workdir, *overrides, **options), code)


def losses(workdir: Path, split: str = "train") -> dict[int, float]:
    """Loss at each step."""
    return {
        line["step"]: line["loss"] for line in read_metrics(str(workdir / "metrics.jsonl")) if line["split"] == split
    }
