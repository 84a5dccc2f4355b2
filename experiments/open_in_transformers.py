"""Does what `save` writes open in transformers and flash-linear-attention, and compute the same there?

    python -m experiments.export_models
    python -m experiments.open_in_transformers [--exports=runs/exports] [--output=exports.json] [--only=mamba]

The second command runs where these are installed, which this project does not need; nothing of the project is imported:

    pip install torch transformers==5.23.0 flash-linear-attention==0.6.0

Every directory is opened by `AutoModelForCausalLM.from_pretrained(directory)`, with no option that changes the model.
Asked for is that no tensor is missing, unexpected or misshapen, that parameters are float32 as they are in the file,
and that logits differ by at most `TOLERANCE` times the largest. All runs on a CPU: the models of transformers in its
torch code, those of flash-linear-attention with their kernels in Triton's interpreter. What neither library can open or
run is listed with the reason.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

TOLERANCE = 3e-5  # float32: both sides round; a wrong detail of a model costs more than 1e-2
NEEDS_FLASH_ATTENTION = {"nsa": "flash-linear-attention calls flash-attn here, which needs a GPU"}
OTHERWISE = {"minimax_text01_rotary_half": "transformers turns all channels of a head, whatever `rotary_dim` says"}
PACKAGES = ("transformers", "torch", "flash-linear-attention", "fla-core", "triton")


def register_fla() -> None:
    """Its model types, its kernels interpreted; the tuner has no clock on a CPU and takes the first configuration."""
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **more: [0.0, 0.0, 0.0]
    del sys.modules["fla"]
    import fla  # noqa: F401


def config_of(directory: pathlib.Path) -> Any:
    return json.loads((directory / "config.json").read_text())


def known(directory: pathlib.Path) -> bool:
    """Whether a library that is imported has the `model_type`."""
    from transformers import CONFIG_MAPPING

    return config_of(directory).get("model_type") in CONFIG_MAPPING


def opened(directory: pathlib.Path) -> tuple[Any, str]:
    """The model, and what is wrong with how it opened."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, trust_remote_code=False)
    problems = [f"{kind}: {sorted(map(str, found))}" for kind, found in info.items() if found]
    others = {str(x.dtype) for x in model.parameters()} - {str(torch.float32)}
    if others:
        problems.append(f"parameters become {', '.join(sorted(others))}")
    return model.eval(), "; ".join(problems)


def difference(model: Any, tokens: np.ndarray, logits: np.ndarray) -> float:
    """Largest of the logits, of the largest of them; NaN stays."""
    import torch

    with torch.no_grad():
        got = model(torch.from_numpy(tokens), use_cache=False).logits.float().numpy()
    return float(np.abs(got - logits).max() / np.abs(logits).max())


def row(directory: pathlib.Path, library: str) -> dict[str, Any]:
    """`result` is "same", "different", "fails", "opens" without comparison, or "not opened"; `note` says why."""
    name, kind = directory.name, config_of(directory).get("model_type")
    found = {"model": name, "model_type": kind, "library": library, "difference": None}
    if not known(directory):
        note = f"neither library has the model type {kind!r}" if kind else "a config of its authors, with no model type"
        return found | {"library": None, "result": "not opened", "note": note}
    try:
        model, problems = opened(directory)
        if kind in NEEDS_FLASH_ATTENTION and not problems:
            return found | {"result": "opens", "note": NEEDS_FLASH_ATTENTION[kind]}
        with np.load(directory.parent / f"{name}.npz") as given:
            error = difference(model, given["tokens"], given["logits"])
    except Exception as failure:
        return found | {"result": "fails", "note": f"{type(failure).__name__}: {failure}".partition("\n")[0]}
    same = error <= TOLERANCE and not problems
    note = problems or ("" if same else OTHERWISE.get(name, "the logits"))
    return found | {"difference": error, "result": "same" if same else "different", "note": note}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    error = "" if row["difference"] is None else f"{row['difference']:.1e}"
    print(f"{row['model']:26}  {row['library'] or '':12}  {error:7}  {row['result']:10}  {row['note']}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="open_in_transformers")
    parser.add_argument("--exports", default="runs/exports", help="what export_models wrote")
    parser.add_argument("--output", help="also write the table as JSON")
    parser.add_argument("--only", default="", help="models whose name has this in it")
    asked = parser.parse_args()
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    sys.modules["fla"] = None  # type: ignore[assignment]  # else transformers would call its kernels
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    print(", ".join(f"{package} {version}" for package, version in versions.items()))
    paths = sorted(path.parent for path in pathlib.Path(asked.exports).glob(f"*{asked.only}*/config.json"))
    own = [path for path in paths if known(path)]
    rows = [shown(row(path, "transformers")) for path in own]
    register_fla()
    rows += [shown(row(path, "fla")) for path in paths if path not in own]
    if asked.output:
        command = "python -m experiments.open_in_transformers"
        report = {"command": command, "device": "cpu", **versions, "tolerance": TOLERANCE, "rows": rows}
        pathlib.Path(asked.output).write_text(json.dumps(report, indent=1) + "\n")
    wrong = [r["model"] for r in rows if r["result"] in ("different", "fails") and r["model"] not in OTHERWISE]
    if wrong:
        sys.exit(f"not the same: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
